"""Make every table and picture of README again, from real runs on the real data.

    python results/make.py                 train the runs missing from results/runs.csv, then draw (all: 4 hours)
    python results/make.py rates           train for one study only: rates, augmentation, tricks or speed
    python results/make.py none            train nothing, only draw

Pictures of single runs are drawn from their folders in experiments/report/.
"""

import argparse
import itertools
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import network
import train
import visualize_aug
from results import runs
from results.runs import find


# ----------------------------------------------------------------------------------------------------------- tables
def write_spread(values):
    """The mean and, if there are several values, their standard deviation."""
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
TABLES = {  # head of the first column: {row's label: run}, the other columns
    "`--lr`": (runs.RATES, (*RESULT, "training loss", "validation loss")),
    "`--augment`": (runs.AUGMENTATIONS, RESULT),
    "`--recipe`": (runs.LADDER, ("runs", "validation accuracy", *SPEED)),
    "`quick`, trick by trick: each row adds to those above": (runs.TRICKS, ("runs", "validation accuracy", "seconds")),
}
# For comparison, (name, seconds of training, accuracy in %): KellerJordan/cifar10-airbench, airbench94_muon.py at
# commit f1c599c, run once on the same cores. It says cpu for cuda, bfloat16 for half and time.perf_counter for CUDA's
# events, and nothing is compiled. The accuracy is with its own test-time augmentation.
PEER = ("airbench94_muon", 1021, 93.94)


def write_table(rows, head):
    """One of TABLES as Markdown, without missing runs."""
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
    train.save_picture(figure, runs.RESULTS / name)
    print(f"wrote results/{name}", flush=True)


def find_shapes(model):
    """The shapes of an image and of each part's output, from a forward pass."""
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
    """Accuracy against time, of every recipe and of PEER, and what the assignment asks for."""
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    label = {"textcoords": "offset points", "fontsize": 13}
    blue, orange = train.COLORS[:2]
    ring = {"fillstyle": "none", "markersize": 9}
    for name, run in runs.LADDER.items():
        if accuracies := find(rows, run, "val_accuracy"):
            point = statistics.median(find(rows, run, "train_seconds")), 100 * statistics.mean(accuracies)
            axes.plot(*point, "o", color=blue, markersize=9)
            axes.annotate(f"{name}\n{point[1]:.1f}%", point, (0, 11), ha="center", va="bottom", **label)
            if augmented := find(rows, run, "val_accuracy_tta"):
                axes.plot(point[0], 100 * statistics.mean(augmented), "o", color=blue, **ring)
    name, *point = PEER
    axes.plot(*point, "s", color=orange, **ring)
    axes.annotate(f"{name}\n{point[1]:.1f}%", point, (0, -9), ha="center", va="top", color=orange, **label)
    axes.plot([], [], "o", color=blue, label="with test-time augmentation", **ring)
    axes.legend(loc="upper left", fontsize=13, frameon=False, handletextpad=0.2)
    axes.axhline(75, color="black", linewidth=1)
    axes.plot(1800, 75, "X", color="black", markersize=10)
    asked = "the assignment: 75%, within half an hour"
    axes.annotate(asked, (1800, 75), (0, -10), ha="right", va="top", **label)
    axes.set(xscale="log", xlim=(4, 2600), ylim=(70, 100))
    axes.set_xlabel("seconds of training, two CPU cores", fontsize=13)
    axes.set_ylabel("validation accuracy, %", fontsize=13)
    ticks = [5, 10, 30, 60, 120, 300, 600, 1800]
    axes.set_xticks(ticks, ticks)
    axes.tick_params(labelsize=12)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    save(figure, "ladder.png")


def are_there(name, rows, wanted):
    """Whether the folders of these runs, seed 0, are there and finished; if not, it prints how to make them."""
    complete = True
    for run in wanted:
        path = runs.find_folder(run, 0) / "checkpoint.pt"
        try:
            done = train.read_checkpoint(path)["rows"][-1]["step"]
        except train.UsageError:  # there is none, or one of older code
            done = 0
        if done not in find(rows, run, "step"):
            complete = False
            command = f"python train.py {run} --experiments experiments/report --name {path.parent.name} --resume"
            print(f"results/{name} is not drawn again; its run is missing or unfinished. To train it: {command}")
    return complete


def draw_rates(rows, curves):
    """Figure 2: the curves at three learning rates, seed 0."""
    if are_there("figure2.png", rows, runs.RATES.values()):
        named = {}
        for rate, run in runs.RATES.items():
            named[f"learning rate {rate}"] = curves[runs.find_folder(run, 0).name]
        save(train.draw_curves(named), "figure2.png")


def draw_best(rows, curves):
    """Figure 4: the curves of the best recipe, seed 0, and where training goes on to larger images."""
    run = runs.LADDER["best"]
    if are_there("figure4.png", rows, [run]):
        settings = train.read_settings(shlex.split(run))
        figure = train.draw_curves({run: curves[runs.find_folder(run, 0).name]})
        larger = [*settings.sizes, data.SIZE][1:]
        for size, share in zip(larger, settings.sizes.values(), strict=True):
            epoch = share * settings.epochs
            for panel in figure.axes:
                panel.axvline(epoch, color="black", linestyle=":")
                panel.text(epoch, 0.98, f" {size} pixels", va="top", transform=panel.get_xaxis_transform())
        save(figure, "figure4.png")


def draw_mistakes(rows):
    """Figure 5: the confusions of the best recipe, seed 0, on the test images, and its surest mistakes."""
    run = runs.LADDER["best"]
    if not are_there("figure5.png", rows, [run]):
        return
    images, labels = data.load_cifar10(runs.ROOT / "datasets")[1]
    model = train.load(runs.find_folder(run, 0))
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
    axes.set_xlabel("predicted class", fontsize=14)
    axes.set_ylabel("true class (the label)", fontsize=14)
    axes.set_title("Predictions for each class, in percent", fontsize=14)

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
    studies = [*runs.STUDIES, "none"]
    parser.add_argument("study", nargs="?", choices=studies, help="the study to train for (default: all)")
    study = parser.parse_args().study
    if study != "none":
        if sys.platform == "win32":
            sys.exit("make.py: it cannot measure memory on Windows: train in WSL, or only draw with `none`")
        for name in runs.STUDIES:
            if study in (None, name):
                runs.complete(name)
    rows = runs.read_rows()
    tables = write_tables(rows)
    data.write_file(runs.RESULTS / "tables.md", tables.encode())
    print(tables)
    printed = subprocess.check_output([sys.executable, "bn.py"], cwd=runs.ROOT)
    data.write_file(runs.RESULTS / "figure1.txt", printed)
    draw_network()
    lenna = visualize_aug.read(runs.ROOT / "Lenna.png")
    save(visualize_aug.draw(lenna), "figure3.jpg")  # as JPEG, a fraction of the bytes
    draw_ladder(rows)
    curves = train.read_curves(runs.REPORT)
    draw_rates(rows, curves)
    draw_best(rows, curves)
    draw_mistakes(rows)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("make.py: stopped. The same command goes on with the next missing run")
