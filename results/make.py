"""Make every table and picture of README again, from real runs on the real data.

    python results/make.py                 train the runs missing from results/runs.csv, then draw (all: 4 hours)
    python results/make.py rates           train for one study only: rates, augmentation, tricks or speed
    python results/make.py none            train nothing, only draw

Every run is a command line of train.py and a row of runs.csv. Delete the row to measure it again. A row whose recipe or
code has changed since does not count. Pictures of single runs are drawn from their folders in experiments/report/.
"""

import argparse
import csv
import hashlib
import io
import itertools
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import network  # noqa: E402
import train  # noqa: E402
import visualize_aug  # noqa: E402

RESULTS = ROOT / "results"
REPORT = ROOT / "experiments" / "report"
MEASURED = ("step", "train_seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_accuracy_tta")
COSTS = ("whole_seconds", "peak_gib", "gflops")
COLUMNS = ("run", "seed", "settings", *MEASURED, *COSTS)

# The quick recipe taken apart: each trick adds to those before it. The first trains the same net the baseline's way.
PLAIN = "--recipe quick --sizes= --label-smoothing 0"
TRICKS = {
    "Adam at 1e-3": f"{PLAIN} --no-mirror --no-whiten --optimizer adam --lr 1e-3",
    "Muon, rate falling to 0": f"{PLAIN} --no-mirror --no-whiten",
    "whitened stem, identity start": f"{PLAIN} --no-mirror",
    "mirrored filters": PLAIN,
    "label smoothing": "--recipe quick --sizes=",
    "small pictures first: `quick`": "--recipe quick",
}
LADDER = {"baseline": "--lr 1e-3"} | {name: f"--recipe {name}" for name in [*train.RECIPES][1:]}
AUGMENTATIONS = {"none": "--lr 1e-3"} | {name: f"--lr 1e-3 --augment {name}" for name in data.AUGMENTATIONS[1:]}
RATES = {rate: f"--lr {rate}" for rate in ("1e-3", "1e-4", "1e-5")}

# study: {run, as flags of train.py: number of seeds}. What takes longest comes last.
STUDIES = {
    "rates": dict(zip(RATES.values(), (3, 1, 1), strict=True)),
    "tricks": dict.fromkeys(TRICKS.values(), 10),
    "augmentation": dict.fromkeys(AUGMENTATIONS.values(), 3),
    "speed": {run: 3 for run in LADDER.values()} | {LADDER["quick"]: 10},
}

# Runs a command, and prints its seconds and its peak memory. A process of its own, because the system counts at least
# the memory of whoever starts a program; make.py has loaded PyTorch, and this has loaded next to nothing.
STOPWATCH = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


# --------------------------------------------------------------------------------------------------------- training
def measure_gflops():
    """A yardstick between machines: GFLOP/s of the best of six 2048 x 2048 matrix products, in bf16 or fp32."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[train.choose_precision("cpu")]
    matrix = torch.ones(2048, 2048, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds) / 1e9


def find_folder(run, seed):
    return REPORT / re.sub(r"[^\w.-]+", "_", f"{run} seed{seed}".replace("--", ""))


def fingerprint(settings):
    """A short text that changes with every setting but the seed and the device, and with the version of the code."""
    kept = {key: settings[key] for key in train.BASELINE}
    for key in ("seed", "device", "precision"):
        del kept[key]
    text = json.dumps([train.FORMAT, kept])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def is_current(row):
    """Whether a run would have the same settings today."""
    return row["settings"] == fingerprint(vars(train.read_settings(shlex.split(row["run"]))))


def train_once(run, seed):
    """Train by that command line, in a process of its own. Returns the row for runs.csv."""
    folder = find_folder(run, seed)
    if folder.exists():
        try:
            with FileLock(folder / ".lock", timeout=0):
                shutil.rmtree(folder)
        except Timeout:
            sys.exit(f"make.py: {folder} is in use: wait until its run has ended")
    command = [sys.executable, "train.py", *shlex.split(run), "--seed", str(seed)]
    command += ["--device", "cpu", "--experiments", str(REPORT), "--name", folder.name]
    print(f"{run} --seed {seed}", flush=True)
    before = measure_gflops()
    stopwatch = [sys.executable, "-c", STOPWATCH]
    watched = subprocess.run(stopwatch + command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if watched.returncode:
        sys.exit(f"make.py: failed: {shlex.join(command)}")
    seconds, peak = map(float, watched.stdout.split())
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes or kibibytes
    costs = {"whole_seconds": seconds, "peak_gib": peak / unit, "gflops": (before + measure_gflops()) / 2}
    config = json.loads((folder / "config.json").read_text())
    with open(folder / "metrics.csv", newline="") as file:
        measured = list(csv.DictReader(file))[-1]
    row = {"run": run, "seed": str(seed), "settings": fingerprint(config)}
    row |= {column: measured.get(column, "") for column in MEASURED}
    return row | {name: f"{cost:.2f}" for name, cost in costs.items()}


def read_rows():
    """The rows of results/runs.csv whose settings are still those of today."""
    path = RESULTS / "runs.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and tuple(rows[0]) != COLUMNS:
        sys.exit(f"make.py: {path} has other columns than {', '.join(COLUMNS)}: remove it, to train everything again")
    current = [row for row in rows if is_current(row)]
    if len(current) < len(rows):
        print(f"{path.name}: {len(rows) - len(current)} rows of older settings do not count")
    return current


def write_rows(rows):
    table = csv.DictWriter(text := io.StringIO(), COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    data.write_file(RESULTS / "runs.csv", text.getvalue().encode())


def complete(study):
    """Train the runs of a study that are missing from results/runs.csv; each finished run is added at once."""
    rows = read_rows()
    for run, seeds in STUDIES[study].items():
        for seed in map(str, range(seeds)):
            if any(row["run"] == run and row["seed"] == seed for row in rows):
                continue
            row = train_once(run, seed)
            rows = [*read_rows(), row]  # by now, another make.py may have added some
            write_rows(rows)
            print(f"  {float(row['val_accuracy']):.2%} in {float(row['train_seconds']):.1f} s", flush=True)


# ----------------------------------------------------------------------------------------------------------- tables
def find(rows, run, column):
    """What a column of runs.csv holds for each seed of a run; nothing if the run does not measure it."""
    texts = [row[column] for row in rows if row["run"] == run]
    return [float(text) for text in texts] if any(texts) else []


def write_spread(values):
    """The mean and, of several, their standard deviation."""
    if len(values) > 1:
        return f"{statistics.mean(values):.2%} ± {100 * statistics.stdev(values):.2f}"
    return f"{values[0]:.2%}" if values else ""


def write_mean(values):
    return f"{statistics.mean(values):.3f}"


def write_median(values):
    return f"{statistics.median(values):.0f}"


CELLS = {  # column of a table: (column of runs.csv, how to write the values of all seeds)
    "runs": ("seed", lambda values: f"{len(values)}"),
    "training accuracy": ("train_accuracy", write_spread),
    "validation accuracy": ("val_accuracy", write_spread),
    "lowest": ("val_accuracy", lambda values: f"{min(values):.2%}"),
    "with test-time augmentation": ("val_accuracy_tta", write_spread),
    "training loss": ("train_loss", write_mean),
    "validation loss": ("val_loss", write_mean),
    "seconds": ("train_seconds", write_median),
    "whole command": ("whole_seconds", write_median),
    "memory": ("peak_gib", lambda values: f"{max(values):.1f} GiB"),
}
RESULT = ("runs", "training accuracy", "validation accuracy")
SPEED = ("lowest", "with test-time augmentation", "seconds", "whole command", "memory")
TABLES = {  # head of the first column: {its text: run}, the other columns
    "`--lr`": (RATES, (*RESULT, "training loss", "validation loss")),
    "`--augment`": (AUGMENTATIONS, RESULT),
    "`--recipe`": (LADDER, ("runs", "validation accuracy", *SPEED)),
    "each row adds to the rows above": (TRICKS, ("runs", "validation accuracy", "seconds")),
}


def write_table(rows, head):
    """One of TABLES, of the runs that are there, as Markdown."""
    named, columns = TABLES[head]
    lines = [[head, *columns], ["---"] * (1 + len(columns))]
    for text, run in named.items():
        if find(rows, run, "seed"):
            lines.append([text])
            for key, write in map(CELLS.get, columns):
                lines[-1].append(write(find(rows, run, key)))
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write_tables(rows):
    """All tables; README shows them line by line."""
    return "\n".join(write_table(rows, head) for head in TABLES)


# --------------------------------------------------------------------------------------------------------- pictures
def save(figure, name):
    train.save_picture(figure, RESULTS / name)
    print(f"wrote results/{name}", flush=True)


def find_shapes(model):
    """The shapes of an image and of what each part of the net makes of it, from a forward pass."""
    images = torch.zeros(1, 3, data.SIZE, data.SIZE)
    shapes = [images.shape[1:]]
    for part in (model.stem, *model.groups, model.head):
        part.register_forward_hook(lambda layer, inputs, output: shapes.append(output.shape[1:]))
    model(images)
    return shapes


def draw_network():
    """How the shape of an image changes from part to part of the baseline's net."""
    model = network.ConvNet()
    words = {"Conv2d": "conv 3x3", "MaxPool2d": "max pool", "BatchNorm2d": "batch norm", "SiLU": "SiLU"}
    groups = [[words[type(layer).__name__] for layer in group] for group in model.groups]
    layers = [[], ["conv 2x2", "SiLU"], *groups, ["max over pixels", "linear"]]
    titles = ("image", "stem", "group 1", "group 2", "group 3", "head")
    figure = Figure(figsize=(7.2, 7), layout="constrained")
    figure.suptitle("channels (width of a box) x height x width after each part", fontsize=15)
    rows = figure.subplots(2, 1)
    for number, (channels, *sides) in enumerate(find_shapes(model)):
        axes, middle = rows[number // 3], 40 * (number % 3)
        height = sides[0] if sides else 1
        color = train.COLORS[5 if sides else 4]
        axes.bar(middle, height, channels / 5, -height / 2, color=color, edgecolor="black")
        shape = " x ".join(map(str, (channels, *sides)))
        axes.text(middle, 19, f"{titles[number]}\n{shape}", ha="center", fontsize=15)
        axes.text(middle, -19, "\n".join(layers[number]), ha="center", va="top", fontsize=13)
        axes.set(xlim=(-20, 100), ylim=(-58, 30))
        axes.axis("off")
    save(figure, "network.png")


def draw_ladder(rows):
    """Accuracy against time, of every recipe, and what the assignment asks for."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    label = {"textcoords": "offset points", "fontsize": 13}
    for name, run in LADDER.items():
        if accuracies := find(rows, run, "val_accuracy"):
            point = statistics.median(find(rows, run, "train_seconds")), 100 * statistics.mean(accuracies)
            axes.plot(*point, "o", color=train.COLORS[0], markersize=9)
            axes.annotate(f"{name}\n{point[1]:.1f}%", point, (0, 9), ha="center", va="bottom", **label)
    axes.axhline(75, color="black", linewidth=1)
    axes.plot(1800, 75, "X", color="black", markersize=10)
    axes.annotate("full credit: 75%, in half an hour", (1800, 75), (0, -10), ha="right", va="top", **label)
    axes.set(xscale="log", xlim=(4, 2600), ylim=(70, 99))
    axes.set_xlabel("seconds of training, two CPU cores", fontsize=13)
    axes.set_ylabel("validation accuracy, %", fontsize=13)
    ticks = [5, 10, 30, 60, 120, 300, 600, 1800]
    axes.set_xticks(ticks, ticks)
    axes.tick_params(labelsize=12)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    save(figure, "ladder.png")


def are_there(name, rows, runs):
    """Whether the folders of these runs, seed 0, are there and finished; if not, lines that say how to make them."""
    complete = True
    for run in runs:
        path = find_folder(run, 0) / "checkpoint.pt"
        done = train.read_checkpoint(path)["rows"][-1]["step"] if path.exists() else 0
        if done not in find(rows, run, "step"):
            complete = False
            command = f"python train.py {run} --experiments experiments/report --name {path.parent.name} --resume"
            print(f"results/{name} is not drawn again; its run is missing or unfinished. This makes it: {command}")
    return complete


def draw_rates(rows, curves):
    """Figure 2: the curves at three learning rates, seed 0."""
    if are_there("figure2.png", rows, RATES.values()):
        named = {}
        for rate, run in RATES.items():
            named[f"learning rate {rate}"] = curves[find_folder(run, 0).name]
        save(train.draw_curves(named), "figure2.png")


def draw_best(rows, curves):
    """Figure 4: the curves of the best recipe, seed 0, and where training goes on to larger images."""
    run = LADDER["best"]
    if are_there("figure4.png", rows, [run]):
        settings = train.read_settings(shlex.split(run))
        figure = train.draw_curves({run: curves[find_folder(run, 0).name]})
        larger = [*settings.sizes, data.SIZE][1:]
        for size, share in zip(larger, settings.sizes.values(), strict=True):
            epoch = share * settings.epochs
            for panel in figure.axes:
                panel.axvline(epoch, color="black", linestyle=":")
                panel.text(epoch, 0.98, f" {size} pixels", va="top", transform=panel.get_xaxis_transform())
        save(figure, "figure4.png")


def draw_mistakes(rows):
    """Figure 5: what the best recipe, seed 0, takes for what in the test images, and its surest mistakes."""
    run = LADDER["best"]
    if not are_there("figure5.png", rows, [run]):
        return
    images, labels = data.load_cifar10(ROOT / "datasets")[1]
    model = train.load(find_folder(run, 0))
    certainty, answers = train.predict(model, images, "fp32").softmax(1).max(1)
    figure = Figure(figsize=(7.2, 11.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(6.2, 5.3))

    axes = top.subplots()
    counts = torch.bincount(10 * labels + answers, minlength=100).view(10, 10)
    shares = 100 * counts / counts.sum(1, keepdim=True)
    axes.imshow(shares.numpy(), cmap="Oranges", vmax=12)
    for row, column in itertools.product(range(10), repeat=2):
        share = shares[row, column]
        text, shade = (f"{share:.0f}", "white") if row == column else (f"{share:.1f}", "black")
        axes.text(column, row, text, ha="center", va="center", fontsize=12, color=shade)
    axes.set_xticks(range(10), data.CLASSES, rotation=60, ha="right", rotation_mode="anchor", fontsize=13)
    axes.set_yticks(range(10), data.CLASSES, fontsize=13)
    axes.set_xlabel("what the network says", fontsize=14)
    axes.set_ylabel("what the label says", fontsize=14)
    axes.set_title("How many percent of each class are taken for what", fontsize=14)

    bottom.suptitle("Its surest mistakes", fontsize=14)
    wrong = torch.nonzero(answers != labels).flatten()
    surest = wrong[certainty[wrong].argsort(descending=True)][:12]
    for index, panel in zip(surest, bottom.subplots(3, 4).flat, strict=True):
        panel.imshow(images[index].permute(1, 2, 0).numpy())
        answer, label = data.CLASSES[answers[index]], data.CLASSES[labels[index]]
        panel.set_title(f"says {answer}\nlabel {label}", fontsize=12)
        panel.axis("off")
    save(figure, "figure5.png")


def main():
    data.prepare_script()
    parser = argparse.ArgumentParser(description="Make every table and picture of README again.")
    parser.add_argument("study", nargs="?", choices=[*STUDIES, "none"], help="the study to train for (default: all)")
    study = parser.parse_args().study
    if study != "none":
        if sys.platform == "win32":
            sys.exit("make.py: it cannot measure memory on Windows: train in WSL, or only draw with `none`")
        for name in STUDIES:
            if study in (None, name):
                complete(name)
    rows = read_rows()
    tables = write_tables(rows)
    data.write_file(RESULTS / "tables.md", tables.encode())
    print(tables)
    printed = subprocess.check_output([sys.executable, "bn.py"], cwd=ROOT)
    data.write_file(RESULTS / "figure1.txt", printed)
    draw_network()
    save(visualize_aug.draw(visualize_aug.read(ROOT / "Lenna.png")), "figure3.jpg")  # as JPEG, a fraction of the bytes
    draw_ladder(rows)
    curves = train.read_curves(REPORT)
    draw_rates(rows, curves)
    draw_best(rows, curves)
    draw_mistakes(rows)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("make.py: stopped. The same command goes on with the next missing run")
