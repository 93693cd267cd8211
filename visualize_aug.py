"""Draw what the augmentations of data.py do to a picture (assignment 2, task 2 d, Figure 3).

    python visualize_aug.py Lenna.png

In training, data.Loader calls the same functions. Shifts are in proportion to the picture, so a picture of 512x512
pixels moves as far as one of 32x32.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import data

SEED = 7632  # its draws are easy to see: a flip, a long shift both ways, very different colors
SIZE = 1024  # `read` shrinks larger pictures to this many pixels; a panel of the figure has 360


def read(path, size=None):
    """Any picture that Pillow opens, as RGB: uint8 (1, 3, H, W). Transparent pixels become white.

    Args:
        path: the picture.
        size: None shrinks a large picture to at most 1,024 pixels each way. With a number it is the square in the
            middle, shrunk to size x size pixels: each is the mean of the pixels whose middles it covers.

    Raises:
        OSError, or another of Pillow's errors: there is no such file, or it is not a picture, or it is damaged.
    """
    with Image.open(path) as file:
        if not size:  # decode a large JPEG at a half, a quarter or an eighth: fast, in less memory
            file.draft(None, (SIZE, SIZE))
        picture = ImageOps.exif_transpose(file)  # upright, as the camera was held
    if picture.mode.startswith("I"):  # 16 bits per pixel (or 32, of which 16 are used): keep the upper eight
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    if size:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BOX)
    else:
        picture.thumbnail((SIZE, SIZE))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


def draw(images):
    """A matplotlib Figure of `images`, uint8 (1, 3, H, W): one panel for the original and one per augmentation.

    Dashed lines mark the middle of each panel, so that the shift shows.
    """
    from matplotlib.figure import Figure  # here, because reading a picture does not need matplotlib

    generator = torch.Generator().manual_seed(SEED)
    panels = {"original": images}
    for augment in data.AUGMENTATIONS["both"]:
        panels[augment.__name__] = augment(images, generator)
    count = len(panels)
    height, width = images.shape[2:]
    inches = min(12, 4 * height / width)  # the height of a picture; its title takes 0.5 more
    figure = Figure(figsize=(4 * count, inches + 0.5))
    for number, (title, panel) in enumerate(panels.items()):
        axes = figure.add_axes((number / count, 0, 0.98 / count, inches / (inches + 0.5)))
        pixels = data.to_float(panel[0]).permute(1, 2, 0)
        axes.imshow(pixels.numpy())
        axes.axhline(height / 2, color="white", linestyle="--")
        axes.axvline(width / 2, color="white", linestyle="--")
        axes.set_title(title, fontsize=26)
        axes.axis("off")
    return figure


def main():
    data.prepare_script()
    parser = argparse.ArgumentParser(description="Draw what the augmentations do to a picture.")
    help = "where to save; the ending chooses the format (default: beside it, cat_aug.png or cat.jpg_aug.png)"
    parser.add_argument("image", metavar="IMAGE", help="any picture that Pillow opens")
    parser.add_argument("--output", metavar="PICTURE", help=help)
    args = parser.parse_args()
    output = Path(args.output or args.image.removesuffix(".png") + "_aug.png")
    try:
        images = read(args.image)
    except Exception as problem:  # Pillow raises many kinds of error
        sys.exit(f"visualize_aug.py: cannot read {args.image} as a picture, such as JPEG or PNG: {problem}")
    if output.exists() and output.samefile(args.image):
        sys.exit(f"visualize_aug.py: --output {output} would overwrite the picture itself: choose another name")
    figure = draw(images)
    try:
        figure.savefig(output, format=output.suffix[1:], dpi=90)
    except Exception as problem:  # matplotlib too
        sys.exit(f"visualize_aug.py: cannot write {output}, choose another --output: {problem}")
    print(f"saved {output}")


if __name__ == "__main__":
    main()
