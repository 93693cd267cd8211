"""Figure 3: any picture in, one picture out, by the loader's own functions; each failure gets one line."""

import errno
import functools
import os
import subprocess
import sys
from unittest.mock import Mock

import matplotlib
import numpy as np
import pytest
import torch
from conftest import ROOT, complain, run_script, seeded
from PIL import Image

import data
import visualize_aug


def ramp(mode, width=60, height=40):
    """A picture that is dark on the left and light on the right."""
    levels = np.tile(np.linspace(0, 255, width), (height, 1))
    deep = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in deep:
        return Image.fromarray((levels * 257).astype(deep[mode]))
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


run = functools.partial(run_script, visualize_aug.main)


@pytest.mark.parametrize("name", ["1.png", "P.gif", "LA.png", "I;16.png", "F.tiff", "CMYK.jpg"])
def test_common_file_formats_and_color_modes_can_be_read(name, tmp_path):
    ramp(name.split(".")[0]).save(tmp_path / name)
    images = visualize_aug.read(tmp_path / name)
    assert images.shape == (1, 3, 40, 60) and images.dtype == torch.uint8
    row = images[0, :, 20].float()
    assert (row.amax(0) - row.amin(0)).max() < 12  # still gray,
    assert row[0, :5].mean() < 30 and row[0, -5:].mean() > 225  # dark on the left, light on the right


PLAIN = [("RGBA", (200, 0, 0, 0), 255), ("I;16", 40 * 257, 40), ("F", 0, 0), ("F", -9, 0)]


@pytest.mark.parametrize("mode, color, level", PLAIN)
def test_transparent_pixels_become_white_and_dark_16_bit_pixels_stay_dark(mode, color, level, tmp_path):
    Image.new(mode, (8, 8), color).save(tmp_path / "plain.tiff")
    with np.errstate(all="raise"):
        assert (visualize_aug.read(tmp_path / "plain.tiff") == level).all()


@pytest.mark.parametrize("name", ["RGB.jpg", "I;16.png"])
def test_a_large_picture_is_shrunk_without_changing_its_look(name, tmp_path):
    ramp(name.split(".")[0], 3000, 2000).save(tmp_path / name)
    images = visualize_aug.read(tmp_path / name)
    assert images.shape == (1, 3, 683, 1024)
    assert np.abs(images[0].float().numpy() - np.linspace(0, 255, 1024)).max() < 6


@pytest.mark.parametrize("mode", ["1", "P"])
def test_a_fine_pattern_shrinks_to_gray(mode, tmp_path):
    pattern = np.indices((2048, 2048)).sum(0) % 2 * 255
    Image.fromarray(pattern.astype(np.uint8)).convert(mode).save(tmp_path / "fine.png")
    assert (visualize_aug.read(tmp_path / "fine.png").int() - 128).abs().max() < 10


def test_a_photo_with_exif_rotation_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    ramp("RGB").save(tmp_path / "photo.jpg", exif=exif)
    assert visualize_aug.read(tmp_path / "photo.jpg").shape == (1, 3, 60, 40)


def test_figure_3_uses_the_augmentations_of_the_loader():
    images = torch.randint(256, (1, 3, 20, 32), dtype=torch.uint8, generator=seeded())
    generator = seeded(visualize_aug.SEED)
    panels = images / 255, data.position(images, generator) / 255, data.color(images / 255, generator)
    titles = "original", "flipped and shifted", "other colors"
    for axes, title, panel in zip(visualize_aug.draw(images).axes, titles, panels, strict=True):
        assert axes.get_title() == title and not axes.axison
        np.testing.assert_allclose(axes.images[0].get_array(), panel[0].permute(1, 2, 0), atol=1e-6)
        across, down = axes.lines
        assert across.get_ydata()[0] == 10 and down.get_xdata()[0] == 16  # the middle


def test_a_fourth_panel_widens_the_figure():
    source = (ROOT / "visualize_aug.py").read_text(encoding="utf-8")
    changed = {"__name__": "changed"}
    exec(source.replace("panels = {", 'panels = {"negative": 1 - data.to_float(images),'), changed)
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    before, after = visualize_aug.draw(images), changed["draw"](images)
    assert [axes.get_title() for axes in after.axes] == ["negative", *(axes.get_title() for axes in before.axes)]
    assert after.get_figwidth() / 4 == before.get_figwidth() / 3 and after.axes[-1].get_position().x1 < 1


def test_a_very_tall_picture_fits_into_the_figure(tmp_path):
    ramp("L", 1, 1024).save(tmp_path / "tall.png")
    run("tall.png", cwd=tmp_path)
    assert Image.open(tmp_path / "tall_aug.png").height < 2000


@pytest.mark.parametrize("ending, first", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("JPG", b"\xff\xd8")])
def test_output_ending_chooses_the_format_and_tilde_is_the_home_folder(ending, first, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    ramp("RGB").save(tmp_path / "picture.png")
    assert visualize_aug.read("~/picture.png").shape == (1, 3, 40, 60)
    outcome = run("~/picture.png", "--output", f"~/out.{ending}", cwd=ROOT)
    assert outcome.returncode == 0 and (tmp_path / f"out.{ending}").read_bytes().startswith(first)


def test_pictures_of_the_same_name_get_different_outputs(tmp_path):
    for path in ("a/x.png", "b/x.png", "b/x.jpg"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        ramp("L").save(tmp_path / path)
        assert run(path, cwd=tmp_path).returncode == 0
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*_aug.png")}
    assert names == {"a/x_aug.png", "b/x_aug.png", "b/x.jpg_aug.png"}


def test_an_unknown_output_ending_is_refused_with_a_list_of_endings(tmp_path):
    line = complain(run(ROOT / "Lenna.png", "--output", "out.xyz", cwd=tmp_path), 2)
    assert "out.xyz must end in one of ." in line and ".pdf, " in line and not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["thing.png", "../folder/thing.png", "link.png"])
def test_the_input_picture_is_never_overwritten(output, tmp_path):
    (folder := tmp_path / "folder").mkdir()
    ramp("RGB").save(folder / "thing.png")
    os.link(folder / "thing.png", folder / "link.png")
    before = (folder / "thing.png").read_bytes()
    line = complain(run("thing.png", "--output", output, cwd=folder), 2)
    assert line == f"visualize_aug.py: --output {output} would overwrite the picture itself: choose another name"
    assert (folder / "thing.png").read_bytes() == (folder / "link.png").read_bytes() == before


UNREADABLE = {
    "missing": (None, "thing.png cannot be read as a picture: No such file"),
    "truncated": ((ROOT / "Lenna.png").read_bytes()[:10_000], "thing.png cannot be read as a picture: "),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "thing.png as a picture: convert it"),
}


@pytest.mark.parametrize("raw, says", UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_picture_prints_one_line(raw, says, tmp_path):
    if raw:
        (tmp_path / "thing.png").write_bytes(raw)
    outcome = run("thing.png", "--output", "out.png", cwd=tmp_path)
    assert says in complain(outcome, 1) and outcome.stderr.count("\n") == 1 and "Errno" not in outcome.stderr
    assert not (tmp_path / "out.png").exists()


def test_an_error_in_an_augmentation_keeps_its_own_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "color", lambda images, generator: images @ 0)
    with pytest.raises(TypeError, match="unsupported operand"):
        run(ROOT / "Lenna.png", "--output", "out.png", cwd=tmp_path)


@pytest.mark.parametrize("usetex, name, says", [(True, "out.png", "latex"), (False, "out.pgf", "xelatex")])
def test_missing_latex_prints_one_line(usetex, name, says, tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", usetex)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = complain(run(ROOT / "Lenna.png", "--output", name, cwd=tmp_path), 1)
    assert line.startswith(f"visualize_aug.py: matplotlib cannot draw {name} (") and says in line
    assert "try a name that ends in .png" in line and not list(tmp_path.iterdir())


def test_missing_matplotlib_prints_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    line = complain(run(ROOT / "Lenna.png", "--output", "out.png", cwd=tmp_path), 1)
    assert line.startswith("visualize_aug.py: matplotlib cannot be imported (") and line.endswith("requirements.txt")


def test_a_full_disk_prints_one_line_and_keeps_the_old_picture(tmp_path, monkeypatch):
    (tmp_path / "out.png").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    line = complain(run(ROOT / "Lenna.png", "--output", "out.png", cwd=tmp_path), 1)
    assert line.startswith("visualize_aug.py: cannot write out.png (No space left on device): choose another place")
    assert [*tmp_path.iterdir()] == [tmp_path / "out.png"] and (tmp_path / "out.png").read_bytes() == b"old"


def test_a_picture_with_a_japanese_name_is_drawn_on_an_ascii_terminal(tmp_path):
    ramp("RGB").save(tmp_path / "実験.png")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    variables = {**os.environ, **ascii_only, "MPLBACKEND": "nonsense"}
    command = [sys.executable, ROOT / "visualize_aug.py", "実験.png"]
    outcome = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert outcome.returncode == 0 and outcome.stderr == ""
    assert "_aug.png" in outcome.stdout and (tmp_path / "実験_aug.png").exists()
