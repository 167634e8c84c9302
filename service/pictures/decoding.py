"""Decodes pictures within limits, and reduces them to the conversion's working size.

Only this file reads Pillow's parsed files and pixels. It turns every error of Pillow into one of
the service's errors.
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
from PIL import (
    AvifImagePlugin,
    Image,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401 - registers the format
)

from service.errors import (
    InvalidInput,
    Overloaded,
    PayloadTooLarge,
    ServiceError,
    UnsupportedMediaType,
)

STRIP_PIXELS = 2**17  # pixels to convert at once; so many fit into the CPU's caches
CLOSE_ENOUGH = 1.02  # a JPEG decoded at up to this times the wanted size is not reduced again
# File names' endings, in lower case. HEIC is here so that its error can name the missing package.
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".avif", ".heic", ".heif")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF")  # not TIFF: damaged files take long
# Brands of an ISO media file, at bytes 8 to 12, that mean HEIC (ISO/IEC 23008-12, annex B).
HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"})
# The service's limits, checked before decoding. Pictures from phones and shops are below them.
# Decoding takes at most a quarter of a second and 150 MB (measured in docs/operations.md).
MAX_SIDE = 8192  # pixels
# Pixels of the whole picture. A JPEG whose data comes row by row is decoded at a fraction of its
# size. For any other, such as a progressive JPEG, all coefficients must be in memory.
MAX_PIXELS = {
    "JPEG": 8192 * 6144,
    "progressive JPEG": 4096 * 3072,
    "WEBP": 4032 * 3024,
    "GIF": 3200 * 3200,
    "BMP": 4096 * 3072,
    "AVIF": 4096 * 3072,
    "HEIF": 4096 * 3072,
}
BYTES_PER_PIXEL = 12  # of memory, for WebP; no other decoder needs more
# Bytes, for formats whose bytes cost more than their pixels. Photographs of that size have fewer.
MAX_BYTES = {
    "lossy WEBP": 4_000_000,
    "AVIF": 2_500_000,
    "HEIF": 4_000_000,
    "progressive JPEG": 6_000_000,
}
MAX_SCANS = 50  # of a progressive JPEG; usual are 10, and 10 more in its thumbnail
MAX_READS = 20_000  # of a file by Pillow's parsers; so many take about 50 ms
# A PNG's pixel costs as much as three bytes, plus its own bytes when unpacked. The limit is a
# screenshot of 3840 x 2160 pixels with transparency (four bytes a pixel).
MAX_PNG_COST = 3840 * 2160 * 7
MAX_EXIF_BYTES = 65_536  # JPEG's own limit
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The first 33 bytes of a 28 x 28 PNG in 8-bit grayscale, not interlaced (PNG, section 11.2.1).
RAW_HEADER = PNG_SIGNATURE + bytes.fromhex("0000000d49484452 0000001c0000001c0800000000 57668048")
PNG_END = bytes.fromhex("0000000049454e44ae426082")
MAX_RAW_BYTES = 2048  # of a 28 x 28 PNG; uncompressed, it has about 880
ORIENTATION = 0x0112  # EXIF's tag
UPRIGHT = {  # how to turn a picture upright, by its orientation
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
NO_MEMORY = "There is too little memory for this picture now; try again, or send a smaller one."


def configure_pillow() -> None:
    """Set Pillow's options for the whole process; each entry point calls this once.

    Pillow's warnings of damaged metadata are switched off: there is one for each tag, so a client
    could flood the log. HEIC can be read if the package pillow-heif is installed.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    Image.preinit()  # with WebP, all formats are loaded now: later, memory may be short
    Image.MAX_IMAGE_PIXELS = None  # this file has its own limits
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker uses one core
    PngImagePlugin.MAX_TEXT_MEMORY = 2**22  # bytes of compressed comments; nothing here reads them
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener(thumbnails=False)


def is_raw_28x28(data: bytes) -> bool:
    """Return whether a file is a 28x28 8-bit grayscale PNG without metadata.

    Such a file takes microseconds to decode, so the event loop decodes it. All other files go to
    the picture thread, because Pillow parses metadata when it opens a file. The check takes less
    than a microsecond. It compares bytes only: the header, one chunk of pixels, the end.
    """
    return (
        data.startswith(RAW_HEADER)
        and data[37:41] == b"IDAT"
        and len(data) == 57 + int.from_bytes(data[33:37], "big") <= MAX_RAW_BYTES
        and data.endswith(PNG_END)
    )


def open_picture(data: bytes, *, limited: bool = True) -> Image.Image:
    """Read a picture's header and check the limits, without decoding it.

    Args:
        data: the whole file; the format is read from its content.
        limited: whether to apply the service's limits; without them, memory is the only limit.

    Raises:
        UnsupportedMediaType: the bytes are not a picture of a known format.
        PayloadTooLarge: the picture exceeds MAX_PIXELS, MAX_PNG_COST, MAX_SIDE, MAX_BYTES or
            MAX_SCANS.
        InvalidInput: the header is damaged.
        Overloaded: there is too little memory.
    """
    formats = [*FORMATS, *({"HEIF"} & Image.OPEN.keys())]
    with _service_errors(HEADER_DAMAGED, MAX_PIXELS["WEBP"]):  # its decoder starts here
        try:
            file = _LimitedFile(data) if limited else io.BytesIO(data)
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
            f"The picture is {width} x {height} pixels; send at most {MAX_SIDE} on each side, and"
            f" for {kind} at most {max_pixels / 1e6:.1f} million in all."
        )
    if len(data) > MAX_BYTES.get(kind, len(data)):
        raise PayloadTooLarge(
            f"The picture has {len(data):,} bytes; for {kind}, send at most {MAX_BYTES[kind]:,}, or"
            " use another format."
        )
    if kind == "progressive JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise PayloadTooLarge(f"The JPEG has more than {MAX_SCANS} scans; save it with fewer.")


def _unidentified(data: bytes, formats: list[str]) -> str:
    if data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS and "HEIF" not in formats:
        return "HEIC needs the package pillow-heif; install it where the model runs, or send JPEG."
    return f"The file is not a picture in a known format; send {', '.join(formats)}."


def raw_pixels(data: bytes) -> NDArray[np.uint8]:
    """Decode a file that passes `is_raw_28x28`: uint8 [28, 28].

    Its only chunk goes directly to Pillow's decoder. Opening the file as a PNG takes four times as
    long (130 instead of 30 microseconds).

    Raises:
        InvalidInput: the pixels are damaged.
    """
    with _service_errors(DAMAGED, 28 * 28):
        pixels = Image.frombytes("L", (28, 28), data[41 : -len(PNG_END) - 4], "zip", "L", 0)
        return np.frombuffer(pixels.tobytes(), np.uint8).reshape(28, 28)


def is_gray_28x28(image: Image.Image) -> bool:
    """Return whether an opened picture is 28x28, 8-bit grayscale, without transparency."""
    return image.size == (28, 28) and image.mode == "L" and "transparency" not in image.info


def gray_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Decode a grayscale picture and turn it upright: uint8 [height, width].

    Raises:
        InvalidInput: the picture is damaged.
    """
    with _service_errors(DAMAGED, image.width * image.height):
        image.load()  # first: `_upright` ignores errors, and Pillow raises this one only once
        return np.array(_upright(image, image))


def reduced(image: Image.Image, side: int) -> Image.Image:
    """Decode a picture, turn it upright, and reduce it so that no edge is longer than `side`.

    Returns:
        an RGBA picture if it may have transparency, else RGB.

    Raises:
        InvalidInput: the picture is damaged.
        Overloaded: there is too little memory.
    """
    with _service_errors(DAMAGED, image.width * image.height):
        return _upright(_decoded_small(image, side), image)


def is_animated(image: Image.Image) -> bool:
    """Return whether a decoded picture has more than one frame."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except Exception:  # the rest of a GIF is damaged, or in too many pieces
        return False


@contextmanager
def _service_errors(damaged: str, pixels: int) -> Iterator[None]:
    """Turn any exception that Pillow raises into one of the service's errors.

    Most decoders do not say whether they lacked memory or the picture is damaged. So if one fails,
    this checks whether the memory that they may need for so many pixels can be had.
    """
    try:
        yield
    except ServiceError:
        raise
    except Exception as exc:
        if isinstance(exc, MemoryError) or not _is_free(pixels * BYTES_PER_PIXEL):
            raise Overloaded(NO_MEMORY, headers={"Retry-After": "1"}) from exc
        raise InvalidInput(damaged) from exc


def _is_free(memory: int) -> bool:
    """Return whether so many bytes of memory can be had."""
    try:
        np.empty(memory, np.uint8)  # reserves addresses, and writes nothing
    except MemoryError:
        return False
    return True


class _LimitedFile(io.BytesIO):
    """A file that limits how often a parser may read from it."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise InvalidInput("The picture's file has too many small parts; save it again.")
        return super().read(size)


def _kind(image: Image.Image, data: bytes) -> str:
    """Return the format, as in MAX_PIXELS and MAX_BYTES."""
    if image.format in ("JPEG", "MPO"):
        return "JPEG" if _is_in_rows(data) else "progressive JPEG"
    if image.format == "WEBP" and b"VP8 " in data:
        return "lossy WEBP"
    # Pillow decodes a run-length encoded BMP in Python, slowly.
    if image.format == "BMP" and image.info["compression"] in (1, 2):
        raise UnsupportedMediaType(
            "This BMP is run-length encoded; save it uncompressed, or as PNG."
        )
    return str(image.format)


def _is_in_rows(data: bytes) -> bool:
    """Return whether a JPEG can be decoded row by row (ITU-T T.81, sections A.2 and B.2).

    It can if it is sequential and Huffman-coded, and its first scan has all components.
    """
    at, components = 2, 0
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return False  # no length follows; decoders skip some of these
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
    """Return a PNG's bits per sample, which Pillow has only in a private attribute."""
    if data[12:16] != b"IHDR":  # the first chunk must be IHDR; Pillow allows others
        raise InvalidInput(HEADER_DAMAGED)
    return data[24]


def _decoded_small(image: Image.Image, side: int) -> Image.Image:
    """Decode a picture so that no edge is longer than `side`; a JPEG at a fraction of its size.

    The picture is reduced in two steps: first by means of whole blocks of pixels, which is fast,
    then to the exact size. A picture that must become RGBA is converted in strips: at once, it
    would need twice the decoder's memory.
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
            # RGBa has colours multiplied by opacity: transparent pixels do not change the means.
            blocks.paste(strip.convert("RGBa").reduce(factor), (0, top // factor[1]))
    box = (0, 0, width / factor[0], height / factor[1])
    return blocks.resize(size, Image.Resampling.BOX, box).convert(
        "RGBA" if blocks.mode == "RGBa" else "RGB"
    )


def _draft_size(full: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the smallest size to decode a JPEG at; the decoder divides by 1, 2, 4 or 8.

    If one of these sizes is close enough to the size asked for, there is no second reduction.
    Otherwise ask for at least twice the size: means of fewer pixels cost accuracy.
    """
    for divisor in (8, 4, 2):
        if side <= max(full) / divisor < CLOSE_ENOUGH * side:
            return full[0] // divisor, full[1] // divisor
    scale = min(1, side / max(full))
    return max(1, round(full[0] * scale)) * 2, max(1, round(full[1] * scale)) * 2


def _without_canvases(image: Image.Image) -> Image.Image:
    """Decode a WebP picture, and free libwebp's two canvases before using the pixels.

    Pillow keeps the canvases while it copies the pixels. That takes 16 bytes a pixel, 184 MB for 12
    million pixels; this takes 144 MB. The decoder is a private attribute; if it is missing, Pillow
    decodes in its own way.
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
    """Scale a PNG's transparent colour like its pixels; Pillow scales only the pixels."""
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
    """Turn a decoded picture upright, by the original's EXIF orientation."""
    try:
        valid = len(original.info.get("exif", b"")) <= MAX_EXIF_BYTES
        turn = UPRIGHT.get(original.getexif().get(ORIENTATION, 1)) if valid else None
    except Exception:  # damaged EXIF data is ignored
        turn = None
    return small if turn is None else small.transpose(turn)
