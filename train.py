"""Train the CNN on CIFAR-10 and log its curves (assignment 2, task 2 b, c and e).

    python train.py --lr 1e-3                 the baseline, at the learning rates of Figure 2: 1e-3, 1e-4, 1e-5
    python train.py --lr 1e-3 --augment both  the same with data augmentation
    python train.py --recipe quick            75% in seconds; coffee, lunch, dinner and best take longer and reach more

Every run has its own folder under experiments/. --resume and `load` need only its checkpoint.pt. The rest is for
people: config.json, metrics.csv (one row per epoch), TensorBoard's events, and curves.png, a picture of all runs.
"""

import signal
import sys

if sys.version_info < (3, 10):
    sys.exit(f"train.py needs Python 3.10 or newer, this is {sys.version.split()[0]}")
if (
    __name__ == "__main__"
    and "IPython" not in sys.modules  # a notebook handles Ctrl-C itself
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main begins, Ctrl-C shows no traceback of an import

import argparse
import contextlib
import csv
import errno
import io
import itertools
import json
import math
import os
import re
import shlex
import tempfile
import time
import timeit
import warnings
from collections import Counter
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, scalar
from tqdm import tqdm

import data
from loss import CrossEntropyLoss
from network import ConvNet, Ensemble, Muon, forward, train_step

# Every setting is a flag: --lr 1e-4, --widths 64,128,256, --mirror or --no-mirror. A flag that is not given has the
# value of the recipe. The baseline is the plain way to train a CNN, with all tricks off.
BASELINE = {  # setting: (value, what it does)
    "recipe": ("baseline", "default values of the settings below; on two cores baseline 81.3% in 120 s, "
               "quick 77.7% in 7, coffee 89.7% in 76, lunch 92.3% in 238, dinner 93.5% in 591, best 94.6% in 1756"),
    "lr": (1e-3, "learning rate: how far a step moves the weights"),
    "epochs": (5.0, "how many times each training image is seen; may be a fraction"),
    "batch_size": (128, "images per step: more give a better direction, but fewer steps"),
    "augment": ("none", "change training images at random: position (flips and shifts), color, or both"),
    "widths": ((32, 64, 128), "channels of the net's three groups of layers: wide ones learn more and cost more"),
    "nets": (1, "train this many networks and average their logits: their mistakes differ (network.Ensemble)"),
    "sizes": ({}, "16:0.2,24:0.6 shrinks the images to 16x16 until 0.2 of the steps are done, then to 24x24 until 0.6:"
              " small images cost less and show the coarse shapes, which a net learns first"),
    "whiten": (False, "start from computed weights instead of random ones (ConvNet.whiten)"),
    "mirror": (False, "treat an image and its mirror image alike, and so learn from both (network.symmetrize)"),
    "optimizer": ("adam", "adam at a constant rate, or muon (network.Muon) at a rate that falls to 0"),
    "label_smoothing": (0.0, "spread this share of each target over all classes (loss.CrossEntropyLoss)"),
    "tta": (False, "at the end, also measure accuracy with test-time augmentation (data.views)"),
    "held_out": (0, "for tuning: validate on the last N training images, and train on the others"),
    "seed": (0, "seed of all random numbers: the same seed gives the same run"),
    "device": ("auto", "auto takes a GPU if there is one, else the CPU"),
    "precision": ("auto", "number format: fp32, or bf16, which auto takes where it is faster"),
}  # fmt: skip
FAST = {  # the tricks that all other recipes share
    "lr": 0.2,
    "batch_size": 500,
    "augment": "position",
    "sizes": {16: 0.2, 24: 0.6},
    "whiten": True,
    "mirror": True,
    "optimizer": "muon",
    "label_smoothing": 0.1,
    "tta": True,
}
# A wide net overfits less if it sees the images in other colors too
WIDE = {**FAST, "augment": "both", "widths": (64, 256, 256)}
RECIPES = {
    "baseline": {},
    "quick": {  # 75% as soon as possible: a small net that sees few, small images
        **FAST,
        "lr": 0.22,
        "epochs": 0.38,
        "batch_size": 128,
        "augment": "none",
        "widths": (32, 64, 64),
        "sizes": {24: 0.5},
        "label_smoothing": 0.2,
        "tta": False,
    },
    "coffee": {**FAST, "epochs": 3.6, "widths": (32, 128, 128)},
    "lunch": {**FAST, "epochs": 5.0, "widths": (64, 192, 192)},
    "dinner": {**WIDE, "lr": 0.18, "epochs": 9.0, "batch_size": 1000},
    "best": {**WIDE, "epochs": 8.7, "nets": 3},  # as long as half an hour on two cores allows
}
FORMAT = 8  # the version of checkpoint.pt: raise it when you change the net, the optimizer or what is saved
# Colors that the color-blind tell apart: M. Okabe and K. Ito, "Color Universal Design", 2008
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to ask for instead."""


# --------------------------------------------------------------------------------------------------------- settings
def number(kind, low, high):
    """A function that reads a number of that kind, from `low` to `high`."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be from {low:,} to {high:,}")
        return value

    read.__name__ = kind.__name__  # argparse says "invalid int value"
    return read


def widths(text):
    """ "64,128,256" -> (64, 128, 256)"""
    channels = tuple(map(number(int, 1, 4096), text.split(",")))
    if len(channels) > 3:
        raise argparse.ArgumentTypeError(f"{text} has more than 3 widths")
    return channels


def sizes(text):
    """ "16:0.2,24:0.6" -> {16: 0.2, 24: 0.6}; below 16x16, a mirrored net has no pixel left."""
    read_size, read_share = number(int, 16, 64), number(float, 0, 1)
    pairs = [pair.split(":") for pair in text.split(",") if pair]
    pairs = [(read_size(size), read_share(share)) for size, share in pairs]
    shares = [share for _, share in pairs]
    if shares != sorted(set(shares)) or len(dict(pairs)) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text} must have each size once, and growing shares: 16:0.2,24:0.6")
    return dict(pairs)


def device(text):
    """A kind of device, or "auto"."""
    if text not in ("auto", "cpu", "cuda", "mps"):
        hint = "CUDA_VISIBLE_DEVICES=1 chooses the second of several cards"
        raise argparse.ArgumentTypeError(f"{text} is not one of auto, cpu, cuda and mps ({hint})")
    return text


READERS = {  # how the command line reads a setting: a function, or a choice
    "recipe": RECIPES,
    "lr": number(float, 1e-30, 1e30),
    "epochs": number(float, 1e-6, 1e6),
    "batch_size": number(int, 2, 50_000),
    "augment": data.AUGMENTATIONS,
    "widths": widths,
    "nets": number(int, 1, 100),
    "sizes": sizes,
    "optimizer": ("adam", "muon"),
    "label_smoothing": number(float, 0, 1),
    "held_out": number(int, 0, 49_998),
    "seed": number(int, 0, 2**63 - 1),
    "device": device,
    "precision": ("auto", "fp32", "bf16"),
}


def write_value(value):
    """A setting as it is typed: (64, 128) is 64,128, {24: 0.5} is 24:0.5, and 10.0 is 10."""
    return re.sub(r"[(){} ]|,(?=\))|\.0\b", "", str(value))


def write_flag(key, value):
    """--lr=0.001, --mirror or --no-mirror"""
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={write_value(value)}"


def list_settings(recipe):
    """{setting: value} of a recipe."""
    baseline = {key: value for key, (value, _) in BASELINE.items()}
    return baseline | RECIPES[recipe] | {"recipe": recipe}


def make_parser(settings, add_help=True):
    """The parser of the command line, with `settings` as its defaults."""
    parser = argparse.ArgumentParser(usage="python train.py [options]", add_help=add_help)
    for key, (_, meaning) in BASELINE.items():
        text = f"{meaning} (default: {write_value(settings[key]) or 'none'})"
        how = {"help": text.replace("%", "%%")}
        reader = READERS.get(key)
        if reader is None:
            how["action"] = argparse.BooleanOptionalAction
        elif callable(reader):
            how["type"] = reader
        else:
            how["choices"] = reader
        parser.add_argument("--" + key.replace("_", "-"), **how)
    parser.set_defaults(**settings)
    add = parser.add_argument
    add("--data", default="datasets", help="folder of CIFAR-10, fetched if missing (default: datasets)")
    add("--experiments", default="experiments", help="folder of all runs (default: experiments)")
    add("--name", help="folder of this run (default: recipe, rate, augmentation, other changed settings, and seed)")
    add("--resume", action="store_true", help="continue the newest run with these settings or this --name, or start it")
    return parser


def read_settings(arguments, stored=None):
    """The settings of a command line. A flag that is not given has the `stored` value, or else the recipe's."""
    first = make_parser(list_settings("baseline"), add_help=False)
    recipe = first.parse_known_args(arguments)[0].recipe
    settings = make_parser(stored or list_settings(recipe)).parse_args(arguments)
    in_fours = all(width % 4 == 0 for width in settings.widths)
    in_eights = all(size % 8 == 0 for size in settings.sizes)
    if settings.mirror and not (settings.whiten and in_fours and in_eights):
        raise UsageError("--mirror needs --whiten, --widths divisible by 4, and --sizes divisible by 8")
    return settings


def find_device(name):
    """The device of that name, "cpu", "cuda" or "mps"; for "auto" the first of "cuda", "mps" and "cpu" that works."""
    for device in ("cuda", "mps", "cpu") if name == "auto" else (name,):
        try:
            pixel = torch.zeros(1, 1, 1, 1, device=device)
            torch.conv2d(pixel, pixel).item()
            return device
        except (RuntimeError, AssertionError) as problem:  # none there, or one that this PyTorch does not support
            reason = f"{device} cannot be used ({first_line(problem)})"
            if name == "auto" and device == "cuda" and torch.cuda.is_available():
                print(f"{reason}: continuing without it", flush=True)
    raise UsageError(f"{reason}: try --device auto")


def choose_precision(device):
    """ "bf16" where matrix products in it are faster than in fp32, else "fp32"."""
    if device != "cpu":  # older cards only emulate it
        modern = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        return "bf16" if modern else "fp32"
    # Half as many bytes can mean twice the speed, but only with the right instructions: on a CPU without them, and on
    # some that have them, bf16 is slower. So both are timed, on a product small enough to take no time, and in turns,
    # so that a moment in which the machine is busy slows both.
    seconds = {torch.float32: [], torch.bfloat16: []}
    for dtype in 30 * list(seconds):
        matrix = torch.ones(256, 256, dtype=dtype)
        taken = timeit.timeit("matrix @ matrix", globals={"matrix": matrix}, number=1)
        seconds[dtype].append(taken)
    fp32, bf16 = map(min, seconds.values())
    return "bf16" if bf16 < 0.75 * fp32 else "fp32"


# --------------------------------------------------------------------------------------------------------- training
def build(settings, images):
    """A new network and its optimizer, built from a run's settings, on the device of `images`.

    Its random weights come from PyTorch's global generator, which the caller seeds.

    Args:
        settings: what `read_settings` returns.
        images: (N, 3, H, W) normalized images, a sample of the training set, for `whiten`.
    """
    net = ConvNet(settings.widths, settings.mirror)
    # Channels last: the CPU's convolutions are 1.4 to 2 times as fast with an image's channels next to each other.
    net.to(images.device, memory_format=torch.channels_last)
    if settings.whiten:
        net.whiten(images)
    if settings.optimizer == "muon":
        net.prepare_for_muon()
        return net, Muon(net.parameters(), settings.lr, settings.batch_size)
    return net, torch.optim.Adam(net.parameters(), settings.lr)


def learning_rate(settings, step, steps):
    """Adam's rate is constant. Muon's falls to 0: large steps get far, and small ones settle at the end."""
    if settings.optimizer == "adam":
        return settings.lr
    return settings.lr * (1 - step / steps)


def image_size(settings, step, steps):
    """Height and width of the training images in a step."""
    for size, share in settings.sizes.items():
        if step < share * steps:
            return size
    return data.SIZE


def accuracy(logits, labels):
    """(B,) float64 on the CPU: 1 for each image whose largest logit is its label's, else 0."""
    return (logits.argmax(1) == labels).cpu().double()


# What is logged, for each image: a new metric is one more entry. Without label smoothing, losses can be compared.
METRICS = {"loss": CrossEntropyLoss(reduction="none"), "accuracy": accuracy}


def train_epoch(model, optimizers, loaders, settings, step, steps, report):
    """Train for an epoch from step number `step` on; stop early at step number `steps`.

    In each step, each network of the Ensemble `model` learns from the next batch of its own loader. About twenty times
    it calls `report` with a point of the training curves: a dict of means over the networks and their images since the
    last point. Returns the number of the next step, and the means over all images.
    """
    criterion = CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    length = len(loaders[0])
    count = min(length, steps - step)
    every = max(1, round(length / 20))
    recent, total = Counter(), Counter()  # sums over images

    def means(sums):
        return {f"train_{metric}": sums[metric] / sums["images"] for metric in METRICS}

    watched, said = is_watched(), time.monotonic()
    batches = itertools.islice(zip(*loaders, strict=True), count)
    bar = tqdm(batches, total=count, leave=False, disable=not watched, mininterval=0.5)
    for number, batch in enumerate(bar, 1):
        rate = learning_rate(settings, step, steps)
        size = image_size(settings, step, steps)
        step += 1
        learners = zip(model.nets, optimizers, batch, strict=True)
        for net, optimizer, (images, labels) in learners:
            optimizer.param_groups[0]["lr"] = rate
            images = data.resize(images, size)
            logits, loss = train_step(net, optimizer, criterion, images, labels, settings.precision)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} at step {step}: try a --lr below {settings.lr:g}")
            recent["images"] += len(labels)
            for metric, measure in METRICS.items():
                recent[metric] += measure(logits, labels).sum().item()
        if number % every == 0 or number == count:
            now = {"epoch": step / length, "step": step, "time": time.time()}
            report(now | {"train_learning_rate": rate} | means(recent))
            if not watched and time.monotonic() - said > 60:  # in a log, a line per minute
                said = time.monotonic()
                print(f"step {step} of {steps}", flush=True)
            total.update(recent)  # adds to it
            recent.clear()
    return step, means(total)


def is_watched():
    """Whether somebody sees a progress bar: on a terminal or in a notebook, not in a log."""
    return data.is_in_notebook() or sys.stderr.isatty()


@torch.no_grad()
def predict(model, images, precision, tta=False):
    """The logits of uint8 images; with `tta` the weighted mean over several views of each."""
    logits = []
    for part in images.split(250):
        part = data.normalize(data.to_float(part))
        views = data.views(part) if tta else [(part, 1)]
        logits.append(sum(weight * forward(model, view, precision) for view, weight in views))
    return torch.cat(logits)


def evaluate(model, images, labels, precision, tta=False):
    """{"val_loss", "val_accuracy" and, with `tta`, "val_accuracy_tta"} of uint8 images, in evaluation mode."""
    training = model.training
    model.eval()
    logits = predict(model, images, precision)
    means = {}
    for metric, measure in METRICS.items():
        means[f"val_{metric}"] = measure(logits, labels).mean().item()
    if tta:  # only the least certain quarter: other answers hardly ever change (Hiverge's speed-run, 2025)
        certainty = logits.softmax(1).amax(1)
        unsure = certainty.argsort()[: math.ceil(len(labels) / 4)]
        logits[unsure] = predict(model, images[unsure], precision, tta=True)
        means["val_accuracy_tta"] = accuracy(logits, labels).mean().item()
    model.train(training)
    return means


# ---------------------------------------------------------------------------------------------------- files of a run
def read_checkpoint(path, any_format=False):
    """The contents of a checkpoint; UsageError if it is missing, damaged, or of other code."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"no run at {path.parent}: it has no {path.name}") from None
    try:
        saved = torch.load(io.BytesIO(raw), weights_only=True, map_location="cpu")  # from a GPU that is not here, maybe
        version = saved["format"]
    except Exception as problem:  # torch.load raises many kinds of error
        if is_out_of_memory(problem):
            raise
        reason = f"{path} is damaged or not a checkpoint ({first_line(problem)})"
        raise UsageError(f"{reason}: remove its folder, or take another --name") from None
    if version != FORMAT and not any_format:
        reason = f"{path} was saved by another version of this code (format {version}, here {FORMAT})"
        raise UsageError(f"{reason}: use that version, or start another run with --name")
    return saved


def load(folder):
    """The trained Ensemble of a run, in evaluation mode, on the CPU; UsageError if this code can load none there."""
    saved = read_checkpoint(Path(os.path.expanduser(folder), "checkpoint.pt"))
    settings = saved["settings"]
    nets = []
    for _ in range(settings["nets"]):
        nets.append(ConvNet(settings["widths"], settings["mirror"]))
    model = Ensemble(nets)
    model.load_state_dict(saved["model"])
    return model.eval()


def is_out_of_memory(problem):
    refused = isinstance(problem, (MemoryError, torch.cuda.OutOfMemoryError))
    return refused or "allocate memory" in str(problem)


def first_line(problem):
    """What went wrong, in one line."""
    text = getattr(problem, "strerror", None) or str(problem)
    return text.strip().split("\n")[0] or type(problem).__name__


@contextlib.contextmanager
def survive(path):
    """Only the checkpoint has to be written: if anything else cannot be, a line says so and the run goes on."""
    try:
        yield
    except Exception as problem:
        print(f"train.py: cannot write {path} ({first_line(problem)}): continuing without it", file=sys.stderr)


def write_tables(folder, settings, command, rows):
    """Write config.json (how to repeat the run) and metrics.csv (what each epoch measured)."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    config = settings | {"command": command, "format": FORMAT, "versions": versions, "threads": torch.get_num_threads()}
    columns = dict.fromkeys(key for row in rows for key in row)  # not all rows have the same
    table = csv.DictWriter(text := io.StringIO(), columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files = {"config.json": json.dumps(config, indent=2), "metrics.csv": text.getvalue()}
    for name, content in files.items():
        with survive(folder / name):
            data.write_file(folder / name, content.encode())


class Events:
    """What TensorBoard shows of a run: its curves and its settings (HPARAMS).

    Each start of a run opens a new file, has TensorBoard drop the older events, and writes them again with their old
    times. So each step is shown once, even after a kill and while TensorBoard stays open. (The thread of tensorboardX's
    SummaryWriter would die of a full disk unnoticed.)
    """

    def __init__(self, path, settings):
        self.path = path
        self.settings = settings
        self.writer = None
        self.written = 0

    def write(self, points):
        """Write a run's new points; at first, and after a failure, all of its points."""
        writer, self.writer = self.writer, None  # until this has succeeded
        with survive(self.path):
            if writer is None:
                writer, self.written = self.open(), 0
            for point in points[self.written :]:
                for key, value in point.items():
                    part, _, metric = key.partition("_")
                    if metric:  # train_loss becomes loss/train, in one chart with all runs, beside loss/val
                        summary = scalar(f"{metric}/{part}", value)
                        event = Event(wall_time=point["time"], step=point["step"], summary=summary)
                        writer.write_event(event)
            writer.flush()
            self.writer, self.written = writer, len(points)

    def open(self):
        """A new file, which tells TensorBoard to purge everything from step 0 on."""
        number = len([*self.path.parent.glob("events.*")])  # TensorBoard reads by name, and clocks may go back
        writer = EventsWriter(f"{self.path}.{number:04}", f".{time.time_ns()}")
        writer.write_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        values = dict(self.settings)
        for key in ("widths", "sizes"):
            values[key] = write_value(values[key])
        metrics = {f"{metric}/val": 0 for metric in METRICS}
        for summary in hparams(values, metrics):
            writer.write_event(Event(wall_time=time.time(), summary=summary))
        return writer


def read_curves(experiments):
    """{run: {"train_loss": (epochs, values), "val_loss": ...}} of all runs under `experiments`, of any format."""
    runs = {}
    for path in sorted(experiments.glob("*/checkpoint.pt")):
        try:
            saved = read_checkpoint(path, any_format=True)
            curves = {}
            for metric in METRICS:
                curves[f"train_{metric}"] = find_curve(saved["points"], f"train_{metric}")
                curves[f"val_{metric}"] = find_curve(saved["rows"], f"val_{metric}")
            runs[path.parent.name] = curves
        except Exception as problem:  # whatever other code may have saved there
            print(f"train.py: curves.png leaves out {path.parent} ({first_line(problem)})", file=sys.stderr)
    return runs


def find_curve(points, key):
    """The epochs and values of a curve; an older run may lack it."""
    if not points:
        raise ValueError("no epoch is finished")
    found = [point for point in points if key in point]
    return [float(point["epoch"]) for point in found], [float(point[key]) for point in found]


def draw_curves(runs):
    """A matplotlib Figure of the curves of `runs`, from `read_curves`, with a panel for each metric (Figure 2)."""
    from matplotlib.figure import Figure  # not at the top: that takes longer than the first steps of training

    labels = [write_label(name) for name in runs]
    short = max(map(len, labels), default=0) <= 22
    columns, fontsize = (2, 12) if short else (1, 9)
    lines = math.ceil(len(labels) / columns)
    figure = Figure(figsize=(9, 4.2 + 0.22 * lines), layout="constrained")
    for metric, panel in zip(METRICS, figure.subplots(1, len(METRICS)), strict=True):
        for number, curves in enumerate(runs.values()):
            marker = "os^Dv"[number % 5]  # with 7 colors, 35 runs look different
            look = {"color": COLORS[number % 7], "linewidth": 1}
            training, validation = curves[f"train_{metric}"], curves[f"val_{metric}"]
            panel.plot(*training, "--" + marker, markersize=1, **look)
            panel.plot(*validation, "-" + marker, markersize=5, label=labels[number], **look)
        last = max(1, panel.get_xlim()[1])
        panel.set(xlabel="epoch", xlim=(0, last))
        panel.set_title(metric, fontsize=14)
        panel.locator_params(axis="x", integer=True)
        panel.grid(alpha=0.3)
        if metric == "accuracy":
            panel.yaxis.set_major_formatter("{x:.0%}")
    legend = panel.get_legend_handles_labels()
    title = "training dashed, validation solid"
    figure.legend(*legend, loc="outside lower center", ncols=columns, fontsize=fontsize, title=title, frameon=False)
    return figure


def save_picture(figure, path):
    """Write a matplotlib Figure; the ending of `path` chooses the format."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters of a name that the font does not have
        figure.savefig(picture := io.BytesIO(), format=path.suffix[1:], dpi=110)
    data.write_file(path, picture.getvalue())


def write_label(name):
    """A run's name for the legend: only text, not too long, and neither hidden (_name) nor a formula ($...$)."""
    name = os.fsencode(name).decode(errors="replace")
    if len(name) > 60:
        name = f"{name[:28]}...{name[-29:]}"
    return " " + name.replace("$", r"\$")


# ---------------------------------------------------------------------------------------------------------- one run
def name_run(settings):
    """The recipe, the rate, the augmentation, every other setting that differs from the recipe, and the seed."""
    name = f"{settings.recipe}-lr{write_value(settings.lr)}-{settings.augment}"
    for key, default in list_settings(settings.recipe).items():
        value = vars(settings)[key]
        if value != default and key not in ("lr", "augment", "seed", "device"):
            name += write_flag(key, value)[1:]
    return f"{name}-seed{settings.seed}".replace(":", ",")  # Windows allows no colon


def claim_folder(settings):
    """The run's folder: a new one or, with --resume, the newest of its name, if there is any.

    A run claims its folder by making it: if two runs start at once, only one can make it. The other one takes the next
    number or, with --name, is refused.
    """
    name, endings = settings.name, [""]
    if name is None:
        name = name_run(settings)
        endings += [f"-{number}" for number in range(2, 1000)]
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise UsageError(f"--name {name!r} must be the name of one folder, without slashes")
    experiments = Path(os.path.expanduser(settings.experiments))
    experiments.mkdir(parents=True, exist_ok=True)
    folders = [experiments / (name + ending) for ending in endings]
    taken = [folder for folder in folders if folder.exists()]
    mine = [folder for folder in taken if os.access(folder, os.W_OK)]  # in a shared folder, not another user's
    if settings.resume and mine:
        return mine[-1]
    if taken and len(folders) > 1:
        folders = folders[folders.index(taken[-1]) + 1 :]  # a new run has the highest number
    for folder in folders:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise UsageError(
        f"{folder} is there already: choose another --name, or continue that run with --resume, if you may write there"
    )


def lock_folder(folder):
    """A lock on the run, held until this process ends, even by SIGKILL; UsageError if another process has it."""
    try:
        return FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise UsageError(f"{folder} is in use by another process: wait, or choose another --name") from None
    except OSError as problem:
        if problem.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):  # a file system without locks
            raise
        print(f"{folder} cannot be locked ({first_line(problem)}): do not resume it twice at once", flush=True)
        return contextlib.nullcontext()


def wait_for(path):
    """Acquire a lock of `take_turn`; if that takes long, a line says why."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=2)
    except Timeout:
        holder = path.with_name("holder").read_text()
        hint = "if it is suspended, continue or end it; with OMP_NUM_THREADS=1 set for both, they train side by side"
        print(f"waiting for process {holder}, which is training on this CPU ({hint})", flush=True)
        return lock.acquire()


@contextlib.contextmanager
def take_turn(settings):
    """Hold the CPU for a stretch of training: this user's runs on one machine take turns.

    Side by side they would be several times slower: a run's threads wait for each other while another run uses their
    cores. Whoever holds `queue` is next, so a run that has just had its turn cannot overtake. A run does not wait if it
    trains on a GPU, if OMP_NUM_THREADS is set, or if there can be no locks. A killed process lets go of its locks.
    """
    with contextlib.ExitStack() as turn:
        if settings.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            with contextlib.suppress(OSError):
                user = getattr(os, "getuid", int)()  # Windows has none, but a temporary folder for each user
                folder = Path(tempfile.gettempdir(), f"train.py-{user}")
                folder.mkdir(exist_ok=True)
                with wait_for(folder / "queue"):
                    turn.enter_context(wait_for(folder / "turn"))
                (folder / "holder").write_text(str(os.getpid()))
        yield


def continue_run(settings, saved, folder):
    """The settings of a saved run, updated from the command line; UsageError if the command line contradicts the run.

    With --name, only a flag can contradict the run; without, so can a recipe that was edited after the run began. The
    command line may change the device, and with it the precision. After whole epochs at a constant rate and image size,
    no step has depended on the number of epochs, so --epochs may change as well.
    """
    stored = list_settings("baseline") | saved["settings"]  # a setting may be newer than the run
    if settings.name:
        settings = read_settings(sys.argv[1:], stored | {"precision": "auto"})
        settings.device = find_device(settings.device)
    moved = settings.device != stored["device"]
    if settings.precision == "auto" and not moved:
        settings.precision = stored["precision"]
    done = saved["rows"][-1]["epoch"]
    constant = settings.optimizer == "adam" and not settings.sizes
    extended = settings.epochs >= done == int(done) and constant
    free = {"device": True, "precision": moved, "epochs": extended}
    for key, value in stored.items():
        given = vars(settings)[key]
        if given != value and not free.get(key):
            reason = f"{folder} was started with {write_flag(key, value)}, not {write_flag(key, given)}"
            if key == "epochs":
                reason += " (only a run of whole epochs at a constant rate and image size can go on for more)"
            advice = f"continue it with --name={folder.name} and without that flag, or start a run with another --name"
            raise UsageError(f"{reason}: {advice}")
    return settings


def run():
    """One run, from its settings to its curves."""
    settings = read_settings(sys.argv[1:])
    settings.device = find_device(settings.device)
    train_set, val_set = data.load_cifar10(settings.data)
    folder = claim_folder(settings)
    with lock_folder(folder):
        saved = None
        if (folder / "checkpoint.pt").exists():
            saved = read_checkpoint(folder / "checkpoint.pt")
            settings = continue_run(settings, saved, folder)
        if settings.precision == "auto":
            settings.precision = choose_precision(settings.device)
        if count := settings.held_out:
            images, labels = train_set
            train_set = images[:-count], labels[:-count]
            val_set = images[-count:], labels[-count:]
        try:
            train(settings, train_set, val_set, folder, saved)
        except KeyboardInterrupt:
            again = shlex.join(["python", *sys.argv, f"--name={folder.name}", "--resume"])
            print(f"\nstopped. To go on after the last finished epoch:\n{again}", file=sys.stderr)
            raise
        curves = folder.parent / "curves.png"
        with survive(curves):
            save_picture(draw_curves(read_curves(folder.parent)), curves)
    print(f"finished: {folder / 'metrics.csv'}, curves of all runs in {curves}")


def train(settings, train_set, val_set, folder, saved):
    """Train from the beginning or, if something is `saved`, from there on; evaluate and save after each epoch."""
    train_set = [tensor.to(settings.device) for tensor in train_set]
    val_set = [tensor.to(settings.device) for tensor in val_set]
    with take_turn(settings):
        start = time.perf_counter()  # making the net counts as training time
        sample = data.normalize(data.to_float(train_set[0][:1000]))
        torch.manual_seed(settings.seed)
        generator = torch.Generator().manual_seed(settings.seed)
        nets, optimizers, loaders = [], [], []
        for _ in range(settings.nets):
            net, optimizer = build(settings, sample)
            nets.append(net)
            optimizers.append(optimizer)
            loaders.append(data.Loader(*train_set, settings.batch_size, settings.augment, generator))
        model, length = Ensemble(nets), len(loaders[0])
        seconds = time.perf_counter() - start
    step, steps = 0, max(1, round(settings.epochs * length))
    points, rows, how = [], [], "starts"
    stored = {key: vars(settings)[key] for key in BASELINE}
    command = shlex.join(["python", *sys.argv])
    if saved:
        points, rows = saved["points"], saved["rows"]
        step, seconds = rows[-1]["step"], rows[-1]["train_seconds"]
        how = "is finished" if step == steps else f"continues after step {step} of {steps}"
        longer = settings.epochs > saved["settings"]["epochs"]
        command = f"{saved['command']} && {command}" if longer else saved["command"]
        for loader in loaders:
            loader.epoch = len(rows)
        try:
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            generator.set_state(saved["generator"])  # after the loaders, which draw their flips from the seed
        except (RuntimeError, ValueError, KeyError) as problem:
            reason = f"does not fit this net and optimizer ({first_line(problem)})"
            raise UsageError(f"{folder / 'checkpoint.pt'} {reason}: start another run with --name") from None

    threads = torch.get_num_threads()
    print(f"run {folder} on {settings.device}, {threads} threads, {settings.precision}: {how}", flush=True)
    left_overs = [*folder.glob("*.part"), *folder.parent.glob("curves.png.*.part")]  # left by killed runs
    for left_over in left_overs:
        with contextlib.suppress(OSError):
            left_over.unlink()
    write_tables(folder, stored, command, rows)
    events = Events(folder / "events", stored)
    events.write(points)

    def report(point):
        points.append(point)
        if events.writer:  # after a failure, try again only once per epoch
            events.write(points)

    while step < steps:
        with take_turn(settings):
            start = time.perf_counter()
            step, training = train_epoch(model, optimizers, loaders, settings, step, steps, report)
            seconds += time.perf_counter() - start
            tta = settings.tta and step == steps  # it takes time, so only at the end
            validation = evaluate(model, *val_set, settings.precision, tta)
        if not math.isfinite(validation["val_loss"]):  # do not overwrite a good checkpoint
            raise FloatingPointError(f"the validation loss is not finite: try a --lr below {settings.lr:g}")

        now = {"epoch": step / length, "step": step}
        points.append(now | {"time": time.time()} | validation)
        rows.append(now | {"train_seconds": seconds} | training | validation)
        state = {  # all that it takes to resume the run or to load its net
            "format": FORMAT,
            "settings": stored,
            "command": command,
            "points": points,
            "rows": rows,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "generator": generator.get_state(),
        }
        torch.save(state, buffer := io.BytesIO())
        data.write_file(folder / "checkpoint.pt", buffer.getvalue(), patience=10)
        write_tables(folder, stored, command, rows)
        events.write(points)
        print(describe(rows[-1], steps), flush=True)


def describe(row, steps):
    """An epoch's results, as a line."""
    line = (
        "step {step} of {steps} (epoch {epoch:.3g}): training loss {train_loss:.4f}, accuracy {train_accuracy:.2%}, "
        "validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}, "
    )
    if "val_accuracy_tta" in row:
        line += "with test-time augmentation {val_accuracy_tta:.2%}, "
    return (line + "{train_seconds:.1f} s").format(steps=steps, **row)


# ------------------------------------------------------------------------------------------------------------- main
def stop(number, frame):
    """Ctrl-C and SIGTERM stop the run cleanly. A second one ends it at once."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def fail(code, message):
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(code)


def main():
    data.prepare_script()
    if not data.is_in_notebook():
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    try:
        run()
    except UsageError as problem:
        fail(2, problem)
    except (MemoryError, RuntimeError) as problem:
        if not is_out_of_memory(problem):
            raise
        fail(1, "out of memory: close other programs, or train narrower nets, or fewer (--widths, --nets)")
    except (data.DataError, FloatingPointError) as problem:
        fail(1, problem)
    except OSError as problem:
        where = f": {problem.filename}" if problem.filename else ""
        fail(1, f"{first_line(problem)}{where} (fix this, then continue with --resume)")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
