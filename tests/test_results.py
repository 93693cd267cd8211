"""README says what results/ holds, results/ holds what was measured, and what README tells the reader to do works."""

import csv
import json
import re
import shutil
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, complain, load_tiny, unix
from PIL import Image

import data
import train
from results import make, runs

README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLES = (runs.RESULTS / "tables.md").read_text(encoding="utf-8")
ROWS = runs.read_rows()
FILES = [path for path in runs.RESULTS.iterdir() if path.is_file()]
# What a copy's train.py is: the real one, on the tiny set, without curves.png, which takes longer than the run.
TINY = """
import sys
sys.path[:0] = [{code!r}, {tests!r}]
import conftest, data, train
data.load_cifar10 = conftest.load_tiny
train.draw_curves = train.save_picture = lambda *arguments: None
train.main()
"""


# ------------------------------------------------------------------------------------------------- README's numbers
def test_tables_md_shows_the_rows_of_runs_csv():
    assert make.write_tables(ROWS) == TABLES


def test_every_row_of_runs_csv_matches_the_current_recipes():
    with open(runs.RESULTS / "runs.csv", newline="") as file:
        assert all(runs.is_current(row) for row in csv.DictReader(file))


def test_readme_shows_exactly_the_rows_of_tables_md():
    heads = [table.splitlines()[0] for table in TABLES.split("\n\n")]
    shown = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    measured = [table for table in shown if table.splitlines()[0] in heads]
    assert sorted(measured) == sorted(table + "\n" for table in TABLES.rstrip("\n").split("\n\n"))


def test_every_accuracy_in_readmes_sentences_was_measured():
    sentences = re.sub(r"^\|.*\n|^    step .*\n", "", README, flags=re.MULTILINE)
    named = {float(number) for number in re.findall(r"(\d+\.\d)%", sentences)}
    measured = [float(number) for number in re.findall(r"(\d+\.\d\d)%", TABLES)]
    measured.append(make.PEER[2])
    assert named and named <= {round(number + 1e-9, 1) for number in measured}


def test_readme_quotes_the_last_line_of_the_first_command():
    row = next(row for row in ROWS if (row["run"], row["seed"]) == ("--lr 1e-3", "0"))
    row = {column: float(row[column]) for column in runs.MEASURED if row[column]} | {"step": row["step"], "epoch": 5.0}
    assert train.describe(row, row["step"]) in README


@pytest.mark.parametrize("name, run", [item for item in runs.LADDER.items() if runs.find(ROWS, item[1], "seed")])
def test_help_gives_each_recipes_measured_accuracy_and_seconds(name, run):
    percent = f"{100 * statistics.mean(runs.find(ROWS, run, 'val_accuracy')):.1f}"
    measured = f"{statistics.median(runs.find(ROWS, run, 'train_seconds')):.0f}"
    text = " ".join(train.make_parser(train.list_settings("baseline")).format_help().split())
    accuracy, seconds = re.search(rf"{name} ([\d.]+)% in (\d+)", text).groups()
    assert (accuracy, seconds) == (percent, measured)


@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_readme_mentions_every_results_file_and_all_are_small(path):
    assert f"results/{path.name}" in README
    assert path.stat().st_size < 300_000


def test_every_file_named_in_readme_exists():
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"`(results/[\w.]+)`", README):
        assert Path(ROOT, name).exists(), name


# --------------------------------------------------------------------------------------------------- results/make.py
@pytest.fixture
def project(monkeypatch, tmp_path):
    """make.py in a copy of the project, where train.py trains on the tiny set, with one study of two short runs."""
    for name in ("bn.py", "Lenna.png"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "train.py").write_text(TINY.format(code=str(ROOT), tests=str(ROOT / "tests")))
    monkeypatch.setattr(data, "load_cifar10", load_tiny)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "REPORT", tmp_path / "experiments/report")
    monkeypatch.setattr(runs, "measure_gflops", lambda: 100.0)
    lines = {"1e-3": "--lr 1e-3 --epochs 1 --widths 8", "1e-4": "--recipe lunch --epochs 1 --widths 8 --sizes 16:0.5"}
    monkeypatch.setattr(runs, "RATES", lines)
    monkeypatch.setattr(runs, "LADDER", {"baseline": lines["1e-3"], "best": lines["1e-4"]})
    monkeypatch.setattr(make, "TABLES", {"run": (lines, make.SPEED)})
    monkeypatch.setattr(runs, "STUDIES", {"rates": dict.fromkeys(lines.values(), 1)})
    return tmp_path


def call_make(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["make.py", *arguments])
    make.main()


@unix
def test_make_trains_then_fills_runs_csv_and_draws_every_picture(project, monkeypatch, capsys):
    ballast = b"x" * 2**31  # the memory of make.py itself does not count
    call_make(monkeypatch)
    del ballast
    rows = runs.read_rows()
    assert [(row["run"], row["seed"]) for row in rows] == [(run, "0") for run in runs.RATES.values()]
    for row in rows:
        folder = runs.find_folder(row["run"], row["seed"])
        checkpoint = train.read_checkpoint(folder / "checkpoint.pt")
        assert str(checkpoint["settings"]["seed"]) == row["seed"]
        saved = checkpoint["rows"][-1]
        del saved["epoch"]
        assert {key: float(row[key]) for key in saved} == saved
        assert 0.2 < float(row["peak_gib"]) < 2 and float(row["whole_seconds"]) > saved["train_seconds"]
    assert rows[0]["val_accuracy_tta"] == "" and rows[1]["val_accuracy_tta"] != ""
    names = {path.name for path in runs.RESULTS.iterdir()}
    pictures = {"network.png", "ladder.png", "figure2.png", "figure3.jpg", "figure4.png", "figure5.png"}
    assert names == pictures | {"runs.csv", "tables.md", "figure1.txt"}
    assert (runs.RESULTS / "tables.md").read_text(encoding="utf-8") in capsys.readouterr().out


@pytest.fixture
def measured(project):
    """runs.csv with a row for the first run, as if measured."""
    run = runs.RATES["1e-3"]
    settings = runs.fingerprint(vars(train.read_settings(run.split())))
    row = dict.fromkeys(runs.COLUMNS, "0.5") | {"run": run, "seed": "0", "settings": settings}
    runs.write_rows([row])
    return row


def test_make_trains_only_the_missing_seeds(measured, monkeypatch):
    trained = []

    def pretend(run, seed):
        trained.append((run, seed))
        settings = runs.fingerprint(vars(train.read_settings(run.split())))
        return measured | {"run": run, "seed": seed, "settings": settings}

    first, second = runs.RATES.values()
    monkeypatch.setattr(runs, "STUDIES", {"rates": {first: 2, second: 2}})
    monkeypatch.setattr(runs, "train_once", pretend)
    runs.complete("rates")
    assert trained == [(first, "1"), (second, "0"), (second, "1")]
    assert [(row["run"], row["seed"]) for row in runs.read_rows()] == [(first, "0"), *trained]
    runs.complete("rates")
    assert len(trained) == 3


def test_make_ignores_rows_of_other_settings_or_formats(measured, monkeypatch):
    assert runs.read_rows() == [measured]
    monkeypatch.setitem(train.BASELINE, "label_smoothing", (0.3, ""))
    assert runs.read_rows() == []
    monkeypatch.undo()
    monkeypatch.setattr(train, "FORMAT", train.FORMAT + 1)
    assert not runs.is_current(measured)


def test_make_rejects_a_runs_csv_with_other_columns_and_leaves_it_unchanged(measured):
    path = runs.RESULTS / "runs.csv"
    before = path.read_text().replace("peak_gib", "memory")
    path.write_text(before)
    with pytest.raises(SystemExit, match="has other columns"):
        runs.read_rows()
    assert path.read_text() == before


def test_make_fails_on_a_row_without_a_value(measured):
    rows = [measured, measured | {"seed": "1", "val_accuracy": ""}]
    with pytest.raises(ValueError, match="could not convert string to float"):
        runs.find(rows, measured["run"], "val_accuracy")


def test_a_table_cell_shows_mean_and_spread_over_seeds():
    rows = []
    for seed, accuracy in enumerate(("0.5", "0.6", "0.7")):
        row = dict.fromkeys(runs.COLUMNS, accuracy) | {"run": "a run", "seed": str(seed), "train_accuracy": "0.9"}
        row |= {"train_seconds": str(10 + seed**2), "peak_gib": str(1 + seed), "train_loss": "0.25"}
        rows.append(row)
    expected = {
        "runs": "3",
        "training accuracy": "90.00% ± 0.00",
        "validation accuracy": "60.00% ± 10.00",
        "lowest": "50.00%",
        "with test-time augmentation": "60.00% ± 10.00",
        "training loss": "0.250",
        "validation loss": "0.600",
        "seconds": "11",
        "whole command": "1",
        "memory": "3.0 GiB",
    }
    written = {column: write(runs.find(rows, "a run", key)) for column, (key, write) in make.CELLS.items()}
    assert written == expected


def test_make_prints_the_commands_of_runs_that_a_figure_lacks(project, capsys):
    make.draw_rates([], {})
    lines = capsys.readouterr().out.splitlines()
    for line, run in zip(lines, runs.RATES.values(), strict=True):
        folder = runs.find_folder(run, 0).name
        assert line.endswith(f"python train.py {run} --experiments experiments/report --name {folder} --resume")


@pytest.mark.parametrize("step, age, drawn", [(12, 0, False), (15, 0, True), (15, 1, False)])
def test_make_draws_only_finished_runs_of_todays_format(measured, step, age, drawn):
    folder = runs.find_folder(measured["run"], 0)
    folder.mkdir(parents=True)
    measured["step"] = "15"
    torch.save({"format": train.FORMAT - age, "rows": [{"step": step}]}, folder / "checkpoint.pt")
    assert make.are_there("figure2.png", [measured], [measured["run"]]) == drawn


@unix
def test_a_failed_run_stops_make_and_adds_no_row(project):
    with pytest.raises(SystemExit, match=r"failed: .*train.py --lr 0 --seed 0"):
        runs.train_once("--lr 0", 0)


@unix
def test_make_never_deletes_a_run_in_use(project):
    folder = runs.find_folder("--lr 1e-3", 0)
    folder.mkdir(parents=True)
    with train.lock_folder(folder), pytest.raises(SystemExit, match="is in use: wait until its run has ended"):
        runs.train_once("--lr 1e-3", 0)
    assert folder.exists()


# ------------------------------------------------------------------------------------------- README's instructions
def test_data_flag_sets_the_folder_of_cifar10(tiny, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(data, "load_cifar10", lambda root: asked.append(root) or load_tiny(root))
    tiny("--epochs", 1, "--data", tmp_path / "shared")
    tiny("--epochs", 1)
    assert asked == [str(tmp_path / "shared"), "datasets"]


def test_git_archive_packs_the_scripts_and_the_pictures_and_no_data(tmp_path):
    command = re.search(r"`(git archive [^`]+)`", README)[1]
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("this is no git repository, or git is not installed")
    archive = tmp_path / "Name.ID.zip"
    subprocess.run(command.replace("Name.ID.zip", str(archive)).split(), cwd=ROOT, check=True)
    names = zipfile.ZipFile(archive).namelist()
    assert {"README.md", "bn.py", "train.py", "tests/test_bn.py", "results/figure2.png", "Lenna.png"} <= set(names)
    assert not [name for name in names if name.startswith(("datasets", "experiments", ".venv"))]
    assert archive.stat().st_size < 3_000_000


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, old
    path.write_text(text.replace(old, new), encoding="utf-8")


def call(folder, *flags):
    """The copy's train.py on the tiny set, for an epoch."""
    code = TINY.format(code=str(folder), tests=str(ROOT / "tests"))
    command = [sys.executable, "-c", code, *flags, "--widths", "8", "--epochs", "1"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the scripts with all the changes that README describes, after a run of the old and one of the new."""
    folder = tmp_path_factory.mktemp("changed")
    for path in [*ROOT.glob("*.py"), ROOT / "Lenna.png"]:
        shutil.copy(path, folder)
    assert call(folder, "--name", "old").returncode == 0
    # a new augmentation
    gray = "def gray(images):\n    return images.mean(1, keepdim=True).expand_as(images)\n\n\n"
    edit(folder / "data.py", "AUGMENTATIONS = (", gray + 'AUGMENTATIONS = ("gray", ')
    edit(folder / "data.py", "        self.epoch = 0\n", '        self.epoch, self.gray = 0, augment == "gray"\n')
    edit(folder / "data.py", "yield normalize(images)", "yield normalize(gray(images) if self.gray else images)")
    panel = '        "original": data.to_float(images),\n'
    edit(folder / "visualize_aug.py", panel, panel + '        "gray": data.gray(data.to_float(images)),\n')
    # a new recipe
    edit(folder / "train.py", "RECIPES = {\n", 'RECIPES = {\n    "mine": {"batch_size": 20, "augment": "gray"},\n')
    # a new metric
    top5 = "lambda logits, labels: (logits.topk(5).indices == labels[:, None]).any(1).double()"
    edit(folder / "train.py", '"accuracy": accuracy}', f'"accuracy": accuracy, "top5": {top5}}}')
    edit(folder / "train.py", 'return (line + "', 'return (line + "top 5 {val_top5:.2%}, ')
    # a new net
    edit(folder / "network.py", "nn.Linear(channels, 10)", "nn.Linear(channels, 10, bias=False)")
    edit(folder / "train.py", f"FORMAT = {train.FORMAT}", f"FORMAT = {train.FORMAT + 1}")
    outcome = call(folder, "--recipe", "mine", "--name", "new")
    assert outcome.returncode == 0, outcome.stderr
    return folder, outcome.stdout


def test_a_new_augmentation_reaches_the_batches(changed):
    code = "images, labels = conftest.load_tiny(0)[0]; "
    code += "batch, _ = next(iter(data.Loader(images, labels, 16, 'gray', conftest.seeded()))); "
    code += "pixels = batch * data.STD + data.MEAN; print(float((pixels[:, :1] - pixels).abs().max()))"
    code = f"import sys; sys.path[:0] = {[str(changed[0]), str(ROOT / 'tests')]}; import conftest, data; {code}"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) < 1e-5


def test_a_new_panel_widens_figure_3(changed):
    command = [sys.executable, "visualize_aug.py", "Lenna.png"]
    subprocess.run(command, cwd=changed[0], check=True, stdout=subprocess.DEVNULL)
    with Image.open(changed[0] / "Lenna_aug.png") as picture:
        assert picture.width == 4 * 360


def test_a_new_metric_reaches_the_table_and_the_printed_line(changed):
    folder, printed = changed
    with open(folder / "experiments/new/metrics.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["val_accuracy"]) <= float(row["val_top5"]) <= 1 and "train_top5" in row
    assert f"top 5 {float(row['val_top5']):.2%}" in printed


def test_a_new_recipe_needs_only_an_entry_in_recipes(changed):
    config = json.loads((changed[0] / "experiments/new/config.json").read_text())
    assert (config["recipe"], config["batch_size"], config["augment"]) == ("mine", 20, "gray")


def test_after_raising_format_old_checkpoints_are_refused(changed):
    saved = torch.load(changed[0] / "experiments/new/checkpoint.pt", weights_only=True)
    assert "nets.0.head.bias" not in saved["model"] and saved["format"] == train.FORMAT + 1
    outcome = call(changed[0], "--name", "old", "--resume")
    assert "was saved by another version of this code" in complain(outcome, 2)
