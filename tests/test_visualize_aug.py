"""Figure 3: any picture in, one picture out, by the loader's own functions; what is no picture gets one line."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import visualize_aug

ROOT = Path(visualize_aug.__file__).parent
HEIGHT, WIDTH = 40, 60


def ramp(mode):
    """A picture of 60x40 pixels, dark on the left and light on the right."""
    levels = np.tile(np.linspace(0, 255, WIDTH), (HEIGHT, 1))
    if mode == "I;16":
        return Image.fromarray((levels * 257).astype(np.uint16))
    if mode in ("I", "F"):
        return Image.fromarray(levels.astype(np.int32 if mode == "I" else np.float32))
    return Image.fromarray(levels.astype(np.uint8)).convert(mode)


def run(*arguments):
    """visualize_aug.py with `arguments`: exit code and what it wrote to the error stream."""
    err = io.StringIO()
    argv = ["visualize_aug.py", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stderr(err):
        try:
            return visualize_aug.main() or 0, err.getvalue()
        except SystemExit as stop:
            return stop.code, err.getvalue()


KINDS = [
    ("L", "png"), ("1", "png"), ("P", "gif"), ("RGBA", "png"), ("LA", "png"), ("I;16", "png"), ("I;16", "tiff"),
    ("CMYK", "jpg"), ("YCbCr", "jpg"), ("F", "tiff"), ("RGB", "webp"), ("RGB", "bmp"),
]  # fmt: skip


@pytest.mark.parametrize("mode, suffix", KINDS)
def test_every_kind_of_picture(mode, suffix, tmp_path):
    path = tmp_path / f"picture.{suffix}"
    ramp(mode).save(path)
    images = visualize_aug.read(path)
    assert images.shape == (1, 3, HEIGHT, WIDTH) and images.dtype == torch.uint8
    row = images[0, :, HEIGHT // 2].float()
    assert (row.amax(0) - row.amin(0)).max() < 12  # still grey,
    assert row[0, :5].mean() < 30 and row[0, -5:].mean() > 225  # dark on the left, light on the right
    assert run(path, "--output", tmp_path / "out.png") == (0, "")
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.format == "PNG" and drawn.width > 2 * drawn.height


def test_transparent_pixels_are_white(tmp_path):
    Image.new("RGBA", (8, 8), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (visualize_aug.read(tmp_path / "clear.png") == 255).all()


def test_a_photo_is_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    ramp("RGB").save(tmp_path / "photo.jpg", exif=exif)
    assert visualize_aug.read(tmp_path / "photo.jpg").shape == (1, 3, WIDTH, HEIGHT)


def test_an_animation_shows_its_first_frame(tmp_path):
    first, second = Image.new("RGB", (9, 9), "black"), Image.new("RGB", (9, 9), "white")
    first.save(tmp_path / "animation.gif", save_all=True, append_images=[second])
    assert (visualize_aug.read(tmp_path / "animation.gif") == 0).all()


def test_what_is_drawn_is_what_the_loader_does(monkeypatch):
    called = []
    for name in ("position", "color"):
        function = getattr(data, name)
        monkeypatch.setattr(data, name, lambda *a, f=function, n=name: called.append(n) or f(*a))
    figure = visualize_aug.draw(torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8))
    assert called == ["position", "color"]
    assert [axes.get_title() for axes in figure.axes] == ["original", "position", "color"]


def broken(kind, path):
    if kind == "text":
        path.write_text("no picture at all")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        ramp("RGB").save(path, format="PNG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "folder":
        path.mkdir()
    elif kind == "bomb":
        Image.new("1", (10_000, 10_000)).save(path, format="PNG")


@pytest.mark.parametrize("kind", ["missing", "text", "empty", "truncated", "folder", "bomb"])
def test_what_is_no_picture_gets_one_line(kind, tmp_path):
    path = tmp_path / "thing.png"
    broken(kind, path)
    code, error = run(path, "--output", tmp_path / "out.png")
    assert code == 1
    assert error.count("\n") == 1 and "thing.png" in error
    assert not (tmp_path / "out.png").exists()


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    ramp("RGB").save(tmp_path / "picture.png")
    code, error = run(tmp_path / "picture.png", "--output", tmp_path / "nowhere" / "out.png")
    assert code == 1 and error.count("\n") == 1 and "nowhere" in error


def test_as_a_user_runs_it(tmp_path):
    command = [sys.executable, ROOT / "visualize_aug.py", ROOT / "Lenna.png"]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 0 and outcome.stderr == ""
    assert "Lenna_aug.png" in outcome.stdout and (tmp_path / "Lenna_aug.png").exists()
