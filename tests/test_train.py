"""Training: files, curves, resuming and errors, on a tiny data set; and, where it is there, on the real one."""

import ast
import contextlib
import csv
import errno
import itertools
import json
import math
import os
import random
import re
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import tensorboardX.record_writer
import torch
from conftest import complain, load_tiny, make_tiny, seeded, unix
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image

import data
import train
from loss import CrossEntropyLoss

SCRIPT = Path(train.__file__)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def config(folder):
    return json.loads((folder / "config.json").read_text())


def results(folder):
    """What two equal runs must agree in, bit for bit: what was measured but for the times, and all that is saved."""
    metrics = [{key: value for key, value in row.items() if key != "train_seconds"} for row in rows(folder)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    points = [{key: value for key, value in point.items() if key != "time"} for point in checkpoint["points"]]
    saved = [checkpoint[key] for key in ("step", "model", "optimizer", "generator")]
    return metrics, points, json.dumps(saved, default=torch.Tensor.tolist)


def agree(one, other):
    return results(one) == results(other)


def scalars(folder):
    """[(tag, step, value)] of a run, read by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return sorted((tag, point.step, point.value) for tag in events.Tags()["scalars"] for point in events.Scalars(tag))


def list_files(folder):
    """{path: bytes} of all in a folder, the empty folders too; but the lock file, which some filelocks delete."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


# ---------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_tiny_set_is_learnt_to_zero_error(recipe):
    images, labels = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8, generator=seeded()), torch.arange(10)
    inputs = data.normalize(data.to_float(images))
    settings = {**train.RECIPES[recipe], "seed": 0, "widths": (16, 16, 16), "batch_size": 10}
    settings["lr"] /= 2
    model, optimizer = train.build(settings, inputs)
    for _ in range(100):
        train.train_step(model, optimizer, CrossEntropyLoss(), inputs, labels, "fp32")
    assert train.evaluate(model, images, labels, "fp32")[1] == 1


def test_evaluate_is_the_mean_over_all_images_in_evaluation_mode():
    settings = {**train.RECIPES["baseline"], "seed": 0, "lr": 1e-2, "widths": (8, 8, 8)}
    images = torch.randint(256, (260, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    labels, inputs = torch.randint(10, (260,), generator=seeded()), data.normalize(data.to_float(images))
    model, optimizer = train.build(settings, inputs)
    for _ in range(40):  # until it no longer says the same of all
        train.train_step(model, optimizer, CrossEntropyLoss(), inputs[:40], labels[:40], "fp32")
    loss, accuracy, accuracy_tta = train.evaluate(model, images, labels, "fp32", tta=True)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(inputs)
        averaged = sum(weight * model(view) for view, weight in data.views(inputs))
    sure = logits.softmax(1).amax(1).sort().values[len(labels) // 4] <= logits.softmax(1).amax(1)
    averaged[sure] = logits[sure]  # only a quarter is looked at again
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert accuracy_tta == (averaged.argmax(1) == labels).double().mean().item() != accuracy


def test_rate_falls_linearly_and_pictures_grow_and_epochs_may_be_a_fraction(tiny, tmp_path, interfere):
    def look(model, optimizer, criterion, images, *others):
        seen.append((optimizer.lr, *images.shape[2:]))

    seen = []
    interfere(train, "train_step", look)
    flags = "--recipe best --epochs 1.5 --lr 0.8 --name run --set sizes=17:0.5,25:0.75"
    assert tiny(*flags.split()).returncode == 0
    # 40 images in batches of 16 are 3 steps an epoch, so 4 in all
    rates, sizes = [pytest.approx(0.8 * (1 - step / 4)) for step in range(4)], (17, 17, 25, 32)
    assert seen == [*zip(rates, sizes, sizes, strict=True)]
    first, last = rows(folder := tmp_path / "experiments/run")
    assert [float(row["epoch"]) for row in (first, last)] == [1, 4 / 3]
    assert first["val_accuracy_tta"] == "" and 0 <= float(last["val_accuracy_tta"]) <= 1  # takes time, so once only
    points = [(step, rate) for tag, step, rate in scalars(folder) if tag == "learning_rate"]
    assert points == [*zip(range(1, 5), rates, strict=True)]


@pytest.mark.parametrize("first, steps, ends", [(0, 1000, [*range(2, 49, 2), 49]), (3, 10, [5, 7, 9, 10])])
def test_a_point_about_every_twentieth_of_an_epoch_is_the_mean_since_the_last(monkeypatch, first, steps, ends):
    images, labels = torch.zeros(97, 3, 32, 32, dtype=torch.uint8), torch.arange(97) % 10
    logits = 3 * torch.randn(97, 10, generator=seeded())
    done = []  # the labels of each step

    def step(model, optimizer, criterion, some, own, precision):
        start = sum(map(len, done))
        done.append(own)
        return logits[start : start + len(own)], 0.5

    monkeypatch.setattr(train, "train_step", step)
    loader = data.Loader(images, labels, 2, "none", seeded())  # 49 steps an epoch, of which the last has one image
    settings = {**train.RECIPES["baseline"], "precision": "fp32"}
    points, means = zip(*train.train_epoch(None, None, loader, settings, first, steps), strict=True)
    assert [point["step"] for point in points] == ends
    own, start = torch.cat(done), 0
    losses = torch.nn.functional.cross_entropy(logits[: len(own)].double(), own, reduction="none")
    measured = torch.stack((losses, (logits[: len(own)].argmax(1) == own).double()))
    for point, epoch_means in zip(points, means, strict=True):
        end = sum(map(len, done[: point["step"] - first]))
        point_means = point["train_loss"], point["train_accuracy"]
        assert point_means == pytest.approx(measured[:, start:end].mean(1).tolist(), rel=1e-6)
        assert epoch_means == pytest.approx(measured[:, :end].mean(1).tolist(), rel=1e-6)
        assert point["epoch"] == point["step"] / 49
        start = end


def test_held_out_trains_on_the_rest_and_validates_on_the_last_training_images(tiny, tmp_path, interfere):
    (images, labels), _ = load_tiny(None)
    trained, validated = [], []
    interfere(train, "train_step", lambda *given: trained.extend(given[4].tolist()))
    interfere(train, "evaluate", lambda *given: validated.extend(given[1:3]))
    assert tiny("--epochs", 1, "--set", "held_out=15").returncode == 0
    assert sorted(trained) == sorted(labels[:25].tolist())
    assert torch.equal(validated[0], images[25:]) and torch.equal(validated[1], labels[25:])
    assert (tmp_path / "experiments/baseline-lr0.001-none-held_out=15-seed0/metrics.csv").exists()


# ---------------------------------------------------------------------------------------------------------- settings
def test_set_sets_what_has_no_flag_and_is_part_of_name_config_and_table(tiny, tmp_path):
    given = "widths=8,12 muon=true mirror=true whiten=true sizes=20:0.2,24:0.6 label_smoothing=0.1 tta=true"
    flags = "--epochs 1 --lr 0.1 --set " + given.replace(" ", " --set ")
    assert tiny(*flags.split()).returncode == 0
    folder = next((tmp_path / "experiments").glob("*/checkpoint.pt")).parent
    assert folder.name == (
        "baseline-lr0.1-none-widths=8,12-whiten=true-mirror=true-muon=true-tta=true-sizes=20,0.2,24,0.6-label_smoothing=0.1-seed0"
    )
    expected = {"widths": [8, 12], "muon": True, "sizes": [[20, 0.2], [24, 0.6]], "label_smoothing": 0.1, "tta": True}
    assert config(folder).items() >= expected.items()
    assert train.load(folder).head.weight.shape == (10, 12)
    events = b"".join(path.read_bytes() for path in folder.glob("events.*"))
    assert b"label_smoothing" in events and b"((20, 0.2), (24, 0.6))" in events
    assert "is finished" in tiny(*flags.split(), "--resume").stdout  # what it holds was read the same


MISUSE = {  # flags: what the line says
    "--lr 0": "--lr 0.0 must be from", "--lr nan": "--lr nan must be from", "--lr 1e999": "--lr", "--lr much": "--lr",
    "--epochs -1": "--epochs", "--epochs inf": "--epochs", "--batch-size 1": "--batch-size 1 must be from 2 to 50,000",
    "--epochs 1e300": "--epochs 1e+300 must be from 1e-06 to 1,000,000", "--batch-size 1e3": "--batch-size",
    "--batch-size 2.5": "--batch-size", "--seed -1": "--seed",
    f"--seed {30 * '9'}": "--seed",
    "--set held_out=49999": "--set held_out=49999 must be from 0 to 49,998",
    "--set label_smoothing=1.5": "--set label_smoothing", "--set label_smoothing=nan": "--set label_smoothing",
    "--set sizes=24:0.5,16:0.6": "--set sizes=24:0.5,16:0.6 must be from 17 to 64",
    "--set widths=8,8,8,8": "at most 3 widths", "--set sizes=24:nan": "shares from 0 to 1",
    "--set widths=8,0": "--set widths=8,0 must be from 1",
    "--set mirror=true": "needs whiten=true", "--recipe quick --set widths=8,6": "widths that can be divided by 4",
    "--augment sideways": "--augment", "--recipe cake": "--recipe", "--colour": "--colour",
    "--device abacus": "--device", "--device cuda": "--device cuda cannot be used: PyTorch sees only cpu",
    "--name ../elsewhere": "--name", "--name ..\\elsewhere --resume": "--name", "--name=": "--name",
}  # fmt: skip
MALFORMED = "widths widths= label_smoothing=x muon=1 muon=True sizes=20 sizes=20:a cake=1 lr=1 tta= = held_out=.5"
MISUSE |= {f"--set {setting}": f"cannot read {setting}; examples: widths=" for setting in MALFORMED.split()}


@pytest.mark.parametrize("flags, says", MISUSE.items(), ids=lambda text: text[:30])
def test_misuse_gets_one_line_that_names_it_and_leaves_nothing(tiny, tmp_path, flags, says):
    outcome = tiny(*flags.split())
    assert says in complain(outcome, 2)
    assert len(outcome.stderr.strip().splitlines()) <= 2  # argparse's line of usage comes first
    assert not list(tmp_path.iterdir())


def test_help_explains_every_flag_with_its_default_and_all_that_can_be_set(tiny):
    text = tiny("--help").stdout
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    expected = "augment batch-size data device epochs experiments lr name recipe resume seed set"
    assert sorted(flags) == [f"--{flag}" for flag in expected.split()]
    assert text.count("(default:") == len(flags) - 1  # --resume is off unless it is given
    assert all(f"{key}=" in text for key in train.SET_PARSERS)


# ------------------------------------------------------------------------------------------------- files and curves
def test_table_and_events_hold_what_was_measured_and_config_enough_to_run_it_again(finished):
    table, points = rows(finished), train.read_curves(finished.parent)[finished.name][0]
    assert list(table[0]) == list(train.COLUMNS)
    assert [row["step"] for row in table] == ["3", "6", "9"]
    assert float(table[0]["train_seconds"]) < float(table[-1]["train_seconds"])
    for epoch, row in enumerate(table):
        assert all(math.isfinite(float(value)) for value in row.values())
        # 40 training images and 20 to validate on: every accuracy is a whole number of them
        for part, count in (("train", 40), ("val", 20)):
            right = float(row[f"{part}_accuracy"]) * count
            assert right == pytest.approx(round(right)) and 0 <= right <= count
        for metric in ("train_loss", "train_accuracy"):  # the mean over the epoch's points
            parts = zip((16, 16, 8), points[3 * epoch : 3 * epoch + 3], strict=True)
            assert sum(size * point[metric] for size, point in parts) / 40 == pytest.approx(float(row[metric]))

    logged = [("learning_rate", step, 1e-3) for step in range(1, 10)]
    for metric, (part, measured) in itertools.product(("accuracy", "loss"), {"train": points, "val": table}.items()):
        logged += [(f"{metric}/{part}", int(row["step"]), float(row[f"{part}_{metric}"])) for row in measured]
    assert scalars(finished) == [pytest.approx(one) for one in sorted(logged)]

    expected = {"recipe": "baseline", "lr": 1e-3, "epochs": 3, "batch_size": 16, "augment": "none", "seed": 0}
    expected |= {"command": "python train.py --lr 1e-3 --epochs 3", "threads": 1, "precision": "fp32"}
    assert expected.items() <= config(finished).items()
    assert config(finished)["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("epochs", [0.6, 7])
def test_curves_have_fine_points_whole_epochs_for_ticks_and_looks_for_more_than_7_runs(monkeypatch, epochs):
    points = [{"epoch": i / 20, "train_loss": 1 / i, "train_accuracy": 0.5} for i in range(1, round(20 * epochs) + 1)]
    table = [{"epoch": end, "val_loss": 1.0, "val_accuracy": 0.4} for end in (*range(1, math.ceil(epochs)), epochs)]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    monkeypatch.setattr(data, "write_file", lambda path, raw: None)
    train.draw_curves(Path("curves.png"), {f"run {number}": (points, table) for number in range(21)})
    figures[0].draw_without_rendering()
    for panel, metric in zip(figures[0].axes, ("loss", "accuracy"), strict=True):
        training, validation = panel.get_lines()[::2], panel.get_lines()[1::2]
        assert [*training[0].get_ydata()] == [point[f"train_{metric}"] for point in points]
        assert [*training[0].get_xdata()] == [point["epoch"] for point in points]
        assert [*validation[0].get_ydata()] == [row[f"val_{metric}"] for row in table]
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert len(ticks) >= 2 and all(tick == int(tick) for tick in ticks)
        for lines in (training, validation):
            looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
            assert len(looks) == 21 and len({color for color, *_ in looks}) == 7


def test_curves_show_every_run_and_pass_over_what_is_none(finished, copy, tiny, tmp_path):
    for name in ("$_$", "b"):  # the first is no formula
        copy(name=name)
    (tmp_path / "experiments/begun").mkdir()
    (copy(name="foreign") / "checkpoint.pt").write_bytes(b"of another program")
    runs = train.read_curves(tmp_path / "experiments")
    assert list(runs) == ["$_$", "b"]
    for row, read in zip(rows(finished), runs["b"][1], strict=True):
        assert {key: float(value) for key, value in row.items()}.items() <= read.items()
    outcome = tiny("--epochs", 1)
    assert outcome.returncode == 0 and outcome.stderr == ""


def test_the_same_run_again_gets_a_new_folder_and_the_same_numbers_another_seed_others(finished, copy, tiny, tmp_path):
    for name in (finished.name, f"{finished.name}-2"):
        copy(name=name)
    before = list_files(tmp_path)
    for seed in (0, 1):
        assert tiny("--lr", "1e-3", "--epochs", 3, "--seed", seed).returncode == 0
    assert list_files(tmp_path).items() >= before.items()
    assert agree(finished, tmp_path / "experiments" / f"{finished.name}-3")
    assert not agree(finished, tmp_path / "experiments" / finished.name.replace("seed0", "seed1"))


@pytest.mark.parametrize("call, error, calls, patience, written", [
    ("fsync", errno.ENOSPC, [1], 0, b"old"),
    ("fsync", errno.EINVAL, [1], 0, b"new"),  # a file system that cannot
    ("replace", errno.EACCES, [1, 2], 0, b"old"),  # Windows, as long as another program holds the file open
    ("replace", errno.EACCES, [1, 2], 60, b"new"),
])  # fmt: skip
def test_a_failed_write_leaves_the_old_file_unless_the_failure_is_minor_or_passes(
    tmp_path, monkeypatch, interfere, call, error, calls, patience, written
):
    data.write_file(path := tmp_path / "file", b"old")
    interfere(os, call, OSError(error, os.strerror(error)), calls)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fails = pytest.raises(OSError, match=f"{os.strerror(error)}.*file")
    with fails if written == b"old" else contextlib.nullcontext():
        data.write_file(path, b"new", patience)
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["metrics.csv", "config.json", "events"])
def test_what_cannot_be_written_is_said_in_a_line_and_tried_again_but_the_picture_only_by_the_next_run(
    finished, tiny, tmp_path, monkeypatch, interfere, name
):
    folder = tmp_path / "experiments/run"
    (tmp_path / "experiments/curves.png").mkdir(parents=True)
    if name == "events":  # what is written waits in memory until it is flushed, and then the disk is full
        place, open_file = tensorboardX.record_writer, tensorboardX.record_writer.open_file
        monkeypatch.setattr(place, "open_file", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
        interfere(train, "evaluate", lambda *_: monkeypatch.setattr(place, "open_file", open_file), [2])
    else:
        (folder / name).mkdir(parents=True)
        interfere(train, "evaluate", lambda *_: (folder / name).rmdir(), [2])
    outcome = tiny("--epochs", 3, "--name", "run", "--resume")
    assert outcome.returncode == 0 and "finished" in outcome.stdout
    complaints = [line.split(" (")[0] for line in outcome.stderr.strip().splitlines()]
    failed = (f"run/{name}", f"run/{name}", "curves.png")  # at the start, after the first epoch and at the end
    assert complaints == [f"train.py: cannot write experiments/{path}" for path in failed]
    assert agree(finished, folder) and scalars(finished) == scalars(folder)
    assert config(folder)["epochs"] == 3


def test_load_gives_the_trained_net_in_evaluation_mode(finished):
    model = train.load(finished)
    assert not model.training and {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    loss, accuracy, _ = train.evaluate(model, *load_tiny(None)[1], "fp32")
    last = rows(finished)[-1]
    assert accuracy == float(last["val_accuracy"]) and loss == pytest.approx(float(last["val_loss"]), rel=0.02)


def test_readme_classifies_a_picture_of_ones_own(finished, tmp_path, monkeypatch, capsys):
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (folder,) = re.findall(r'train\.load\("(.*?)"\)', code)
    (picture,) = re.findall(r'read\("(.*?)"\)', code)
    shutil.copytree(finished, tmp_path / folder)
    shutil.copy(SCRIPT.parent / "Lenna.png", tmp_path / picture)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split()[0].endswith("%") and line.split()[1] in data.CLASSES for line in lines)


# ------------------------------------------------------------------------------------------------------- TensorBoard
class TensorBoard:
    """A TensorBoard server over a folder of runs, asked for the curves of one, until `stack` is left."""

    def __init__(self, experiments, fast, stack):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", experiments, "--port", str(port)]
        command += [f"--load_fast={fast}", "--reload_interval=1"]
        stack.callback(subprocess.Popen(command, stderr=subprocess.DEVNULL).kill)
        self.address = f"http://127.0.0.1:{port}/data/plugin/"

    def ask(self, query, posted=None):
        body = json.dumps(posted).encode() if posted else None
        request = urllib.request.Request(self.address + query, body, {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=30))

    def wait_for(self, run, step):
        """[(tag, step, value, wall time)] of a run once the last step of loss/val is this one."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, IndexError):  # before it has started, and before it has read
                if self.ask(f"scalars/scalars?run={run}&tag=loss/val")[-1][1] == step:
                    tags = self.ask("scalars/tags")[run]
                    shown = {tag: self.ask(f"scalars/scalars?run={run}&tag={tag}") for tag in tags}
                    return sorted((tag, *point[1:], point[0]) for tag in shown for point in shown[tag])
            select.select([], [], [], 0.1)
        raise TimeoutError(f"TensorBoard does not show step {step}")


def test_tensorboard_may_stay_open_while_a_run_is_stopped_and_resumed(finished, tiny, tmp_path, interfere):
    folder, flags = tmp_path / "experiments/run", ("--epochs", 3, "--name", "run")
    interfere(train, "train_step", KeyboardInterrupt(), [9])  # the third epoch's points are logged, and will be again
    assert tiny(*flags).returncode == 130
    assert ("loss/train", 8) in [point[:2] for point in scalars(folder)]
    (first,) = folder.glob("events.*")
    first.write_bytes(first.read_bytes()[:-3])  # the writer was killed in the middle of a record
    with contextlib.ExitStack() as stack:
        both = [TensorBoard(tmp_path / "experiments", fast, stack) for fast in ("true", "false")]
        before = [point for point in both[0].wait_for("run", 6) if point[1] <= 6]
        both[1].wait_for("run", 6)
        assert tiny(*flags, "--resume").returncode == 0
        both += [TensorBoard(tmp_path / "experiments", fast, stack) for fast in ("true", "false")]
        for board in both:
            shown = board.wait_for("run", 9)
            assert [point[:3] for point in shown] == [pytest.approx(point) for point in scalars(finished)]
            assert [point for point in shown if point[1] <= 6] == before  # at the time at which it was measured
        assert first.exists()
        asked = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10}
        (run,) = board.ask("hparams/session_groups", asked)["sessionGroups"]
        assert run["hparams"].items() >= {"lr": 1e-3, "recipe": "baseline", "seed": 0, "widths": "(8, 8, 8)"}.items()
        final = {metric["name"]["tag"]: metric["value"] for metric in run["metricValues"]}
        for tag, column in train.VALIDATION_TAGS.items():
            assert final[tag] == pytest.approx(float(rows(folder)[-1][column]))


# ----------------------------------------------------------------------------------------------- stopping, resuming
def die_in(tiny, cwd, *flags, kill_at=math.inf):
    """Run train.py in a forked process that kills itself at its `kill_at`-th function call or return, be it in C.

    So every moment of a run can be hit, and hit again. Returns the status of os.waitpid; a run that came to its end
    leaves their number, and those at which it entered and left data.write_file, in `cwd`/moments.
    """
    pid = os.fork()
    if pid == 0:
        moments, saving = 0, []

        def count(frame, event, argument):
            nonlocal moments
            moments += 1
            if moments >= kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if frame.f_code is data.write_file.__code__ and event in ("call", "return"):
                saving.append(moments)

        # tqdm's lock is shared with forked processes: killed while it holds it, this one would lock us out for ever
        train.tqdm.set_lock(threading.RLock())
        code = 1
        try:
            sys.setprofile(count)
            code = tiny(*flags, cwd=cwd).returncode
            sys.setprofile(None)
            (cwd / "moments").write_text(json.dumps([moments, saving]))
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return status


def moments_of(tiny, cwd, *flags):
    """All moments of an uninterrupted run, and those in which it saves something."""
    assert die_in(tiny, cwd, *flags) == 0
    moments, saving = json.loads((cwd / "moments").read_text())
    return range(1, moments), [moment for pair in zip(*[iter(saving)] * 2, strict=True) for moment in range(*pair)]


@unix
@pytest.mark.parametrize("recipe", ["baseline", "quick"])
@pytest.mark.usefixtures("finished")  # so that all is imported before the moments are counted
def test_a_killed_run_resumes_to_the_very_same_end(tiny, tmp_path, recipe):
    flags = ("--recipe", recipe, "--augment", "both", "--epochs", 3, "--name", "run", "--resume")
    (whole := tmp_path / "whole").mkdir()
    everywhere, saving = moments_of(tiny, whole, *flags)
    chance = random.Random(0)
    for number in range(3):
        (cwd := tmp_path / str(number)).mkdir()
        folder = cwd / "experiments/run"
        # The first kill is anywhere or while something is saved; some are killed again after they have been resumed
        status = die_in(tiny, cwd, *flags, kill_at=chance.choice(everywhere if number % 2 else saving))
        assert status == signal.SIGKILL
        if number % 3 == 0:
            die_in(tiny, cwd, *flags, kill_at=chance.choice(everywhere) // 2)
        outcome = tiny(*flags, cwd=cwd)  # started, or gone on with: the same command does both
        assert outcome.returncode == 0, outcome
        assert agree(whole / "experiments/run", folder)
        assert scalars(whole / "experiments/run") == scalars(folder)  # no point twice, none missing
        assert (cwd / "experiments/curves.png").exists()


def test_resume_starts_or_goes_on_says_which_and_clears_what_killed_writers_left(tiny, tmp_path, interfere):
    flags = ("--augment", "both", "--epochs", 3, "--resume")
    folder, whole = (tmp_path / "experiments" / name for name in ("baseline-lr0.001-both-seed0", "whole"))
    assert tiny(*flags, "--name", "whole").returncode == 0
    interfere(train, "train_step", KeyboardInterrupt(), [2])  # a folder, and nothing to go on with
    assert tiny(*flags).returncode == 130
    interfere(train, "train_step", KeyboardInterrupt(), [5])
    outcome = tiny(*flags)
    assert outcome.returncode == 130 and "starts" in outcome.stdout.splitlines()[0]
    (folder / "checkpoint.pt.1-1.part").touch()
    outcome = tiny(*flags)
    assert outcome.returncode == 0 and "continues after step 3 of 9" in outcome.stdout.splitlines()[0]
    assert agree(whole, folder) and not list(folder.glob("*.part"))
    before = (folder / "checkpoint.pt").read_bytes()
    outcome = tiny(*flags)
    assert outcome.returncode == 0 and "is finished" in outcome.stdout.splitlines()[0]
    assert (folder / "checkpoint.pt").read_bytes() == before and agree(whole, folder)


def test_more_epochs_take_a_finished_run_to_what_a_longer_one_gives(copy, tiny, interfere):
    whole = (folder := copy()).with_name("whole")
    assert tiny("--epochs", 5, "--name", "whole").returncode == 0
    interfere(train, "train_step", KeyboardInterrupt(), [4])  # in the fifth epoch
    assert tiny("--name", "run", "--resume", "--epochs", 5).returncode == 130
    outcome = tiny("--name", "run", "--resume")  # it is one of five epochs now
    assert outcome.returncode == 0 and "continues after step 12 of 15" in outcome.stdout
    assert agree(whole, folder) and scalars(whole) == scalars(folder)
    first, further = config(folder)["command"].split(" && ")
    assert config(folder)["epochs"] == 5 and first.endswith("--epochs 3") and further.endswith("--resume --epochs 5")


@pytest.mark.parametrize("accident, code, says", [
    (lambda *_: signal.raise_signal(signal.SIGINT), 130, "--resume"),
    (lambda *_: signal.raise_signal(signal.SIGTERM), 130, "--resume"),
    (MemoryError(), 1, "--batch-size"),
    (torch.cuda.OutOfMemoryError(), 1, "--batch-size"),
])  # fmt: skip
def test_a_run_that_is_stopped_or_out_of_memory_says_how_to_go_on(tiny, interfere, accident, code, says):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in a shell's background would ignore
    interfere(train, "evaluate", accident)
    assert says in complain(tiny(), code)


def test_resume_finds_the_run_of_a_name_that_was_saved_last(finished, copy, tiny):
    first, second, third = (copy(name=finished.name + number) for number in ("", "-2", "-3"))
    flags = ("--lr", "1e-3", "--epochs", 3, "--resume")
    for times, newest in (((1, 2, 3), third), ((4, 2, 3), first), ((1, 3, 2), second)):
        for folder, saved_at in zip((first, second, third), times, strict=True):
            os.utime(folder / "checkpoint.pt", (saved_at, saved_at))
        assert f"{newest.name} on" in tiny(*flags).stdout


# ------------------------------------------------------------------------------------------------------------ errors
def test_a_name_that_another_run_claims_meanwhile_is_refused_and_not_overwritten(copy, tiny, tmp_path, interfere):
    before = {}
    interfere(data, "load_cifar10", lambda root: copy() and before.update(list_files(tmp_path)))
    line = complain(tiny("--name", "run"), 2)
    assert "experiments/run is there already" in line and "--name" in line and "--resume" in line
    assert list_files(tmp_path) == before


def test_a_run_that_is_still_going_on_cannot_be_resumed_beside_it(copy, tiny, tmp_path):
    folder = copy()
    before = list_files(tmp_path)
    with FileLock(folder / ".lock"):
        assert "in use" in complain(tiny("--name", "run", "--resume"), 2)
    assert list_files(tmp_path) == before
    assert tiny("--name", "run", "--resume").returncode == 0


@pytest.mark.parametrize("change, flags, says", [
    (None, "--lr 0.5", "--lr 0.001: drop that flag"),
    (None, "--recipe quick", "--recipe baseline: drop"),
    (None, "--set tta=true", "--set tta=false: drop"),
    (None, "--set widths=8,8", "--set widths=8,8,8: drop"),
    (None, "--seed 1", "--seed 0: drop"),
    (None, "--epochs 2", "--epochs 3.0: drop"),
    (lambda saved: saved["settings"].update(muon=True), "--epochs 4", "--epochs 3.0 and a schedule that depends on it"),
    # When its pictures grow depends on the epochs, and from the middle of an epoch it cannot go on
    (lambda saved: saved["settings"].update(sizes=((17, 0.5),)), "--epochs 4", "--epochs 3.0 and a schedule"),
    (lambda saved: saved["rows"][-1].update(epoch=2.5), "--epochs 4", "--epochs 3.0: drop"),
    (lambda saved: saved["settings"].update(device="cuda"), "", "--device"),  # another may be named, see below
    (lambda saved: saved["model"].update({"head.bias": torch.zeros(11)}), "", "does not fit this net and optimizer"),
    (lambda saved: saved["optimizer"].clear(), "", "does not fit this net and optimizer"),
    (lambda saved: saved.update(generator=torch.zeros(3)), "", "does not fit this net and optimizer"),
    (lambda saved: saved.update(format=1), "", "cannot load "),  # an older net
    (lambda saved: saved.clear(), "", "cannot load "),
])  # fmt: skip
def test_what_contradicts_a_run_or_does_not_fit_is_refused_leaving_nothing(copy, tiny, tmp_path, change, flags, says):
    folder = copy(change)
    before = list_files(tmp_path)
    line = complain(tiny("--name", "run", "--resume", *flags.split()), 2)
    assert says in line and ("with --name" in line or not flags)
    assert list_files(tmp_path) == before
    assert "not fit" in says or not (folder / ".lock").exists()  # that shows only once the run is locked


@pytest.mark.parametrize("share", [0, 0.5, None])
def test_a_broken_checkpoint_is_refused_and_cannot_be_loaded(copy, tiny, share):
    raw = (path := copy() / "checkpoint.pt").read_bytes()
    path.write_bytes(b"not a checkpoint" if share is None else raw[: int(share * len(raw))])
    assert "checkpoint.pt" in complain(tiny("--name", "run", "--resume"), 2)
    with pytest.raises(train.UsageError, match=r"checkpoint\.pt"):
        train.load(path.parent)


@pytest.mark.parametrize(
    "device, flag, precision", [("cpu", "", "bf16"), ("cpu", "--device auto", "bf16"), ("cuda", "--device cpu", "fp32")]
)
def test_a_run_goes_on_in_its_own_precision_unless_another_device_than_its_own_is_named(
    finished, copy, tiny, device, flag, precision
):
    folder = copy(lambda saved: saved["settings"].update(device=device, precision="bf16"))
    assert f" {precision}:" in tiny("--name", "run", "--resume", "--epochs", 4, *flag.split()).stdout
    expected = config(finished) | {"precision": precision, "epochs": 4, "command": config(folder)["command"]}
    assert config(folder) == expected and len(rows(folder)) == 4


@unix
@pytest.mark.parametrize("kilobytes", [0, 1, 60])
def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(finished, tiny, tmp_path, kilobytes):
    import resource

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, before[1]))  # no file may grow beyond that
    try:
        outcome = tiny("--epochs", 3, "--name", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert re.search("File too large: '?experiments/run/checkpoint.pt", complain(outcome, 1))
    folder = tmp_path / "experiments/run"
    assert not list(folder.glob("*.part")) and not (folder / "checkpoint.pt").exists()
    assert tiny("--epochs", 3, "--name", "run", "--resume").returncode == 0
    assert agree(finished, folder) and scalars(finished) == scalars(folder)


def test_a_loss_that_is_not_finite_is_not_saved_and_the_failed_run_lets_go_of_its_folder(tmp_path, monkeypatch, capsys):
    make_tiny(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1e30", "--name", "run"])
    with pytest.raises(SystemExit) as kept:  # as a notebook keeps it, and with it all that the call has held
        train.main()
    assert kept.value.code == 1
    assert re.search(r"loss is (nan|inf) at step \d+: .*--lr", capsys.readouterr().err)
    assert not (tmp_path / "experiments/run/checkpoint.pt").exists()
    FileLock(tmp_path / "experiments/run/.lock").acquire(timeout=0)


def test_a_net_that_the_last_step_of_an_epoch_has_broken_is_not_saved(copy, tiny, monkeypatch):
    before = (path := copy() / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(train, "evaluate", lambda *arguments: (math.nan, 0.1, None))
    line = complain(tiny("--name", "run", "--resume", "--epochs", 4), 1)
    assert "validation loss is nan" in line and "--lr" in line
    assert path.read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in complain(tiny("--experiments", "file"), 1)


def test_a_tilde_is_the_home_folder_and_a_name_may_have_spaces_and_dots(tiny, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    for name in ("my 1st run", "..dots", "-minus"):
        assert tiny(f"--name={name}", "--epochs", 1, "--experiments=~/runs").returncode == 0
        assert len(rows(tmp_path / "home/runs" / name)) == 1 and train.load(f"~/runs/{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_terminal_without_the_letters_a_foreign_backend_and_a_closed_stderr_do_not_matter(tmp_path):
    """What a notebook, an old terminal or a shell hands on to a process of its own."""
    code = "import os, sys; os.close(2); sys.stderr = None; import conftest, pytest, train; "
    code += "conftest.make_tiny(pytest.MonkeyPatch()); train.main()"
    path = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent / "tests")])
    variables = {"MPLBACKEND": "nonsense", "PYTHONIOENCODING": "ascii", "PYTHONPATH": path}
    command = [sys.executable, "-c", code, "--name", "実験", "--epochs", "1"]
    outcome = subprocess.run(command, cwd=tmp_path, env=os.environ | variables, stdout=subprocess.PIPE)
    assert outcome.returncode == 0
    assert b"run experiments/?? on cpu" in outcome.stdout.replace(b"\\", b"/")
    assert len(rows(tmp_path / "experiments/実験")) == 1
    with Image.open(tmp_path / "experiments/curves.png") as picture:
        assert min(picture.size) > 400


@pytest.mark.parametrize("name", ["train.py", "bn.py", "visualize_aug.py"])
def test_an_older_python_is_told_which_one_is_needed(monkeypatch, name):
    ast.parse((SCRIPT.parent / name).read_text(encoding="utf-8"), feature_version=(3, 8))  # so far it gets, at least
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    monkeypatch.setattr(sys, "version", "3.9.1 (main)")
    with pytest.raises(SystemExit, match=f"^{name} needs Python 3.10 or newer, this is 3.9.1$"):
        runpy.run_path(str(SCRIPT.parent / name))


def test_a_notebook_sees_progress(tiny, monkeypatch):  # and a log does not: of the finished run, stderr is empty
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert "0/3 [" in tiny("--epochs", 1).stderr


# --------------------------------------------------------------------------------------------------------- real data
@pytest.mark.real_data
def test_some_seconds_on_the_real_cifar10_give_more_than_60_percent(tmp_path):
    command = [sys.executable, SCRIPT, "--recipe", "quick", "--epochs", "0.3", "--data", SCRIPT.parent / "datasets"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (row,) = rows(next(tmp_path.glob("experiments/*/metrics.csv")).parent)
    assert float(row["val_accuracy"]) > 0.6
