"""Draw what the augmentations of data.py do to a picture (assignment 2, task 2 d, Figure 3).

    python visualize_aug.py Lenna.png

The picture goes through the same functions that the training's loader calls; shifts are in proportion to its size, so
what is seen here at 512x512 is what happens at 32x32.
"""

import sys

if sys.version_info < (3, 10):
    sys.exit(f"visualize_aug.py needs Python 3.10 or newer, this is {sys.version.split()[0]}")

import argparse
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

import data

SEED = 5  # one whose draws are easy to see: a flip, a shift both ways, a change of color
SIZE = 1024  # pixels that a picture has at most after it is read, each way; a third of the figure has 360
Image.MAX_IMAGE_PIXELS = 250_000_000  # a phone's picture has up to 200 million; Pillow refuses twice as many as this


def read(path):
    """Any picture that Pillow opens, as RGB: uint8 (1, 3, H, W). Transparent pixels are laid on white.

    A large one is made smaller, to at most 1,024 pixels each way: that is more than can be seen of it.

    Raises:
        OSError: there is no such file, or it is not (wholly) a picture.
    """
    with Image.open(Path(path).expanduser()) as picture:
        deep = picture.mode.startswith("I;16")
        if deep or picture.mode in ("1", "P", "PA"):  # Pillow shrinks these roughly or not at all
            picture = picture.convert("I" if deep else "RGBA")
        picture.thumbnail((SIZE, SIZE))
        picture = ImageOps.exif_transpose(picture)  # as the camera was held
        if picture.mode in ("I", "F"):  # 16 or 32 bits a pixel: scale to 8
            pixels = np.asarray(picture, dtype=np.float64)
            white = 65535 if deep else max(1, pixels.max())
            picture = Image.fromarray((pixels.clip(0, white) * (255 / white)).astype(np.uint8))
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]


def draw(images):
    """A figure of `images`, uint8 (1, 3, H, W): as they are, after position and after color augmentation."""
    from matplotlib.figure import Figure  # here, because reading a picture does not need it

    generator = torch.Generator().manual_seed(SEED)
    panels = {
        "original": data.to_float(images),
        "position": data.to_float(data.position(images, generator)),
        "color": data.color(data.to_float(images), generator),
    }
    height, width = images.shape[2:]
    figure = Figure(figsize=(12, max(1.5, min(12, 4 * height / width)) + 0.35), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        axes.imshow(panel[0].permute(1, 2, 0).numpy())
        axes.set_title(title, fontsize=16)
        axes.axis("off")
    return figure


def main():
    data.prepare_script()
    parser = argparse.ArgumentParser(description="Draw what the augmentations do to a picture.")
    parser.add_argument("image", metavar="IMAGE", type=Path, help="any picture that Pillow opens")
    help = "where to save; its ending names the format (default: IMAGE's name with _aug.png)"
    parser.add_argument("--output", metavar="PICTURE", type=Path, help=help)
    args = parser.parse_args()
    output = (args.output or Path(f"{args.image.stem}_aug.png")).expanduser()
    try:
        figure = draw(read(args.image))
    except UnidentifiedImageError:
        reason = "is no picture that Pillow can read: convert it, a phone's HEIC for example, to JPEG or PNG first"
        parser.exit(1, f"visualize_aug.py: {args.image} {reason}\n")
    except Exception as problem:  # Pillow raises many kinds of error
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
        parser.exit(1, f"visualize_aug.py: {args.image} cannot be read as a picture: {reason}\n")
    formats = figure.canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        parser.exit(2, f"visualize_aug.py: --output {output} must end in one of .{', .'.join(formats)}\n")
    try:
        figure.savefig(buffer := io.BytesIO(), format=output.suffix[1:].lower(), dpi=90)
        data.write_file(output, buffer.getvalue())
    except OSError as problem:
        parser.exit(1, f"visualize_aug.py: cannot write {output}: {problem.strerror or problem}\n")
    print(f"saved {output}: original, position, color")


if __name__ == "__main__":
    main()
