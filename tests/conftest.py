from pathlib import Path

import pytest

import data

ROOT = Path(data.__file__).parent


def pytest_collection_modifyitems(items):
    if not (ROOT / "datasets" / data.FOLDER / data.FILES[-1]).exists():
        reason = "CIFAR-10 is not in datasets/: run python train.py once, it puts it there"
        for item in items:
            if item.get_closest_marker("real_data"):
                item.add_marker(pytest.mark.skip(reason=reason))
