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
        "lr": 0.25, "epochs": 0.64, "batch_size": 250, "augment": "position",
        "widths": (32, 64, 64), "whiten": True, "muon": True, "sizes": ((24, 0.5),), "label_smoothing": 0.2,
        "tta": False,
    },
    "best": {
        "lr": 0.18, "epochs": 8, "batch_size": 1000, "augment": "position",
        "widths": (64, 256, 256), "whiten": True, "muon": True, "sizes": ((20, 0.25),), "label_smoothing": 0.2,
        "tta": True,
    },
}  # fmt: skip
COLUMNS = ("epoch", "step", "train_seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy")


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what to ask for instead."""


# ------------------------------------------------------------------------------------------------------ command line


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of `kind` in [low, high], or above 0 where low is None."""

    def parse(text):
        value = kind(text)  # argparse reports what is not a number
        if not math.isfinite(value) or value > high or (value <= 0 if low is None else value < low):
            bounds = ("above 0" if low is None else f"from {low}") + (f" to {high:,}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"{text} is not a finite number {bounds}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
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
    add("--lr", type=number(float, None),
        help=f"learning rate {by_recipe('lr')}")
    add("--epochs", type=number(float, None, 1e6), metavar="N",
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
    some that have them, bf16 is the slower one. So both are timed; it takes a few hundredths of a second.
    """
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    if device == "mps":
        return "fp32"
    seconds = {}
    for _ in range(5):
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            a @ a
            seconds[dtype] = min(time.perf_counter() - start, seconds.get(dtype, math.inf))
    return "bf16" if seconds[torch.bfloat16] < 0.75 * seconds[torch.float32] else "fp32"


# ---------------------------------------------------------------------------------------------------------- training


class Muon:
    """Gradient descent with momentum; the step of a filter bank is made orthogonal: every direction moves as far.

    A gradient is mostly a few strong directions. Replacing its singular values by ones lets the weak ones learn too,
    which takes far fewer steps than SGD or Adam. (K. Jordan et al., "Muon: an optimizer for hidden layers in neural
    networks", 2024.) The filters themselves are kept at a fixed norm: batch norm undoes their scale anyway, and so
    one rate suits all layers. What is not a filter bank, the shifts and the linear layer, is stepped along its own
    gradient (SGD), summed over the batch so that an epoch goes as far in large batches as in small ones; it decays a
    little in each step. The two factors are those of K. Jordan's airbench94.

    It keeps no base class, as importing torch.optim's takes longer than a tenth of the quick recipe.
    """

    def __init__(self, parameters, lr, batch_size):
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.velocities = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.lr = lr
        self.batch_size = batch_size

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

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
                rate = self.lr * self.batch_size
                parameter.mul_(1 - 1e-5 * rate)
                parameter.sub_(rate * (1 / 4 if parameter.ndim == 1 else 3.3 / parameter.shape[1] ** 2) * direction)

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
    if wide := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if wide else x


def build(settings, train_images):
    """The network and its optimizer, as the settings say, on the device of `train_images`."""
    torch.manual_seed(settings["seed"])
    # Channels last: the CPU's convolutions are 1.1 to 2 times as fast with an image's channels next to each other.
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
    """One step of gradient descent. Returns the logits (B, 10), and the loss that was minimised as a float."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(images)
    logits = logits.float()
    loss = criterion(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return logits.detach(), loss.item()


def views(images):
    """The views that test-time augmentation adds, with their weights: mirrored, and shifted by a pixel both ways."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    height, width = images.shape[2:]
    yield images.flip(3), 0.25
    for shifted in (padded[..., :height, :width], padded[..., 2:, 2:]):
        yield shifted, 0.125
        yield shifted.flip(3), 0.125


@torch.no_grad()
def evaluate(model, images, labels, precision, tta=False):
    """Loss, accuracy and, with `tta`, accuracy with test-time augmentation (else None), in evaluation mode."""
    model.eval()
    loss = correct = correct_tta = 0
    for some, targets in zip(images.split(1000), labels.split(1000), strict=True):
        inputs = data.normalize(data.to_float(some))
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(inputs).float()
            if tta:
                averaged = 0.25 * logits + sum(weight * model(view).float() for view, weight in views(inputs))
                correct_tta += (averaged.argmax(1) == targets).sum().item()
        loss += CrossEntropyLoss(reduction="sum")(logits, targets).item()
        correct += (logits.argmax(1) == targets).sum().item()
    model.train()
    return loss / len(images), correct / len(images), correct_tta / len(images) if tta else None


# --------------------------------------------------------------------------------------------------- files of a run


def write(path, save):
    """Write a file by `save(open file)` so that `path` is at any moment the old file whole or the new one whole."""
    partial = path.with_name(path.name + ".part")
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


def write_metrics(path, rows):
    columns = list(dict.fromkeys(itertools.chain(COLUMNS, *rows)))
    lines = [columns] + [[row.get(column, "") for column in columns] for row in rows]
    write(path, lambda file: file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode()))


CURVES = {f"{metric}/{part}": f"{part}_{metric}" for metric in ("loss", "accuracy") for part in ("train", "val")}


def log(writer, row, lr):
    """One row of the metrics to TensorBoard, under tags that lay all runs over each other in the same charts."""
    for tag, column in CURVES.items():
        writer.add_scalar(tag, row[column], row["step"])
    writer.add_scalar("learning_rate", lr, row["step"])


def log_start(writer, settings, model, train_set):
    """What TensorBoard shows beside the curves: some images as the network sees them, and the network's graph."""
    generator = torch.Generator().manual_seed(settings["seed"])  # one of its own: the training draws as without this
    images, _ = next(iter(data.Loader(*train_set, 32, settings["augment"], generator)))
    writer.add_images("images", data.denormalize(images).cpu())
    writer.add_scalar("learning_rate", settings["lr"], 0)
    model.eval()
    with warnings.catch_warnings():  # it is traced by a part of PyTorch that wants to be replaced
        warnings.simplefilter("ignore")
        writer.add_graph(model, images[:1])
    model.train()


def log_end(writer, settings):
    """The settings beside the final figures, for TensorBoard's table of runs (HPARAMS)."""
    values = {key: str(value) if isinstance(value, (tuple, list)) else value for key, value in settings.items()}
    for summary in hparams(values, CURVES):
        writer.file_writer.add_summary(summary)


def environment():
    """What, beside the settings, it takes to run the same again."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git_commit": commit or None,
        "versions": {"python": platform.python_version(), **versions},
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def draw_curves(experiments):
    """Draw loss and accuracy of every run under `experiments`, in curves.png there (Figure 2)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = dict(zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True))
    # Colors that the color-blind tell apart: M. Okabe and K. Ito, "Color Universal Design", 2008
    colors = itertools.cycle(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"))
    for path, color in zip(sorted(experiments.glob("*/metrics.csv")), colors, strict=False):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        if not rows or not rows[0].keys() >= set(COLUMNS):  # still in its first epoch, or none of ours
            continue
        for metric, panel in panels.items():
            for part, style in (("train", "o--"), ("val", "o-")):
                points = [(float(row["epoch"]), float(row[f"{part}_{metric}"])) for row in rows]
                label = f"{path.parent.name}, {part}"
                panel.plot(*zip(*points, strict=True), style, color=color, label=label, markersize=3.5)
    for metric, panel in panels.items():
        panel.set(xlabel="epoch", ylabel=metric, title=f"{metric}: training dashed, validation solid")
        panel.grid(alpha=0.3)
    panels["loss"].set_ylim(bottom=0)
    handles, labels = panels["loss"].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    write(experiments / "curves.png", lambda file: figure.savefig(file, format="png", dpi=150))


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
    hidden = Path(args.experiments, f".new-{os.getpid()}")
    try:
        hidden.mkdir(parents=True, exist_ok=True)
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
    """The newest folder of a run of this name, to resume, and its claim."""
    there = list(itertools.takewhile(Path.exists, folders(args, settings)))
    folder = there[-1] if there else next(folders(args, settings))
    if not (folder / "checkpoint.pt").exists():
        raise UsageError(f"nothing to resume: there is no {folder / 'checkpoint.pt'}")
    return folder, claim(folder)


def claim(folder):
    """What keeps the run to this process until it is closed or the process ends, be it by SIGKILL.

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
    return file


def load_checkpoint(path, args, settings):
    """The checkpoint of a run to resume, once it is clear that it is one and that `args` does not contradict it."""
    try:
        checkpoint = torch.load(path, weights_only=True)
        stored = checkpoint["settings"] = {key: checkpoint["settings"][key] for key in settings}
    except Exception as problem:  # torch.load has no error of its own for what it cannot read
        raise UsageError(f"{path} is no checkpoint of this train.py ({type(problem).__name__})") from None
    for key in stored.keys() & {key for key, value in vars(args).items() if value not in (None, "auto")}:
        if stored[key] != getattr(args, key):
            flag = "--" + key.replace("_", "-")
            raise UsageError(f"{path.parent} was started with {flag} {stored[key]}: leave {flag} out to resume it")
    return checkpoint


# ------------------------------------------------------------------------------------------------------------- main


def run(args):
    settings, checkpoint = settings_of(args), None
    if args.resume:
        folder, claimed = old_folder(args, settings)
        checkpoint = load_checkpoint(folder / "checkpoint.pt", args, settings)
        settings = checkpoint["settings"]
    elif args.name is not None and (folder := next(folders(args, settings))).exists():
        raise taken(folder)  # now, and not after a download
    device, precision = present(settings["device"]), settings["precision"]
    train_set, val_set = ([tensor.to(device) for tensor in part] for part in data.load_cifar10(args.data))

    start = time.perf_counter()
    step, rows = 0, []
    criterion = CrossEntropyLoss(label_smoothing=settings["label_smoothing"])
    report = CrossEntropyLoss(reduction="sum")  # logged without smoothing: comparable between all runs
    generator = torch.Generator().manual_seed(settings["seed"])
    try:
        model, optimizer = build(settings, train_set[0])
        loader = data.Loader(*train_set, settings["batch_size"], settings["augment"], generator)
        steps = max(1, round(settings["epochs"] * len(loader)))
        if checkpoint:
            step, rows, loader.epoch = checkpoint["step"], checkpoint["rows"], len(checkpoint["rows"])
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            generator.set_state(checkpoint["generator"])
    except Exception as problem:
        if not checkpoint:
            raise
        raise UsageError(f"{folder / 'checkpoint.pt'} does not fit ({type(problem).__name__})") from None
    train_seconds = checkpoint["train_seconds"] if checkpoint else time.perf_counter() - start

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
        for events in folder.glob("events.out.tfevents.*"):
            events.unlink()  # they may hold points from after the checkpoint; its own are logged again below
    else:
        folder, claimed = new_folder(args, settings, fill)
    print(f"run {folder} on {device}, {torch.get_num_threads()} threads, {precision}, channels last", flush=True)
    with claimed, SummaryWriter(str(folder)) as writer:
        write_metrics(folder / "metrics.csv", rows)
        log_start(writer, settings, model, train_set)
        for row in rows:
            log(writer, row, learning_rate(settings, row["step"] / steps))

        while step < steps:
            start = time.perf_counter()
            seen = loss_sum = correct = 0
            batches = itertools.islice(loader, steps - step)
            for images, labels in tqdm(batches, total=min(len(loader), steps - step), leave=False, disable=None):
                if settings["muon"]:
                    optimizer.lr = learning_rate(settings, step / steps)
                    # The stem's shifts settle early; after that its gradient, the costliest of all, is spared
                    model.stem.bias.requires_grad_(step < 3 / 8 * steps)
                size = next((size for size, share in settings["sizes"] if step < share * steps), images.shape[2])
                images = data.resize(images, size)
                logits, loss = train_step(model, optimizer, criterion, images, labels, precision)
                step += 1
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} at step {step}: try a --lr below {settings['lr']:g}")
                seen += len(labels)
                loss_sum += report(logits, labels).item()
                correct += (logits.argmax(1) == labels).sum().item()
            train_seconds += time.perf_counter() - start

            done = step == steps
            val_loss, val_accuracy, val_accuracy_tta = evaluate(
                model, *val_set, precision, tta=settings["tta"] and done
            )
            values = (step / len(loader), step, train_seconds, loss_sum / seen, correct / seen, val_loss, val_accuracy)
            row = dict(zip(COLUMNS, values, strict=True))
            if settings["tta"]:
                row["val_accuracy_tta"] = val_accuracy_tta if done else ""
            rows.append(row)
            save(folder)
            write_metrics(folder / "metrics.csv", rows)
            log(writer, row, learning_rate(settings, step / steps))
            print(
                f"epoch {row['epoch']:.4g} of {steps / len(loader):.4g}: "
                f"training loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}, "
                f"validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}"
                + (f", with test-time augmentation {val_accuracy_tta:.2%}" if val_accuracy_tta else "")
                + f", {train_seconds:.1f} s",
                flush=True,
            )
        log_end(writer, settings)
    draw_curves(folder.parent)
    print(f"finished: {folder}{os.sep}metrics.csv, curves of all runs in {folder.parent / 'curves.png'}")


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
        if "memory" not in f"{type(problem)} {problem}".lower():
            raise
        options.exit(1, "train.py: out of memory: try a smaller --batch-size\n")
    except KeyboardInterrupt:
        options.exit(130, "\nstopped; once training has begun, the same command with --resume goes on from there\n")


if __name__ == "__main__":
    main()
