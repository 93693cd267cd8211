"""What several test files share: a script run in this process, and train.py on a tiny set in place of CIFAR-10."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the tests compare bit for bit, so all of them compute on the CPU,
os.environ["OMP_NUM_THREADS"] = "1"  # in one thread; and with it set, no run waits for its turn

import contextlib
import io
import itertools
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import data
import train

ROOT = Path(data.__file__).parent
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    there = all((ROOT / "datasets" / data.FOLDER / name).exists() for name in data.MD5)
    for item in items:
        if item.get_closest_marker("real_data") and not there:
            item.add_marker(pytest.mark.skip(reason="no CIFAR-10 in datasets/: run python train.py, it puts it there"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run_script(main, flags):
    """Run a script's `main` with these flags on a terminal that has only ASCII: its exit code, and what it printed."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for encoding in ("ascii", "utf-8"))
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *flags.split()])
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    if isinstance(code, str):  # Python prints the message and exits with 1
        print(code, file=err)
        code = 1
    printed = (stream.buffer.getvalue().decode() for stream in (out, err))
    return subprocess.CompletedProcess(flags, code, *printed)


def complain(outcome, code):
    """The line with which a script has refused or failed, with this exit code and without a traceback."""
    assert outcome.returncode == code and "Traceback" not in outcome.stderr, outcome
    lines = outcome.stderr.splitlines()
    assert code != 1 or len(lines) == 1, lines  # argparse also prints its usage
    return lines[-1]


def load_tiny(root=None, device=None):
    """40 random images to train on and 20 to validate on, in place of CIFAR-10."""
    images = torch.randint(256, (60, 3, 32, 32), dtype=torch.uint8, generator=seeded(1))
    labels = torch.randint(10, (60,), generator=seeded(2))
    return (images[:40], labels[:40]), (images[40:], labels[40:])


def make_tiny(monkeypatch, folder):
    """A function that runs train.py with given flags in `folder`, on the tiny set, with a net to match."""
    monkeypatch.chdir(folder)
    train.warn.cache_clear()
    monkeypatch.setattr(data, "load_cifar10", load_tiny)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # none: so auto is fp32 on any processor
    monkeypatch.setattr(train, "draw_curves", lambda runs: Mock())  # drawing takes longer than all the rest
    for name, flags in train.RECIPES.items():
        monkeypatch.setitem(train.RECIPES, name, f"{flags} --widths 8 8 8 --batch-size 16")
    return lambda flags: run_script(train.main, flags)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    return make_tiny(monkeypatch, tmp_path)


def run_before(monkeypatch, place, name, action, calls=None):
    """Has a function run `action` first, with the same arguments: in every call, or in `calls`, counted from 1."""
    function, number = getattr(place, name), itertools.count(1)

    def call(*arguments, **options):
        if calls is None or next(number) in calls:
            action(*arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(place, name, call)


@pytest.fixture
def before(monkeypatch):
    return lambda *arguments: run_before(monkeypatch, *arguments)


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """The folder of a run of the recipe `quick` on the real data, on all cores."""
    folder = tmp_path_factory.mktemp("quick")
    command = [sys.executable, "train.py", "--recipe", "quick", "--device", "cpu", "--experiments", folder]
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    variables["MPLBACKEND"] = "inline"  # as a notebook sets it for the programs that it starts
    subprocess.run([*command, "--name", "run"], cwd=ROOT, env=variables, check=True)
    return folder / "run"
