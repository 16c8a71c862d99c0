"""Image files of every kind, brought to RGB and to one size."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from utils.errors import UserError, reason
from utils.files import check_regular

# Pillow goes by the content of a file, and hands PostScript, for example, to another program.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
THINNEST = 1000  # times as long as wide; scaled to a width of 224, such an image takes 150 MB
DEEP_RANGE = (0, 0x10000)  # from black to white, in images of more than 8 bits


def open_rgb(
    path: str | os.PathLike, content: bytes | None = None, value_range: Sequence[float] | None = None
) -> Image.Image:
    """Decode the file at `path` to 8-bit RGB, whatever its own mode is.

    Args:
        path: the file; with `content`, what messages call it.
        content: what is in the file, if that is known already.
        value_range: see `to_rgb`.

    Raises:
        UserError: it is missing, damaged or no image of the `FORMATS`.
    """
    try:
        with open_image(path, content) as image:
            if max(image.size) > THINNEST * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels, too thin to be scaled")
            return to_rgb(image, value_range)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # on damaged files PIL's decoders raise nearly anything
        why = "damaged, or of an unknown format" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"{os.fspath(path)}: cannot be read as an image ({why})") from error


def open_image(path: str | os.PathLike, content: bytes | None = None) -> Image.Image:
    """The image as Pillow opens it: its header is read, its pixels are not decoded yet.

    Raises:
        UserError: `path` is no ordinary file.
        Exception: nearly any, if the file is damaged.
    """
    if content is None:
        check_regular(path)
    return Image.open(path if content is None else io.BytesIO(content), formats=FORMATS)


def is_deep(image: Image.Image) -> bool:
    """Its one channel has more than 8 bits."""
    return image.mode.startswith(("I", "F"))


def to_rgb(image: Image.Image, value_range: Sequence[float] | None = None) -> Image.Image:
    """`image` in 8-bit RGB: grey is repeated, 16 bits keep their upper eight, transparency shows white.

    Args:
        image: of any mode.
        value_range: the values that become black and white in an image of more than 8 bits; None: 0 and 65,536.

    Raises:
        ValueError: its values are floating-point numbers, and no range is given.
    """
    if is_deep(image):
        if image.mode == "F" and value_range is None:
            raise ValueError("floating-point values, of which no range is known; dataset.image_range=[low,high] says")
        low, high = value_range or DEEP_RANGE
        # PIL's own conversion clips 16-bit values at 255, which turns most pictures white.
        levels = (np.asarray(image, np.float64) - low) * (256 / (high - low))
        return Image.fromarray(np.nan_to_num(levels).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # The colour stored under a transparent pixel is arbitrary and must not be seen.
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, size: tuple[int, int], margin: bool = False) -> Image.Image:
    """Scale `image` until it just covers the frame and cut the centre out.

    Args:
        image: RGB, any size.
        size: height and width of the result.
        margin: scale to 8/7 of the frame first, the custom of ImageNet's evaluation (256 for 224), where
            training crops show the objects larger than they are.
    """
    cover_h, cover_w = frame(size, margin)
    width, height = image.size
    # Scaled to the height, or to the width: whichever is larger.
    scaled_w, scaled_h = max((cover_h * width // height, cover_h), (cover_w, cover_w * height // width))
    top, left = round((scaled_h - size[0]) / 2), round((scaled_w - size[1]) / 2)
    scaled = image.resize((scaled_w, scaled_h), Image.Resampling.BILINEAR)
    return scaled.crop((left, top, left + size[1], top + size[0]))


def frame(size: tuple[int, int], margin: bool) -> tuple[int, int]:
    """(height, width) that `fit` scales an image to cover."""
    height, width = size
    return (height * 8 // 7, width * 8 // 7) if margin else size


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 ``[3, H, W]``."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
