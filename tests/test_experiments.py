"""What a run leaves in experiments/: folders, tables, pictures, TensorBoard's events, a net to load."""

import contextlib
import errno
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import matplotlib
import pytest
import tensorboardX.record_writer
import torch
from conftest import ROOT, agree, config, load_tiny, make_tiny, raising, rows, scalars, unix
from PIL import Image

import data
import train
import visualize_aug


# ----------------------------------------------------------------------------------------------------- files and curves
def test_metrics_csv_has_a_row_per_epoch_with_means_over_all_images(finished):
    table = rows(finished)
    points = torch.load(finished / "checkpoint.pt", weights_only=True)["points"]
    training = [point for point in points if "train_loss" in point]
    assert ",".join(table[0]) == "epoch,step,train_seconds,train_loss,train_accuracy,val_loss,val_accuracy"
    assert [row["step"] for row in table] == ["3", "6", "9"]
    assert float(table[0]["train_seconds"]) < float(table[-1]["train_seconds"])
    for epoch, row in enumerate(table):
        assert all(math.isfinite(float(value)) for value in row.values())
        # 40 training images and 20 to validate on: every accuracy is a whole number of them
        for part, count in (("train", 40), ("val", 20)):
            right = float(row[f"{part}_accuracy"]) * count
            assert right == pytest.approx(round(right)) and 0 <= right <= count
        for metric in ("train_loss", "train_accuracy"):  # the mean over the epoch's points
            parts = zip((16, 16, 8), training[3 * epoch : 3 * epoch + 3], strict=True)
            assert sum(size * point[metric] for size, point in parts) / 40 == pytest.approx(float(row[metric]))


def test_tensorboard_events_have_every_training_and_validation_value(finished):
    points = torch.load(finished / "checkpoint.pt", weights_only=True)["points"]
    training = [point for point in points if "train_loss" in point]
    logged = [("learning_rate/train", step, 1e-3) for step in range(1, 10)]
    for metric, (part, measured) in itertools.product(
        ("accuracy", "loss"), {"train": training, "val": rows(finished)}.items()
    ):
        logged += [(f"{metric}/{part}", int(row["step"]), float(row[f"{part}_{metric}"])) for row in measured]
    assert scalars(finished) == [pytest.approx(one) for one in sorted(logged)]


def test_config_json_has_the_command_that_repeats_the_run(finished):
    expected = {"recipe": "baseline", "lr": 1e-3, "epochs": 3, "batch_size": 16, "augment": "none", "seed": 0}
    expected |= {"command": "python train.py --lr 1e-3 --epochs 3", "threads": 1, "precision": "fp32"}
    assert expected.items() <= config(finished).items()
    assert config(finished)["versions"]["torch"] == torch.__version__


def test_tensorboard_shows_points_before_the_first_epoch_ends(tiny, tmp_path, before):
    seen = []
    before(train, "train_step", lambda *_: seen.append(len(scalars(tmp_path / "experiments/run"))), [2])
    assert tiny("--epochs", 1, "--name", "run").returncode == 0
    assert seen == [3]  # loss, accuracy and rate of the first step


def draw(runs):
    """The matplotlib figure of these runs, laid out."""
    figure = train.draw_curves(runs)
    figure.draw_without_rendering()
    return figure


def curves(epochs):
    points, ends = [i / 20 for i in range(1, round(20 * epochs) + 1)], [*range(1, math.ceil(epochs)), epochs]
    training = {f"train_{metric}": (points, [1 / (1 + point) for point in points]) for metric in train.METRICS}
    return training | {f"val_{metric}": (ends, [0.4] * len(ends)) for metric in train.METRICS}


@pytest.mark.parametrize("epochs", [0.6, 7])
def test_curves_png_shows_points_within_epochs_and_ticks_at_whole_epochs(epochs):
    run = curves(epochs)
    for panel, metric in zip(draw({"run": run}).axes, train.METRICS, strict=True):
        training, validation = panel.get_lines()
        assert ([*training.get_xdata()], [*training.get_ydata()]) == run[f"train_{metric}"]
        assert ([*validation.get_xdata()], [*validation.get_ydata()]) == run[f"val_{metric}"]
        low, high = panel.get_xlim()
        ticks = [tick for tick in panel.get_xticks() if low <= tick <= high]
        assert len(ticks) >= 2 and all(tick == int(tick) for tick in ticks)


def test_curves_png_gives_35_runs_different_styles():
    figure = draw({f"run {number}": curves(1) for number in range(35)})
    for lines in (figure.axes[0].get_lines()[::2], figure.axes[0].get_lines()[1::2]):
        looks = {(line.get_color(), line.get_marker()) for line in lines}
        assert len(looks) == 35 and len({color for color, _ in looks}) == 7


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["W" * 20, "W" * 255, "実" * 80], ids=["20", "255", "80"])
def test_curves_png_has_room_for_long_names(name):
    figure = draw({name + ending: curves(1) for ending in "ab"})
    legend = figure.legends[0].get_window_extent()
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1
    first, second = (text.get_text() for text in figure.legends[0].get_texts())
    assert first != second and first.startswith(" " + name[:28])


def test_curves_png_shows_runs_of_any_name(finished, copy, tiny, tmp_path):
    for name in ("$_$", "_b"):  # for matplotlib, a formula and a hidden label
        copy(name=name)
    runs = train.read_curves(tmp_path / "experiments")
    assert list(runs) == ["$_$", "_b"]
    expected = [float(row["val_loss"]) for row in rows(finished)]
    assert runs["_b"]["val_loss"] == ([1, 2, 3], pytest.approx(expected))
    outcome = tiny("--epochs", 1)
    assert outcome.returncode == 0 and outcome.stderr == ""


def test_curves_png_shows_runs_of_an_older_format(copy, tmp_path):
    def make_old(saved):
        saved["format"] = 5
        saved["points"] = [point for point in saved["points"] if "train_loss" in point]  # validation was in the rows

    copy(make_old)
    runs = train.read_curves(tmp_path / "experiments")
    assert [len(values) for _, values in runs["run"].values()] == [9, 3, 9, 3]


@pytest.mark.parametrize("change", [
    lambda saved: saved.clear(),  # of another program
    lambda saved: saved.pop("rows"),
    lambda saved: saved["rows"].clear(),
    lambda saved: saved.update(points=[3]),
])  # fmt: skip
def test_curves_png_warning_names_a_checkpoint_it_leaves_out(copy, tiny, tmp_path, change):
    copy(change, name="foreign")
    outcome = tiny("--epochs", 1, "--name", "run")
    assert outcome.returncode == 0
    assert outcome.stderr.startswith("train.py: curves.png leaves out experiments/foreign (")
    assert (tmp_path / "experiments/curves.png").exists()


def test_same_seed_gives_the_same_bits_and_another_seed_different_ones(finished, tiny, tmp_path):
    for seed in (0, 1):
        assert tiny("--lr", "1e-3", "--epochs", 3, "--seed", seed, "--name", seed).returncode == 0
    assert agree(finished, tmp_path / "experiments/0")
    assert not agree(finished, tmp_path / "experiments/1")


def test_repeating_a_command_makes_a_folder_with_the_next_number(tiny, tmp_path):
    for _ in range(3):
        assert tiny("--epochs", 1).returncode == 0
    first, second, third = sorted(path.parent for path in tmp_path.glob("experiments/*/metrics.csv"))
    assert (second.name, third.name) == (f"{first.name}-2", f"{first.name}-3")


def test_a_new_folder_gets_the_highest_number_even_if_a_lower_one_is_free(copy, tiny, tmp_path):
    name = "baseline-lr0.001-none-epochs=1-seed0"
    copy(name=f"{name}-3")
    assert tiny("--epochs", 1).returncode == 0
    assert (tmp_path / f"experiments/{name}-4").exists()


@pytest.mark.parametrize("call, error, calls, patience, written", [
    ("fsync", errno.ENOSPC, [1], 0, b"old"),
    ("fsync", errno.EINVAL, [1], 0, b"new"),  # a file system that cannot
    ("replace", errno.EACCES, [1, 2], 0, b"old"),  # Windows, while another program has the file open
    ("replace", errno.EACCES, [1, 2], 60, b"new"),
])  # fmt: skip
def test_a_failed_write_keeps_the_files_old_content(
    tmp_path, monkeypatch, before, call, error, calls, patience, written
):
    data.write_file(path := tmp_path / "file", b"old")
    before(os, call, raising(OSError(error, os.strerror(error))), calls)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    fails = pytest.raises(OSError, match=f"{os.strerror(error)}.*file")
    with fails if written == b"old" else contextlib.nullcontext():
        data.write_file(path, b"new", patience)
    assert path.read_bytes() == written and list(tmp_path.iterdir()) == [path]


def list_complaints(outcome):
    assert outcome.returncode == 0 and "finished" in outcome.stdout
    return [line.split(" (")[0] for line in outcome.stderr.strip().splitlines()]


@pytest.mark.parametrize("name", ["metrics.csv", "config.json"])
def test_an_unwritable_metrics_csv_or_config_json_warns_and_is_written_later(finished, tiny, tmp_path, before, name):
    folder = tmp_path / "experiments/run"
    (folder / name).mkdir(parents=True)
    before(train, "evaluate", lambda *_: (folder / name).rmdir(), [2])
    outcome = tiny("--epochs", 3, "--name", "run", "--resume")
    # at the start and after the first epoch
    assert list_complaints(outcome) == 2 * [f"train.py: cannot write experiments/run/{name}"]
    assert rows(folder)[-1]["val_loss"] == rows(finished)[-1]["val_loss"] and config(folder)["epochs"] == 3


@unix
def test_a_full_disk_warns_once_per_epoch_and_events_are_written_later(finished, tiny, tmp_path, monkeypatch, before):
    # what is written waits in memory until it is flushed, and then the disk is full
    place, open_file = tensorboardX.record_writer, tensorboardX.record_writer.open_file
    monkeypatch.setattr(place, "open_file", lambda path: open("/dev/full", "wb"))  # noqa: SIM115
    before(train, "evaluate", lambda *_: monkeypatch.setattr(place, "open_file", open_file), [2])
    outcome = tiny("--epochs", 3, "--name", "run")
    assert list_complaints(outcome) == 2 * ["train.py: cannot write experiments/run/events"]
    assert scalars(finished) == scalars(tmp_path / "experiments/run")


def break_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def use_latex(monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setenv("PATH", "")


@pytest.mark.parametrize("accident", [break_matplotlib, use_latex])
def test_training_survives_a_failure_to_draw_curves_png(tmp_path, monkeypatch, accident):
    tiny = make_tiny(monkeypatch, tmp_path, draw=True)
    accident(monkeypatch)
    assert list_complaints(tiny("--epochs", 1)) == ["train.py: cannot write experiments/curves.png"]


def test_load_returns_the_trained_net_in_evaluation_mode(finished):
    model = train.load(finished)
    assert not model.training and {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    result, last = train.evaluate(model, *load_tiny(None)[1], "fp32"), rows(finished)[-1]
    assert result["val_accuracy"] == float(last["val_accuracy"])
    assert result["val_loss"] == pytest.approx(float(last["val_loss"]), rel=0.02)


def test_readmes_snippet_classifies_a_picture(finished, tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (folder,) = re.findall(r'train\.load\("(.*?)"\)', code)
    (picture,) = re.findall(r'read\("(.*?)"\)', code)
    shutil.copytree(finished, tmp_path / folder)
    with Image.open(ROOT / "Lenna.png") as lenna:  # wide, with bars of noise that the middle square cuts off
        wide = Image.effect_noise((1024, 512), 200).convert("RGB")
        wide.paste(lenna, (256, 0))
    wide.convert("RGB").save(tmp_path / picture, "PNG")
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(line.split()[0].endswith("%") and line.split()[1] in data.CLASSES for line in lines)
    lenna = data.to_float(visualize_aug.read(ROOT / "Lenna.png"))
    expected = train.load(folder)(data.normalize(data.resize(lenna, 32)))
    torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- TensorBoard
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
            threading.Event().wait(0.1)
        raise TimeoutError(f"TensorBoard does not show step {step}")


def test_tensorboard_left_open_shows_a_run_stopped_and_resumed(finished, tiny, tmp_path, before):
    folder, flags = tmp_path / "experiments/run", ("--epochs", 3, "--name", "run")
    before(train, "train_step", raising(KeyboardInterrupt()), [9])  # the third epoch's points will be logged again
    assert tiny(*flags).returncode == 130
    assert ("loss/train", 8) in [point[:2] for point in scalars(folder)]
    (first,) = folder.glob("events.*")
    first.write_bytes(first.read_bytes()[:-3])  # the writer was killed in the middle of a record
    with contextlib.ExitStack() as stack:
        both = [TensorBoard(tmp_path / "experiments", fast, stack) for fast in ("auto", "false")]
        earlier = [point for point in both[0].wait_for("run", 6) if point[1] <= 6]
        both[1].wait_for("run", 6)
        assert tiny(*flags, "--resume").returncode == 0
        both += [TensorBoard(tmp_path / "experiments", fast, stack) for fast in ("auto", "false")]
        for board in both:
            shown = board.wait_for("run", 9)
            assert [point[:3] for point in shown] == [pytest.approx(point) for point in scalars(finished)]
            assert [point for point in shown if point[1] <= 6] == earlier  # at the time at which it was measured
        assert first.exists()
        asked = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 10}
        (run,) = board.ask("hparams/session_groups", asked)["sessionGroups"]
        assert run["hparams"].items() >= {"lr": 1e-3, "recipe": "baseline", "seed": 0, "widths": "8,8,8"}.items()
        final = {metric["name"]["tag"]: metric["value"] for metric in run["metricValues"]}
        for metric in train.METRICS:
            assert final[f"{metric}/val"] == pytest.approx(float(rows(folder)[-1][f"val_{metric}"]))
