"""Make every table and picture of README again, from real runs on the real data.

    python results/make.py                 train all that results/runs.csv does not hold yet (hours), then draw
    python results/make.py rates           train for one study only: rates, augmentation, steps or speed
    python results/make.py none            train nothing, only draw

Every run is a command line of train.py. Its figures become lines of runs.csv, one an epoch, and are not measured again
until somebody takes those lines out. Its folder is in experiments/report/, where the last run of that name stays.

The yardstick that travels between machines is the rate of the best of six matrix products, 2048 x 2048, in the faster
of bf16 and fp32. "Scaled" seconds are seconds * rate / 850 GFLOP/s; a "unit" is 0.29 PFLOP (the arithmetic of the
speed-run that is known for 94%, K. Jordan's airbench94) at that rate.
"""

import argparse
import csv
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
from filelock import FileLock
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402
import visualize_aug  # noqa: E402

RESULTS = ROOT / "results"
REPORT = ROOT / "experiments" / "report"
COSTS = ("whole_seconds", "peak_gib", "gflops")  # of a whole run, in the line of its last epoch
COLUMNS = ("study", "run", "seed", *train.COLUMNS, "val_accuracy_tta", *COSTS)

# The quick recipe taken apart: each step adds to those before it. The first trains the same net the baseline's way.
STEPS = {
    "Adam at 1e-3": "--recipe quick --set sizes= --set label_smoothing=0 --set whiten=false --set muon=false --lr 1e-3",
    "Muon, rate falling to 0": "--recipe quick --set sizes= --set label_smoothing=0 --set whiten=false",
    "whitened stem, identity start": "--recipe quick --set sizes= --set label_smoothing=0",
    "label smoothing": "--recipe quick --set sizes=",
    "small pictures first: `quick`": "--recipe quick",
    "flips and shifts": "--recipe quick --augment position",
}

# study: {run, as flags of train.py: seeds}. What takes longest comes last.
STUDIES = {
    "rates": {"--lr 1e-3 --augment none": 1, "--lr 1e-4 --augment none": 1, "--lr 1e-5 --augment none": 1},
    "steps": dict.fromkeys(STEPS.values(), 3),
    "augmentation": {f"--lr 1e-3 --augment {name}": 3 for name in data.AUGMENTATIONS},
    "speed": {
        "--recipe quick": 10,
        "--recipe quick --augment position --epochs 1.5": 1,
        "--recipe quick --augment position --epochs 3": 1,
        "--recipe quick --augment position --epochs 6": 1,
        "--recipe best --epochs 2": 1,
        "--recipe best --epochs 4": 1,
        "--recipe best": 5,
    },
}
ONE_THREAD = ("rates", "augmentation")  # so that they come out the same, bit for bit, however many cores there are


# --------------------------------------------------------------------------------------------------------- training


def rate():
    """The yardstick between machines: GFLOP/s of the best of six 2048 x 2048 matrix products, in bf16 or fp32."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[train.choose_precision("cpu")]
    a, seconds = torch.ones(2048, 2048, dtype=dtype), []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(seconds) / 1e9


def train_once(run, seed, variables):
    """Train by that command line, in a process of its own with these environment variables; the rows for runs.csv."""
    name = re.sub(r"[^\w.-]+", "_", f"{run} seed{seed}".replace("--", ""))
    if (REPORT / name).exists():
        with FileLock(REPORT / name / ".lock", timeout=0):  # unless it is just being trained
            shutil.rmtree(REPORT / name)
    command = [sys.executable, "train.py", *run.split(), "--seed", str(seed)]
    command += ["--experiments", str(REPORT), "--name", name]
    print(f"{run} --seed {seed}", flush=True)
    gflops, start = rate(), time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"make.py: failed: {shlex.join(command)}")
    whole_seconds = time.perf_counter() - start
    with open(REPORT / name / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    rows[-1] |= {"whole_seconds": f"{whole_seconds:.1f}", "peak_gib": f"{peak:.2f}"}
    rows[-1] |= {"gflops": f"{(gflops + rate()) / 2:.0f}"}
    return rows


class Runs:
    """results/runs.csv: the rows of every run that was trained."""

    def __init__(self):
        self.read()

    def read(self):
        self.rows = []
        if (RESULTS / "runs.csv").exists():
            with open(RESULTS / "runs.csv", newline="") as file:
                self.rows = list(csv.DictReader(file))

    def of(self, run):
        """{seed: rows, one an epoch} of all that was trained of a run."""
        found = {}
        for row in self.rows:
            if row["run"] == run:
                found.setdefault(int(row["seed"]), []).append(row)
        return found

    def last(self, run, column):
        """The figures in a column after the last epoch, one a seed."""
        return [float(rows[-1][column]) for rows in self.of(run).values() if rows[-1][column]]

    def work(self, run):
        """The median over the seeds of the seconds of training times the yardstick, in GFLOP."""
        pairs = zip(self.last(run, "train_seconds"), self.last(run, "gflops"), strict=True)
        return statistics.median(seconds * gflops for seconds, gflops in pairs)

    def complete(self, study):
        """Train what is missing of a study; every finished run is kept at once."""
        for run, seeds in STUDIES[study].items():
            for seed in range(seeds):
                if seed in self.of(run):
                    continue
                rows = train_once(run, seed, {"OMP_NUM_THREADS": "1"} if study in ONE_THREAD else {})
                self.read()  # another study may have been trained meanwhile
                self.rows += [{"study": study, "run": run, "seed": seed, **row} for row in rows]
                text = io.StringIO()
                table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
                table.writeheader()
                table.writerows(self.rows)
                data.write_file(RESULTS / "runs.csv", text.getvalue().encode())
                self.read()  # as the file has them, every column filled
                last = self.of(run)[seed][-1]
                print(f"  {float(last['val_accuracy']):.2%} in {float(last['train_seconds']):.1f} s", flush=True)


# ----------------------------------------------------------------------------------------------------------- tables


def spread(values):
    """Mean and, of several, their standard deviation, as text."""
    return f"{statistics.mean(values):.2%}" + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


def rates_table(runs):
    yield "| `--lr` | training accuracy | validation accuracy | training loss | validation loss |"
    for run in STUDIES["rates"]:
        if rows := runs.of(run).get(0):
            last = rows[-1]
            accuracies = [f"{float(last[f'{part}_accuracy']):.2%}" for part in ("train", "val")]
            losses = [f"{float(last[f'{part}_loss']):.3f}" for part in ("train", "val")]
            yield "| " + " | ".join([run.split()[1], *accuracies, *losses]) + " |"


def augmentation_table(runs):
    yield "| `--augment` | seeds | training accuracy | validation accuracy | gap in points |"
    for run in STUDIES["augmentation"]:
        if count := len(runs.of(run)):
            training, validation = (runs.last(run, f"{part}_accuracy") for part in ("train", "val"))
            gap = 100 * (statistics.mean(training) - statistics.mean(validation))
            yield f"| {run.split()[-1]} | {count} | {spread(training)} | {spread(validation)} | {gap:+.1f} |"


def steps_table(runs):
    yield "| each line adds to those above | seeds | validation accuracy | gain in points | scaled seconds |"
    before = None
    for step, run in STEPS.items():
        if count := len(runs.of(run)):
            accuracy = runs.last(run, "val_accuracy")
            gain = "" if before is None else f"{100 * (statistics.mean(accuracy) - before):+.2f}"
            before = statistics.mean(accuracy)
            yield f"| {step} | {count} | {spread(accuracy)} | {gain} | {runs.work(run) / 850:.1f} |"


def speed_table(runs):
    yield (
        "| `python train.py …` | seeds | validation accuracy | lowest | with test-time augmentation "
        "| seconds of training | scaled | units | whole command | peak GiB |"
    )
    for run in STUDIES["speed"]:
        if count := len(runs.of(run)):
            accuracy, tta = runs.last(run, "val_accuracy"), runs.last(run, "val_accuracy_tta")
            work, seconds = runs.work(run), statistics.median(runs.last(run, "train_seconds"))
            whole, peak = statistics.median(runs.last(run, "whole_seconds")), max(runs.last(run, "peak_gib"))
            yield (
                f"| `{run}` | {count} | {spread(accuracy)} | {min(accuracy):.2%} | {spread(tta) if tta else ''} "
                f"| {seconds:.1f} | {work / 850:.1f} | {work / 290e3:.2f} "
                f"| {whole:.1f} | {peak:.2f} |"
            )


def text_of_tables(runs):
    """All tables, as Markdown; README shows them line by line."""
    text = []
    for table in (rates_table, augmentation_table, steps_table, speed_table):
        head, *body = table(runs)
        text += [f"{table.__name__.removesuffix('_table')}\n", head, "|" + " --- |" * (head.count("|") - 1), *body, ""]
    return "\n".join(text)


# --------------------------------------------------------------------------------------------------------- pictures


def save(figure, name):
    figure.savefig(picture := io.BytesIO(), format=Path(name).suffix[1:], dpi=110)
    data.write_file(RESULTS / name, picture.getvalue())
    print(f"results/{name}", flush=True)


def write_figure_1():
    """What bn.py prints, and beside it what the assignment's Figure 1 shows."""
    printed = subprocess.run([sys.executable, "bn.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = dict(line.rsplit(": ", 1) for line in (RESULTS / "figure1_assignment.txt").read_text().splitlines())
    lines = [f"{line:32}{shown.get(line.rsplit(': ', 1)[0], '...')}" for line in printed.splitlines()]
    head = f"{'python bn.py':32}Figure 1 of the assignment"
    (RESULTS / "figure1.txt").write_text("\n".join([head, *lines]) + "\n")


def draw_rates(runs):
    curves = {}
    for run in STUDIES["rates"]:
        rows = [{column: float(row[column]) for column in train.COLUMNS} for row in runs.of(run).get(0, [])]
        if rows:
            curves[f"lr {run.split()[1]}"] = rows, rows
    train.draw_curves(RESULTS / "figure2.png", curves)


def draw_figure_3():
    """What visualize_aug.py makes of Lenna.png, as JPEG: a fraction of the bytes."""
    save(visualize_aug.draw(visualize_aug.read(ROOT / "Lenna.png")), "figure3.jpg")


def draw_augmentation(runs):
    """Training and validation accuracy of each augmentation, a dot a seed."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    names = [run for run in STUDIES["augmentation"] if runs.of(run)]
    for part, label, color, marker, aside in (
        ("train", "training", train.COLORS[0], "o", -0.13),
        ("val", "validation", train.COLORS[1], "D", 0.13),
    ):
        for place, run in enumerate(names):
            values = [100 * value for value in runs.last(run, f"{part}_accuracy")]
            axes.plot(values, [place + aside] * len(values), marker, color=color, alpha=0.7, label=label)
            label = None  # once is enough for the legend
    for place, run in enumerate(names):
        ends = [100 * statistics.mean(runs.last(run, f"{part}_accuracy")) for part in ("train", "val")]
        axes.plot(ends, [place] * 2, color="grey", linewidth=1, zorder=0)
    axes.set_yticks(range(len(names)), [run.split()[-1] for run in names])
    axes.invert_yaxis()
    axes.set(xlabel="accuracy after the last epoch, % (a dot a seed)", ylabel="--augment")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False)
    save(figure, "gap.png")


def draw_strip(train_set):
    """The same CIFAR-10 images as the network sees them, under each augmentation."""
    count = 12
    images = train_set[0][:count]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for row, name in enumerate(data.AUGMENTATIONS):
        loader = data.Loader(images, torch.arange(count), count, name, torch.Generator().manual_seed(0))
        seen, order = next(iter(loader))
        strip = torch.cat([*data.denormalize(seen)[order.argsort()]], dim=2).clamp(0, 1)
        axes = figure.add_subplot(4, 1, row + 1)
        axes.imshow(strip.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, "strip.png")


def draw_best(runs):
    """Figure 4: the curves of a run of the recipe best; and accuracy against time beside the assignment's own marks."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if seeds := runs.of("--recipe best"):
        rows = seeds[min(seeds)]
        for part, style, color in (("train", "o--", train.COLORS[0]), ("val", "o-", train.COLORS[1])):
            points = [(float(row["epoch"]), 100 * float(row[f"{part}_accuracy"])) for row in rows]
            label = {"train": "training (augmented pictures)", "val": "validation"}[part]
            left.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4)
        final = 100 * float(rows[-1]["val_accuracy_tta"])
        left.plot(float(rows[-1]["epoch"]), final, "*", color=train.COLORS[2], markersize=11,
                  label=f"with test-time augmentation: {final:.2f}%")  # fmt: skip
        left.legend(loc="lower right", frameon=False)
    left.set(xlabel="epoch", ylabel="accuracy, %", title=f"--recipe best, seed {min(seeds, default='')}")

    for (low, high), score in {(40, 50): 2, (50, 60): 4, (60, 70): 6, (70, 75): 8, (75, 96): 10}.items():
        right.axhspan(low, high, color=train.COLORS[2], alpha=score / 55, linewidth=0)
        right.text(9, (low + high) / 2, f"graded {score}", va="center", fontsize=9, color="#444444")
    for recipe, color in (("quick", train.COLORS[0]), ("best", train.COLORS[1])):
        points = []
        for run in STUDIES["speed"]:
            if recipe in run and runs.of(run):
                seconds = statistics.median(runs.last(run, "train_seconds"))
                points.append((seconds, 100 * statistics.mean(runs.last(run, "val_accuracy"))))
        if points:
            right.plot(*zip(*sorted(points), strict=True), "o-", color=color, label=f"--recipe {recipe}, by --epochs")
    right.plot(1800, 75, "X", color="black", markersize=9, label="the assignment: 75% in half an hour")
    right.set(xscale="log", xlabel="seconds of training", ylabel="validation accuracy, %", ylim=(40, 96),
              xlim=(8, 4000), title="accuracy against time")  # fmt: skip
    right.set_xticks([10, 30, 100, 300, 1000, 3000], [10, 30, 100, 300, 1000, 3000])
    right.legend(loc="lower right", frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, "figure4.png")


def draw_mistakes(val_set):
    """What the recipe best (its seed 4) takes for what, and the mistakes that it is most certain of."""
    folder = REPORT / "recipe_best_seed4"
    if not (folder / "checkpoint.pt").exists():
        print(f"{folder / 'checkpoint.pt'} is not there: its mistakes are not drawn again")
        return
    images, labels = val_set
    model = train.load(folder)
    with torch.no_grad():
        logits = torch.cat([model(data.normalize(data.to_float(some))) for some in images.split(250)])
    certainty, taken_for = logits.softmax(1).max(1)

    counts = torch.bincount(10 * labels + taken_for, minlength=100).view(10, 10)
    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(counts.clamp(max=60), cmap="Blues")  # the diagonal would leave nothing but white beside it
    for truth in range(10):
        for taken in range(10):
            color = "white" if counts[truth, taken] > 40 else "black"
            axes.text(taken, truth, int(counts[truth, taken]), ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(10), data.CLASSES, rotation=45, ha="right")
    axes.set_yticks(range(10), data.CLASSES)
    right = (labels == taken_for).float().mean()
    axes.set(xlabel="taken for (60 and more: darkest)", ylabel="is", title=f"{right:.2%} of 10,000 are right")
    save(figure, "confusion.png")

    wrong = torch.where(labels == taken_for, torch.zeros(()), certainty).argsort(descending=True)[:12]
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    for axes, number in zip(figure.subplots(2, 6).flat, wrong.tolist(), strict=True):
        axes.imshow(images[number].permute(1, 2, 0).numpy(), interpolation="nearest")
        took, truth = data.CLASSES[taken_for[number]], data.CLASSES[labels[number]]
        axes.set_title(f"{took}? ({certainty[number]:.0%})\nlabel: {truth}", fontsize=9)
        axes.axis("off")
    save(figure, "mistakes.png")


def main():
    parser = argparse.ArgumentParser(description="Make every table and picture of README again.")
    parser.add_argument("study", nargs="?", choices=[*STUDIES, "none"], help="what to train for (default: all of them)")
    study = parser.parse_args().study
    runs = Runs()
    try:
        for name in STUDIES:
            if study in (None, name):
                runs.complete(name)
    except train.UsageError as problem:
        sys.exit(f"make.py: {problem}")
    tables = text_of_tables(runs)
    (RESULTS / "tables.md").write_text(tables, encoding="utf-8")
    print(tables)
    train_set, val_set = data.load_cifar10(ROOT / "datasets")
    draw_rates(runs)
    draw_augmentation(runs)
    draw_strip(train_set)
    draw_best(runs)
    draw_mistakes(val_set)
    write_figure_1()
    draw_figure_3()


if __name__ == "__main__":
    main()
