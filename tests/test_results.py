"""README shows what results/ holds, results/ holds what was trained, and every picture is light enough for a phone."""

import re
import statistics
from pathlib import Path

import pytest

import train
from results import make

README = (make.ROOT / "README.md").read_text(encoding="utf-8")
FILES = [path for path in make.RESULTS.iterdir() if path.is_file()]


def test_tables_are_those_of_the_runs_and_stand_in_readme():
    tables = (make.RESULTS / "tables.md").read_text(encoding="utf-8")
    assert tables == make.write_tables(make.read_runs())
    assert all(line in README for line in tables.splitlines())
    shown = " ".join(train.make_parser(train.list_settings("baseline")).format_help().split())
    for name, run in make.LADDER.items():
        assert f"{name} {statistics.mean(make.last(make.read_runs(), run, 'val_accuracy')):.1%} in" in shown


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_every_file_is_named_in_readme_and_light(path):
    assert f"results/{path.name}" in README
    assert path.stat().st_size < 300_000


def test_readme_names_no_file_that_is_not_there():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"`(results/[\w.]+)`", README):
        assert Path(make.ROOT, name).exists(), name
