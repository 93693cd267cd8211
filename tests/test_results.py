"""README shows what results/ holds, results/ holds what was trained, and every picture is light enough for a phone."""

import re
from pathlib import Path

import pytest

from results import make

README = (make.ROOT / "README.md").read_text(encoding="utf-8")
FILES = [path for path in make.RESULTS.iterdir() if path.is_file()]


def test_tables_are_those_of_the_runs_and_stand_in_readme():
    tables = (make.RESULTS / "tables.md").read_text(encoding="utf-8")
    assert tables == make.write_tables(make.read_runs())
    for line in tables.splitlines():
        assert line in README


def test_what_is_trained_is_added_once_and_read_back(monkeypatch, tmp_path):
    row = dict.fromkeys(make.COLUMNS[2:], 0.5) | {"val_accuracy_tta": ""}
    trained = []
    monkeypatch.setattr(make, "RESULTS", tmp_path)
    monkeypatch.setattr(make, "train_once", lambda run, seed: trained.append((run, seed)) or [row, row])
    for _ in range(2):
        make.complete("rates")
    assert trained == [(run, seed) for run, seeds in make.STUDIES["rates"].items() for seed in range(seeds)]
    assert make.last(make.read_runs(), "--lr 1e-3", "val_loss") == [0.5] * make.STUDIES["rates"]["--lr 1e-3"]
    assert make.write_table(make.read_runs(), "`--lr`").count("50.00%") == 6


def test_runs_are_whole():
    for run, seeds in make.read_runs().items():
        for seed, rows in seeds.items():
            epochs = [float(row["epoch"]) for row in rows]
            assert epochs[:-1] == list(range(1, len(epochs))) and epochs[-1] > len(epochs) - 1, (run, seed)
            assert rows[-1]["gflops"] and not any(row["gflops"] for row in rows[:-1])


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_every_file_is_named_in_readme_and_light(path):
    assert f"results/{path.name}" in README
    assert path.stat().st_size < 300_000


def test_readme_names_no_file_that_is_not_there():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"`(results/[\w.]+)`", README):
        assert Path(make.ROOT, name).exists(), name
