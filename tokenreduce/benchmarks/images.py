"""Images as models see them: upright, in RGB, with the range that their files have."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Values = npt.NDArray[np.float64]

_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
"""Tags of TIFF, and a value of the latter."""
_SIXTEEN_BITS = 65535


def rgb(image: Image.Image, name: str = "") -> Image.Image:
    """An image of any mode in 8-bit RGB, the first frame of several, turned as its EXIF orientation says.

    16 bits become 8 with their whole range, 65535 as 255. What is transparent shows white. A palette, CMYK and other
    color spaces are converted by Pillow. Whole numbers of 32 bits are taken as 16-bit ones, and floating-point numbers
    as those from 0 to 1. Raises ``ValueError``, with the image's file or else its ``name``, where the numbers are
    others: what is white cannot be known then.
    """
    try:
        upright = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return _of_numbers(image, np.asarray(upright, np.float64)).convert("RGB")
        if "transparency" in upright.info or upright.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
            upright = upright.convert("LA") if upright.mode == "La" else upright
            upright = upright.convert("RGBA")
            white = Image.new("RGBA", upright.size, "white")
            return Image.alpha_composite(white, upright).convert("RGB")
        return upright.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{getattr(image, 'filename', '') or name or 'an image'}: {error}") from error


def _of_numbers(image: Image.Image, values: Values) -> Image.Image:
    """A grey image of the numbers of one that has more than 8 bits, or fractions."""
    white = _white(image, values)
    transparent = values == image.info.get("transparency")
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = white - values
    return Image.fromarray(np.where(transparent, 255, np.rint(255 / white * values)).astype(np.uint8))


def _white(image: Image.Image, values: Values) -> float:
    """The number that stands for white, zero being black."""
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        bits: Any = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        return float((1 << bits[0]) - 1)
    if image.mode == "I" and (image.format in ("PNG", "PPM") or (low >= 0 and 255 < high <= _SIXTEEN_BITS)):
        return _SIXTEEN_BITS
    if image.mode == "F" and low >= 0 and high <= 1:
        return 1
    numbers = "floating-point numbers" if image.mode == "F" else "32-bit whole numbers"
    known = "0 to 1" if image.mode == "F" else f"0 to more than 255 and at most {_SIXTEEN_BITS}"
    raise ValueError(
        f"its pixels are {numbers} from {low:g} to {high:g}, and which of them is white cannot be known, as it can of "
        f"{known}: save the image with 8 or 16 bits"
    )
