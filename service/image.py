"""Turns the bytes of a picture into the 28x28 grayscale array that the model takes.

Pictures are converted the way Fashion-MNIST was made (Xiao, Rasul and Vollgraf, 2017,
arXiv 1708.07747, section 2). This file knows nothing of HTTP or of the model.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import InvalidInput, PayloadTooLarge, UnsupportedMediaType

SIDE = 28
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
Preprocessing = Literal["auto", "none", "dataset"]


@dataclass(frozen=True)
class Decoded:
    """The pixels that the model is to see, and how they came about.

    Attributes:
        pixels: uint8 [28, 28], 0 = background, as in the data set.
        preprocessing: "none" when the picture was taken as it came, "dataset" when converted.
        notes: what could not be done, or was guessed, one sentence each; empty when all went well.
    """

    pixels: NDArray[np.uint8]
    preprocessing: Literal["none", "dataset"]
    notes: tuple[str, ...] = ()


def decode(
    data: bytes,
    preprocessing: Preprocessing = "auto",
    *,
    max_side: int = 8192,
    max_pixels: int = 24_000_000,
) -> Decoded:
    """Decode a picture and, where asked or needed, convert it to the data set's form.

    Args:
        data: the whole file; its format is told by its content, never by a name.
        preprocessing: "none" takes exactly 28x28 8-bit grayscale and refuses all else; "dataset"
            converts whatever comes; "auto" takes 28x28 8-bit grayscale as it is, converts the rest.
        max_side: the longest edge allowed, in pixels.
        max_pixels: the largest width times height allowed.

    Raises:
        UnsupportedMediaType: the bytes are no picture of a known format.
        PayloadTooLarge: the header declares more than the limits; nothing was decoded.
        InvalidInput: the picture is damaged, or "none" was asked and it is not 28x28 grayscale.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnsupportedMediaType(
            f"The body is not a picture that can be read; send {', '.join(FORMATS)}."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PayloadTooLarge(f"The picture has more than {max_pixels:,} pixels.") from None
    except Exception as exc:  # Pillow's plugins raise whatever their parsers stumble over
        raise InvalidInput("The picture's header is damaged.") from exc
    width, height = image.size
    if max(width, height) > max_side or width * height > max_pixels:
        raise PayloadTooLarge(
            f"The picture is {width} x {height} pixels; at most {max_side:,} on a side"
            f" and {max_pixels:,} in all are accepted."
        )
    as_it_is = image.mode == "L" and image.size == (SIDE, SIDE) and "transparency" not in image.info
    if preprocessing == "none" and not as_it_is:
        raise InvalidInput(
            f"The picture is {width} x {height} in mode {image.mode}; without preprocessing it"
            " must be 28 x 28, 8-bit grayscale."
        )
    try:
        if as_it_is and preprocessing != "dataset":
            return Decoded(np.array(image), "none")
        image.thumbnail((256, 256))
        image = ImageOps.exif_transpose(image)
        gray = image.convert("L")
    except Exception as exc:  # as above: a damaged file may raise anything
        raise InvalidInput(f"The {image.format} picture is damaged or cut short.") from exc
    gray = ImageOps.pad(gray, (SIDE, SIDE))
    return Decoded(255 - np.array(gray), "dataset", ("The conversion is not written yet.",))
