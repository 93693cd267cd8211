"""Draw what the augmentations of data.py do to a picture (assignment 2, task 2 d, Figure 3).

    python visualize_aug.py Lenna.png

The picture goes through the very functions that the training's loader calls; shifts are in proportion to its size, so
what is seen here at 512x512 is what happens at 32x32.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

import data

SEED = 5  # one whose draws are easy to see: a flip, a shift both ways, a change of color


def read(path):
    """Any picture that Pillow opens, as RGB: uint8 (1, 3, H, W). Transparent pixels are laid on white.

    Raises:
        OSError: there is no such file, or it is not (wholly) a picture.
        Image.DecompressionBombWarning: it has more pixels than a picture should.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        opened = Image.open(path)
    with opened as picture:
        picture = ImageOps.exif_transpose(picture)  # as the camera was held
        if picture.mode.startswith("I") or picture.mode == "F":  # 16 or 32 bits a pixel: scale to 8
            levels = np.asarray(picture, dtype=np.float64)
            levels *= 255 / max(65535 if picture.mode.startswith("I;16") else 0, levels.max(), 1)
            picture = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None]


def draw(images):
    """A figure of `images`, uint8 (1, 3, H, W): as they are, after position and after color augmentation."""
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
    parser = argparse.ArgumentParser(
        usage="python visualize_aug.py IMAGE [--output PNG]", description="Draw what the augmentations do to a picture."
    )
    parser.add_argument("image", metavar="IMAGE", type=Path, help="any picture that Pillow opens")
    parser.add_argument(
        "--output", metavar="PNG", type=Path, help="where to save (default: IMAGE's name with _aug.png)"
    )
    args = parser.parse_args()
    output = args.output or Path(f"{args.image.stem}_aug.png")
    try:
        images = read(args.image)
    except Exception as problem:  # Pillow has many, and no class of its own for all of them
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
        parser.exit(1, f"visualize_aug.py: {args.image} cannot be read as a picture: {reason}\n")
    try:
        draw(images).savefig(output, format="png", dpi=90)
    except OSError as problem:
        parser.exit(1, f"visualize_aug.py: cannot write {output}: {problem.strerror or problem}\n")
    print(f"saved {output}: original, position, color")


if __name__ == "__main__":
    main()
