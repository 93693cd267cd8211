import functools
import os
from pathlib import Path

import hypothesis
import pytest
import torch

import data

# The tests fork and compare bit for bit, and neither goes with a GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.backends.mps.is_available = functools.wraps(torch.backends.mps.is_available)(lambda: False)
ROOT = Path(data.__file__).parent
# Threads only get in each other's way with arrays as small as the tests'; and a run here can be compared bit for bit
# with one in another process, as sums come out the same only in the same order.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="many more cases each, in many minutes")


def pytest_configure(config):
    for name, cases in (("short", 80), ("long", 3000)):
        hypothesis.settings.register_profile(name, deadline=None, derandomize=True, max_examples=cases)
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "short")


def pytest_collection_modifyitems(items):
    if not (ROOT / "datasets" / data.FOLDER / data.FILES[-1]).exists():
        reason = "CIFAR-10 is not in datasets/: run python train.py once, it puts it there"
        for item in items:
            if item.get_closest_marker("real_data"):
                item.add_marker(pytest.mark.skip(reason=reason))
