"""Train the CNN on CIFAR-10 and log its curves (assignment 2, task 2 b, c and e).

    python train.py --lr 1e-3                 the baseline, at the learning rates of Figure 2: 1e-3, 1e-4, 1e-5
    python train.py --lr 1e-3 --augment both  the same with data augmentation
    python train.py --recipe best             the best accuracy

Every run has a folder of its own under experiments/: TensorBoard events, metrics.csv, config.json and checkpoint.pt.
experiments/curves.png shows the curves of all runs in one picture.
"""

import argparse
import contextlib
import csv
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there two processes are not kept apart
    fcntl = None

import torch
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams
from tqdm import tqdm

import data
from loss import CrossEntropyLoss
from network import ConvNet

# What a recipe is: defaults. The first row of each can be set by flags, which win.
#
#   whiten           start from a fixed first layer that decorrelates neighbouring pixels, and from others that let it
#                    through (network.ConvNet.whiten, .pass_through)
#   muon             optimise by Muon (below) with a rate that falls linearly to 0: large steps first, then ever smaller
#                    ones that settle. What only scales is fixed (.fix_scales). Without: Adam at a constant rate.
#   sizes            (size, share) pairs: pictures are made that small until that share of the steps is done. What is
#                    learnt first, the coarse, is learnt from small pictures as well, for a fraction of the arithmetic.
#   label_smoothing  train towards targets that are not quite certain (loss.CrossEntropyLoss)
#   tta              also report the accuracy with test-time augmentation (mirrored and shifted views, averaged)
RECIPES = {
    "baseline": {
        "lr": 1e-3, "epochs": 5, "batch_size": 128, "augment": "none",
        "widths": (32, 80, 160), "whiten": False, "muon": False, "sizes": (), "label_smoothing": 0.0, "tta": False,
    },
    "quick": {
        "lr": 0.25, "epochs": 0.6, "batch_size": 250, "augment": "none",
        "widths": (32, 64, 64), "whiten": True, "muon": True, "sizes": ((24, 0.5),), "label_smoothing": 0.2,
        "tta": False,
    },
    "best": {
        "lr": 0.18, "epochs": 11, "batch_size": 1000, "augment": "position",
        "widths": (64, 256, 256), "whiten": True, "muon": True, "sizes": ((20, 0.2), (24, 0.6)), "label_smoothing": 0.2,
        "tta": True,
    },
}  # fmt: skip
COLUMNS = ("epoch", "step", "train_seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
# TensorBoard's tags, which lay all runs over each other in the same charts, and their columns
CURVES = {f"{metric}/{part}": f"{part}_{metric}" for metric in ("loss", "accuracy") for part in ("train", "val")}
# Colors that the color-blind tell apart: M. Okabe and K. Ito, "Color Universal Design", 2008
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to ask for instead."""


# ------------------------------------------------------------------------------------------------------ command line


def number(kind, low, high=sys.float_info.max, above=False):
    """An argparse type: a number of `kind` from `low` (or only above it) to `high`; nan and infinity are refused."""

    def parse(text):
        value = kind(text)  # argparse reports what is not a number
        if not (low < value if above else low <= value) or not value <= high:
            bounds = f"{'above' if above else 'from'} {low}" + (f" to {high:,}" if high < sys.float_info.max else "")
            raise argparse.ArgumentTypeError(f"{text} is not a {parse.__name__} {bounds}")
        return value

    parse.__name__ = {int: "whole number", float: "finite number"}[kind]
    return parse


def parser():
    def by_recipe(setting):
        values = ", ".join(f"{recipe} {values[setting]}" for recipe, values in RECIPES.items())
        return f"(default: by recipe, {values})"

    parser = argparse.ArgumentParser(usage="python train.py [options]", description="Train a CNN on CIFAR-10.")
    add = parser.add_argument
    # fmt: off
    add("--recipe", choices=RECIPES,
        help="set of defaults; flags given beside it win (default: baseline)")
    add("--lr", type=number(float, 0, above=True),
        help=f"learning rate {by_recipe('lr')}")
    add("--epochs", type=number(float, 0, 1e6, above=True), metavar="N",
        help=f"passes over the training set, may be a fraction {by_recipe('epochs')}")
    add("--batch-size", type=number(int, 2, 50_000), metavar="N",
        help=f"images in a step {by_recipe('batch_size')}")
    add("--augment", choices=data.AUGMENTATIONS,
        help=f"position: flip, shift; color: brightness, contrast, saturation, hue {by_recipe('augment')}")
    add("--seed", type=number(int, 0, 2**63 - 1), metavar="N",
        help="of all that is drawn by chance (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"),
        help="auto takes a GPU where there is one (default: auto)")
    add("--data", default="datasets", metavar="DIR",
        help="where CIFAR-10 is, or is put (default: %(default)s)")
    add("--experiments", default="experiments", metavar="DIR",
        help="where the runs' folders are (default: %(default)s)")
    add("--name",
        help="the run's folder (default: made of recipe, rate, augmentation and seed)")
    add("--resume", action="store_true",
        help="go on with the newest run of that name, from its last checkpoint")
    # fmt: on
    return parser


def settings_of(args):
    """What defines the run: the recipe's values, those given on the command line, and where and how to compute."""
    recipe = args.recipe or "baseline"
    settings = {"recipe": recipe, **RECIPES[recipe], "seed": 0, "device": "auto"}
    settings |= {key: value for key, value in vars(args).items() if key in settings and value is not None}
    settings["device"] = present(settings["device"])
    settings["precision"] = fastest_precision(settings["device"])
    return settings


def present(device):
    """The device of that name once it is clear that it is there; for "auto" the fastest there is."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    devices = [name for name in there if there[name]]
    if device not in ("auto", *devices):
        raise UsageError(f"--device {device} is not there: PyTorch sees {', '.join(devices)}")
    return devices[0] if device == "auto" else device


def fastest_precision(device):
    """ "bf16" where matrix products in it are faster than in fp32, else "fp32".

    Half as many bytes can mean twice the speed, but only with the right instructions: on a CPU without them, and on
    some that have them, bf16 is the slower one. So both are timed; it takes a fraction of a second.
    """
    if device == "cuda":  # older cards only imitate it
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp32"
    if device == "mps":
        return "fp32"
    for size in (128, 512):
        seconds = {torch.float32: math.inf, torch.bfloat16: math.inf}
        for _ in range(5):
            for dtype in seconds:
                a = torch.ones(size, size, dtype=dtype)
                start = time.perf_counter()
                a @ a
                seconds[dtype] = min(time.perf_counter() - start, seconds[dtype])
        if seconds[torch.bfloat16] > 3 * seconds[torch.float32]:
            return "fp32"  # bf16 is imitated, which takes long in larger products
    return "bf16" if seconds[torch.bfloat16] < 0.75 * seconds[torch.float32] else "fp32"


# ---------------------------------------------------------------------------------------------------------- training


class Muon:
    """Gradient descent with momentum; the step of a filter bank is made orthogonal: every direction moves as far.

    A gradient is mostly a few strong directions. Replacing its singular values by ones lets the weak ones learn too,
    which takes far fewer steps than SGD or Adam. (K. Jordan et al., "Muon: an optimizer for hidden layers in neural
    networks", 2024; the constants here are those of his speed-run airbench94, or close.) The filters themselves are
    kept at a fixed norm: batch norm undoes their scale anyway, and so one rate suits all layers. What is not a filter
    bank, the shifts and the linear layer, is stepped along its own gradient (SGD), summed over the batch so that an
    epoch goes as far in large batches as in small ones; it decays a little in each step.

    It has no base class, as the first optimizer of torch.optim that is made imports more than PyTorch itself does.
    """

    def __init__(self, parameters, lr, batch_size):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.lr = lr
        self.batch_size = batch_size

    @torch.no_grad()
    def step(self):
        for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
            if parameter.grad is None:
                continue
            momentum = 0.6 if parameter.ndim == 4 else 0.85
            velocity.mul_(momentum).add_(parameter.grad)
            direction = parameter.grad + momentum * velocity  # Nesterov: look one step ahead
            if parameter.ndim == 4:
                parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                parameter.sub_(self.lr * orthogonalize(direction.flatten(1)).view_as(parameter))
            else:
                # airbench94 divides the logits by the number of inputs, hence its square
                factor = 1 / 4 if parameter.ndim == 1 else 3.3 / parameter.shape[1] ** 2
                rate = self.lr * self.batch_size
                parameter.mul_(1 - 1e-5 * rate)
                parameter.sub_(rate * factor * direction)

    def state_dict(self):
        return {"velocities": self.velocities}

    def load_state_dict(self, state):
        for velocity, saved in zip(self.velocities, state["velocities"], strict=True):
            velocity.copy_(saved)


def orthogonalize(matrix, steps=3):
    """Roughly U V^T of the singular value decomposition U S V^T of a matrix, by Newton-Schulz iteration.

    Each step applies an odd polynomial to the singular values that pushes those in (0, 1] towards 1. It needs nothing
    but matrix products, which an SVD cannot compete with; the polynomial is that of Muon's authors.
    """
    x = matrix / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def autocast(device, precision):
    """A context for the forward pass: in it, matrix products are in bf16 if that is the precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def build(settings, train_images):
    """The network and its optimizer, as the settings say, on the device of `train_images`."""
    torch.manual_seed(settings["seed"])
    # Channels last: the CPU's convolutions are 1.4 to 2 times as fast with an image's channels next to each other.
    model = ConvNet(settings["widths"]).to(train_images.device, memory_format=torch.channels_last)
    if settings["whiten"]:
        model.whiten(data.normalize(data.to_float(train_images[:2000])))
        model.pass_through()
    if settings["muon"]:
        model.fix_scales()
        return model, Muon(model.parameters(), settings["lr"], settings["batch_size"])
    return model, torch.optim.Adam(model.parameters(), lr=settings["lr"])


def learning_rate(settings, done):
    """The rate once that share of the steps is done."""
    return settings["lr"] * (1 - done) if settings["muon"] else settings["lr"]


def train_step(model, optimizer, criterion, images, labels, precision):
    """One step of gradient descent. Returns the logits (B, 10), and the loss that was minimised as a float.

    The batch is worked through in parts, and the mean of their losses, weighted by their sizes, is that of the batch;
    so their gradients add up to its gradient. What a part of 250 images leaves behind on its way forward is still near
    the processor on its way back: a step of 1,000 is a quarter faster and takes a quarter of the memory. (Batch norm
    alone sees no more than a part.)
    """
    model.zero_grad()
    parts = math.ceil(len(images) / 250)
    logits, loss = [], 0
    for some, targets in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        with autocast(images.device, precision):
            outputs = model(some)
        outputs = outputs.float()
        weighted = criterion(outputs, targets) * (len(targets) / len(labels))
        weighted.backward()
        logits.append(outputs.detach())
        loss += weighted.item()
    optimizer.step()
    return torch.cat(logits), loss


def train_epoch(model, optimizer, criterion, batches, settings, step, steps):
    """Train on `batches`, (images, labels) pairs, from step number `step` of `steps` on.

    Returns the step number after the last of them; the loss, without smoothing so that all runs can be compared, and
    the accuracy, both as means over the images.
    """
    plain_loss = CrossEntropyLoss(reduction="sum")
    seen = loss_sum = correct = 0
    for images, labels in batches:
        if settings["muon"]:
            optimizer.lr = learning_rate(settings, step / steps)
            # The stem's shifts settle early (3 epochs of 8 in airbench94); after that its gradient, the costliest of
            # all, is spared
            model.stem.bias.requires_grad_(step < 3 / 8 * steps)
        size = next((size for size, share in settings["sizes"] if step < share * steps), images.shape[2])
        images = data.resize(images, size)
        logits, loss = train_step(model, optimizer, criterion, images, labels, settings["precision"])
        step += 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}: try a --lr below {settings['lr']:g}")
        seen += len(labels)
        loss_sum += plain_loss(logits, labels).item()
        correct += (logits.argmax(1) == labels).sum().item()
    return step, loss_sum / seen, correct / seen


def views(images):
    """(view, weight) pairs for test-time augmentation: the images as they are, shifted by a pixel, and all mirrored."""
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    for view, weight in ((images, 0.25), (padded[..., :height, :width], 0.125), (padded[..., 2:, 2:], 0.125)):
        yield view, weight
        yield view.flip(3), weight


@torch.no_grad()
def evaluate(model, images, labels, precision, tta=False):
    """Loss, accuracy and, with `tta`, accuracy with test-time augmentation (else None), in evaluation mode."""
    model.eval()
    plain_loss = CrossEntropyLoss(reduction="sum")
    loss = correct = correct_tta = 0
    for some, targets in zip(images.split(250), labels.split(250), strict=True):
        inputs = data.normalize(data.to_float(some))
        with autocast(images.device, precision):
            outputs = [(model(view).float(), weight) for view, weight in (views(inputs) if tta else [(inputs, 1)])]
        logits = outputs[0][0]
        loss += plain_loss(logits, targets).item()
        correct += (logits.argmax(1) == targets).sum().item()
        averaged = sum(weight * logits for logits, weight in outputs)
        correct_tta += (averaged.argmax(1) == targets).sum().item()
    model.train()
    return loss / len(images), correct / len(images), correct_tta / len(images) if tta else None


# --------------------------------------------------------------------------------------------------- files of a run


def write(path, save):
    """Write a file by `save(open file)` so that `path` is at any moment the old file whole or the new one whole."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")  # of this process alone
    buffer = io.BytesIO()  # first whole in memory: what fails below is the disk and nothing else
    save(buffer)
    try:
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as problem:
        partial.unlink(missing_ok=True)
        raise OSError(problem.errno, problem.strerror, str(path)) from None


def write_csv(path, columns, rows):
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write(path, lambda file: file.write(text.getvalue().encode()))


@contextlib.contextmanager
def events(folder):
    """A SummaryWriter for the events of a run; what cannot be written is an OSError that names the folder.

    It writes at once. tensorboardX has a thread for that, which dies of a full disk while we wait for it for ever.
    """
    writer = SummaryWriter(str(folder))
    file = writer.file_writer.event_writer
    file.add_event = file._ev_writer.write_event
    try:
        with writer:
            yield writer
    except OSError as problem:
        file._closed = True  # else it is closed again at exit, where nobody catches the error
        raise problem if problem.filename else OSError(problem.errno, problem.strerror, str(folder)) from None


def log(writer, row, lr):
    """One row of the metrics to TensorBoard."""
    for tag, column in CURVES.items():
        writer.add_scalar(tag, row[column], row["step"])
    writer.add_scalar("learning_rate", lr, row["step"])
    writer.flush()


def log_run(writer, settings, model, train_set):
    """What TensorBoard shows beside the curves: images as the network sees them, its graph, the settings (HPARAMS)."""
    generator = torch.Generator().manual_seed(settings["seed"])
    images, _ = next(iter(data.Loader(*train_set, 32, settings["augment"], generator)))
    writer.add_images("images", data.denormalize(images).cpu())
    with warnings.catch_warnings():  # it is traced by a part of PyTorch that wants to be replaced
        warnings.simplefilter("ignore")
        writer.add_graph(model.eval(), images[:1])
    values = {key: str(value) if isinstance(value, (tuple, list)) else value for key, value in settings.items()}
    for summary in hparams(values, CURVES):
        writer.file_writer.add_summary(summary)


def environment():
    """What, beside the settings, it takes to run the same again."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": commit or None,
        "versions": {"python": platform.python_version(), **versions},
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def finished_epochs(experiments):
    """{name: rows of metrics.csv} of every run under `experiments` that has come to the end of an epoch."""
    runs = {}
    for path in sorted(experiments.glob("*/metrics.csv")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, csv.Error):  # being deleted, or not ours
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file))
            if rows and all(math.isfinite(float(row[column])) for row in rows for column in COLUMNS):
                runs[path.parent.name] = rows
    return runs


def draw_curves(path, runs):
    """Draw loss and accuracy of `runs`, {name: rows of metrics.csv}, in one picture (Figure 2)."""
    from matplotlib.figure import Figure  # here, as importing it takes longer than the first steps of training

    figure = Figure(figsize=(11, 4.4 + 0.22 * len(runs) / 2), layout="constrained")
    panels = dict(zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True))
    for (name, rows), color in zip(runs.items(), itertools.cycle(COLORS), strict=False):
        name = " " + name.replace("$", r"\$")  # matplotlib hides labels that begin with _ and reads $...$ as a formula
        for metric, panel in panels.items():
            for part, style, label, inside in (("train", "o--", None, "white"), ("val", "o-", name, color)):
                points = [(float(row["epoch"]), float(row[f"{part}_{metric}"])) for row in rows]
                panel.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=4, mfc=inside)
    for metric, panel in panels.items():
        panel.set(xlabel="epoch", ylabel=metric, title=f"{metric}: training dashed and hollow, validation solid")
        panel.grid(alpha=0.3)
    panels["loss"].set_ylim(bottom=0)
    figure.legend(*panels["loss"].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    write(path, lambda file: figure.savefig(file, format="png", dpi=110))


def folders(args, settings):
    """The folders that a run of this name may have: NAME and, unless it was given, NAME-2, NAME-3, ..."""
    given = args.name is not None
    name = args.name if given else "{recipe}-lr{lr:g}-{augment}-seed{seed}".format(**settings)
    if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise UsageError(f"--name {name!r} must be the name of one folder, without slashes")
    yield Path(args.experiments, name)
    for count in () if given else itertools.count(2):
        yield Path(args.experiments, f"{name}-{count}")


def taken(folder):
    return UsageError(f"{folder} is there already: choose another --name, or go on with that run by --resume")


def new_folder(args, settings, fill):
    """Make the run's folder, under the first name that is free, with what `fill` puts in. Returns it and its claim.

    It is filled before it gets its name: a run that can be seen can be resumed, and of two that start at once under
    one name the second finds the name taken.
    """
    hidden = Path(args.experiments, f".new-{secrets.token_hex(8)}")
    try:
        hidden.mkdir(parents=True)
        fill(hidden)
        claimed = claim(hidden)
        for folder in folders(args, settings):
            try:
                return hidden.rename(folder), claimed
            except OSError:
                if not folder.exists():
                    raise
        raise taken(folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def old_folder(args, settings):
    """The folder of the run of this name that was saved last, to resume, and its claim."""
    possible = [folder / "checkpoint.pt" for folder in itertools.islice(folders(args, settings), 1000)]
    there = [checkpoint for checkpoint in possible if checkpoint.exists()]
    if not there:
        raise UsageError(f"nothing to resume: there is no {possible[0]}")
    folder = max(there, key=lambda checkpoint: checkpoint.stat().st_mtime).parent
    return folder, claim(folder)


def claim(folder):
    """Lock a run's folder for this process, until what is returned is closed or the process ends, be it by SIGKILL.

    Raises:
        UsageError: another process has it.
    """
    if not fcntl:
        return contextlib.nullcontext()
    file = open(folder / "config.json", "a")  # noqa: SIM115, run() closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder} is in use: that run is still going on, in another process") from None
    except OSError:  # a file system without locks: like Windows
        pass
    return file


def load_checkpoint(path, args, settings):
    """The checkpoint of a run to resume, once it is clear that it is one and that `args` does not contradict it."""
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")  # it may come from a GPU not here
        stored = checkpoint["settings"] = {key: checkpoint["settings"][key] for key in settings}
    except Exception as problem:  # torch.load has no error of its own for what it cannot read
        raise UsageError(f"{path} is no checkpoint of this train.py ({type(problem).__name__})") from None
    given = {key for key, value in vars(args).items() if value is not None}
    for key in (stored.keys() & given) - {"device"}:
        if stored[key] != getattr(args, key):
            flag = "--" + key.replace("_", "-")
            raise UsageError(
                f"{path.parent} was started with {flag} {stored[key]}: leave {flag} out to resume it, "
                "or say by --name which other run is meant"
            )
    return checkpoint


# ------------------------------------------------------------------------------------------------------------- main


def run(args):
    """One run from its settings to its curves."""
    settings, checkpoint = settings_of(args), None
    if args.resume:
        folder, claimed = old_folder(args, settings)
        checkpoint = load_checkpoint(folder / "checkpoint.pt", args, settings)
        if args.device and settings["device"] != checkpoint["settings"]["device"]:
            checkpoint["settings"] |= {key: settings[key] for key in ("device", "precision")}
        settings = checkpoint["settings"]
    elif args.name is not None and (folder := next(folders(args, settings))).exists():
        raise taken(folder)  # now, and not after a download
    device, precision = present(settings["device"]), settings["precision"]
    train_set, val_set = ([tensor.to(device) for tensor in part] for part in data.load_cifar10(args.data))

    start = time.perf_counter()
    step, rows = 0, []
    criterion = CrossEntropyLoss(label_smoothing=settings["label_smoothing"])
    generator = torch.Generator().manual_seed(settings["seed"])
    try:
        model, optimizer = build(settings, train_set[0])
        loader = data.Loader(*train_set, settings["batch_size"], settings["augment"], generator)
        steps = max(1, round(settings["epochs"] * len(loader)))
        train_seconds = time.perf_counter() - start
        if checkpoint:
            step, rows, train_seconds = checkpoint["step"], checkpoint["rows"], checkpoint["train_seconds"]
            loader.epoch = len(rows)
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            generator.set_state(checkpoint["generator"])
    except Exception as problem:
        if not checkpoint or out_of_memory(problem):
            raise
        raise UsageError(f"{folder / 'checkpoint.pt'} does not fit ({type(problem).__name__})") from None

    def save(folder):
        state = {
            "settings": settings, "step": step, "rows": rows, "train_seconds": train_seconds,
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
        }  # fmt: skip
        write(folder / "checkpoint.pt", lambda file: torch.save(state, file))

    def fill(folder):
        config = json.dumps({**settings, **environment()}, indent=2)
        write(folder / "config.json", lambda file: file.write(config.encode()))
        save(folder)  # so that there is something to resume from the first step on

    if checkpoint:
        # Events may hold points from after the checkpoint; its own are logged again below. Parts are of killed writers.
        for left_over in (*folder.glob("events.out.tfevents.*"), *folder.glob("*.part")):
            left_over.unlink()
    else:
        folder, claimed = new_folder(args, settings, fill)
    resumed = f", resumed after step {step} of {steps}" if checkpoint else ""
    threads = torch.get_num_threads()
    print(f"run {folder} on {device}, {threads} threads, {precision}, channels last{resumed}", flush=True)
    with claimed, events(folder) as writer:
        columns = [*COLUMNS, "val_accuracy_tta"] if settings["tta"] else COLUMNS
        write_csv(folder / "metrics.csv", columns, rows)
        writer.add_scalar("learning_rate", settings["lr"], 0)
        for row in rows:
            log(writer, row, learning_rate(settings, row["step"] / steps))

        while step < steps:
            start = time.perf_counter()
            batches = itertools.islice(loader, steps - step)
            batches = tqdm(batches, total=min(len(loader), steps - step), leave=False, disable=None)
            step, *training = train_epoch(model, optimizer, criterion, batches, settings, step, steps)
            train_seconds += time.perf_counter() - start

            *validation, tta = evaluate(model, *val_set, precision, tta=settings["tta"] and step == steps)
            if not math.isfinite(validation[0]):  # before it is saved in place of what was good
                raise FloatingPointError(f"the validation loss is {validation[0]}: try a --lr below {settings['lr']:g}")
            row = dict(zip(COLUMNS, (step / len(loader), step, train_seconds, *training, *validation), strict=True))
            if settings["tta"]:
                row["val_accuracy_tta"] = "" if tta is None else tta
            rows.append(row)
            save(folder)
            write_csv(folder / "metrics.csv", columns, rows)
            log(writer, row, learning_rate(settings, step / steps))
            print(
                f"epoch {row['epoch']:.4g} of {steps / len(loader):.4g}: "
                f"training loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}, "
                f"validation loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2%}"
                + ("" if tta is None else f", with test-time augmentation {tta:.2%}")
                + f", {train_seconds:.1f} s",
                flush=True,
            )
        draw_curves(folder.parent / "curves.png", finished_epochs(folder.parent))
        log_run(writer, settings, model, train_set)  # last: it takes longer than all that comes before the first step
    print(f"finished: {folder}{os.sep}metrics.csv, curves of all runs in {folder.parent / 'curves.png'}")


def out_of_memory(problem):
    """Whether an exception says so: PyTorch has no class of its own for it on every device."""
    signs = "out of memory|not enough memory|can't allocate memory"
    return isinstance(problem, MemoryError) or bool(re.search(signs, str(problem)))


def main():
    options = parser()
    args = options.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to stop, politely: like Ctrl-C
    try:
        run(args)
    except UsageError as problem:
        options.exit(2, f"train.py: {problem}\n")
    except (data.DataError, FloatingPointError, OSError) as problem:
        options.exit(1, f"train.py: {problem}\n")
    except (MemoryError, RuntimeError) as problem:
        if not out_of_memory(problem):
            raise
        options.exit(1, "train.py: out of memory: try a smaller --batch-size\n")
    except KeyboardInterrupt:
        options.exit(130, "\nstopped; once training has begun, the same command with --resume goes on from there\n")


if __name__ == "__main__":
    main()
