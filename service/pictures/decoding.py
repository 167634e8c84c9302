"""Decodes pictures within limits, and reduces them to the size that the conversion works on.

Every access to what Pillow found in a file happens in this file, and every error of its parsers
and decoders becomes one of ours here.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import AvifImagePlugin, Image, PngImagePlugin, UnidentifiedImageError

from service.errors import InvalidInput, PayloadTooLarge, ServiceError, UnsupportedMediaType

STRIP_PIXELS = 2**17  # of a large picture, converted at a time: they fit the CPU's caches
NEARLY = 1.02  # times the size asked for
# Endings of names in lower case; HEIC too, to name the package that reads it.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".avif", ".heic", ".heif")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")  # not TIFF: damaged ones take long
# An ISO media file's brands that mean HEIC (ISO/IEC 23008-12, annex B), at bytes 8 to 12.
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
# The service's limits: whatever a phone or a shop makes is below them; decoding takes a quarter of
# a second and 150 MB at most (measured: docs/operations.md). Checked before anything is decoded.
MAX_SIDE = 8192
# Pixels. JPEG is decoded at a fraction of its size if it comes row by row; if not, as progressive
# ones, all its coefficients are in memory.
MAX_PIXELS = {
    "JPEG": 8192 * 6144,
    "progressive JPEG": 4096 * 3072,
    "WEBP": 4032 * 3024,  # 12 bytes a pixel
    "GIF": 3200 * 3200,
    "BMP": 4096 * 3072,
    "AVIF": 4096 * 3072,
    "HEIF": 4096 * 3072,
}
# Bytes, where these cost more than pixels do: more than photographs of that size have.
MAX_BYTES = {
    "lossy WEBP": 4_000_000,
    "AVIF": 2_500_000,
    "HEIF": 4_000_000,
    "progressive JPEG": 6_000_000,
}
MAX_SCANS = 50  # of a progressive JPEG: usual are 10, and as many in a thumbnail; each is a pass
MAX_READS = 20_000  # of a file, by Pillow's parsers: some 50 ms for a file of nothing but markers
# A PNG's pixel takes the time of three bytes, and of each that it has when unpacked: a screen of
# 3840 x 2160 with colours and transparency.
MAX_PNG_COST = 3840 * 2160 * 7
MAX_EXIF_BYTES = 65_536  # as in JPEG
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# A PNG's first 33 bytes when it is 28 x 28, 8-bit grayscale, not interlaced (PNG, section 11.2.1).
RAW_HEADER = PNG_SIGNATURE + bytes.fromhex("0000000d49484452 0000001c0000001c0800000000 57668048")
PNG_END = bytes.fromhex("0000000049454e44ae426082")
MAX_RAW_BYTES = 2048  # of a 28 x 28 PNG: 812 when not compressed at all, and chunk headers
UPRIGHT = {  # what undoes each value of EXIF's Orientation (tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
HEADER_DAMAGED = "The picture's header is damaged; send the whole file."
DAMAGED = "The picture is damaged or cut short; send the whole file."


def configure_pillow() -> None:
    """Set what Pillow keeps for the whole process; whoever builds the application calls this.

    Pillow warns of damaged metadata, once for each tag: a client could flood the log. HEIC can be
    read where the package pillow-heif is installed.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    Image.MAX_IMAGE_PIXELS = None  # this file has limits of its own
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker uses one core
    PngImagePlugin.MAX_TEXT_MEMORY = 2**22  # of compressed comments, which nothing here reads
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener(thumbnails=False)


def is_raw_28x28(data: bytes) -> bool:
    """Return whether a file is a 28x28 8-bit grayscale PNG that holds nothing but its pixels.

    Such a file is decoded in microseconds, on the event loop. Every other file goes to the
    picture thread: Pillow parses metadata as soon as it opens a file. The check takes less than a
    microsecond and looks at bytes alone: the header, one chunk of pixels, the end.
    """
    return (
        data.startswith(RAW_HEADER)
        and data[37:41] == b"IDAT"
        and len(data) == 57 + int.from_bytes(data[33:37], "big") <= MAX_RAW_BYTES
        and data.endswith(PNG_END)
    )


def open_picture(data: bytes, *, limited: bool = True) -> Image.Image:
    """Read a picture's header, and check the limits; nothing is decoded.

    Args:
        data: the whole file; its content decides the format.
        limited: whether the service's limits hold; memory is the only one otherwise.

    Raises:
        UnsupportedMediaType: the bytes are not a picture of a known format.
        PayloadTooLarge: the header declares more than MAX_PIXELS, MAX_PNG_COST, MAX_SIDE, MAX_BYTES
            or MAX_SCANS allow.
        InvalidInput: the header is damaged.
    """
    formats = [*FORMATS, *({"HEIF"} & Image.OPEN.keys())]
    with _our_errors(HEADER_DAMAGED):
        try:
            file = _Bounded(data) if limited else io.BytesIO(data)
            image = Image.open(file, formats=formats)
        except UnidentifiedImageError:
            raise UnsupportedMediaType(_unidentified(data, formats)) from None
        if image.format == "PNG":
            _scale_transparency(image, _png_depth(data))
        if limited:
            _check_limits(image, data)
    return image


def _check_limits(image: Image.Image, data: bytes) -> None:
    kind = _kind(image, data)
    max_pixels = _max_pixels(image, kind, data)
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > max_pixels:
        raise PayloadTooLarge(
            f"The picture is {width} x {height} pixels; of this kind, send at most {MAX_SIDE} on a"
            f" side and {max_pixels / 1e6:.1f} million in all."
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


def _unidentified(data: bytes, formats: list[str]) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS and "HEIF" not in formats:
        return "HEIC pictures need the package pillow-heif beside the service; or send JPEG."
    return f"These bytes are not a picture that can be read; send {', '.join(formats)}."


def raw_pixels(data: bytes) -> NDArray[np.uint8]:
    """Decode a file of which `is_raw_28x28` holds: uint8 [28, 28].

    Its one chunk goes to Pillow's decoder as it is; opening the file, with all that a PNG may have,
    takes four times as long (130 against 30 microseconds).

    Raises:
        InvalidInput: the pixels are damaged.
    """
    with _our_errors(DAMAGED):
        pixels = Image.frombytes("L", (28, 28), data[41 : -len(PNG_END) - 4], "zip", "L", 0)
        return np.frombuffer(pixels.tobytes(), np.uint8).reshape(28, 28)


def is_gray_28x28(image: Image.Image) -> bool:
    """Return whether an opened picture is 28x28, 8-bit grayscale, without transparency."""
    return image.size == (28, 28) and image.mode == "L" and "transparency" not in image.info


def gray_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Decode a grayscale picture as it is: uint8 [height, width].

    Raises:
        InvalidInput: the picture is damaged.
    """
    with _our_errors(DAMAGED):
        return np.array(image)


def reduced(image: Image.Image, side: int) -> Image.Image:
    """Decode a picture, upright, with no edge longer than asked for.

    Returns:
        an RGBA picture where it may have transparency, else RGB.

    Raises:
        InvalidInput: the picture is damaged.
    """
    with _our_errors(DAMAGED):
        return _upright(_at_most(image, side), image)


def is_animated(image: Image.Image) -> bool:
    """Return whether a decoded picture has further frames."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # what follows a GIF's first frame is damaged, or in too many pieces
        return False


@contextmanager
def _our_errors(sentence: str) -> Iterator[None]:
    """Turn what a damaged file makes Pillow raise, which may be anything, into our errors."""
    try:
        yield
    except ServiceError:
        raise
    except MemoryError:
        raise PayloadTooLarge("The picture needs more memory than there is.") from None
    except Exception as exc:
        raise InvalidInput(sentence) from exc


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
    """Return whether a JPEG's first scan is Huffman-coded and has all components, block by block.

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


def _max_pixels(image: Image.Image, kind: str, data: bytes) -> int:
    if image.format != "PNG":
        return MAX_PIXELS[kind.removeprefix("lossy ")]
    sample = 2 if _png_depth(data) == 16 else 1
    return int(MAX_PNG_COST / (3 + sample * len(image.getbands())))


def _png_depth(data: bytes) -> int:
    """Return a PNG's bits a sample: Pillow tells them only in its decoder's private arguments."""
    if data[12:16] != b"IHDR":  # the first chunk must be; Pillow does not insist
        raise InvalidInput(HEADER_DAMAGED)
    return data[24]


def _at_most(image: Image.Image, side: int) -> Image.Image:
    """Decode with no edge longer than asked for; JPEG at a fraction of its size.

    First means of whole blocks of pixels are taken, at the cost of a look at each, then of those
    the means that the size needs. What must become RGBA before means can be taken, does so strip
    by strip: all at once it would take twice the decoder's memory.
    """
    scale = min(1, side / max(image.size))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    image.draft(None, _draft_size(image.size, side))
    image = _without_canvases(image)
    width, height = image.size
    factor = int(width / size[0] / 2) or 1, int(height / size[1] / 2) or 1
    if image.mode in ("L", "RGB", "RGBX", "CMYK") and "transparency" not in image.info:
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


def _draft_size(full: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the least size at which a JPEG is to be decoded: by 1, 2, 4 or 8 smaller.

    Where one of these nearly is the size asked for, it needs no second reduction. Else there must
    be two pixels for one: the means of fewer cost accuracy.
    """
    for divisor in (8, 4, 2):
        if side <= max(full) / divisor < NEARLY * side:
            return full[0] // divisor, full[1] // divisor
    scale = min(1, side / max(full))
    return max(1, round(full[0] * scale)) * 2, max(1, round(full[1] * scale)) * 2


def _without_canvases(image: Image.Image) -> Image.Image:
    """Decode a WebP picture, and free libwebp's two canvases before its pixels are used.

    Pillow holds them while it copies the pixels: 16 bytes a pixel, 184 MB for 12 million. This
    takes 144 MB. The decoder is private; where Pillow has none, its own way is taken.
    """
    decoder: Any = getattr(image, "_decoder", None)
    if image.format != "WEBP" or not hasattr(decoder, "get_next"):
        return image
    frame = decoder.get_next()
    if frame is None:
        raise InvalidInput(DAMAGED)
    image._decoder = decoder = None  # type: ignore[attr-defined] # see above
    mode = "RGBA" if image.mode == "RGBA" else "RGBX"
    return Image.frombuffer(mode, image.size, frame[0], "raw", mode, 0, 1)


def _scale_transparency(image: Image.Image, depth: int) -> None:
    """Scale a PNG's transparent colour as Pillow scales its pixels, which it forgets to do."""
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    elif isinstance(transparent, int) and image.mode == "L" and depth in (2, 4):
        image.info["transparency"] = transparent * (255 // (2**depth - 1))


def _rgba(strip: Image.Image) -> Image.Image:
    if not strip.mode.startswith("I"):
        return strip.convert("RGBA")
    deep = np.asarray(strip)  # 16 bits
    gray = Image.fromarray((deep // 257).astype(np.uint8))
    if "transparency" in strip.info:
        gray.putalpha(Image.fromarray(deep != strip.info["transparency"]))
    return gray.convert("RGBA")


def _upright(small: Image.Image, original: Image.Image) -> Image.Image:
    """Turn the reduced picture as the original's EXIF wants it."""
    try:
        usual = len(original.info.get("exif", b"")) <= MAX_EXIF_BYTES
        turn = UPRIGHT.get(original.getexif().get(0x0112, 1)) if usual else None
    except Exception:  # the pixels can be read though the EXIF data is damaged
        turn = None
    return small if turn is None else small.transpose(turn)
