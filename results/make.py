"""Draw every picture and write every measured number of README again, from what results/ holds.

    python results/make.py          takes seconds, in any clone: it needs neither CIFAR-10 nor a trained net
    python results/make.py train    first trains the runs that runs.csv lacks; to measure one again, delete its row

curves.csv has the points of Figures 2 and 4, mistakes.npz the answers of Figure 5, measured.csv what else was measured.
"""

import csv
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import data
import train
import visualize_aug

matplotlib.rcParams["font.size"] = 13
RESULTS = ROOT / "results"
COLUMNS = ("settings", "seed", "step", "train_seconds", "whole_seconds", "peak_gib", "train_loss", "train_accuracy")
COLUMNS += ("plain_accuracy", "val_loss", "val_accuracy", "val_accuracy_tta")
RATES = {rate: f"--lr {rate}" for rate in ("1e-3", "1e-4", "1e-5")}
AUGMENTATIONS = {name: f"--lr 1e-3 --augment {name}" for name in ("none", "position", "color", "both")}
RECIPES = {name: f"--recipe {name}" for name in ("baseline", "quick", "coffee", "lunch", "dinner", "best")}
BASELINE, QUICK, BEST = RATES["1e-3"], RECIPES["quick"], RECIPES["best"]
PLAIN = f"{QUICK} --sizes --label-smoothing 0"
ADAM = f"{PLAIN} --no-mirror --no-whiten --optimizer adam --lr"
TRICKS = {
    "Adam at 1e-3, the best of three constant rates": f"{ADAM} 1e-3 --no-decay",
    "Adam, falling from 3e-3 to 0": f"{ADAM} 3e-3",
    "Muon, falling from 0.22 to 0": f"{PLAIN} --no-mirror --no-whiten",
    "+ whitened stem, identity start": f"{PLAIN} --no-mirror",
    "+ mirrored filters": PLAIN,
    "+ label smoothing": f"{QUICK} --sizes",
    "+ small pictures first: `quick`": QUICK,
    "`coffee` without small pictures": "--recipe coffee --sizes",
    "`coffee` with color": "--recipe coffee --augment both",
    "`lunch` with two nets": "--recipe lunch --nets 2",
}
OTHER_RATES = [f"{ADAM} 3e-3 --no-decay", f"{ADAM} 8e-3 --no-decay"]
CORES = ", ".join(f"@ {run} seconds, @ {run} accuracy" for run in ("baseline", "coffee", "quick")) + ", @ quick lowest"
TYPED = {  # a sentence of README: what measured.csv calls its numbers, which were typed by hand
    "reached {}% in {} seconds, where `dinner` took {}": "peer accuracy, peer seconds, dinner seconds beside the peer",
    "Rapids, bf16) | {} s, {}% | {} s, {}% | {} s, {}% | {}% |": CORES.replace("@", "Xeon"),
    "Zen 1, fp32) | {} s, {}% | {} s, {}% | {} s, {}% | {}% |": CORES.replace("@", "Zen 1"),
    "--epochs 0.4` | | | {} s, {}% | {}% |": "Zen 1 narrow seconds, Zen 1 narrow accuracy, Zen 1 narrow lowest",
}
SEEDS = dict.fromkeys([*RATES.values(), *TRICKS.values()], 1)  # how many of each run
SEEDS |= dict.fromkeys([command for command in [*TRICKS.values(), *OTHER_RATES] if QUICK in command], 5)
SEEDS |= dict.fromkeys([*AUGMENTATIONS.values(), *RECIPES.values()], 3) | {QUICK: 10}


def read_table(name):
    with open(RESULTS / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(name, rows):
    with open(RESULTS / name, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def read_settings(command):
    return train.read_settings([*command.split(), "--device", "cpu"])[0]


def write_settings(command):
    """All that decides what a run computes, but for its seed, as text: rows of runs.csv count by it."""
    left_out = ("recipe", "resume", "seed", "device", "data", "experiments", "name", "command")
    pairs = [f"{key}={value}" for key, value in vars(read_settings(command)).items() if key not in left_out]
    return re.sub(r"[\[\]()]", "", " ".join(pairs).replace(", ", ","))


def find(command, column):
    """The values of a column of runs.csv for all seeds of a run, without those that were not measured."""
    settings = write_settings(command)
    texts = [row[column] for row in read_table("runs.csv") if row["settings"] == settings]
    return [float(text) for text in texts if text]


def train_run(command, seed):
    """Train one run in a process of its own, and write down what it measured."""
    folder = ROOT / "experiments" / "report" / re.sub(r"[^\w.]+", "-", f"run {command} seed {seed}")
    arguments = [*command.split(), "--seed", str(seed), "--experiments", str(folder.parent), "--name", folder.name]
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "train.py", *arguments, "--device", "cpu"], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"make.py: failed: python train.py {command} --seed {seed}")
    spent = {"whole_seconds": time.perf_counter() - start, "peak_gib": usage.ru_maxrss / 2**20}
    (images, labels), (val_images, val_labels) = data.load_cifar10(ROOT / "datasets")
    model, progress = train.load(folder), train.read_checkpoint(folder)["progress"]
    plain = train.evaluate(model, images[:10_000], labels[:10_000], "fp32", tta=False)["val_accuracy"]
    row = progress["rows"][-1] | spent | {"plain_accuracy": plain, "settings": write_settings(command), "seed": seed}
    if seed == 0 and command in [*RATES.values(), BEST]:
        points = [point for point in read_table("curves.csv") if point["run"] != command]
        for curve, lists in progress["curves"].items():
            points += [{"run": command, "curve": curve, "epoch": epoch, "value": value} for epoch, value in zip(*lists)]
        write_table("curves.csv", points)
    if seed == 0 and command == BEST:
        certainty, answers = train.predict(model, val_images, "fp32", tta=False).softmax(1).max(1)
        wrong = (answers != val_labels).nonzero().flatten()
        surest = wrong[certainty[wrong].argsort(descending=True)][:12]
        kept = {"answers": answers.byte(), "certainty": certainty.half(), "labels": val_labels.byte()}
        np.savez_compressed(RESULTS / "mistakes.npz", **kept, surest=surest, pixels=val_images[surest].movedim(1, 3))
    write_table("runs.csv", [*read_table("runs.csv"), {column: row.get(column, "") for column in COLUMNS}])  # last


def mean(command, column="val_accuracy", digits=1):  # in percent
    return f"{100 * statistics.mean(find(command, column)):.{digits}f}"


def spread(command, column):
    values = find(command, column)
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(command, column, 2)}%{deviation}" if values else ""


def median(command, column, unit=1):
    value = statistics.median(find(command, column)) / unit
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


CELLS = {  # column of a table: what it says of a run
    "runs": lambda run: f"{len(find(run, 'seed'))}",
    "training accuracy": lambda run: spread(run, "plain_accuracy"),
    "validation accuracy": lambda run: spread(run, "val_accuracy"),
    "gap": lambda run: f"{float(mean(run, 'plain_accuracy', 4)) - float(mean(run, digits=4)):.1f} points",
    "training loss": lambda run: f"{statistics.mean(find(run, 'train_loss')):.3f}",
    "validation loss": lambda run: f"{statistics.mean(find(run, 'val_loss')):.3f}",
    "lowest": lambda run: f"{min(find(run, 'val_accuracy')):.2%}",
    "with views": lambda run: spread(run, "val_accuracy_tta"),
    "seconds": lambda run: median(run, "train_seconds"),
    "whole command": lambda run: median(run, "whole_seconds"),
    "memory": lambda run: f"{max(find(run, 'peak_gib')):.1f} GiB",
}
GAP = "runs, training accuracy, validation accuracy, gap"
TABLES = {  # head of the first column: its rows, the other columns
    "`--lr`": (RATES, f"{GAP}, training loss, validation loss"),
    "`--augment`": (AUGMENTATIONS, GAP),
    "`--recipe`": (RECIPES, "runs, validation accuracy, lowest, with views, seconds, whole command, memory"),
    "trick by trick": (TRICKS, "runs, validation accuracy, seconds"),
}


def list_sentences():  # (a sentence of README, with {} for each number that was measured; the numbers)
    measured = {row["what"]: row["value"] for row in read_table("measured.csv")}
    slowest = max(float(value) for what, value in measured.items() if "batch norm" in what)
    typed = [(sentence, [measured[what] for what in names.split(", ")]) for sentence, names in TYPED.items()]
    fast = [mean(QUICK), median(QUICK, "train_seconds"), median(QUICK, "whole_seconds")]
    good = [mean(BEST), median(BEST, "train_seconds", 60), median(BEST, "whole_seconds", 60)]
    row = {column: (find(BASELINE, column) or [None])[0] for column in COLUMNS[2:]}
    line = train.describe({key: row[key] for key in row if row[key]} | {"step": 1955, "epoch": 5}, 1955)
    return [
        ("reaches {}% after {} seconds of training (whole command: {} seconds)", fast),
        ("and {}% after {} minutes ({} minutes)", good),
        (re.sub(r"\d+\.\d+", "{}", line), re.findall(r"\d+\.\d+", line)),
        *typed,
        ("batch norm takes up to {} times as long", [f"{slowest:.1f}"]),
    ]


def write_readme(text):
    """README's text, with everything that was measured written again."""
    changes = {}  # a pattern, with a group for each part that stays: what comes after each of them
    for head, (runs, columns) in TABLES.items():
        lines = [[head, *columns.split(", ")], ["---"] * (2 + columns.count(", "))]
        lines += [[name, *(CELLS[column](run) for column in columns.split(", "))] for name, run in runs.items()]
        table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
        changes[rf"()\| {head} \|.*\n(?:\|.*\n)+"] = [table]
    for sentence, values in list_sentences():
        parts = [f"({re.escape(part)})".replace("\\ ", r"\s+") for part in sentence.split("{}")]
        changes[r"\d+(?:[.,]\d+)*".join(parts)] = [*values, ""]
    for pattern, values in changes.items():
        match = re.search(pattern, text) or sys.exit(f"make.py: README.md lacks {pattern}: mend it, or list_sentences")
        new = "".join(part + value for part, value in zip(match.groups(), values))
        text = text[: match.start()] + new + text[match.end() :]
    return text


def draw_ladder():
    """Validation error against time: every recipe, and what the assignment asks for."""
    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    axes.fill_between((1, 1800), 25, 3, color="0.93")
    axes.text(2.3, 3.3, "the goal of the assignment: 75%,\nwithin half an hour like its authors", va="top")
    label, ring = {"textcoords": "offset points", "ha": "center"}, {"fillstyle": "none", "markersize": 9, "ls": "none"}
    blue = train.COLORS[0]
    for name, run in RECIPES.items():
        spent = statistics.median(find(run, "train_seconds"))
        axes.plot(spent, 100 - float(mean(run)), "o", color=blue, markersize=9)
        axes.annotate(f"{name}\n{mean(run)}%", (spent, 100 - float(mean(run))), (0, -9), va="top", **label)
        if find(run, "val_accuracy_tta"):
            axes.plot(spent, 100 - float(mean(run, "val_accuracy_tta")), "o", color=blue, **ring)
    axes.plot([], [], "o", color=blue, label="with test-time augmentation", **ring)
    axes.legend(loc="lower right", frameon=False, handletextpad=0.2)
    axes.set(xscale="log", yscale="log", xlim=(2, 3000), ylim=(32, 3))
    axes.set(xlabel="seconds of training, two CPU cores", ylabel="validation error")
    axes.set_xticks(ticks := [2, 5, 10, 30, 60, 120, 300, 600, 1800], ticks)
    axes.set_yticks(ticks := [25, 20, 15, 10, 7, 5], [f"{tick}%" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    return figure


def draw_curves(commands):
    """train.py's picture of some runs, with their names at the ends of their lines (Figures 2 and 4)."""
    runs = {command: {} for command in commands}
    for row in read_table("curves.csv"):
        if row["run"] in runs:
            epochs, values = runs[row["run"]].setdefault(row["curve"], ([], []))
            epochs.append(float(row["epoch"]))
            values.append(float(row["value"]))
    figure = train.draw_curves(runs)
    figure.legends[0].remove()
    figure.suptitle("thin: training, strong: validation")
    for panel in figure.axes:
        for line in panel.lines[1::2]:
            x, y = line.get_data()
            panel.annotate(line.get_label(), (x[-1], y[-1]), (6, 0), textcoords="offset points", color=line.get_color())
        panel.set_xticks([tick for tick in panel.get_xticks() if 0 <= tick <= x[-1]])
        panel.set_xlim(0, 1.5 * x[-1])
    return figure


def draw_best():
    """Figure 4: the curves of `best`, and where its training goes on to larger images."""
    figure, settings = draw_curves([BEST]), read_settings(BEST)
    for panel in figure.axes:
        for size, (_, share) in zip((24, 32), settings.sizes):
            panel.axvline(epoch := share * settings.epochs, color="black", linestyle=":")
            panel.text(epoch, 0.45, f" {size}x{size}\n pixels", transform=panel.get_xaxis_transform())
    x, y = figure.axes[1].lines[1].get_xydata()[0]
    figure.axes[1].text(x + 0.8, y, "so far\nonly\n16x16", va="center")
    return figure


def draw_mistakes():
    """Figure 5: the confusions of `best` on the test images, and its surest mistakes."""
    kept, shares = np.load(RESULTS / "mistakes.npz"), np.zeros((10, 10))
    answers, labels = kept["answers"], kept["labels"]
    np.add.at(shares, (labels, answers), 0.1)  # each class has 1,000 images
    figure = Figure(figsize=(7.2, 11.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(6.2, 5.3))
    axes = top.subplots()
    axes.imshow(shares, cmap="Oranges", vmax=12)
    for row, column in np.ndindex(10, 10):
        color, text = "white" if row == column else "black", f"{shares[row, column]:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=11, color=color)
    axes.set_xticks(range(10), data.CLASSES, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(10), data.CLASSES)
    axes.set(xlabel="predicted class", ylabel="true class (the label)", title="Predictions for each class, in percent")
    bottom.suptitle("Its surest mistakes")
    for index, pixels, panel in zip(kept["surest"], kept["pixels"], bottom.subplots(3, 4).flat):
        panel.imshow(pixels)
        panel.set_title(f"says {data.CLASSES[answers[index]]}\nlabel {data.CLASSES[labels[index]]}", fontsize=12)
        panel.axis("off")
    return figure


def main():
    for command, count in SEEDS.items() if sys.argv[1:] == ["train"] else ():
        for seed in sorted({*range(count)} - {*find(command, "seed")}):
            train_run(command, seed)
    readme = ROOT / "README.md"
    readme.write_text(write_readme(readme.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    draw_ladder().savefig(RESULTS / "ladder.png", dpi=110)
    draw_curves(RATES.values()).savefig(RESULTS / "figure2.png", dpi=110)
    visualize_aug.draw(visualize_aug.read(ROOT / "Lenna.png")).savefig(RESULTS / "figure3.jpg", dpi=90)
    draw_best().savefig(RESULTS / "figure4.png", dpi=110)
    draw_mistakes().savefig(RESULTS / "figure5.png", dpi=110)


if __name__ == "__main__":
    main()
