"""README shows what results/ holds, results/ holds what was trained, and every picture is light enough for a phone."""

import re
from pathlib import Path

import pytest

from results import make

README = (make.ROOT / "README.md").read_text(encoding="utf-8")
FILES = [path for path in make.RESULTS.iterdir() if path.is_file()]


def test_tables_are_those_of_the_runs_and_stand_in_readme():
    tables = (make.RESULTS / "tables.md").read_text(encoding="utf-8")
    assert tables == make.text_of_tables(make.Runs())
    for line in tables.splitlines():
        if line.startswith("|"):
            assert line in README


def test_tables_come_out_the_same_right_after_training(monkeypatch, tmp_path):
    row = dict.fromkeys((*make.train.COLUMNS, *make.COSTS), 1.0)  # of a recipe without test-time augmentation
    monkeypatch.setattr(make, "RESULTS", tmp_path)
    monkeypatch.setattr(make, "train_once", lambda *arguments: [dict(row)])
    runs = make.Runs()
    for study in make.STUDIES:
        runs.complete(study)
    assert make.text_of_tables(runs) == make.text_of_tables(make.Runs())


def test_runs_are_whole():
    runs = make.Runs()
    for study, seeds in make.STUDIES.items():
        for run in seeds:
            for seed, rows in runs.of(run).items():
                epochs = [float(row["epoch"]) for row in rows]
                assert epochs[:-1] == list(range(1, len(epochs))) and epochs[-1] > len(epochs) - 1, (study, run, seed)
                assert rows[-1]["gflops"] and not any(row["gflops"] for row in rows[:-1])


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_every_file_is_named_in_readme_and_light(path):
    assert f"results/{path.name}" in README
    assert path.stat().st_size < 300_000


def test_readme_names_no_file_that_is_not_there():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"`(results/[\w.]+)`", README):
        assert Path(make.ROOT, name).exists(), name
