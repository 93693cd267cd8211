"""Figure 3: any picture in, one picture out, by the loader's own functions; what is no picture gets one line."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, complain, run_script, seeded
from PIL import Image

import data
import visualize_aug

KINDS = "L.png 1.png P.gif RGBA.png LA.png I;16.png I;16.tiff I.tiff F.tiff CMYK.jpg YCbCr.jpg RGB.webp RGB.bmp"


def ramp(mode, width=60, height=40):
    """A picture that is dark on the left and light on the right."""
    levels = np.tile(np.linspace(0, 255, width), (height, 1))
    deep = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in deep:
        return Image.fromarray((levels * 257).astype(deep[mode]))
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("name", KINDS.split())
def test_every_kind_of_picture(name, tmp_path):
    path = tmp_path / name
    ramp(path.stem).save(path)
    images = visualize_aug.read(path)
    assert images.shape == (1, 3, 40, 60) and images.dtype == torch.uint8
    row = images[0, :, 20].float()
    assert (row.amax(0) - row.amin(0)).max() < 12  # still gray,
    assert row[0, :5].mean() < 30 and row[0, -5:].mean() > 225  # dark on the left, light on the right
    outcome = run_script(visualize_aug.main, path, "--output", "out.png", cwd=tmp_path)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.format == "PNG" and drawn.width > 2 * drawn.height


@pytest.mark.parametrize(
    "mode, color, level",
    [("RGBA", (200, 0, 0, 0), 255), ("LA", (9, 0), 255), ("I;16", 40 * 257, 40), ("F", 0, 0), ("F", -9, 0)],
)
def test_transparent_pixels_are_white_and_dark_deep_ones_stay_dark(mode, color, level, tmp_path):
    Image.new(mode, (8, 8), color).save(tmp_path / "plain.tiff")
    with np.errstate(all="raise"):
        assert (visualize_aug.read(tmp_path / "plain.tiff") == level).all()


@pytest.mark.parametrize("name", ["RGB.jpg", "RGBA.png", "P.png", "I;16.png", "F.tiff"])
def test_a_large_picture_is_made_smaller_before_anything_else_and_looks_the_same(name, tmp_path):
    mode = name.split(".")[0]
    ramp(mode, 3000, 2000).save(tmp_path / name)
    images = visualize_aug.read(tmp_path / name)
    assert images.shape == (1, 3, 683, 1024)
    expected = np.linspace(0, 255, 1024)
    assert np.abs(images[0].float().numpy() - expected).max() < 6


def test_a_hard_edge_of_a_large_deep_picture_does_not_wrap_around(tmp_path):
    edge = np.repeat(np.array([[0, 65535]], dtype=np.uint16), 750, axis=1)
    Image.fromarray(np.repeat(edge, 900, axis=0)).save(tmp_path / "edge.png")
    assert (visualize_aug.read(tmp_path / "edge.png")[..., 512:] > 200).all()


def test_a_photo_is_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    ramp("RGB").save(tmp_path / "photo.jpg", exif=exif)
    assert visualize_aug.read(tmp_path / "photo.jpg").shape == (1, 3, 60, 40)


def test_what_is_drawn_is_what_the_loader_does():
    images = torch.randint(256, (1, 3, 20, 32), dtype=torch.uint8, generator=seeded())
    generator = seeded(visualize_aug.SEED)
    panels = images / 255, data.position(images, generator) / 255, data.color(images / 255, generator)
    titles = "original", "position", "color"
    for axes, title, panel in zip(visualize_aug.draw(images).axes, titles, panels, strict=True):
        assert axes.get_title() == title and not axes.axison
        np.testing.assert_allclose(axes.images[0].get_array(), panel[0].permute(1, 2, 0), atol=1e-6)
    heights = [visualize_aug.draw(images[:, :, :h, :w]).get_figheight() for h, w in ((20, 32), (1, 32), (20, 1))]
    assert heights == pytest.approx([2.85, 1.85, 12.35])  # not too flat or high to be seen


@pytest.mark.parametrize(
    "ending, first", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("JPG", b"\xff\xd8"), ("svg", b"<?xml")]
)
def test_the_name_says_the_format_and_may_be_in_the_home_folder(ending, first, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    ramp("RGB").save(tmp_path / "picture.png")
    outcome = run_script(visualize_aug.main, "~/picture.png", "--output", f"~/out.{ending}", cwd=ROOT)
    assert outcome.returncode == 0 and (tmp_path / f"out.{ending}").read_bytes().startswith(first)


@pytest.mark.parametrize("name", ["out", "out.xyz"])
def test_a_format_that_cannot_be_had_is_refused_with_a_list(name, tmp_path):
    line = complain(run_script(visualize_aug.main, ROOT / "Lenna.png", "--output", name, cwd=tmp_path), 2)
    assert name in line and ".pdf, " in line and ".png, " in line
    assert not list(tmp_path.iterdir())


KINDS_OF_TROUBLE = "missing text empty truncated folder bomb unwritable heic"


@pytest.mark.parametrize("kind", KINDS_OF_TROUBLE.split())
def test_what_cannot_be_read_or_written_gets_one_line(kind, tmp_path, monkeypatch):
    thing, output = tmp_path / "thing.png", tmp_path / "out.png"
    contents = {"text": b"no picture at all", "empty": b"", "truncated": (ROOT / "Lenna.png").read_bytes()[:10_000]}
    contents["heic"] = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
    if kind in contents:
        thing.write_bytes(contents[kind])
    elif kind == "folder":
        thing.mkdir()
    elif kind in ("bomb", "unwritable"):
        ramp("RGB").save(thing)
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    if kind == "unwritable":
        output = tmp_path / "nowhere" / "out.png"
    outcome = run_script(visualize_aug.main, thing, "--output", output, cwd=tmp_path)
    says = "to JPEG or PNG first" if kind in ("text", "empty", "heic") else f"{thing.as_posix()} cannot be read"
    says = f"cannot write {output.as_posix()}" if kind == "unwritable" else says
    assert says in complain(outcome, 1) and outcome.stderr.count("\n") == 1 and "Errno" not in outcome.stderr
    assert not output.exists()


def test_as_a_user_runs_it(tmp_path):
    command = [sys.executable, ROOT / "visualize_aug.py", ROOT / "Lenna.png"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 0 and outcome.stderr == ""
    assert "Lenna_aug.png" in outcome.stdout and (tmp_path / "Lenna_aug.png").exists()
