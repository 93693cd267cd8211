"""Any picture is read alike, and classified as well as the test set is; Figure 3 shows what the loader does."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, complain, run_script, seeded
from PIL import Image

import data
import train
import visualize_aug


@pytest.fixture
def save(tmp_path, monkeypatch):
    """Saves rows of pixels as a picture in the current folder, and returns its name."""
    monkeypatch.chdir(tmp_path)

    def to_file(pixels, name="picture.png", mode=None, **options):
        picture = Image.fromarray(np.asarray(pixels))
        (picture.convert(mode) if mode else picture).save(name, **options)
        return name

    return to_file


@pytest.mark.parametrize("mode, ending", [
    ("1", "png"), ("L", "bmp"), ("P", "gif"), ("LA", "png"), ("RGB", "jpg"), ("RGBA", "webp"), ("CMYK", "jpg"),
])  # fmt: skip
def test_all_formats_and_color_modes_are_read_alike(mode, ending, save):
    gray = np.uint8([[0, 255]]).repeat(8, axis=1).repeat(8, axis=0)  # black on the left, white on the right
    images = visualize_aug.read(save(gray, f"picture.{ending}", mode))
    np.testing.assert_allclose(images, np.broadcast_to(gray, (1, 3, 8, 16)), atol=4)


def test_of_16_bits_the_upper_eight_count(save):
    levels = np.uint16([[0, 255, 256, 40 * 256 + 99, 65535]])
    assert visualize_aug.read(save(levels))[0, 0, 0].tolist() == [0, 0, 1, 40, 255]


@pytest.mark.parametrize("bands, options", [(4, {}), (3, {"transparency": (0, 0, 0)}), (1, {"transparency": 0})])
def test_transparent_pixels_are_white_up_to_the_rim_in_a_large_picture_too(bands, options, save):
    white = np.full((2048, 2048, bands), 255, np.uint8)
    white[301:1702, 301:1702] = 0  # transparent by the fourth band, or declared to be the transparent color
    assert (visualize_aug.read(save(white.squeeze(), **options)) == 255).all()


def test_a_large_picture_is_shrunk_and_a_fine_pattern_becomes_gray(save):
    images = visualize_aug.read(save(np.indices((1500, 3000)).sum(0) % 2 == 0))
    assert images.shape == (1, 3, 512, 1024) and (images.int() - 128).abs().max() < 16


def test_a_photo_is_turned_upright_as_the_camera_was_held(save):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    gray = np.uint8([[0, 255]]).repeat(32, axis=1).repeat(8, axis=0)
    column = visualize_aug.read(save(gray, "photo.jpg", exif=exif))[0, 0, :, 0]
    assert (column > 128).tolist() == 32 * [False] + 32 * [True]


def test_with_a_size_the_middle_square_is_shrunk_and_no_pixel_counts_twice(save):
    wide = np.uint8([[99] * 33 + [255] + [0] * 32 + [99] * 33] * 33)  # white begins the square in the middle
    images = visualize_aug.read(save(wide), 32)
    assert images.shape == (1, 3, 32, 32)
    assert images[..., 0].min() >= 255 * 32 / 33 - 1  # of 33 pixels a row, each in the result has 33/32
    assert images[..., 1:].max() <= 8


@pytest.mark.real_data
def test_the_test_set_enlarged_to_pictures_of_40_pixels_is_classified_as_well(quick):
    images, labels = (part[:2000] for part in data.load_cifar10(ROOT / "datasets")[1])
    pictures = []
    for image in images:
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((40, 40), Image.Resampling.BICUBIC)
        picture.save(file := io.BytesIO(), "BMP")
        pictures.append(visualize_aug.read(file, 32))
    model = train.load(quick)
    plain, own = (train.evaluate(model, some, labels, "fp32", tta=False) for some in (images, torch.cat(pictures)))
    assert own["val_accuracy"] > plain["val_accuracy"] - 0.02


def test_figure_3_shows_the_picture_and_what_each_of_the_loaders_augmentations_makes_of_it():
    images = torch.randint(256, (1, 3, 20, 32), dtype=torch.uint8, generator=seeded())
    generator = seeded(visualize_aug.SEED)
    panels = [images] + [augment(images, generator) for augment in data.AUGMENTATIONS["both"]]
    drawn = visualize_aug.draw(images).axes
    assert [axes.get_title() for axes in drawn] == ["original", "position", "color"]
    for axes, panel in zip(drawn, panels, strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), data.to_float(panel)[0].permute(1, 2, 0), atol=1e-6)


def test_figure_3_is_saved_beside_the_picture_or_as_output_whose_ending_chooses_the_format(save):
    for name, flags, output, start in (
        ("cat.png", "", "cat_aug.png", b"\x89PNG"), ("Küken.jpg", "", "Küken.jpg_aug.png", b"\x89PNG"),
        ("cat.png", "--output new.pdf", "new.pdf", b"%PDF"),
    ):  # fmt: skip
        save(np.zeros((40, 60), np.uint8), name)
        assert run_script(visualize_aug.main, f"{name} {flags}").returncode == 0
        assert Path(output).read_bytes().startswith(start)


def test_misuse_gets_one_line_and_the_picture_itself_is_never_overwritten(save):
    raw = Path(save(np.zeros((8, 8), np.uint8), "cat.png")).read_bytes()
    Path("half.png").write_bytes(raw[:-30])
    os.link("cat.png", "link.png")
    for flags, named in ("half.png", "half"), ("none.png", "none"), ("cat.png --output link.png", "link"):
        assert named in complain(run_script(visualize_aug.main, flags), 1)
    assert Path("cat.png").read_bytes() == raw
