"""Train the CNN on CIFAR-10 and log its curves (assignment 2, task 2 b, c and e).

    python train.py --lr 1e-3                 the baseline, at the learning rates of Figure 2: 1e-3, 1e-4, 1e-5
    python train.py --lr 1e-3 --augment both  the same with data augmentation
    python train.py --recipe quick            75% in seconds; coffee, lunch and best take longer and reach more

Every run has a folder of its own under experiments/. --resume and `load` need only its checkpoint.pt. The rest is for
people: config.json, metrics.csv (a row an epoch), TensorBoard's events, and curves.png, a picture of all runs.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit(f"train.py needs Python 3.10 or newer, this is {sys.version.split()[0]}")

import argparse
import contextlib
import io
import itertools
import json
import math
import shlex
import signal
import time
import warnings
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, scalar
from tqdm import tqdm

import data
from loss import CrossEntropyLoss
from network import ConvNet, UsageError, build, choose_precision, find_device, forward, train_step

# A recipe is a set of defaults. lr, epochs, batch_size and augment have flags, --set sets the others:
#   widths           channels of the net's three groups of layers: wider nets learn more and cost more
#   sizes            (size, share) pairs: shrink the pictures to that size until that share of the steps is done. They
#                    are enough to learn the coarse shapes, which come first, and cost a fraction of the arithmetic.
#   whiten           start from computed weights (network.ConvNet.whiten)
#   mirror           treat an image and its mirror image alike (network.symmetrize): learn from both at once
#   muon             optimize by network.Muon, with steps that shrink to 0; false: by Adam at a constant rate
#   label_smoothing  spread this share of each target over all classes (loss.CrossEntropyLoss)
#   tta              at the end, also measure the accuracy with test-time augmentation (data.views)
# and, for tuning, held_out: validate on the last N training images, not on the test batch.
SHARED = {  # what all recipes but the baseline start from
    "batch_size": 500, "augment": "position", "sizes": ((20, 0.2), (24, 0.6)), "whiten": True, "mirror": True,
    "muon": True, "label_smoothing": 0.1, "tta": True}  # fmt: skip
RECIPES = {
    "baseline": {
        "lr": 1e-3, "epochs": 5.0, "batch_size": 128, "augment": "none", "widths": (32, 64, 128), "sizes": (),
        "whiten": False, "mirror": False, "muon": False, "label_smoothing": 0.0, "tta": False},
    "quick": SHARED | {
        "lr": 0.22, "epochs": 0.38, "batch_size": 128, "augment": "none", "widths": (32, 64, 64), "sizes": ((22, 0.5),),
        "label_smoothing": 0.2, "tta": False},
    "coffee": SHARED | {"lr": 0.2, "epochs": 3.6, "widths": (32, 128, 128)},
    "lunch": SHARED | {"lr": 0.2, "epochs": 5.0, "widths": (64, 192, 192)},
    "best": SHARED | {"lr": 0.18, "epochs": 8.4, "batch_size": 1000, "augment": "both", "widths": (64, 256, 256)},
}  # fmt: skip
DEFAULTS = {"held_out": 0, "seed": 0, "device": "auto"}  # whatever the recipe
SET_PARSERS = {  # how --set reads what has no flag
    "widths": lambda text: tuple(int(width) for width in text.split(",")),
    **dict.fromkeys(("whiten", "mirror", "muon", "tta"), {"true": True, "false": False}.__getitem__),
    "sizes": lambda text: tuple(
        (int(size), float(share)) for size, share in (pair.split(":") for pair in text.split(",") if pair)),
    "label_smoothing": float, "held_out": int,
}  # fmt: skip
EXAMPLES = "widths=8,16 whiten=true mirror=true muon=false tta=true sizes=20:0.2,24:1 label_smoothing=0.1 held_out=5000"
LIMITS = {  # of smaller pictures than 17 x 17, three groups of layers leave one pixel
    "lr": (1e-30, 1e30), "epochs": (1e-6, 1e6), "batch_size": (2, 50_000), "seed": (0, 2**63 - 1),
    "widths": (1, 4096), "sizes": (17, 64), "label_smoothing": (0, 1), "held_out": (0, 49_998),
}  # fmt: skip
FORMAT = 5  # of checkpoint.pt: raise it when you change the net, the optimizer or what is saved
COLUMNS = ("epoch", "step", "train_seconds", "train_loss", "train_accuracy", "val_loss", "val_accuracy")
# TensorBoard's tags (a chart each, with all runs in it), and the column that each shows
TRAINING_TAGS = {"loss/train": "train_loss", "accuracy/train": "train_accuracy", "learning_rate": "learning_rate"}
VALIDATION_TAGS = {"loss/val": "val_loss", "accuracy/val": "val_accuracy"}
# Colors that the color-blind tell apart: M. Okabe and K. Ito, "Color Universal Design", 2008
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


# ------------------------------------------------------------------------------------------------------ command line
def parse_setting(text):
    """KEY=VALUE -> (KEY, value)"""
    key, _, value = text.partition("=")
    try:
        return key, SET_PARSERS[key](value)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"cannot read {text[:60]}; examples: {EXAMPLES}") from None


def make_parser():
    def by_recipe(setting):
        return "(default: by recipe, " + ", ".join(f"{name} {RECIPES[name][setting]}" for name in RECIPES) + ")"

    parser = argparse.ArgumentParser(usage="python train.py [options]", description="Train a CNN on CIFAR-10.")
    add = parser.add_argument
    ladder = "baseline 81.3%% in 120 s, quick 77.0%% in 6, coffee 89.8%% in 88, lunch 92.2%% in 252, best 93.3%% in 584"
    add("--recipe", choices=RECIPES, help=f"set of defaults; on two cores {ladder} (default: baseline)")
    add("--lr", type=float, help=f"learning rate {by_recipe('lr')}")
    add("--epochs", type=float, metavar="N", help=f"passes over the training set, or a fraction {by_recipe('epochs')}")
    add("--batch-size", type=int, metavar="N", help=f"images in a step {by_recipe('batch_size')}")
    add("--augment", choices=data.AUGMENTATIONS, help=f"flips and shifts, colors, or both {by_recipe('augment')}")
    every = f"repeat it for each of these: {EXAMPLES} (default: by recipe)"
    add("--set", type=parse_setting, action="append", metavar="KEY=VALUE", help=every)
    add("--seed", type=int, metavar="N", help="seed of all random numbers (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="auto uses a GPU if there is one (default: auto)")
    add("--data", default="datasets", metavar="DIR", help="folder of CIFAR-10, fetched if missing (default: datasets)")
    add("--experiments", default="experiments", metavar="DIR", help="folder of all runs (default: experiments)")
    add("--name", help="the run's folder (default: from recipe, rate, augmentation, what was set, and seed)")
    add("--resume", action="store_true", help="continue the last saved run of that name, or start it")
    return parser


def list_items(value):
    """The value of a setting as a list of tuples: 8 -> [(8,)], (8, 16) -> [(8,), (16,)], ((20, 0.2),) -> [(20, 0.2)]"""
    values = value if isinstance(value, tuple) else (value,)
    return [item if isinstance(item, tuple) else (item,) for item in values]


def write_flag(key, value):
    """A setting as it is typed: --lr 0.001, --set sizes=20:0.2,24:0.6"""
    if key not in SET_PARSERS:
        return f"--{key.replace('_', '-')} {value}"
    return f"--set {key}=" + ",".join(":".join(map(str, item)) for item in list_items(value)).lower()


def list_given(args):
    """{setting: value} of all that the command line sets."""
    keys = ("recipe", "lr", "epochs", "batch_size", "augment", "seed", "device")
    return {key: vars(args)[key] for key in keys if vars(args)[key] is not None} | dict(args.set or [])


def choose_settings(args):
    """What defines the run: the recipe's values, those given on the command line, and where and how to compute."""
    recipe = args.recipe or "baseline"
    settings = {"recipe": recipe, **RECIPES[recipe], **DEFAULTS, **list_given(args)}
    for key, (low, high) in LIMITS.items():
        if not all(low <= item[0] <= high for item in list_items(settings[key])):
            raise UsageError(f"{write_flag(key, settings[key])} must be from {low:,} to {high:,}")
    if len(settings["widths"]) > 3 or not all(0 <= share <= 1 for _, share in settings["sizes"]):
        raise UsageError("--set takes at most 3 widths (a fourth group leaves one pixel), and shares from 0 to 1")
    if settings["mirror"] and (not settings["whiten"] or any(width % 4 for width in settings["widths"])):
        raise UsageError("--set mirror=true needs whiten=true, and widths that can be divided by 4")
    device = find_device(settings["device"])
    return settings | {"device": device, "precision": choose_precision(device)}


# -------------------------------------------------------------------------------------------- one epoch of training
def train_epoch(model, optimizer, loader, settings, step, steps):
    """Train for an epoch from step number `step` on; stop early at step number `steps`.

    Yields, about twenty times an epoch, a point of the training curves (of the steps since the last point), and the
    (loss, accuracy) of the epoch so far. These are means over images, without label smoothing, so that runs compare.
    """
    criterion = CrossEntropyLoss(label_smoothing=settings["label_smoothing"])
    plain_loss = CrossEntropyLoss(reduction="sum")
    count, every = min(len(loader), steps - step), max(1, round(len(loader) / 20))
    recent, total = torch.zeros(2, 3, dtype=torch.float64)  # images, their summed loss, how many are right
    disable = False if "ipykernel" in sys.modules else None  # None: a bar on a terminal only; False: always
    batches = tqdm(itertools.islice(loader, count), total=count, leave=False, disable=disable, mininterval=0.5)
    for number, (images, labels) in enumerate(batches, 1):
        rate = settings["lr"]
        if settings["muon"]:
            optimizer.lr = rate = rate * (1 - step / steps)
        size = next((size for size, share in settings["sizes"] if step < share * steps), images.shape[2])
        images = data.resize(images, size)
        logits, loss = train_step(model, optimizer, criterion, images, labels, settings["precision"])
        step += 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step}: try a --lr below {settings['lr']:g}")
        right = (logits.argmax(1) == labels).sum()
        recent += torch.tensor([len(labels), plain_loss(logits, labels), right], dtype=torch.float64)
        if number % every == 0 or number == count:
            total += recent
            means, means_so_far = ((sums[1:] / sums[0]).tolist() for sums in (recent, total))
            recent.zero_()
            point = {"epoch": step / len(loader), "step": step, "time": time.time(), "learning_rate": rate}
            yield point | {"train_loss": means[0], "train_accuracy": means[1]}, means_so_far


# --------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def evaluate(model, images, labels, precision, tta=False):
    """Loss, accuracy and, with `tta`, accuracy with test-time augmentation (else None), in evaluation mode."""

    def predict(images, views):
        parts = (data.normalize(data.to_float(part)) for part in images.split(250))
        return torch.cat([sum(w * forward(model, view, precision) for view, w in views(part)) for part in parts])

    def measure_accuracy():
        return (logits.argmax(1) == labels).sum().item() / len(labels)

    model.eval()
    logits = predict(images, lambda part: [(part, 1)])
    loss = CrossEntropyLoss()(logits, labels).item()
    accuracy, accuracy_tta = measure_accuracy(), None
    if tta:  # only the images it is least sure of: other answers hardly ever change (Hiverge's speed-run, 2025)
        unsure = logits.softmax(1).amax(1).argsort()[: math.ceil(len(labels) / 4)]
        logits[unsure] = predict(images[unsure], data.views)
        accuracy_tta = measure_accuracy()
    model.train()
    return loss, accuracy, accuracy_tta


def load(folder):
    """The trained net of a run, in evaluation mode, on the CPU; UsageError if the folder holds no checkpoint."""
    saved = read_checkpoint(Path(folder).expanduser() / "checkpoint.pt")
    model = ConvNet(saved["settings"]["widths"], saved["settings"]["mirror"])
    model.load_state_dict(saved["model"])
    return model.eval()


# ---------------------------------------------------------------------------------------------------- files of a run
def read_checkpoint(path):
    """What a run has saved; UsageError if the file is no checkpoint of this train.py."""
    try:
        saved = torch.load(path, weights_only=True, map_location="cpu")  # it may come from a GPU that is not here
        if saved["format"] != FORMAT:
            raise ValueError
    except Exception as problem:  # torch.load raises many kinds of error
        raise UsageError(f"cannot load {path} with this train.py ({type(problem).__name__})") from None
    return saved


def write_tables(folder, settings, command, rows):
    """Write config.json (how to repeat the run) and metrics.csv (what each epoch measured)."""
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    config = {**settings, "command": command, "versions": versions, "threads": torch.get_num_threads()}
    with data.survive_failure(folder / "config.json"):
        data.write_file(folder / "config.json", json.dumps(config, indent=2).encode())
    columns = (*COLUMNS, "val_accuracy_tta") if settings["tta"] else COLUMNS
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    with data.survive_failure(folder / "metrics.csv"):
        data.write_file(folder / "metrics.csv", "".join(",".join(map(str, line)) + "\n" for line in lines).encode())


class Events:
    """What TensorBoard shows of a run: its curves and its settings (HPARAMS).

    Each start of a run begins a new file, tells TensorBoard to drop the older events (to purge from step 0), and writes
    those again with their old times. So each step is shown once, even after a kill and while TensorBoard stays open.
    (The thread of tensorboardX's SummaryWriter would die of a full disk unnoticed.)
    """

    def __init__(self, folder, settings):
        self.path, self.settings = folder / "events", settings
        self.writer, self.epochs = None, -1

    def write(self, points, rows):
        """Write what is new in `points` (training) and `rows` (validation). After a failure, retry once an epoch."""
        if self.writer is None and len(rows) == self.epochs:
            return
        writer, self.writer, self.epochs = self.writer, None, len(rows)  # None until this write has succeeded
        with data.survive_failure(self.path):
            if not writer:
                writer, self.written = EventsWriter(str(self.path), f".{time.time_ns()}"), (0, 0)
                writer.write_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
                values = {k: str(v) if isinstance(v, tuple) else v for k, v in self.settings.items()}
                for summary in hparams(values, dict.fromkeys([*TRAINING_TAGS, *VALIDATION_TAGS], 0)):
                    writer.write_event(Event(wall_time=time.time(), summary=summary))
            for tags, new in ((TRAINING_TAGS, points[self.written[0] :]), (VALIDATION_TAGS, rows[self.written[1] :])):
                for (tag, column), one in itertools.product(tags.items(), new):
                    writer.write_event(Event(wall_time=one["time"], step=one["step"], summary=scalar(tag, one[column])))
            writer.flush()
            self.writer, self.written = writer, (len(points), len(rows))


def read_curves(experiments):
    """{name: (points, rows)} of every run under `experiments` that has come to the end of an epoch."""
    runs = {}
    for path in sorted(experiments.glob("*/checkpoint.pt")):
        with contextlib.suppress(UsageError):  # not a run
            saved = read_checkpoint(path)
            runs[path.parent.name] = saved["points"], saved["rows"]
    return runs


def draw_curves(path, runs):
    """Draw loss and accuracy of `runs`, {name: (points of training, rows of validation)}, in one picture (Figure 2)."""
    figure = data.new_figure(11, 4.4 + 0.11 * len(runs))
    last = max([1, *(rows[-1]["epoch"] for _, rows in runs.values())])
    for metric, panel in zip(("loss", "accuracy"), figure.subplots(1, 2), strict=True):
        for number, (name, (points, rows)) in enumerate(runs.items()):
            color, again = COLORS[number % len(COLORS)], number // len(COLORS)  # from the 8th on, other shapes as well
            label = " " + name.replace("$", r"\$")  # matplotlib hides _names and reads $...$ as a formula
            training = [row["epoch"] for row in points], [row[f"train_{metric}"] for row in points]
            panel.plot(*training, "." + ("--", ":", "-.")[again % 3], color=color, linewidth=1, markersize=1)
            validation = [row["epoch"] for row in rows], [row[f"val_{metric}"] for row in rows]
            panel.plot(*validation, "os^Dv"[again % 5] + "-", color=color, linewidth=1, markersize=5, label=label)
        panel.set(title=f"{metric}: training dashed, validation solid", xlabel="epoch", xlim=(0, 1.02 * last))
        panel.locator_params(axis="x", integer=True)
        panel.grid(alpha=0.3)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters of a name that the font does not have
        data.save_figure(figure, path, dpi=110)


# ---------------------------------------------------------------------------------------------------------- one run
def claim_folder(args, settings):
    """The run's folder: a new one or, with --resume, the last saved one of that name, if there is any.

    A run claims its name by making the folder: of two that start at once only one can. The other takes the next name
    or, if it was given a --name, is refused.
    """
    default = RECIPES[settings["recipe"]] | DEFAULTS
    changed = [write_flag(key, settings[key]) for key in SET_PARSERS if settings[key] != default[key]]
    changed = "".join(changed).replace("--set ", "-").replace(":", ",")  # Windows allows no colon
    name = "{recipe}-lr{lr:g}-{augment}{changed}-seed{seed}".format(changed=changed, **settings)
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))] if args.name is None else [args.name]
    if names[0] in ("", ".", "..") or Path(names[0]).name != names[0] or "\\" in names[0]:
        raise UsageError(f"--name {names[0]!r} must be the name of one folder, without slashes")
    folders = [Path(args.experiments).expanduser() / name for name in names]
    if args.resume:
        saved = [folder for folder in folders if (folder / "checkpoint.pt").exists()]
        folders = [max(saved, key=lambda folder: (folder / "checkpoint.pt").stat().st_mtime, default=folders[0])]
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=args.resume)
            return folder
        except FileExistsError:
            if not folder.is_dir():  # something else stands in its way
                raise
    raise UsageError(f"{folder} is there already: choose another --name, or continue that run with --resume")


def continue_settings(saved, args, settings, folder):
    """The settings that a run was started with, once it is clear that the command line does not contradict them."""
    stored, given, done = saved["settings"], list_given(args), saved["rows"][-1]["epoch"]
    if "device" in given and settings["device"] != stored["device"]:
        stored |= {key: settings[key] for key in ("device", "precision")}
    # After whole epochs at a constant rate and size, no step has depended on the number of epochs
    scheduled = stored["muon"] or stored["sizes"]
    if given.get("epochs", 0) >= done == int(done) and not scheduled:
        stored["epochs"] = given["epochs"]
    for key, value in given.items():
        if key != "device" and value != stored[key]:
            reason = " and a schedule that depends on it" if key == "epochs" and scheduled else ""
            raise UsageError(
                f"{folder} was started with {write_flag(key, stored[key])}{reason}: drop that flag to resume it, "
                "or name another run with --name"
            )
    return stored


def run(args):
    """One run, from its settings to its curves."""
    settings, command = choose_settings(args), shlex.join(["python", *sys.argv])
    train_set, val_set = data.load_cifar10(args.data)
    folder = claim_folder(args, settings)
    checkpoint = folder / "checkpoint.pt"
    saved = read_checkpoint(checkpoint) if checkpoint.exists() else None
    if saved:
        epochs, settings = saved["settings"]["epochs"], continue_settings(saved, args, settings, folder)
        command = saved["command"] + (f" && {command}" if settings["epochs"] != epochs else "")
    device, precision = find_device(settings["device"]), settings["precision"]
    if held_out := settings["held_out"]:
        train_set, val_set = zip(*((part[:-held_out], part[-held_out:]) for part in train_set), strict=True)
    train_set, val_set = ([tensor.to(device) for tensor in part] for part in (train_set, val_set))

    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)  # held until this process ends, even by SIGKILL
    except Timeout:
        raise UsageError(f"{folder} is in use: another process is training that run") from None
    with lock:
        start = time.perf_counter()  # making the net counts as training time
        model, optimizer = build(settings, data.normalize(data.to_float(train_set[0][:1000])))
        generator = torch.Generator().manual_seed(settings["seed"])
        loader = data.Loader(*train_set, settings["batch_size"], settings["augment"], generator)
        steps = max(1, round(settings["epochs"] * len(loader)))
        step, points, rows, seconds = 0, [], [], time.perf_counter() - start
        if checkpoint.exists():
            saved = read_checkpoint(checkpoint)  # again: another process may have saved before it let go of the lock
            try:
                step, points, rows, seconds = (saved[key] for key in ("step", "points", "rows", "train_seconds"))
                loader.epoch = len(rows)
                model.load_state_dict(saved["model"])
                optimizer.load_state_dict(saved["optimizer"])
                generator.set_state(saved["generator"])  # after Loader, which draws its flips from the seed
            except Exception as problem:
                reason = f"does not fit this net and optimizer ({type(problem).__name__}): take another --name"
                raise UsageError(f"{checkpoint} {reason}") from None
        how = "is finished" if step == steps else f"continues after step {step} of {steps}" if saved else "starts"
        print(f"run {folder} on {device}, {torch.get_num_threads()} threads, {precision}: {how}", flush=True)

        for left_over in folder.glob("*.part"):  # of killed writers
            left_over.unlink()
        write_tables(folder, settings, command, rows)
        events = Events(folder, settings)
        events.write(points, rows)
        while step < steps:
            start = time.perf_counter()
            for point, means_so_far in train_epoch(model, optimizer, loader, settings, step, steps):  # noqa: B007
                points.append(point)
                events.write(points, rows)
            step, seconds = points[-1]["step"], seconds + time.perf_counter() - start

            tta = settings["tta"] and step == steps
            *validation, accuracy_tta = evaluate(model, *val_set, precision, tta)
            if not math.isfinite(validation[0]):  # do not overwrite a good checkpoint
                raise FloatingPointError(f"the validation loss is {validation[0]}: try a --lr below {settings['lr']:g}")
            row = dict(zip(COLUMNS, (step / len(loader), step, seconds, *means_so_far, *validation), strict=True))
            rows.append(row | {"time": time.time()} | ({"val_accuracy_tta": accuracy_tta} if tta else {}))
            state = {  # all that it takes to resume the run or to load its net
                "format": FORMAT, "settings": settings, "command": command, "points": points, "rows": rows,
                "step": step, "train_seconds": seconds, "model": model.state_dict(),
                "optimizer": optimizer.state_dict(), "generator": generator.get_state(),
            }  # fmt: skip
            torch.save(state, buffer := io.BytesIO())
            data.write_file(checkpoint, buffer.getvalue(), patience=10)
            write_tables(folder, settings, command, rows)
            events.write(points, rows)
            print(
                f"epoch {row['epoch']:.4g} of {steps / len(loader):.4g}: "
                "training loss {train_loss:.4f}, accuracy {train_accuracy:.2%}, "
                "validation loss {val_loss:.4f}, accuracy {val_accuracy:.2%}, ".format(**row)
                + (f"with test-time augmentation {accuracy_tta:.2%}, " if tta else "") + f"{seconds:.1f} s", flush=True,
            )  # fmt: skip
        curves = folder.parent / "curves.png"
        with data.survive_failure(curves):
            draw_curves(curves, read_curves(folder.parent))
    print(f"finished: {folder / 'metrics.csv'}, curves of all runs in {curves}")


# ------------------------------------------------------------------------------------------------------------- main
def main():
    data.prepare_streams()
    parser = make_parser()
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # treat it like Ctrl-C
    try:
        run(args)
    except UsageError as problem:
        parser.exit(2, f"train.py: {problem}\n")
    except (MemoryError, torch.cuda.OutOfMemoryError):
        parser.exit(1, "train.py: out of memory: try a smaller --batch-size\n")
    except (data.DataError, FloatingPointError, OSError) as problem:
        parser.exit(1, f"train.py: {problem}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped: the same command with --resume continues after the last finished epoch\n")


if __name__ == "__main__":
    main()
