"""Train the CNN on CIFAR-10 and log its curves (assignment 2, task 2 b, c and e).

    python train.py --lr 1e-3                   the baseline, at the rates of Figure 2: 1e-3, 1e-4, 1e-5
    python train.py --lr 1e-3 --augment both    the same with data augmentation
    python train.py --recipe quick              75% in seconds; other recipes take longer and reach more
    python train.py --resume experiments/NAME   go on with a run that was stopped

Each run has a folder in experiments/. checkpoint.pt is all that --resume and `load` need. The rest is for people:
config.json (the settings), metrics.csv (a row per epoch), and TensorBoard's events. curves.png shows all runs.
"""

import argparse
import contextlib
import csv
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

import data
from loss import CrossEntropyLoss
from network import ConvNet, Ensemble, Muon, backpropagate, compute_logits

# A recipe is a command line that has a name; of a flag that is there twice, the last one counts. The tricks that all
# but the baseline share:
FAST = (
    "--lr 0.2 --batch-size 500 --augment position --sizes 16:0.2 24:0.6 --whiten --mirror --optimizer muon --decay "
    "--label-smoothing 0.1 --tta"
)
# A wide net overfits less if it sees the images in other colors too
WIDE = f"{FAST} --augment both --widths 64 256 256"
RECIPES = {
    "baseline": "",  # the plain way to train a CNN: the defaults of `read_settings`
    "quick": (  # 75% as soon as possible: a small net that sees few, small images
        f"{FAST} --lr 0.22 --epochs 0.34 --batch-size 128 --augment none --widths 32 64 64 --sizes 24:0.5 "
        "--label-smoothing 0.2 --no-tta"
    ),
    "coffee": f"{FAST} --epochs 3.6 --widths 32 128 128",
    "lunch": f"{FAST} --epochs 5 --widths 64 192 192",
    "dinner": f"{WIDE} --epochs 9 --lr 0.18 --batch-size 1000",
    "best": f"{WIDE} --epochs 8.7 --nets 3",  # 20 to 30 minutes on two recent cores
}
FORMAT = 9  # the version of checkpoint.pt: raise it when old ones no longer fit the net, the optimizer or the settings
# Colors that the color-blind tell apart: M. Okabe and K. Ito, "Color Universal Design", 2008
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class RunError(Exception):
    """A run cannot start or go on; the message says why in one line."""


def shorten(problem):
    """The message of an exception, on one line and at most 300 characters long."""
    return " ".join(str(problem).split())[:300]


# --------------------------------------------------------------------------------------------------------- settings
def between(kind, low, high):
    """Make a function with which argparse reads a number and checks that it is from `low` to `high`."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:  # written so that nan fails, too
            raise argparse.ArgumentTypeError(f"{text} must be from {low:,} to {high:,}")
        return value

    return number


def size_and_share(text):
    """ "16:0.2" -> (16, 0.2): train on images of 16x16 pixels until 0.2 of the steps are done."""
    try:
        size, share = text.split(":")
        return between(int, 16, 64)(size), between(float, 0, 1)(share)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} must look like 16:0.2") from None


def read_settings(arguments=None):
    """The settings of a command line, and the checkpoint that --resume names or None.

    A flag that is not given has the recipe's value or, with --resume, the checkpoint's; but --device is chosen by
    the machine that goes on.
    """
    # fmt: off
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--recipe", choices=RECIPES, default="baseline",
        help="defaults: baseline is plain; quick is fast; coffee, lunch, dinner and best take longer and reach more")
    first.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, with its settings; "
        "without --decay and --sizes it can be given more --epochs")
    chosen, _ = first.parse_known_args(arguments)

    parser = argparse.ArgumentParser(
        parents=[first],
        usage="python train.py [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument

    def add_number(flag, default, low, high, meaning):
        add(flag, default=default, type=between(type(default), low, high), help=meaning)

    def add_switch(flag, meaning):
        add(flag, default=False, action=argparse.BooleanOptionalAction, help=meaning)

    here = "cuda" if torch.cuda.is_available() else "cpu"
    add_number("--lr", 1e-3, 1e-9, 1e3,
        "learning rate: how far a step moves the weights")
    add_number("--epochs", 5.0, 1e-6, 1e6,
        "how many times each training image is seen; may be a fraction")
    add_number("--batch-size", 128, 2, 50_000,
        "images per step: more give a better direction, but fewer steps")
    add("--augment", default="none", choices=data.AUGMENTATIONS,
        help="change training images at random: position (flips and shifts), color, or both")
    width = between(int, 1, 4096)
    add("--widths", default=[32, 64, 128], type=width, nargs="+",
        help="channels of the net's groups of layers: wide ones learn more and cost more")
    add_number("--nets", 1, 1, 100,
        "train this many networks and average their logits: their mistakes differ (network.Ensemble)")
    add("--sizes", default=[], type=size_and_share, nargs="*",
        help="16:0.2 24:0.6 shrinks images to 16x16 until 0.2 of the steps are done, then to 24x24 until 0.6: "
             "small images cost less and show the coarse shapes, which a net learns first")
    add_switch("--whiten",
        "start from computed weights instead of random ones (ConvNet.whiten)")
    add_switch("--mirror",
        "treat an image and its mirror image alike, and so learn from both (network.symmetrize)")
    add("--optimizer", default="adam", choices=["adam", "muon"],
        help="what turns gradients into steps (network.Muon)")
    add_switch("--decay",
        "let the learning rate fall to 0: large steps get far, and small ones settle at the end")
    add_number("--label-smoothing", 0.0, 0, 1,
        "spread this share of each target over all classes (loss.CrossEntropyLoss)")
    add_switch("--tta",
        "at the end, also measure accuracy with test-time augmentation (data.views)")
    add_number("--held-out", 0, 0, 49_998,
        "for tuning: validate on the last N training images, and train on the others")
    add_number("--seed", 0, 0, 2_147_483_647,
        "seed of all random numbers: the same seed gives the same run")
    add("--device", default=here, choices=["cuda", "mps", "cpu"],
        help="where to compute")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"],
        help="number format: auto takes bf16 where an x86 CPU or an NVIDIA card computes in it")
    add("--data", default="datasets",
        help="folder of CIFAR-10, fetched if missing")
    add("--experiments", default="experiments",
        help="folder of all runs")
    add("--name",
        help="name of this run's folder; by default it is made from the settings")
    # fmt: on
    parser.set_defaults(command=shlex.join(["python", *sys.argv]))
    saved = None if chosen.resume is None else read_checkpoint(chosen.resume)
    if saved:
        begun = saved["settings"]
        parser.set_defaults(**begun | {"device": here})
    else:
        recipe = parser.parse_args(RECIPES[chosen.recipe].split())
        parser.set_defaults(**vars(recipe))
    settings = parser.parse_args(arguments)

    shares = [share for _, share in settings.sizes]
    if shares != sorted(set(shares)) or settings.widths[3:]:
        parser.error("--sizes must have shares that grow, such as 16:0.2 24:0.6, and --widths at most 3 numbers")
    divisor = math.gcd(*settings.widths, *dict(settings.sizes))
    if settings.mirror and (divisor % 8 or not settings.whiten):
        parser.error("--mirror needs --whiten, and --widths and --sizes divisible by 8")
    check_device(settings.device, parser)
    if saved:
        check_resumed(settings, begun, parser)
    return settings, saved


def check_device(device, parser):
    """Refuse a device on which this PyTorch cannot compute."""
    try:
        torch.ones(1, device=device).exp()
    except Exception as problem:  # no such device, or not one that this PyTorch supports
        parser.error(f"--device {device} cannot be used ({shorten(problem)}): try --device cpu")


def check_resumed(settings, begun, parser):
    """Refuse flags that would change a run that has `begun` with other settings."""
    extendable = not (settings.decay or settings.sizes or begun["epochs"] % 1)
    for key, value in begun.items():
        given = getattr(settings, key)
        longer = key == "epochs" and extendable and given > value  # the steps so far would have been the same
        if given != value and key not in ("resume", "device", "precision", "data") and not longer:
            flag = "--" + key.replace("_", "-")
            parser.error(f"--resume cannot change {flag} from {value} to {given}: leave it out, or start a new run")


def choose_precision(settings):
    """The --precision; for auto "bf16" where an x86 CPU or an NVIDIA card computes in it, else "fp32"."""
    if settings.precision != "auto":
        return settings.precision
    if settings.device == "cpu":  # it is asked, not timed: so the same command always takes the same precision
        fast = torch.cpu.get_capabilities().get("avx512_bf16")
    else:  # older GPUs only emulate it
        fast = settings.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    return "bf16" if fast else "fp32"


# --------------------------------------------------------------------------------------------------------- training
def build(settings, images):
    """A new Ensemble and its optimizer, on the device of `images`, with random weights from PyTorch's generator.

    Args:
        settings: what `read_settings` returns.
        images: (N, 3, H, W) normalized images, a sample of the training set, for `whiten`.
    """
    nets = []
    for _ in range(settings.nets):
        net = ConvNet(settings.widths, settings.mirror)
        # Channels last: the CPU's convolutions are 1.4 to 2 times as fast with an image's channels next to each other.
        net.to(images.device, memory_format=torch.channels_last)
        if settings.whiten:
            net.whiten(images)
            net.start_as_identity()
        if settings.optimizer == "muon":
            net.freeze_scales()
            net.follow_faster()
            net.start_undecided()
        nets.append(net)
    model = Ensemble(nets)
    if settings.optimizer == "muon":
        return model, Muon(model.parameters(), settings.lr, settings.batch_size)
    return model, torch.optim.Adam(model.parameters(), settings.lr)


def learning_rate(settings, step, steps):
    """The learning rate of a step."""
    if settings.decay:
        return settings.lr * (1 - step / steps)
    return settings.lr


def image_size(settings, step, steps):
    """Height and width of the training images in a step."""
    for size, share in settings.sizes:
        if step < share * steps:
            return size
    return data.SIZE


def accuracy(logits, labels):
    """(B,) float64 on the CPU: 1 for each image whose largest logit is its label's, else 0."""
    return (logits.argmax(1) == labels).cpu().double()


# What is logged. A new metric is one more entry: a function that returns a value for each image. This loss is without
# label smoothing, so runs can be compared.
METRICS = {"loss": CrossEntropyLoss(reduction="none"), "accuracy": accuracy}


def train_epoch(model, optimizer, loaders, settings, step, steps, log):
    """Train for an epoch from step number `step` on; stop early at step number `steps`.

    In each step, each network of the Ensemble `model` learns from the next batch of its own loader. About twenty times
    `log` gets the step, and the means over the networks and their images since the last time. Returns the number of
    the next step, and the means over the epoch.
    """
    criterion = CrossEntropyLoss(label_smoothing=settings.label_smoothing)
    precision = choose_precision(settings)
    length = len(loaders[0])
    every = max(1, round(length / 20))
    recent, total = Counter(), Counter()  # sums over images

    def average(sums):
        return {f"train_{metric}": sums[metric] / sums["images"] for metric in METRICS}

    model.train()
    batches = zip(*loaders)
    count = min(length, steps - step)
    for batch in tqdm(batches, total=count, leave=False, disable=None):  # None: only on a terminal
        size = image_size(settings, step, steps)
        model.zero_grad()
        for net, (images, labels) in zip(model.nets, batch):
            images = data.resize(images, size)
            logits = backpropagate(net, criterion, images, labels, precision)
            recent["images"] += len(labels)
            for metric, measure in METRICS.items():
                recent[metric] += measure(logits, labels).sum().item()
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step, steps)
        optimizer.step()
        step += 1
        if step % length % every == 0 or step == steps:
            log(step, average(recent))
            total.update(recent)  # adds to it
            recent.clear()
        if step == steps:
            break
    return step, average(total)


@torch.no_grad()
def predict(model, images, precision, tta):
    """The logits of uint8 images by a model in evaluation mode; with `tta` the weighted mean over several views."""
    logits = []
    for part in images.split(250):
        part = data.normalize(part)
        views = data.views(part) if tta else [(part, 1)]
        logits.append(sum(weight * compute_logits(model, view, precision) for view, weight in views))
    return torch.cat(logits)


def evaluate(model, images, labels, precision, tta):
    """{"val_loss", "val_accuracy" and, with `tta`, "val_accuracy_tta"} of uint8 images, in evaluation mode."""
    model.eval()
    logits = predict(model, images, precision, tta=False)
    means = {}
    for metric, measure in METRICS.items():
        means[f"val_{metric}"] = measure(logits, labels).mean().item()
    if tta:  # only the least certain quarter: other answers hardly ever change (Hiverge's speed-run, 2025)
        certainty = logits.softmax(1).amax(1)
        unsure = certainty.argsort()[: math.ceil(len(labels) / 4)]
        logits[unsure] = predict(model, images[unsure], precision, tta=True)
        means["val_accuracy_tta"] = accuracy(logits, labels).mean().item()
    return means


# ---------------------------------------------------------------------------------------------------- files of a run
def make_folder(settings):
    """A new folder for a run: --name, or how it differs from its recipe (and if that is taken, -2, -3 and so on)."""
    usual, _ = read_settings(["--recipe", settings.recipe, "--device", settings.device])
    name = f"{settings.recipe}-lr{settings.lr:g}-{settings.augment}"
    for key, value in vars(settings).items():
        if value != getattr(usual, key) and key not in ("lr", "augment", "seed", "data", "experiments"):
            name += f"-{key}=" + re.sub(r"[^\w.,-]", "", str(value))  # [(24, 0.5)] -> 24,0.5
    name += f"-seed{settings.seed}"

    experiments = Path(settings.experiments).expanduser()
    experiments.mkdir(parents=True, exist_ok=True)
    folder = experiments / (settings.name or name)
    for number in itertools.count(2):
        try:
            folder.mkdir()  # if two runs start at once, only one can make it
            return folder
        except FileExistsError:
            if settings.name:
                raise RunError(
                    f'{folder} is there already: choose another --name, or go on with --resume "{folder}"'
                ) from None
        folder = experiments / f"{name}-{number}"


def read_checkpoint(folder):
    """What `save` has written; RunError if there is nothing that this code can read."""
    path = Path(folder, "checkpoint.pt")
    if not path.exists():
        raise RunError(f"{path} is missing: {folder} is no run, or one that never began (then delete it)")
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError
        saved = torch.load(path, weights_only=True, map_location="cpu")
        version = saved["format"]
    except Exception:  # torch.load raises many kinds of error
        raise RunError(f"{path} cannot be read, or is damaged, or is no checkpoint: start another run") from None
    if version != FORMAT:
        raise RunError(f"{path} has format {version}, this code reads {FORMAT}: start another run")
    return saved


def load(folder):
    """The Ensemble of a run as last saved, in evaluation mode, on the CPU; RunError if none is there."""
    saved = read_checkpoint(folder)
    settings = argparse.Namespace(**saved["settings"])
    nets = [ConvNet(settings.widths, settings.mirror) for _ in range(settings.nets)]
    model = Ensemble(nets)
    model.load_state_dict(saved["model"])
    return model.eval()


@functools.cache  # a problem that stays gets one line
def warn(line):
    print(f"train.py: {line}", file=sys.stderr)


@contextlib.contextmanager
def survive(what):
    """If this block fails, say so in a line and go on: only the checkpoint must be written."""
    try:
        yield
    except Exception as problem:
        warn(f"cannot {what} ({shorten(problem)}): continuing without it")


def write_config(folder, settings):
    """config.json: the settings of the run, the command that began it, and what computes it."""
    config = vars(settings) | {
        "precision": choose_precision(settings),
        "versions": f"Python {sys.version}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_metrics(folder, rows):
    """metrics.csv: what each epoch measured."""
    columns = max(rows, key=len)  # with test-time augmentation, the last row has a column more
    with open(folder / "metrics.csv", "w") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def open_events(folder, step):
    """Start a new file for TensorBoard, which drops what older files have after this step: a killed run repeats it.

    (tensorboardX's SummaryWriter writes in a thread. That dies of a full disk unnoticed, and then the run never ends.)
    """
    events = EventsWriter(f"{folder}/events", f".{step:07}")
    start = SessionLog(status=SessionLog.START)
    events.write_event(Event(step=step + 1, session_log=start))
    return events


def write_events(events, step, means):
    """Add a point to each curve: train_loss becomes loss/train, in one chart with loss/val."""
    for key, value in means.items():
        part, metric = key.split("_", 1)
        summary = scalar(f"{metric}/{part}", value)
        events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
    events.flush()


def read_curves(experiments):
    """{run: {"train_loss": (epochs, values), ...}} of all runs in a folder."""
    runs = {}
    for path in sorted(experiments.glob("*/checkpoint.pt")):
        with survive(f"draw the curves of {path.parent}"):
            runs[path.parent.name] = read_checkpoint(path.parent)["progress"]["curves"]
    return runs


def draw_curves(runs):
    """A matplotlib Figure of the curves of `runs`, from `read_curves`, with a panel for each metric (Figure 2)."""
    from matplotlib.figure import Figure  # not at the top, because it takes longer than the first steps of training

    figure = Figure(figsize=(9, 4.2 + 0.22 * len(runs)), layout="constrained")
    panels = figure.subplots(1, len(METRICS))
    for metric, panel in zip(METRICS, panels):
        for (name, curves), color in zip(runs.items(), itertools.cycle(COLORS)):
            if f"val_{metric}" in curves:  # else no epoch is finished, or the run is older than the metric
                panel.plot(*curves[f"train_{metric}"], color=color, alpha=0.5, linewidth=1)
                panel.plot(*curves[f"val_{metric}"], "o-", color=color, linewidth=2, label=name)
        panel.set(title=metric, xlabel="epoch")
        panel.locator_params(axis="x", integer=True)
        if metric == "accuracy":
            panel.yaxis.set_major_formatter("{x:.0%}")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", title="thin: training, strong: validation"
    )
    return figure


# ---------------------------------------------------------------------------------------------------------- one run
def take_turn(device):
    """For a `with` block: hold the CPU while this user's other runs on it wait.

    Side by side they would be several times slower: a run's threads wait for each other while another run uses their
    cores. A run on a GPU, or with OMP_NUM_THREADS set, does not wait. If a process is killed, its lock is released.
    """
    if device != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return contextlib.nullcontext()
    lock = FileLock(f"{tempfile.gettempdir()}/train.py-{os.environ.get('USER')}.lock")
    try:
        return lock.acquire(timeout=1, poll_interval=0.01)
    except Timeout:
        print("waiting for another run on this CPU (with OMP_NUM_THREADS=1 set they train side by side)")
        return lock.acquire(poll_interval=0.01)
    except OSError:  # this system has no locks
        return contextlib.nullcontext()


def train(settings, train_set, val_set, folder, saved):
    """Train a new net or, if something is `saved`, go on with that; evaluate and save after each epoch."""
    start = time.perf_counter()  # making the nets counts as training time
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    model, optimizer = build(settings, data.normalize(train_set[0][:1000]))
    loaders = [data.Loader(*train_set, settings.batch_size, settings.augment, generator) for _ in model.nets]
    length = len(loaders[0])
    steps = max(1, round(settings.epochs * length))
    progress = argparse.Namespace(step=0, epoch=0, curves={}, rows=[])
    progress.seconds = time.perf_counter() - start
    if saved:
        vars(progress).update(saved["progress"])
        try:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        except Exception as problem:
            raise RunError(f"{folder}/checkpoint.pt does not fit this net: {shorten(problem)}") from None
        generator.set_state(saved["generator"])  # after the loaders, which have drawn from it
        for loader in loaders:
            loader.epoch = progress.epoch
    precision = choose_precision(settings)
    print(f"run {folder} on {settings.device}, {precision}: step {progress.step} of {steps}")
    with survive("write config.json"):
        write_config(folder, settings)
    events = None
    with survive("open TensorBoard's events"):
        events = open_events(folder, progress.step)

    def log(step, means):
        for key, value in means.items():
            if not math.isfinite(value):  # stop before `save`: the last checkpoint stays good
                raise RunError(f"{key} is {value} at step {step}: try a --lr below {settings.lr:g}")
            epochs, values = progress.curves.setdefault(key, ([], []))
            epochs.append(step / length)
            values.append(value)
        if events:
            with survive("write TensorBoard's events"):
                write_events(events, step, means)

    def save():
        # The checkpoint comes last: if the run is killed before it, the resumed run writes all of this again.
        if progress.rows:
            with survive("write metrics.csv"):
                write_metrics(folder, progress.rows)
        state = {  # all that it takes to resume the run or to load its net
            "format": FORMAT,
            "settings": vars(settings),
            "progress": vars(progress),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
        }
        torch.save(state, buffer := io.BytesIO())
        data.write_file(folder / "checkpoint.pt", buffer.getvalue())

    save()  # before the first step: so every run can be resumed, and a full disk shows at once
    while progress.step < steps:
        with take_turn(settings.device):
            start = time.perf_counter()
            progress.step, training = train_epoch(model, optimizer, loaders, settings, progress.step, steps, log)
            progress.epoch += 1
            progress.seconds += time.perf_counter() - start
            tta = settings.tta and progress.step == steps  # it takes time, so only at the end
            validation = evaluate(model, *val_set, precision, tta)
        log(progress.step, validation)
        spent = {"epoch": progress.step / length, "step": progress.step, "train_seconds": progress.seconds}
        row = spent | training | validation
        progress.rows.append(row)
        save()
        print(describe(row, steps))


def describe(row, steps):
    """An epoch's results, as a line."""
    line = (
        f"step {row['step']} of {steps} (epoch {row['epoch']:.3g}): "
        f"training loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}, "
        f"validation loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2%}, "
    )
    if "val_accuracy_tta" in row:
        line += f"with test-time augmentation {row['val_accuracy_tta']:.2%}, "
    return f"{line}{row['train_seconds']:.1f} s"


def run():
    """One run, from its settings to its curves."""
    settings, saved = read_settings()
    train_set, val_set = data.load_cifar10(settings.data, settings.device)
    if settings.held_out:
        train_set, val_set = data.hold_out(train_set, settings.held_out)
    folder = Path(settings.resume or make_folder(settings))
    try:
        train(settings, train_set, val_set, folder, saved)
    except (KeyboardInterrupt, OSError):
        if (folder / "checkpoint.pt").exists():
            print(f'\nto go on after its last epoch: python train.py --resume "{folder}" --device {settings.device}')
        with contextlib.suppress(OSError):  # an empty folder, so that its name is free again; others stay
            folder.rmdir()
        raise
    curves = folder.parent / "curves.png"
    with survive(f"draw {curves}"):
        figure = draw_curves(read_curves(folder.parent))
        figure.savefig(curves)
        print(f"curves of all runs: {curves}")
    print(f"finished: {folder}")


def main():
    data.prepare_script()
    try:
        run()
    except (RunError, data.DataError, OSError) as problem:
        sys.exit(f"train.py: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
