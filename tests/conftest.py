"""What several test files share: a script run inside this process, and train.py on a tiny set in place of CIFAR-10."""

import contextlib
import csv
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import data
import train

# The tests fork and compare bit for bit, and neither goes with a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # and with it set, no run waits for its turn
ROOT = Path(data.__file__).parent
# Threads only get in each other's way with arrays as small as the tests'; and a run here can be compared bit for bit
# with one in another process, as sums come out the same only in the same order.
torch.set_num_threads(1)
unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork, no resource limits and no SIGKILL")
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=80)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items):
    if not (ROOT / "datasets" / data.FOLDER / data.FILES[-1]).exists():
        reason = "CIFAR-10 is not in datasets/: run python train.py once, it puts it there"
        for item in items:
            if item.get_closest_marker("real_data"):
                item.add_marker(pytest.mark.skip(reason=reason))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run_script(main, *arguments, cwd):
    """A script's `main` with these command line arguments, in the folder `cwd`: exit code and what it printed."""
    out, err, here, argv = io.StringIO(), io.StringIO(), Path.cwd(), sys.argv
    sys.argv = [f"{main.__module__}.py", *map(str, arguments)]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main() or 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os.chdir(here)
        sys.argv = argv
    printed = (stream.getvalue().replace(os.sep, "/") for stream in (out, err))  # as on Linux on Windows too
    return subprocess.CompletedProcess(arguments, code, *printed)


def complain(outcome, code):
    """The line by which a script has refused or failed, with that exit code and without a traceback."""
    assert outcome.returncode == code, outcome
    assert "Traceback" not in outcome.stderr
    return outcome.stderr.strip().splitlines()[-1]


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def config(folder):
    return json.loads((folder / "config.json").read_text())


def collect_results(folder):
    """What two equal runs must agree in, bit for bit: what was measured but for the times, and all that is saved."""
    metrics = [{key: value for key, value in row.items() if key != "train_seconds"} for row in rows(folder)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    points = [{key: value for key, value in point.items() if key != "time"} for point in checkpoint["points"]]
    saved = [checkpoint[key] for key in ("model", "optimizers", "generator")]
    return metrics, points, json.dumps(saved, default=torch.Tensor.tolist)


def agree(one, other):
    return collect_results(one) == collect_results(other)


def scalars(folder):
    """[(tag, step, value)] of a run, read by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return sorted((tag, point.step, point.value) for tag in events.Tags()["scalars"] for point in events.Scalars(tag))


def list_files(folder):
    """{path: bytes} of all in a folder, the empty folders too; but the lock file, which some filelocks delete."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def load_tiny(root):
    """60 random images in place of CIFAR-10."""
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8, generator=seeded(1))
    labels = torch.randint(10, (60,), generator=seeded(2))
    return (images[:40], labels[:40]), (images[40:], labels[40:])


def make_tiny(monkeypatch, default_cwd=None, draw=False):
    """A function that runs train.py on a tiny set with a net to match; unless `draw`, curves.png is no picture."""
    if not draw:  # drawing takes longer than all the rest
        monkeypatch.setattr(train, "draw_curves", lambda runs: None)
        monkeypatch.setattr(train, "save_picture", lambda figure, path: data.write_file(path, b"no picture"))
    monkeypatch.setattr(data, "load_cifar10", load_tiny)
    # It goes by the clock, so on a busy machine two runs would differ
    monkeypatch.setattr(train, "choose_precision", lambda device: "fp32")
    monkeypatch.setitem(train.BASELINE, "device", ("cpu", "the tests compare bit for bit"))
    for recipe in train.RECIPES.values():
        monkeypatch.setitem(recipe, "widths", (8, 8, 8))
        monkeypatch.setitem(recipe, "batch_size", 16)

    def tiny(*flags, cwd=default_cwd):
        return run_script(train.main, *flags, cwd=cwd)

    return tiny


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs train.py with the given flags on a tiny set with a net to match, in `tmp_path` or the folder `cwd`."""
    return make_tiny(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a finished run of three epochs on the tiny set, to be read and not to be changed."""
    cwd = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as monkeypatch:
        outcome = make_tiny(monkeypatch, cwd)("--lr", "1e-3", "--epochs", 3)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stderr == ""  # no warning either
    return cwd / "experiments" / "baseline-lr0.001-none-epochs=3-seed0"


@pytest.fixture
def copy(finished, tmp_path):
    """Makes a copy of the finished run, without its lock, and has `change` change what its checkpoint holds."""

    def make(change=None, name="run"):
        folder = tmp_path / "experiments" / name
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns(".lock"))
        if change:
            state = torch.load(folder / "checkpoint.pt", weights_only=True)
            change(state)
            torch.save(state, folder / "checkpoint.pt")
        return folder

    return make


@pytest.fixture
def before(monkeypatch):
    """Has a function run an action first, with the same arguments: in every call, or in `calls`, counted from 1."""

    def arrange(place, name, action, calls=None):
        function, number = getattr(place, name), itertools.count(1)

        def call(*arguments, **options):
            if calls is None or next(number) in calls:
                action(*arguments)
            return function(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    return arrange


def raising(problem):
    """An action that raises an exception."""

    def action(*arguments):
        raise problem

    return action
