"""Turns the bytes of a picture into the 28x28 grayscale array that the model takes.

Pictures are converted the way Fashion-MNIST was made (Xiao, Rasul and Vollgraf, 2017,
arXiv 1708.07747, section 2). This file knows nothing of HTTP or of the model.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, PngImagePlugin, UnidentifiedImageError

from service.errors import InvalidInput, PayloadTooLarge, UnsupportedMediaType
from service.pictures.cutout import cut_out, eroded

SIDE = 28
WORKING_SIDE = 160  # where the garment is told from its background; 128 costs a point
STRIP_PIXELS = 2**17  # what is made of a large picture at a time: stays in the CPU's caches
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")  # not TIFF: damaged ones take long
MAX_SIDE = 8192
# Pixels, so that photographs of the format take about 50 ms and nothing takes 50 MB (measured:
# docs/operations.md). JPEG is decoded at a fraction of its size, if it comes row by row; if not,
# as progressive ones, all its coefficients are kept.
MAX_PIXELS = {
    "JPEG": 6144 * 4096,
    "progressive JPEG": 2048 * 2048,
    "WEBP": 1600 * 1600,
    "GIF": 1600 * 1600,
    "BMP": 2048 * 2048,
    "AVIF": 1920 * 1088,
}
# Bytes, where these cost more than pixels do: twice what photographs of that size have, or more.
MAX_BYTES = {"lossy WEBP": 1_500_000, "AVIF": 750_000, "progressive JPEG": 2_000_000}
MAX_SCANS = 50  # of a progressive JPEG: usual are 10, and as many in a thumbnail; each is a pass
MAX_READS = 20_000  # of a file, by Pillow's parsers: some 50 ms for a file of nothing but markers
MAX_EXIF_BYTES = 65_536  # as in JPEG
# A PNG's pixel takes the time of three bytes, and of each that it has when unpacked: 1500 x 1500
# with colours and transparency, 1600 x 1600 without.
MAX_PNG_COST = 1600 * 1600 * 6.2
UPRIGHT = {  # what undoes each value of EXIF's Orientation (tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
Image.MAX_IMAGE_PIXELS = None  # ours are lower; its warning would get into the log
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker uses one core
PngImagePlugin.MAX_TEXT_MEMORY = 2**22  # of compressed comments that nobody reads
# Told on standard error else, though such a picture is read like any other (see `_upright`).
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
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


def decode(data: bytes, preprocessing: Preprocessing = "auto") -> Decoded:
    """Decode a picture and, where asked or needed, convert it to the data set's form.

    Args:
        data: the whole file; its format is told by its content, never by a name.
        preprocessing: "none" takes exactly 28x28 8-bit grayscale and refuses all else; "dataset"
            converts whatever comes; "auto" takes 28x28 without colours as it is, converts the rest.

    Raises:
        UnsupportedMediaType: the bytes are no picture of a known format.
        PayloadTooLarge: the header declares more than MAX_PIXELS, MAX_PNG_COST, MAX_SIDE, MAX_BYTES
            or MAX_SCANS allow; nothing was decoded.
        InvalidInput: the picture is damaged, or "none" was asked and it is not 28x28 grayscale.
    """
    return read(open_picture(data), preprocessing)


def open_picture(data: bytes) -> Image.Image:
    """Read a picture's header, and refuse it as `decode` does if it declares too much."""
    image = _open(data)
    if image.format == "PNG":
        _scale_transparency(image)
    width, height = image.size
    kind = _kind(image, data)
    most = _max_pixels(image, kind)
    if max(width, height) > MAX_SIDE or width * height > most:
        raise PayloadTooLarge(
            f"The picture is {width} x {height} pixels; of this kind, send at most {MAX_SIDE} on a"
            f" side and {most / 1e6:.1f} million in all."
        )
    if len(data) > MAX_BYTES.get(kind, len(data)):
        raise PayloadTooLarge(
            f"The picture has {len(data):,} bytes; of this kind ({kind}), send at most"
            f" {MAX_BYTES[kind]:,}, or another format."
        )
    if kind == "progressive JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise PayloadTooLarge(
            f"The JPEG has more than {MAX_SCANS} scans; save it again with fewer."
        )
    return image


def is_small(image: Image.Image) -> bool:
    """Tell whether `read` takes less time than handing the picture to a thread would.

    That is so of what is taken as it is; any conversion takes from 2 to 10 milliseconds.
    """
    return image.size == (SIDE, SIDE)


def read(image: Image.Image, preprocessing: Preprocessing) -> Decoded:
    """Decode an opened picture, once, as `decode` does."""
    width, height = image.size
    fits = image.size == (SIDE, SIDE) and image.mode == "L" and "transparency" not in image.info
    if preprocessing == "none" and not fits:
        raise InvalidInput(
            f"The picture is {width} x {height} in mode {image.mode}; send 28 x 28, 8-bit"
            " grayscale, or leave preprocessing to the service."
        )
    try:
        if fits and preprocessing != "dataset":
            return Decoded(np.array(image), "none")
        small = _upright(_at_most(image, WORKING_SIDE), image)
    except InvalidInput:
        raise
    except Exception as exc:  # whatever a damaged file makes Pillow's decoders stumble on
        raise InvalidInput("The picture is damaged or cut short; send the whole file.") from exc
    if preprocessing == "auto" and small.size == (SIDE, SIDE) == (width, height):
        gray = np.asarray(small)
        if (gray[..., 3] == 255).all() and (np.ptp(gray[..., :3], axis=2) == 0).all():
            return Decoded(gray[..., 0].copy(), "none")
    pixels, notes = convert(small)
    if _is_animated(image):
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
        negated = 255 - _gray(image)
        if negated[opaque].max() < 4:  # all white: of what there is to see, the shape
            negated[:] = 255
        return _fit(negated, opaque), ()
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
        return Image.open(_Bounded(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnsupportedMediaType(
            f"These bytes are not a picture that can be read; send {', '.join(FORMATS)}."
        ) from None
    except InvalidInput:
        raise
    except Exception as exc:  # whatever a damaged header makes Pillow's parsers stumble on
        raise InvalidInput("The picture's header is damaged; send the whole file.") from exc


class _Bounded(io.BytesIO):
    """A file that a parser may not read in too many pieces."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise InvalidInput("The picture's file is in too many pieces; save it again.")
        return super().read(size)


def _kind(image: Image.Image, data: bytes) -> str:
    """Return the format, as in MAX_PIXELS and MAX_BYTES."""
    if image.format in ("JPEG", "MPO"):
        return "JPEG" if _is_in_rows(data) else "progressive JPEG"
    if image.format == "WEBP" and b"VP8 " in data:
        return "lossy WEBP"
    if image.format == "BMP" and image.info["compression"] in (1, 2):  # decoded in Python, slowly
        raise UnsupportedMediaType("This BMP is run-length encoded; save it without, or as PNG.")
    return str(image.format)


def _is_in_rows(data: bytes) -> bool:
    """Tell whether a JPEG's first scan is Huffman-coded and has all components, block by block.

    Only then can it be decoded row by row (ITU-T T.81, sections A.2 and B.2).
    """
    at, components = 2, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA:
            return data[at + 4] == components
        if marker in (0xC0, 0xC1):
            components = data[at + 9]
        elif 0xC2 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return False
        at += 1 if marker == 0xFF else 2 + length
    return False


def _is_animated(image: Image.Image) -> bool:
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # what follows a GIF's first frame is damaged, or in too many pieces
        return False


def _max_pixels(image: Image.Image, kind: str) -> int:
    if image.format != "PNG":
        return MAX_PIXELS[kind.removeprefix("lossy ")]
    sample = 2 if _is_deep(image) else 1
    return int(MAX_PNG_COST / (3 + sample * len(image.getbands())))


def _is_deep(image: Image.Image) -> bool:
    """Tell whether a PNG has 16 bits a sample."""
    return image.format == "PNG" and "16" in str(image.tile[0].args)  # type: ignore[attr-defined] # an ImageFile


def _at_most(image: Image.Image, side: int) -> Image.Image:
    """Decode to RGBA with no edge longer than asked for; JPEG at a fraction of its size.

    First means of whole blocks of pixels are taken, at the cost of a look at each, then of those
    the means that the size needs. What must become RGBA before means can be taken, does so strip
    by strip: all at once it would take twice the decoder's memory.
    """
    scale = min(1, side / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image.draft(None, (2 * size[0], 2 * size[1]))
    width, height = image.size
    factor = int(width / size[0] / 2) or 1, int(height / size[1] / 2) or 1
    if image.mode in ("L", "RGB", "CMYK") and "transparency" not in image.info:
        blocks = image.reduce(factor)
    else:
        blocks = Image.new("RGBa", (-(-width // factor[0]), -(-height // factor[1])))
        rows = factor[1] * max(1, STRIP_PIXELS // (width * factor[1]))
        for top in range(0, height, rows):
            strip = _rgba(image.crop((0, top, width, min(top + rows, height))))
            # Premultiplied: colours under transparency must not get into the means.
            blocks.paste(strip.convert("RGBa").reduce(factor), (0, top // factor[1]))
    box = (0, 0, width / factor[0], height / factor[1])
    return blocks.resize(size, Image.Resampling.BOX, box).convert(
        "RGBA" if blocks.mode == "RGBa" else "RGB"
    )


def _scale_transparency(image: Image.Image) -> None:
    """Scale a PNG's transparent colour as Pillow scales its pixels, which it forgets to do."""
    depth = str(image.tile[0].args).rpartition(";")[2]  # type: ignore[attr-defined] # an ImageFile
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and depth == "16B":
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif isinstance(transparent, int) and image.mode == "L" and depth in ("2", "4"):
        image.info["transparency"] = transparent * (255 // (2 ** int(depth) - 1))


def _rgba(strip: Image.Image) -> Image.Image:
    if not strip.mode.startswith("I"):
        return strip.convert("RGBA")
    deep = np.asarray(strip)  # 16 bits
    gray = Image.fromarray((deep // 257).astype(np.uint8))
    if "transparency" in strip.info:
        gray.putalpha(Image.fromarray(deep != strip.info["transparency"]))
    return gray.convert("RGBA")


def _upright(small: Image.Image, original: Image.Image) -> Image.Image:
    """Turn the reduced picture as the original's EXIF wants it; convert to RGBA."""
    try:
        sound = len(original.info.get("exif", b"")) <= MAX_EXIF_BYTES
        turn = UPRIGHT.get(original.getexif().get(0x0112, 1)) if sound else None
    except Exception:  # damaged EXIF is no reason to refuse a sound picture
        turn = None
    small = small.convert("RGBA")
    return small if turn is None else small.transpose(turn)


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
