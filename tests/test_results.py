"""README says what results/ holds, and results/make.py needs nothing else to say it again."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import network
from results import make

README = (make.ROOT / "README.md").read_text(encoding="utf-8")


def test_make_puts_right_every_measured_number_that_was_changed_in_readme():
    changed = README
    for head in make.TABLES:
        table = re.search(rf"\| {head} \|.*\n(\|.*\n)+", README).group()
        rows = table.splitlines(keepends=True)
        spoilt = [re.sub(r"(?<=\| )[\d.]+(?=[%s g|])", "7", row) for row in rows[2:]]
        assert spoilt != rows[2:]
        changed = changed.replace(table, "".join([*rows[:2], *spoilt]))
    for sentence, values in make.list_sentences():
        said = re.escape(sentence.format(*values)).replace(r"\ ", r"\s+")
        before = re.search(said, README).group()
        changed = changed.replace(before, sentence.replace("{}", "7"))
    assert changed != README
    assert make.write_readme(changed).split() == README.split()
    assert make.write_readme(README) == README


def test_make_refuses_a_readme_without_one_of_its_sentences():
    with pytest.raises(SystemExit, match="seconds"):
        make.write_readme(README.replace("of training (whole command", "of work (whole command"))


def test_make_draws_every_picture_in_a_clone_without_data_or_nets(tmp_path):
    for name in ("README.md", "Lenna.png", *[path.name for path in make.ROOT.glob("*.py")]):
        shutil.copy(make.ROOT / name, tmp_path)
    shutil.copytree(make.RESULTS, tmp_path / "results")
    pictures = [path for path in (tmp_path / "results").iterdir() if path.suffix in (".png", ".jpg")]
    for picture in pictures:
        picture.unlink()
    subprocess.run([sys.executable, "results/make.py"], cwd=tmp_path, check=True)
    assert all(picture.stat().st_size > 10_000 for picture in pictures)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == README
    assert not (tmp_path / "datasets").exists()


def test_every_run_that_make_would_train_is_in_runs_csv():
    for command, count in make.SEEDS.items():
        assert {*range(count)} <= {*make.find(command, "seed")}, command


def test_recipes_in_readme_have_their_settings_parameters_and_multiplications():
    rows = re.findall(r"^\| `(\w+)` \| (\d[\d, ]*) \| (\d+) \| ([\d.]+) \| (\d+) \| (\w+) \| (.*) \|$", README, re.M)
    assert [row[0] for row in rows] == list(make.RECIPES)
    for name, widths, nets, epochs, batch_size, augment, costs in rows:
        settings = make.read_settings(f"--recipe {name}")
        said = ([int(width) for width in widths.split(", ")], int(nets), float(epochs), int(batch_size), augment)
        assert said == (settings.widths, settings.nets, settings.epochs, settings.batch_size, settings.augment)
        net = network.ConvNet(settings.widths)
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 3, 32, 32))
        parameters = settings.nets * sum(parameter.numel() for parameter in net.parameters())
        multiplications = settings.nets * counter.get_total_flops() / 2  # each goes with an addition
        assert costs == f"{parameters / 1e6:.2f} million | {multiplications / 1e6:.0f} million"


def test_every_file_and_picture_that_readme_links_to_exists():
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", README) + re.findall(r"`(results/[\w.]+)`", README)
    assert links and all(Path(make.ROOT, link).exists() for link in links)
