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


def results(folder):
    """What two equal runs must agree in, bit for bit: what was measured but for the seconds, and all that is saved."""
    metrics = [{key: value for key, value in row.items() if key != "train_seconds"} for row in rows(folder)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved = [*checkpoint["model"].values(), *tensors(checkpoint["optimizer"]), checkpoint["generator"]]
    points = [{key: value for key, value in point.items() if key != "time"} for point in checkpoint["points"]]
    return metrics, points, saved


def tensors(state):
    """All tensors in a state, however it is nested."""
    if torch.is_tensor(state):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for value in inner for tensor in tensors(value)]


def agree(one, other):
    (*tables, saved), (*other_tables, other_saved) = results(one), results(other)
    return tables == other_tables and all(map(torch.equal, saved, other_saved)) and len(saved) == len(other_saved)


def scalars(folder):
    """[(tag, step, value)] of a run, read by TensorBoard's own reader."""
    return [point[:3] for point in timed_scalars(folder)]


def timed_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return sorted((tag, e.step, e.value, e.wall_time) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))


def list_files(folder):
    """{path: bytes} of all that is in a folder, the empty folders too."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_a_tiny_set_is_learnt_to_zero_error(recipe):
    images = torch.randint(256, (30, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    labels, inputs = torch.arange(30) % 10, data.normalize(data.to_float(images))
    settings = {**train.RECIPES[recipe], "seed": 0, "widths": (16, 16, 16), "batch_size": 30}
    settings["lr"] /= 2
    model, optimizer = train.build(settings, inputs)
    for _ in range(100):
        train.train_step(model, optimizer, CrossEntropyLoss(), inputs, labels, "fp32")
    assert train.evaluate(model, images, labels, "fp32")[1] == 1


def test_evaluate_is_the_mean_over_all_images_in_evaluation_mode():
    settings = {**train.RECIPES["baseline"], "seed": 0, "lr": 1e-2, "widths": (8, 8, 8)}
    images = torch.randint(256, (503, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    labels, inputs = torch.randint(10, (503,), generator=seeded()), data.normalize(data.to_float(images))
    model, optimizer = train.build(settings, inputs)
    for _ in range(20):  # until it no longer says the same of all
        train.train_step(model, optimizer, CrossEntropyLoss(), inputs[:250], labels[:250], "fp32")
    loss, accuracy, accuracy_tta = train.evaluate(model, images, labels, "fp32", tta=True)
    assert model.training
    with torch.no_grad():
        logits = model.eval()(inputs)
        averaged = sum(weight * model(view) for view, weight in data.views(inputs))
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert accuracy_tta == (averaged.argmax(1) == labels).double().mean().item() != accuracy


def test_rate_falls_linearly_and_pictures_grow_and_epochs_may_be_a_fraction(tiny, tmp_path, monkeypatch):
    seen, train_step = [], train.train_step

    def spy(model, optimizer, criterion, images, labels, precision):
        seen.append((optimizer.lr, *images.shape[2:], model.stem.bias.requires_grad))
        return train_step(model, optimizer, criterion, images, labels, precision)

    monkeypatch.setattr(train, "train_step", spy)
    sizes = "sizes=17:0.5,25:0.75"
    outcome = tiny("--recipe", "quick", "--epochs", 1.5, "--lr", 0.8, "--name", "run", "--set", sizes)
    assert outcome.returncode == 0, outcome.stderr
    # 40 images in batches of 16 are 3 steps an epoch, so 4 in all
    sizes, stem, rates = (
        (17, 17, 25, 32),
        (True, True, False, False),
        [pytest.approx(0.8 * (1 - i / 4)) for i in range(4)],
    )
    assert seen == [(rates[i], sizes[i], sizes[i], stem[i]) for i in range(4)]
    assert [float(row["epoch"]) for row in rows(tmp_path / "experiments/run")] == [1, 4 / 3]
    points = [(step, rate) for tag, step, rate in scalars(tmp_path / "experiments/run") if tag == "learning_rate"]
    assert points == [*zip(range(1, 5), rates, strict=True)]


@pytest.mark.parametrize("first, steps, ends", [(0, 1000, [*range(2, 49, 2), 49]), (3, 10, [5, 7, 9, 10])])
def test_a_point_about_every_twentieth_of_an_epoch_is_the_mean_since_the_last(monkeypatch, first, steps, ends):
    images, labels = torch.zeros(97, 3, 32, 32, dtype=torch.uint8), torch.arange(97) % 10
    logits = 3 * torch.randn(97, 10, generator=seeded())
    done = []  # the images of each step

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
    right = (logits[: len(own)].argmax(1) == own).double()
    for point, (loss, accuracy) in zip(points, means, strict=True):
        end = sum(map(len, done[: point["step"] - first]))
        assert point["train_loss"] == pytest.approx(losses[start:end].mean().item(), rel=1e-6)
        assert point["train_accuracy"] == pytest.approx(right[start:end].mean().item())
        assert (loss, accuracy) == pytest.approx((losses[:end].mean().item(), right[:end].mean().item()), rel=1e-6)
        assert point["epoch"] == point["step"] / 49
        start = end


def test_held_out_trains_on_the_rest_and_validates_on_the_last_training_images(tiny, tmp_path, monkeypatch):
    (images, labels), _ = load_tiny(None)
    trained, validated = [], []

    def spy(model, *arguments):
        validated.append(arguments[:2])
        return 1.0, 0.5, None

    def step(model, optimizer, criterion, some, own, precision):
        trained.extend(own.tolist())
        return torch.zeros(len(own), 10), 0.5

    monkeypatch.setattr(train, "evaluate", spy)
    monkeypatch.setattr(train, "train_step", step)
    assert tiny("--epochs", 1, "--set", "held_out=15").returncode == 0
    assert sorted(trained) == sorted(labels[:25].tolist())
    assert torch.equal(validated[0][0], images[25:]) and torch.equal(validated[0][1], labels[25:])
    assert (tmp_path / "experiments/baseline-lr0.001-none-held_out=15-seed0/metrics.csv").exists()


# ---------------------------------------------------------------------------------------------------------- settings


def test_set_sets_what_has_no_flag_and_is_part_of_name_config_and_table(tiny, tmp_path):
    given = ("widths=8,12", "muon=true", "whiten=true", "sizes=20:0.2,24:0.6", "label_smoothing=0.1", "tta=true")
    flags = ("--epochs", 1, "--lr", 0.1, *itertools.chain(*(("--set", setting) for setting in given)))
    assert tiny(*flags).returncode == 0
    (folder,) = (tmp_path / "experiments").glob("*/")
    assert folder.name == (
        "baseline-lr0.1-none-widths=8,12-whiten=true-muon=true-tta=true-sizes=20,0.2,24,0.6-label_smoothing=0.1-seed0"
    )
    config = json.loads((folder / "config.json").read_text())
    expected = {"widths": [8, 12], "muon": True, "sizes": [[20, 0.2], [24, 0.6]], "label_smoothing": 0.1, "tta": True}
    assert config.items() >= expected.items()
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["model"]["head.weight"].shape == (10, 12)
    events = b"".join(path.read_bytes() for path in folder.glob("events.*"))
    assert b"label_smoothing" in events and b"((20, 0.2), (24, 0.6))" in events
    assert "widths" in complain(tiny(*flags[:-2], "--resume", "--name", folder.name, "--set", "widths=8,8"), 2)


@pytest.mark.parametrize(
    "setting",
    ("widths", "widths=", "widths=a", "muon=1", "muon=True", "sizes=20", "sizes=20:a", "cake=1", "lr=1", "tta=", "=",
     "label_smoothing=x", "held_out=0.5"),
)  # fmt: skip
def test_a_setting_that_is_not_there_or_of_another_kind_is_refused_with_a_list(tiny, tmp_path, setting):
    line = complain(tiny("--set", setting), 2)
    assert setting in line and all(key in line for key in train.SETTABLE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--lr", "0"), "--lr 0.0 is not from"),
        (("--lr", "nan"), "--lr nan is not from"),
        (("--lr", "much"), "--lr"),
        (("--epochs", "-1"), "--epochs"),
        (("--epochs", "inf"), "--epochs"),
        (("--epochs", "1e300"), "--epochs 1e+300 is not from 1e-06 to 1,000,000"),
        (("--lr", "1e999"), "--lr"),
        (("--batch-size", "1e3"), "--batch-size"),
        (("--batch-size", "9" * 5000), "--batch-size"),
        (("--seed", "9" * 30), "--seed"),
        (("--seed", "9" * 400), "--seed"),
        (("--batch-size", "1"), "--batch-size 1 is not from 2 to 50,000"),
        (("--batch-size", "2.5"), "--batch-size"),
        (("--seed", "-1"), "--seed"),
        (("--set", "held_out=49999"), "--set held_out 49999 is not from 0 to 49,998"),
        (("--set", "label_smoothing=1.5"), "--set label_smoothing"),
        (("--set", "label_smoothing=nan"), "--set label_smoothing"),
        (("--set", "sizes=24:0.5,16:0.6"), "--set sizes"),
        (("--set", "widths=8,0"), "--set widths (8, 0) is not from 1"),
        (("--augment", "sideways"), "--augment"),
        (("--recipe", "cake"), "--recipe"),
        (("--device", "abacus"), "--device"),
        (("--device", "cuda"), "--device cuda cannot be used: PyTorch sees only cpu"),
        (("--name", "../elsewhere"), "--name"),
        (("--name", "..\\elsewhere", "--resume"), "--name"),
        (("--name", ""), "--name"),
        (("--colour",), "--colour"),
    ],
)  # fmt: skip
def test_misuse_gets_one_line_that_names_it_and_leaves_nothing(tiny, tmp_path, flags, says):
    outcome = tiny(*flags)
    assert says in complain(outcome, 2)
    assert len(outcome.stderr.strip().splitlines()) <= 2  # argparse's line of usage comes first
    assert not list(tmp_path.iterdir())


def test_help_explains_every_flag_with_its_default(tiny):
    text = tiny("--help").stdout
    flags = re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE)
    assert set(flags) == {
        "--recipe", "--lr", "--epochs", "--batch-size", "--augment", "--seed", "--device", "--data", "--experiments",
        "--name", "--resume", "--set",
    }  # fmt: skip
    assert text.count("(default:") == len(flags) - 1  # --resume is off unless it is given


# ------------------------------------------------------------------------------------------------- files and curves


def test_metrics_csv(finished):
    table = rows(finished)
    assert list(table[0]) == list(train.COLUMNS)
    assert [row["step"] for row in table] == ["3", "6", "9"]
    for row in table:
        assert all(math.isfinite(float(value)) for value in row.values())
        # 40 training images and 20 to validate on: every accuracy is a whole number of them
        for part, count in (("train", 40), ("val", 20)):
            right = float(row[f"{part}_accuracy"]) * count
            assert right == pytest.approx(round(right)) and 0 <= right <= count
    assert float(table[0]["train_seconds"]) < float(table[-1]["train_seconds"])


def test_the_points_of_an_epoch_have_its_mean(finished):
    points = train.read_curves(finished.parent)[finished.name][0]
    for metric in ("train_loss", "train_accuracy"):
        for epoch, row in enumerate(rows(finished)):
            parts = [point[metric] for point in points[3 * epoch : 3 * epoch + 3]]
            mean = sum(size * part for size, part in zip((16, 16, 8), parts, strict=True)) / 40
            assert mean == pytest.approx(float(row[metric]))


def test_only_the_last_row_has_an_accuracy_with_test_time_augmentation(tiny, tmp_path):
    assert tiny("--recipe", "best", "--epochs", 2, "--name", "run").returncode == 0
    first, last = rows(tmp_path / "experiments/run")
    assert first["val_accuracy_tta"] == ""
    assert 0 <= float(last["val_accuracy_tta"]) <= 1


def test_config_says_enough_to_run_it_again(finished):
    config = json.loads((finished / "config.json").read_text())
    expected = {"recipe": "baseline", "lr": 1e-3, "epochs": 3, "batch_size": 16, "augment": "none", "seed": 0}
    assert expected.items() <= config.items()
    assert config["versions"]["torch"] == torch.__version__
    assert config["command"] == "python train.py --lr 1e-3 --epochs 3"
    assert config["precision"] in ("fp32", "bf16") and config["threads"] == 1


def test_the_events_hold_what_was_measured(finished):
    points = train.read_curves(finished.parent)[finished.name][0]
    tables = {"train": points, "val": rows(finished)}
    expected = [
        (f"{metric}/{part}", int(row["step"]), pytest.approx(float(row[f"{part}_{metric}"])))
        for metric, part in itertools.product(("accuracy", "loss"), tables)
        for row in tables[part]
    ]
    expected[12:12] = [("learning_rate", step, pytest.approx(1e-3)) for step in range(1, 10)]
    assert scalars(finished) == expected


def captured(monkeypatch, *runs):
    """The figures that draw_curves makes of these runs."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    monkeypatch.setattr(data, "write_file", lambda path, raw: None)
    for run in runs:
        train.draw_curves(None, run)
    return figures


def measured(epochs, every=0.05):
    points = [
        {"epoch": every * i, "train_loss": 1 / i, "train_accuracy": 0.5} for i in range(1, round(epochs / every) + 1)
    ]
    ends = [*range(1, math.ceil(epochs)), epochs]
    return points, [{"epoch": epoch, "val_loss": 1.0, "val_accuracy": 0.4} for epoch in ends]


def test_curves_have_the_fine_points_and_whole_epochs_for_ticks(monkeypatch):
    for figure, epochs in zip(captured(monkeypatch, {"a": measured(0.6)}, {"a": measured(7)}), (0.6, 7), strict=True):
        for panel, metric in zip(figure.axes, ("loss", "accuracy"), strict=True):
            training, validation = panel.get_lines()
            points, table = measured(epochs)
            assert [*training.get_ydata()] == [point[f"train_{metric}"] for point in points]
            assert [*training.get_xdata()] == [point["epoch"] for point in points]
            assert [*validation.get_ydata()] == [row[f"val_{metric}"] for row in table]
            figure.draw_without_rendering()
            low, high = panel.get_xlim()
            ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
            assert len(ticks) >= 2 and all(tick == int(tick) for tick in ticks)


def test_from_the_8th_run_on_curves_differ_by_more_than_color(monkeypatch):
    (figure,) = captured(monkeypatch, {f"run {number}": measured(2) for number in range(21)})
    for panel in figure.axes:
        for lines in (panel.get_lines()[::2], panel.get_lines()[1::2]):
            looks = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines]
            assert len(set(looks)) == 21 and len({color for color, *_ in looks}) == 7


def test_curves_show_every_run_and_pass_over_what_is_none(finished, tiny, tmp_path):
    for name in ("$_$", "b"):  # the first is no formula
        shutil.copytree(finished, tmp_path / "experiments" / name)
    for name in ("begun", "foreign"):
        (tmp_path / "experiments" / name).mkdir()
    (tmp_path / "experiments/foreign/checkpoint.pt").write_bytes(b"of another program")
    (tmp_path / "experiments/foreign/metrics.csv").write_text("time,value\n1,2\n")
    runs = train.read_curves(tmp_path / "experiments")
    assert list(runs) == ["$_$", "b"]
    for row, read in zip(rows(finished), runs["b"][1], strict=True):
        assert {key: float(value) for key, value in row.items()}.items() <= read.items()
    outcome = tiny("--epochs", 1)
    assert outcome.returncode == 0 and outcome.stderr == ""
    with Image.open(tmp_path / "experiments/curves.png") as picture:
        assert min(picture.size) > 400


def test_the_same_run_once_more_gets_a_folder_of_its_own_and_the_same_numbers(finished, tiny):
    kept = list_files(finished)
    assert tiny("--lr", "1e-3", "--epochs", 3, cwd=finished.parent.parent).returncode == 0
    assert list_files(finished) == kept
    assert agree(finished, finished.with_name(finished.name + "-2"))


def test_another_seed_gives_other_numbers(finished, tiny, tmp_path):
    assert tiny("--lr", "1e-3", "--epochs", 3, "--seed", 1, "--name", "run").returncode == 0
    assert not agree(finished, tmp_path / "experiments/run")


@pytest.mark.parametrize("error, written", [(errno.ENOSPC, b"old"), (errno.EINVAL, b"new")])
def test_a_failed_write_leaves_the_old_file_but_a_file_system_may_lack_fsync(tmp_path, monkeypatch, error, written):
    def fail(number):
        raise OSError(error, os.strerror(error))

    data.write_file(path := tmp_path / "file", b"old")
    monkeypatch.setattr(data.os, "fsync", fail)
    with contextlib.nullcontext() if written == b"new" else pytest.raises(OSError, match=r"space left.*file"):
        data.write_file(path, b"new")
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("patience, written", [(0, b"old"), (60, b"new")])
def test_a_file_that_another_program_holds_open_is_waited_for_with_patience(tmp_path, monkeypatch, patience, written):
    (tmp_path / "file").write_bytes(b"old")
    replace, calls = os.replace, []

    def refuse_twice(source, target):  # as Windows does
        calls.append(target)
        if len(calls) <= 2:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(data.os, "replace", refuse_twice)
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with contextlib.nullcontext() if patience else pytest.raises(OSError, match=r"Access is denied.*file"):
        data.write_file(tmp_path / "file", b"new", patience)
    assert (tmp_path / "file").read_bytes() == written and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["metrics.csv", "config.json", "events"])
def test_what_cannot_be_written_is_said_in_a_line_and_written_an_epoch_later(
    finished, tiny, tmp_path, monkeypatch, name
):
    folder, calls = tmp_path / "experiments/run", []
    evaluate, open_file = train.evaluate, tensorboardX.record_writer.open_file
    if name == "events":  # what is written waits in memory until it is flushed, and then the disk is full
        monkeypatch.setattr(tensorboardX.record_writer, "open_file", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
    else:
        (folder / name).mkdir(parents=True)

    def clear_in_the_second_epoch(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            monkeypatch.setattr(tensorboardX.record_writer, "open_file", open_file)
            if name != "events":
                (folder / name).rmdir()
        return evaluate(*arguments)

    monkeypatch.setattr(train, "evaluate", clear_in_the_second_epoch)
    outcome = tiny("--epochs", 3, "--name", "run", "--resume")
    assert outcome.returncode == 0
    complaints = outcome.stderr.strip().splitlines()  # at the start and after the first epoch
    assert [line.startswith(f"train.py: cannot write experiments/run/{name} (") for line in complaints] == [True, True]
    assert agree(finished, folder) and scalars(finished) == scalars(folder)
    assert json.loads((folder / "config.json").read_text())["epochs"] == 3


def test_a_picture_that_cannot_be_written_does_not_fail_the_run(tiny, tmp_path):
    (tmp_path / "experiments/curves.png").mkdir(parents=True)
    outcome = tiny("--epochs", 1)
    assert outcome.returncode == 0 and "finished" in outcome.stdout
    (line,) = outcome.stderr.strip().splitlines()
    assert line.startswith("train.py: cannot write experiments/curves.png (")


# ------------------------------------------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """A TensorBoard server over a folder of runs, asked for the curves of one."""

    def __init__(self, experiments, fast):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", experiments, "--port", str(port)]
        command += [f"--load_fast={fast}", "--reload_interval=1"]
        self.server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        self.address = f"http://127.0.0.1:{port}/data/plugin/"

    def ask(self, query, posted=None):
        body = json.dumps(posted).encode() if posted else None
        request = urllib.request.Request(self.address + query, body, {"Content-Type": "application/json"})
        return json.loads(urllib.request.urlopen(request, timeout=30).read())

    def wait_for(self, run, steps):
        """{tag: [(wall time, step, value)]} of a run once loss/val is shown up to the last of these steps."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if [step for _, step, _ in self.ask(f"scalars/scalars?run={run}&tag=loss/val")][-1:] == steps[-1:]:
                    return {
                        tag: self.ask(f"scalars/scalars?run={run}&tag={tag}") for tag in self.ask("scalars/tags")[run]
                    }
            select.select([], [], [], 0.1)
        raise TimeoutError(f"TensorBoard does not show {steps}")


def test_two_writers_within_a_second_have_files_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(train.time, "time", lambda: 1e9)
    for _ in range(2):
        train.write_curves(tmp_path, None, [], [])
    assert len(list(tmp_path.iterdir())) == 2


def stop_at(monkeypatch, step, interrupt=KeyboardInterrupt):
    """Have training interrupted, as by Ctrl-C, in this step (counted from 1) of a run that starts now."""
    train_step, calls = train.train_step, itertools.count(1)

    def stop(*arguments):
        if next(calls) == step:
            monkeypatch.setattr(train, "train_step", train_step)
            raise interrupt
        return train_step(*arguments)

    monkeypatch.setattr(train, "train_step", stop)


def test_tensorboard_may_stay_open_while_a_run_is_stopped_and_resumed(finished, tiny, tmp_path, monkeypatch):
    folder, flags = tmp_path / "experiments/run", ("--epochs", 3, "--name", "run")
    stop_at(monkeypatch, 9)  # when points of the third epoch are logged that will be measured again
    assert tiny(*flags).returncode == 130
    before = {point[:2]: point for point in timed_scalars(folder)}
    assert ("loss/train", 8) in before
    (first,) = folder.glob("events.*")
    first.write_bytes(first.read_bytes()[:-3])  # the writer was killed in the middle of a record
    with contextlib.ExitStack() as stack:

        def start(fast):
            board = TensorBoard(tmp_path / "experiments", fast)
            stack.callback(board.server.kill)
            return board

        boards = [start("true"), start("false")]
        for board in boards:
            board.wait_for("run", [3, 6])
        assert tiny(*flags, "--resume").returncode == 0
        boards += [start("true"), start("false")]
        for board in boards:
            shown = board.wait_for("run", [3, 6, 9])
            points = sorted((tag, step, value) for tag in shown for _, step, value in shown[tag])
            assert points == [pytest.approx(point) for point in scalars(finished)]
            for tag in shown:
                for measured_at, step, _ in shown[tag]:
                    assert step > 6 or measured_at == before[tag, step][3]  # at the time at which it was measured
        assert first.exists()
        assert boards[-1].ask("images/tags")["run"]
        asked = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10}
        (run,) = boards[-1].ask("hparams/session_groups", asked)["sessionGroups"]
        assert run["hparams"].items() >= {"lr": 1e-3, "recipe": "baseline", "seed": 0, "widths": "(8, 8, 8)"}.items()
        final = {metric["name"]["tag"]: metric["value"] for metric in run["metricValues"]}
        last = rows(folder)[-1]
        for tag, column in train.VALIDATION_TAGS.items():
            assert final[tag] == pytest.approx(float(last[column]))


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
def test_a_killed_run_resumes_to_the_very_same_end(tiny, tmp_path, recipe, request):
    flags = ("--recipe", recipe, "--augment", "both", "--epochs", 3, "--name", "run", "--resume")
    (whole := tmp_path / "whole").mkdir()
    everywhere, saving = moments_of(tiny, whole, *flags)
    chance = random.Random(0)
    for number in range(60 if request.config.getoption("--long") else 3):
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


def test_resume_starts_what_is_not_there_and_says_which(finished, tiny, tmp_path, monkeypatch):
    flags = ("--lr", "1e-3", "--epochs", 3, "--resume")
    stop_at(monkeypatch, 2)  # in the first epoch: there is a folder, and nothing to go on with
    assert tiny(*flags).returncode == 130
    stop_at(monkeypatch, 5)
    outcome = tiny(*flags)
    assert outcome.returncode == 130 and "starts" in outcome.stdout.splitlines()[0]
    outcome = tiny(*flags)
    assert outcome.returncode == 0 and "goes on after step 3 of 9" in outcome.stdout.splitlines()[0]
    (folder,) = (tmp_path / "experiments").glob("*/")
    assert agree(finished, folder)
    before = (folder / "checkpoint.pt").read_bytes()
    outcome = tiny(*flags)
    assert outcome.returncode == 0 and "goes on after step 9 of 9" in outcome.stdout.splitlines()[0]
    assert (folder / "checkpoint.pt").read_bytes() == before and agree(finished, folder)


def test_resume_clears_away_what_killed_writers_have_left(finished, tiny, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "experiments/run")
    (folder / "checkpoint.pt.1-1.part").touch()
    assert tiny("--name", "run", "--resume").returncode == 0
    assert not list(folder.glob("*.part"))


def test_more_epochs_take_a_finished_run_to_what_a_longer_one_gives(finished, tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "experiments" / finished.name)
    assert tiny("--lr", "1e-3", "--epochs", 5, "--name", "whole").returncode == 0
    stop_at(monkeypatch, 4)  # in the fifth epoch
    assert tiny("--lr", "1e-3", "--resume", "--epochs", 5).returncode == 130
    outcome = tiny("--lr", "1e-3", "--resume")  # it is one of five epochs now
    assert outcome.returncode == 0 and "goes on after step 12 of 15" in outcome.stdout
    assert agree(tmp_path / "experiments/whole", folder)
    assert scalars(tmp_path / "experiments/whole") == scalars(folder)
    assert json.loads((folder / "config.json").read_text())["epochs"] == 5


@pytest.mark.parametrize(
    "flags, more, says",
    [
        (
            ("--recipe", "quick", "--set", "sizes=", "--epochs", 1),
            2,
            "--epochs 1.0, over which Muon's rate falls to 0: leave",
        ),
        (("--set", "sizes=17:0.5", "--epochs", 1), 2, "--epochs 1.0"),  # when the pictures grow depends on the epochs
        (("--epochs", 1.5), 2, "--epochs 1.5"),  # in the middle of an epoch, from which it does not go on
        (("--epochs", 2), 1, "--epochs 2.0"),
    ],
)
def test_epochs_that_a_run_cannot_go_on_to_are_refused(tiny, tmp_path, flags, more, says):
    assert tiny(*flags, "--name", "run").returncode == 0
    before = list_files(tmp_path)
    assert says in complain(tiny("--name", "run", "--resume", "--epochs", more), 2)
    assert list_files(tmp_path) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@unix
def test_ctrl_c_and_sigterm_say_how_to_go_on(tiny, monkeypatch, number):
    monkeypatch.setattr(train, "evaluate", lambda *arguments: os.kill(os.getpid(), number))
    handlers = signal.getsignal(signal.SIGTERM)
    try:
        assert "--resume" in complain(tiny(), 130)
    finally:
        signal.signal(signal.SIGTERM, handlers)


def test_resume_finds_the_run_of_a_name_that_was_saved_last(tiny, tmp_path):
    for _ in range(3):
        assert tiny("--epochs", 1).returncode == 0
    first, *_, third = sorted(path.parent for path in tmp_path.glob("experiments/*/metrics.csv"))
    assert f"{third.name} on" in tiny("--epochs", 1, "--resume").stdout
    os.utime(first / "checkpoint.pt", (2e9, 2e9))
    assert f"{first.name} on" in tiny("--epochs", 1, "--resume").stdout
    shutil.rmtree(first)
    assert f"{third.name} on" in tiny("--epochs", 1, "--resume").stdout


# ------------------------------------------------------------------------------------------------------------ errors


def test_a_name_in_use_is_not_overwritten(finished, tiny):
    before = list_files(finished.parent)
    line = complain(tiny("--name", finished.name, cwd=finished.parent.parent), 2)
    assert finished.name in line and "--name" in line and "--resume" in line
    assert list_files(finished.parent) == before


def test_a_name_may_have_spaces_and_dots(tiny, tmp_path):
    for name in ("my 1st run", "..dots", "-minus"):
        assert tiny(f"--name={name}", "--epochs", 1).returncode == 0
        assert len(rows(tmp_path / "experiments" / name)) == 1


def test_of_two_runs_that_start_at_once_under_one_name_the_second_is_told_so(tiny, tmp_path, monkeypatch):
    def load_while_the_other_starts(root):
        (tmp_path / "experiments/run").mkdir(parents=True)
        return load_tiny(root)

    monkeypatch.setattr(data, "load_cifar10", load_while_the_other_starts)
    assert "experiments/run is there already" in complain(tiny("--name", "run"), 2)
    assert list_files(tmp_path / "experiments") == {tmp_path / "experiments/run": None}


def test_a_run_that_is_still_going_on_cannot_be_resumed_beside_it(finished, tiny, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "experiments/run")
    before = list_files(tmp_path)
    with FileLock(folder / ".lock"):
        assert "in use" in complain(tiny("--name", "run", "--resume"), 2)
    assert list_files(tmp_path) == before
    assert tiny("--name", "run", "--resume").returncode == 0


def test_a_failed_run_lets_go_of_its_folder_though_a_notebook_keeps_the_error(tmp_path, monkeypatch):
    make_tiny(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1e30", "--name", "run"])
    with pytest.raises(SystemExit) as kept:
        train.main()
    assert kept.value.code == 1
    with FileLock(tmp_path / "experiments/run/.lock", timeout=0):
        pass


def test_a_refused_call_leaves_nothing_behind(finished, tiny, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "experiments/run", ignore=shutil.ignore_patterns(".lock"))
    before = list_files(tmp_path)
    for flags in (("--lr", "0.5"), ("--recipe", "quick"), ("--set", "tta=true"), ("--seed", "1")):
        line = complain(tiny("--name", "run", "--resume", *flags), 2)
        assert " ".join(flags).split("=")[0].removesuffix(flags[1]).strip() in line and "--name" in line
        assert list_files(tmp_path) == before
    assert tiny("--name", "run", "--resume").returncode == 0  # as in a notebook: all in one process
    assert agree(finished, folder)


@unix
@pytest.mark.parametrize("kilobytes", [0, 1, 20, 60])
def test_a_full_disk_names_what_could_not_be_written_and_the_run_goes_on_once_there_is_room(
    finished, tiny, tmp_path, kilobytes
):
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


def tamper(finished, cwd, change):
    """A copy of the finished run as the run "run" of the folder `cwd`, with its checkpoint changed by `change`."""
    folder = shutil.copytree(finished, cwd / "experiments/run")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    change(state)
    torch.save(state, folder / "checkpoint.pt")
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"].popitem(),
        lambda state: state["model"].update({"head.bias": torch.zeros(11)}),
        lambda state: state["optimizer"].clear(),
        lambda state: state.pop("step"),
        lambda state: state.update(rows=3),
        lambda state: state.update(generator=torch.zeros(3)),
        lambda state: state["settings"].pop("lr"),
        lambda state: state.clear(),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(finished, tiny, tmp_path, change):
    tamper(finished, tmp_path, change)
    before = list_files(tmp_path)
    assert "checkpoint.pt" in complain(tiny("--name", "run", "--resume"), 2)
    assert list_files(tmp_path) == before


@pytest.mark.parametrize("share", [0, 0.5, None])
def test_a_broken_checkpoint_is_refused_and_cannot_be_loaded(finished, tiny, tmp_path, share):
    (folder := tmp_path / "experiments/run").mkdir(parents=True)
    raw = (finished / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt").write_bytes(b"not a checkpoint" if share is None else raw[: int(share * len(raw))])
    assert "checkpoint.pt" in complain(tiny("--name", "run", "--resume"), 2)
    with pytest.raises(train.UsageError, match=r"checkpoint\.pt"):
        train.load(folder)


def test_a_run_of_a_device_that_is_gone_goes_on_on_another(finished, tiny, tmp_path):
    tamper(finished, tmp_path, lambda state: state["settings"].update(device="cuda"))
    assert "--device" in complain(tiny("--name", "run", "--resume"), 2)
    assert tiny("--name", "run", "--resume", "--device", "cpu").returncode == 0
    assert json.loads((tmp_path / "experiments/run/config.json").read_text())["device"] == "cpu"


def test_a_run_goes_on_in_its_own_precision(finished, tiny, tmp_path):
    tamper(finished, tmp_path, lambda state: state["settings"].update(precision="bf16"))
    for flags in ((), ("--device", "cpu")):  # saying what holds anyway changes nothing
        assert " bf16," in tiny("--name", "run", "--resume", *flags).stdout


@pytest.mark.parametrize("error", [MemoryError, torch.cuda.OutOfMemoryError])
def test_out_of_memory_says_what_to_lower(tiny, monkeypatch, error):
    stop_at(monkeypatch, 1, error)
    assert "--batch-size" in complain(tiny(), 1)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tiny, tmp_path):
    line = complain(tiny("--lr", "1e30", "--name", "run"), 1)
    assert re.search(r"loss is (nan|inf) at step \d+", line) and "--lr" in line
    assert not (tmp_path / "experiments/run/checkpoint.pt").exists()


def test_a_net_that_the_last_step_of_an_epoch_has_broken_is_not_saved(finished, tiny, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "experiments/run")
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(train, "evaluate", lambda *arguments: (math.nan, 0.1, None))
    line = complain(tiny("--name", "run", "--resume", "--epochs", 4), 1)
    assert "validation loss is nan" in line and "--lr" in line
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "file" in complain(tiny("--experiments", "file"), 1)


def test_a_tilde_is_the_home_folder(tiny, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    assert tiny("--epochs", 1, "--experiments=~/runs", "--name", "run").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert train.load("~/runs/run")


def test_a_terminal_without_the_letters_a_foreign_backend_and_a_closed_stderr_do_not_matter(tmp_path):
    """What a notebook, an old terminal or a shell hands on to a process of its own."""
    code = "import os, sys; os.close(2); sys.stderr = None; import conftest, pytest, train; "
    code += "conftest.make_tiny(pytest.MonkeyPatch()); train.main()"
    variables = {"MPLBACKEND": "nonsense", "PYTHONIOENCODING": "ascii"}
    variables["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parent), str(SCRIPT.parent / "tests")])
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


def test_a_notebook_sees_progress_and_a_log_does_not(tiny, monkeypatch):
    assert tiny("--epochs", 1).stderr == ""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    assert "0/3 [" in tiny("--epochs", 1).stderr


# ------------------------------------------------------------------------------------------ a picture of one's own


def test_load_gives_the_trained_net_in_evaluation_mode(finished):
    model = train.load(finished)
    assert not model.training and {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    _, (images, labels) = load_tiny(None)
    loss, accuracy, _ = train.evaluate(model, images, labels, "fp32")
    last = rows(finished)[-1]
    assert accuracy == float(last["val_accuracy"]) and loss == pytest.approx(float(last["val_loss"]), rel=0.02)


def test_readme_classifies_a_picture_of_ones_own(finished, tmp_path):
    readme = (SCRIPT.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (folder,) = re.findall(r'train\.load\("(.*?)"\)', code)
    (picture,) = re.findall(r'read\("(.*?)"\)', code)
    shutil.copytree(finished, tmp_path / folder)
    shutil.copy(SCRIPT.parent / "Lenna.png", tmp_path / picture)
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent)}
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert len(lines) == 3 and all(line.split()[0].endswith("%") and line.split()[1] in data.CLASSES for line in lines)


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real_data
def test_some_seconds_on_the_real_cifar10_give_more_than_60_percent(tmp_path):
    command = [sys.executable, SCRIPT, "--recipe", "quick", "--epochs", "0.3", "--data", SCRIPT.parent / "datasets"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (row,) = rows(next(tmp_path.glob("experiments/*/metrics.csv")).parent)
    assert float(row["val_accuracy"]) > 0.6
