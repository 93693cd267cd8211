"""Make every table and picture of README again, from real runs on the real data.

    python results/make.py                 train the runs missing from results/runs.csv, then draw (all: two hours)
    python results/make.py rates           train for one study only: rates, augmentation, tricks or speed
    python results/make.py none            train nothing, only draw

Every run is a command line of train.py. Each run adds one row per epoch to runs.csv. Delete its rows to measure it
again. Pictures of single runs are drawn from their folders in experiments/report/.
"""

import argparse
import csv
import functools
import io
import os
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
MEASURED = ("epoch", "step", "train_seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
COLUMNS = ("run", "seed", *MEASURED, "val_accuracy_tta", "whole_seconds", "peak_gib", "gflops")

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
    "tricks": dict.fromkeys(TRICKS.values(), 3),
    "augmentation": dict.fromkeys(AUGMENTATIONS.values(), 3),
    "speed": dict(zip(LADDER.values(), (3, 10, 3, 3, 5), strict=True)),
}


# --------------------------------------------------------------------------------------------------------- training
def measure_gflops():
    """A yardstick between machines: GFLOP/s of the best of six 2048 x 2048 matrix products, in bf16 or fp32."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[train.choose_precision("cpu")]
    a, seconds = torch.ones(2048, 2048, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds) / 1e9


def find_folder(run, seed):
    return REPORT / re.sub(r"[^\w.-]+", "_", f"{run} seed{seed}".replace("--", ""))


def train_once(run, seed):
    """Train by that command line, in a process of its own; the rows for runs.csv."""
    folder = find_folder(run, seed)
    if folder.exists():
        try:
            with FileLock(folder / ".lock", timeout=0):
                shutil.rmtree(folder)
        except Timeout:
            sys.exit(f"make.py: {folder} is in use: wait until its run has ended")
    command = [sys.executable, "train.py", *run.split(), "--seed", str(seed)]
    command += ["--device", "cpu", "--experiments", str(REPORT), "--name", folder.name]
    print(f"{run} --seed {seed}", flush=True)
    gflops, start = measure_gflops(), time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"make.py: failed: {shlex.join(command)}")
    peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    costs = {"whole_seconds": time.perf_counter() - start, "peak_gib": peak, "gflops": (gflops + measure_gflops()) / 2}
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[-1] |= {name: f"{cost:.2f}" for name, cost in costs.items()}
    return rows


def read_runs():
    """{run: {seed: its rows, one an epoch}}, from results/runs.csv."""
    runs = {}
    if (RESULTS / "runs.csv").exists():
        with open(RESULTS / "runs.csv", newline="") as file:
            for row in csv.DictReader(file):
                runs.setdefault(row["run"], {}).setdefault(int(row["seed"]), []).append(row)
    return runs


def complete(study):
    """Train what results/runs.csv lacks of a study; every finished run is added at once."""
    for run, seeds in STUDIES[study].items():
        for seed in range(seeds):
            if seed in read_runs().get(run, {}):
                continue
            rows = train_once(run, seed)
            with open(RESULTS / "runs.csv", "a", newline="") as file:
                table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
                if not file.tell():
                    table.writeheader()
                table.writerows({"run": run, "seed": seed, **row} for row in rows)
            print(f"  {float(rows[-1]['val_accuracy']):.2%} in {float(rows[-1]['train_seconds']):.1f} s", flush=True)


def last(runs, run, column):
    """What a column holds after the last epoch of each seed."""
    return [float(rows[-1][column]) for rows in runs.get(run, {}).values() if rows[-1][column]]


# ----------------------------------------------------------------------------------------------------------- tables
def spread(values):
    """Mean and, of several, their standard deviation, as text."""
    return f"{statistics.mean(values):.2%}" + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


# column: how its text is made; of(name) lists the last value of each seed
CELLS = {
    "runs": lambda of: len(of("val_accuracy")),
    "training accuracy": lambda of: spread(of("train_accuracy")),
    "validation accuracy": lambda of: spread(of("val_accuracy")),
    "lowest": lambda of: f"{min(of('val_accuracy')):.2%}",
    "with test-time augmentation": lambda of: spread(of("val_accuracy_tta")) if of("val_accuracy_tta") else "",
    "gap in points": lambda of: (
        f"{round(100 * (statistics.mean(of('train_accuracy')) - statistics.mean(of('val_accuracy'))), 1) + 0:+}"
    ),  # + 0 turns -0.0 into 0.0
    "training loss": lambda of: f"{statistics.mean(of('train_loss')):.3f}",
    "validation loss": lambda of: f"{statistics.mean(of('val_loss')):.3f}",
    "seconds": lambda of: f"{statistics.median(of('train_seconds')):.0f}",
    "whole command": lambda of: f"{statistics.median(of('whole_seconds')):.0f}",
    "memory": lambda of: f"{max(of('peak_gib')):.1f} GiB",
}
ACCURACY = ("runs", "training accuracy", "validation accuracy")
TABLES = {  # head of the first column: {its text: run}, the other columns
    "`--lr`": (RATES, (*ACCURACY, "training loss", "validation loss")),
    "`--augment`": (AUGMENTATIONS, (*ACCURACY, "gap in points")),
    "each row adds to the rows above": (TRICKS, ("runs", "validation accuracy", "seconds")),
    "`--recipe`": (
        LADDER,
        ("runs", "validation accuracy", "lowest", "with test-time augmentation", "seconds", "whole command", "memory"),
    ),
}


def write_table(runs, head):
    """One of TABLES, of the runs that are there, as Markdown."""
    named, columns = TABLES[head]
    lines = [[head, *columns], ["---"] * (1 + len(columns))]
    for text, run in named.items():
        if run in runs:
            lines.append([text, *(CELLS[column](functools.partial(last, runs, run)) for column in columns)])
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def write_tables(runs):
    """All tables; README shows them line by line."""
    return "\n".join(write_table(runs, head) for head in TABLES)


# --------------------------------------------------------------------------------------------------------- pictures
def save(figure, name):
    figure.savefig(picture := io.BytesIO(), format=name.split(".")[1], dpi=110)
    data.write_file(RESULTS / name, picture.getvalue())
    print(f"wrote results/{name}", flush=True)


def draw_network():
    """How the shapes change from layer to layer of the baseline's net, as its own forward pass shows them."""
    model, shapes = network.ConvNet(), [("image", (3, 32, 32))]
    names = {torch.nn.Conv2d: "conv\n{0}x{0}", torch.nn.MaxPool2d: "max pool\n{0}x{0}", torch.nn.Linear: "linear"}

    def look(layer, inputs, output):
        if isinstance(layer, torch.nn.Linear):  # what comes before it is a function and no layer
            shapes.append(("max over\nall pixels", tuple(inputs[0][0].shape)))
        size = getattr(layer, "kernel_size", None)
        shapes.append((names[type(layer)].format(size[0] if isinstance(size, tuple) else size), tuple(output[0].shape)))

    for layer in model.modules():
        if type(layer) in names:
            layer.register_forward_hook(look)
    model(torch.zeros(1, 3, 32, 32))
    figure = Figure(figsize=(11, 2.8), layout="constrained")
    axes, left = figure.subplots(), 0
    for name, (channels, *sides) in shapes:
        width, height = 0.3 + channels / 80, sides[0] if sides else 1
        axes.bar(left, height, width, -height / 2, align="edge", color=train.COLORS[5 if sides else 4])
        axes.text(left + width / 2, 18, "x".join(map(str, (channels, *sides))), ha="center", fontsize=9)
        axes.text(left + width / 2, -18, name, ha="center", va="top", fontsize=9)
        left += max(width, 1) + 1.2
    axes.set(xlim=(-1.2, left), ylim=(-25, 22), title="channels x height x width of an image after each layer")
    axes.axis("off")
    save(figure, "network.png")


def draw_ladder(runs):
    """Accuracy against time, of every recipe, and what the assignment asks for."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    for name, run in LADDER.items():
        accuracies = last(runs, run, "val_accuracy")
        if not accuracies:
            continue
        seconds = statistics.median(last(runs, run, "train_seconds"))
        height = 100 * statistics.mean(accuracies)
        axes.plot(seconds, height, "o", color=train.COLORS[0], markersize=9)
        text = f"{name}\n{height:.1f}%"
        axes.annotate(
            text, (seconds, height), (0, 9), textcoords="offset points", ha="center", va="bottom", fontsize=13
        )
    axes.axhline(75, color="black", linewidth=1)
    axes.plot(1800, 75, "X", color="black", markersize=10)
    text = "full marks: 75%, in half an hour"
    axes.annotate(text, (1800, 75), (0, -10), textcoords="offset points", ha="right", va="top", fontsize=13)
    axes.set(xscale="log", xlim=(4, 2400), ylim=(70, 98))
    axes.set_xlabel("seconds of training, two CPU cores", fontsize=13)
    axes.set_ylabel("validation accuracy, %", fontsize=13)
    ticks = [5, 10, 30, 60, 120, 300, 600, 1800]
    axes.set_xticks(ticks, ticks)
    axes.tick_params(labelsize=12)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    save(figure, "ladder.png")


def draw_curves():
    """Figure 2, the curves at three rates; and Figure 4, the curves of the best recipe. Both show seed 0."""
    curves = train.read_curves(REPORT)
    for name, shown in (("figure2.png", [*RATES.values()]), ("figure4.png", [LADDER["best"]])):
        folders = {f"python train.py {run}": find_folder(run, 0).name for run in shown}
        missing = {command: folder for command, folder in folders.items() if folder not in curves}
        for command, folder in missing.items():
            command += f" --experiments experiments/report --name {folder}"
            print(f"results/{name} is not drawn again; its run is missing. This makes it: {command}")
        if not missing:
            train.draw_curves(RESULTS / name, {command: curves[folder] for command, folder in folders.items()})
            print(f"wrote results/{name}", flush=True)


def main():
    data.prepare_script()
    parser = argparse.ArgumentParser(description="Make every table and picture of README again.")
    parser.add_argument("study", nargs="?", choices=[*STUDIES, "none"], help="the study to train for (default: all)")
    study = parser.parse_args().study
    for name in STUDIES:
        if study in (None, name):
            complete(name)
    runs = read_runs()
    (RESULTS / "tables.md").write_text(write_tables(runs), encoding="utf-8")
    print(write_tables(runs))
    printed = subprocess.run([sys.executable, "bn.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (RESULTS / "figure1.txt").write_text(printed)
    draw_network()
    save(visualize_aug.draw(visualize_aug.read(ROOT / "Lenna.png")), "figure3.jpg")  # as JPEG, a fraction of the bytes
    draw_ladder(runs)
    draw_curves()


if __name__ == "__main__":
    main()
