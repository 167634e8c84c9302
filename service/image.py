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
from PIL import Image, UnidentifiedImageError

from service.cutout import cut_out, eroded
from service.errors import InvalidInput, PayloadTooLarge, UnsupportedMediaType

SIDE = 28
WORKING_SIDE = 160  # where the garment is told from its background; 128 costs a point
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")  # not TIFF: damaged ones take long
UPRIGHT = {  # what undoes each value of EXIF's Orientation (tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Preprocessing = Literal["auto", "none", "dataset"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """The pixels that the model is to see, and how they came about.

    Attributes:
        pixels: uint8 [28, 28], 0 = background, as in the data set.
        preprocessing: "none" when the picture was taken as it came, "dataset" when converted.
        notes: what could not be done, or was guessed, one sentence each; empty when all went well.
    """

    pixels: Pixels
    preprocessing: Literal["none", "dataset"]
    notes: tuple[str, ...] = ()


def decode(
    data: bytes,
    preprocessing: Preprocessing = "auto",
    *,
    max_side: int = 8192,
    max_pixels: int = 2048 * 2048,
    max_jpeg_pixels: int = 25_000_000,
) -> Decoded:
    """Decode a picture and, where asked or needed, convert it to the data set's form.

    Args:
        data: the whole file; its format is told by its content, never by a name.
        preprocessing: "none" takes exactly 28x28 8-bit grayscale and refuses all else; "dataset"
            converts whatever comes; "auto" takes 28x28 8-bit grayscale as it is, converts the rest.
        max_side: the longest edge allowed, in pixels.
        max_pixels: the largest width times height allowed.
        max_jpeg_pixels: the same for JPEG that is not progressive: it is decoded at a fraction of
            its size, in a fraction of the time and memory.

    Raises:
        UnsupportedMediaType: the bytes are no picture of a known format.
        PayloadTooLarge: the header declares more than the limits; nothing was decoded.
        InvalidInput: the picture is damaged, or "none" was asked and it is not 28x28 grayscale.
    """
    image = _open(data)
    width, height = image.size
    scales = image.format in ("JPEG", "MPO") and "progressive" not in image.info
    most = max_jpeg_pixels if scales else max_pixels
    if max(width, height) > max_side or width * height > most:
        raise PayloadTooLarge(
            f"The picture is {width} x {height} pixels; send at most {max_side} on a side and"
            f" {most} in all."
        )
    fits = image.size == (SIDE, SIDE) and image.mode == "L" and "transparency" not in image.info
    if preprocessing == "none" and not fits:
        raise InvalidInput(
            f"The picture is {width} x {height} in mode {image.mode}; send 28 x 28, 8-bit"
            " grayscale, or leave preprocessing to the service."
        )
    try:
        if fits and preprocessing != "dataset":
            return Decoded(np.array(image), "none")
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
        small = _upright(_at_most(image, WORKING_SIDE))
    except Exception as exc:  # whatever a damaged file makes Pillow's decoders stumble on
        raise InvalidInput("The picture is damaged or cut short; send the whole file.") from exc
    pixels, notes = convert(small)
    if animated:
        notes += ("Only the first frame was looked at.",)
    return Decoded(pixels, "dataset", notes)


def convert(image: Image.Image) -> tuple[Pixels, tuple[str, ...]]:
    """Convert a small upright RGBA picture as the data set's authors did, and say what was guessed.

    The garment is cut out, its longest edge scaled to 28, its extent centred; its grey levels are
    negated, as they were for photographs on white, and stretched to 255, as all in the data set
    are. It is not sharpened, as theirs was: that made no test more accurate (docs/performance.md).

    Returns:
        pixels uint8 [28, 28], and the notes of `Decoded`.
    """
    opaque = np.asarray(image.getchannel("A")) > 127
    if opaque.any() and opaque.mean() < 0.99:
        return _fit(255 - _gray(image), opaque), ()
    on_white = Image.new("RGBA", image.size, "white")
    on_white.alpha_composite(image)
    gray = _gray(on_white)
    if np.ptp(gray) < 4:
        return np.zeros((SIDE, SIDE), np.uint8), ("The picture is of one colour: nothing to see.",)
    background = float(np.median(np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])))
    cutout = cut_out(np.asarray(on_white.convert("RGB")))
    if cutout is None:
        height, width = gray.shape
        centre = gray[height // 4 : height - height // 4, width // 4 : width - width // 4]
        contrast = background - gray if centre.mean() < background else gray - background
        return _fit(contrast.clip(0), np.ones_like(gray, np.bool_)), (
            "No border could be told from the garment: the whole picture was taken.",
        )
    notes: tuple[str, ...] = ()
    if not cutout.plain:
        notes = ("The background is not plain: the garment's outline was guessed by its colours.",)
    if background < 16 and np.percentile(gray[cutout.mask], 99) > 190:
        # As bright as that on black is what the data set's own images are.
        notes += ("The background is black: the picture was taken as negated already.",)
        return _fit(gray, cutout.mask), notes
    negated, core = 255 - gray, eroded(cutout.mask, 2)
    if core.any() and gray[core].mean() > background:
        # The edge, where a dark background shines through, must not outshine a light garment.
        negated = np.minimum(negated, np.percentile(negated[core], 98))
    return _fit(negated, cutout.mask), notes


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnsupportedMediaType(
            f"These bytes are not a picture that can be read; send {', '.join(FORMATS)}."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PayloadTooLarge("The picture has far too many pixels; send a smaller one.") from None
    except Exception as exc:  # whatever a damaged header makes Pillow's parsers stumble on
        raise InvalidInput("The picture's header is damaged; send the whole file.") from exc


def _at_most(image: Image.Image, side: int) -> Image.Image:
    """Decode to RGBA with no edge longer than asked for; JPEG at a fraction of its size."""
    deep = image.mode.startswith("I")  # 16 bits
    if image.mode in ("1", "P", "PA", "La", "LA") or ("transparency" in image.info and not deep):
        image = image.convert("RGBA")  # neither palettes nor single transparent colours scale
    image.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None if deep else 2)
    if deep:
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image


def _upright(image: Image.Image) -> Image.Image:
    turn = UPRIGHT.get(image.getexif().get(0x0112, 1))
    if image.mode != "RGBA":
        image = image.convert("RGB").convert("RGBA")
    return image.transpose(turn) if turn is not None else image


def _gray(image: Image.Image) -> NDArray[np.float32]:
    return np.asarray(image.convert("RGB").convert("L"), np.float32)


def _fit(gray: NDArray[np.float32], mask: NDArray[np.bool_]) -> Pixels:
    """Scale what is under the mask to 28 on its longest edge, centre it, stretch it to 255."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = SIDE / max(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    garment = Image.fromarray(gray * mask)
    small = garment.resize((width, height), Image.Resampling.BOX, box=box)
    # An odd margin is the larger one above and on the left, as in the data set.
    top, left = (SIDE - height + 1) // 2, (SIDE - width + 1) // 2
    pixels = np.zeros((SIDE, SIDE), np.float32)
    pixels[top : top + height, left : left + width] = np.asarray(small)
    pixels *= 255 / max(float(pixels.max()), 1)
    return pixels.round().astype(np.uint8)
