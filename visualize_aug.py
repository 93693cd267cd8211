"""Draw what the augmentations of data.py do to a picture (assignment 2, task 2 d, Figure 3).

    python visualize_aug.py Lenna.png

The loader of train.py calls the same functions. Shifts are in proportion to the picture, so a picture of 512x512 pixels
moves as far as one of 32x32.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit(f"visualize_aug.py needs Python 3.10 or newer, this is {sys.version.split()[0]}")

import argparse
import io
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

import data

SEED = 7632  # its draws are easy to see: a flip, a long shift both ways, very different colors
SIZE = 1024  # `read` shrinks larger pictures to this many pixels; a panel of the figure has 360
Image.MAX_IMAGE_PIXELS = 250_000_000  # a phone's picture has up to 200 million; Pillow refuses twice this number


def read(path):
    """Any picture that Pillow opens, as RGB: uint8 (1, 3, H, W). Transparent pixels become white.

    A large picture is shrunk to at most 1,024 pixels each way.

    Raises:
        OSError: there is no such file, or it is not a picture, or it is damaged.
    """
    with Image.open(os.path.expanduser(path)) as picture:
        deep = picture.mode.startswith("I;16")
        if deep or picture.mode in ("1", "P", "PA"):  # Pillow shrinks these roughly or not at all
            picture = picture.convert("I" if deep else "RGBA")
        picture.thumbnail((SIZE, SIZE))
        picture = ImageOps.exif_transpose(picture)  # upright, as the camera was held
        if picture.mode in ("I", "F"):  # 16 or 32 bits per pixel: scale to 8
            pixels = np.asarray(picture, dtype=np.float64)
            white = 65535 if deep else max(1, pixels.max())
            picture = Image.fromarray((pixels.clip(0, white) * (255 / white)).astype(np.uint8))
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]


def draw(images):
    """A matplotlib Figure of `images`, uint8 (1, 3, H, W): one panel for the original and one per augmentation.

    Dashed lines mark the middle of each panel, so that the shift shows.
    """
    from matplotlib.figure import Figure  # here, because reading a picture does not need matplotlib

    generator = torch.Generator().manual_seed(SEED)
    panels = {
        "original": data.to_float(images),
        "flipped and shifted": data.to_float(data.position(images, generator)),
        "other colors": data.color(data.to_float(images), generator),
    }
    count = len(panels)
    height, width = images.shape[2:]
    inches = min(12, 4 * height / width)  # the height of a picture; its title takes 0.5 more
    figure = Figure(figsize=(4 * count, inches + 0.5))
    for number, (title, panel) in enumerate(panels.items()):
        axes = figure.add_axes((number / count, 0, 0.98 / count, inches / (inches + 0.5)))
        axes.imshow(panel[0].permute(1, 2, 0).numpy(), origin="upper")
        axes.axhline(height / 2, color="white", linestyle="--")
        axes.axvline(width / 2, color="white", linestyle="--")
        axes.set_title(title, fontsize=26)
        axes.axis("off")
    return figure


def main():
    data.prepare_script()
    parser = argparse.ArgumentParser(description="Draw what the augmentations do to a picture.")
    expand = os.path.expanduser
    help = "where to save; the ending chooses the format (default: beside IMAGE, cat_aug.png or cat.jpg_aug.png)"
    parser.add_argument("image", metavar="IMAGE", type=expand, help="any picture that Pillow opens")
    parser.add_argument("--output", metavar="PICTURE", type=expand, help=help)
    args = parser.parse_args()
    output = Path(args.output or args.image.removesuffix(".png") + "_aug.png")

    def fail(code, message):
        parser.exit(code, f"visualize_aug.py: {message}\n")

    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except Exception as problem:  # not installed, or made for another NumPy
        fail(1, f"matplotlib cannot be imported ({problem}): pip install -r requirements.txt")
    formats = FigureCanvasBase.get_supported_filetypes()
    ending = output.suffix[1:].lower()
    if ending not in formats:
        fail(2, f"--output {output} must end in one of .{', .'.join(formats)}")
    try:
        images = read(args.image)
    except UnidentifiedImageError:
        fail(1, f"Pillow cannot read {args.image} as a picture: convert it, a phone's HEIC for example, to JPEG or PNG")
    except Exception as problem:  # Pillow raises many kinds of error
        fail(1, f"{args.image} cannot be read as a picture: {getattr(problem, 'strerror', None) or problem}")
    if os.path.exists(output) and os.path.samefile(output, args.image):
        fail(2, f"--output {output} would overwrite the picture itself: choose another name")
    figure = draw(images)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=ending, dpi=90)
    except Exception as problem:  # LaTeX is not installed, for example
        way_out = "try a name that ends in .png, and text.usetex: False in your matplotlibrc"
        fail(1, f"matplotlib cannot draw {output} ({problem}): {way_out}")
    try:
        data.write_file(output, picture.getvalue())
    except OSError as problem:
        fail(1, f"cannot write {output} ({problem.strerror or problem}): choose another place with --output")
    print(f"saved {output}")


if __name__ == "__main__":
    main()
