"""Pictures are opened within limits; damaged files give pixels or one of the service's errors."""

import io
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import AvifImagePlugin, Image

from service.errors import InvalidInput, PayloadTooLarge, ServiceError, UnsupportedMediaType
from service.pictures.conversion import Pixels, Preprocessing, read_picture
from service.pictures.decoding import (
    FORMATS,
    MAX_PIXELS,
    MAX_PNG_COST,
    configure_pillow,
    is_raw_28x28,
    open_picture,
    raw_pixels,
    reduced,
)
from tests.service.pictures.drawings import GRAY, encode, plain, shaded, stencil, worn

ROOT = Path(__file__).parents[3]


# Raw 28 x 28 PNGs


def chunk(name: bytes, content: bytes = b"") -> bytes:
    check = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + check


def png(*chunks: bytes, size: tuple[int, int] = (28, 28), depth: int = 8, colour: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


END = chunk(b"IEND")
ROWS = zlib.compress(bytes(28 * 29))


@pytest.mark.parametrize("level", [0, 1, 9])
def test_a_raw_28_by_28_png_is_recognised(level: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    data = encode(Image.fromarray(noise), compress_level=level)
    assert is_raw_28x28(data)
    np.testing.assert_array_equal(read_picture(data, "none").pixels, noise)
    np.testing.assert_array_equal(raw_pixels(data), noise)


@given(
    st.sampled_from([0, 1, 6]),
    st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(41, 800), st.integers(0, 255)), max_size=3),
)
def test_a_raw_png_is_decoded_as_pillow_decodes_its_file(
    level: int, seed: int, damage: list[tuple[int, int]]
) -> None:
    """Valid or damaged: both give the same pixels, or both an error."""
    noise = np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)
    data = bytearray(encode(Image.fromarray(noise), compress_level=level))
    for place, value in damage:
        if place < len(data) - 12:
            data[place] = value
    if is_raw_28x28(bytes(data)):
        assert outcome(raw_pixels, bytes(data)) == outcome(pillows_pixels, bytes(data))


def pillows_pixels(data: bytes) -> Pixels:
    return read_picture(data, "none").pixels


def outcome(decode: Callable[[bytes], Pixels], data: bytes) -> bytes | str:
    try:
        return decode(data).tobytes()
    except ServiceError as error:
        return error.code


@pytest.mark.parametrize(
    "data",
    [
        b"",
        encode(Image.new("L", (28, 28)))[:33],
        encode(Image.new("L", (28, 28)), "BMP"),
        encode(Image.new("L", (28, 29))),
        encode(Image.new("RGB", (28, 28))),
        encode(Image.new("I;16", (28, 28))),
        png(chunk(b"eXIf", b"MM\0*"), chunk(b"IDAT", ROWS), END),
        png(chunk(b"IDAT", ROWS), chunk(b"tEXt", b"a\0b"), END),
        png(chunk(b"IDAT", ROWS[:9]), chunk(b"IDAT", ROWS[9:]), END),
        png(chunk(b"IDAT", ROWS + bytes(3_000)), END),
    ],
    ids=["nothing", "cut", "BMP", "28x29", "colour", "deep", "EXIF", "text", "two", "long"],
)
def test_a_file_with_other_chunks_is_not_raw(data: bytes) -> None:
    assert not is_raw_28x28(data)


# Metadata


def with_exif(entries: list[tuple[int, int, int, int]], padding: int = 0) -> bytes:
    """Return GRAY as a PNG whose EXIF data has these tags: number, type, count, value."""
    tags = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + tags + bytes(4 + padding)
    data = encode(GRAY)
    return data[:33] + chunk(b"eXIf", exif) + data[33:]


def test_oversized_exif_is_not_read() -> None:
    """EXIF data too long for a JPEG is ignored in other formats too."""
    orientation = [(0x0112, 3, 1, 3)]
    upright = np.asarray(reduced(open_picture(encode(GRAY)), 160))
    turned = upright[::-1, ::-1]
    fits = 65_536 - len(b"Exif\0\0") - 8 - 2 - 12 - 4
    for padding, expected in ((fits, turned), (fits + 1, upright)):
        picture = reduced(open_picture(with_exif(orientation, padding)), 160)
        np.testing.assert_array_equal(np.asarray(picture), expected)


def test_pillows_warnings_are_not_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Pillow warns of each damaged tag; a client could flood the log."""
    damaged = [(number, 2, 2**31, 0) for number in range(1, 1000)]
    jpeg = encode(GRAY, "JPEG")
    tags = b"".join(struct.pack("<HHII", *entry) for entry in damaged)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(damaged)) + tags
    flood = jpeg[:2] + segment(0xE1, exif) + jpeg[2:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        configure_pillow()
        for data in (flood, with_exif(damaged), png(chunk(b"acTL", b"1"), END)):
            with suppress(ServiceError):
                read_picture(data)
    assert [caught, caplog.records, *capfd.readouterr()] == [[], [], "", ""]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("size", [(200, 240), (1000, 1200)])
def test_colours_under_transparency_do_not_change_a_reduced_picture(
    mode: str, size: tuple[int, int]
) -> None:
    """The outline too, where a mean covers garment and background."""
    alpha = stencil().resize(size)
    seen = alpha.point(lambda value: 255 * (value > 0))
    pictures = []
    for under in ("black", "white"):
        picture = Image.composite(
            Image.new("RGB", size, "#305070"), Image.new("RGB", size, under), seen
        )
        if mode == "P":
            palette = picture.quantize(2)
            picture = Image.open(io.BytesIO(encode(palette, transparency=palette.getpixel((0, 0)))))
        else:
            picture.putalpha(alpha)
            picture = picture.convert(mode)
        pictures.append(np.asarray(reduced(open_picture(encode(picture)), 160)))
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert 0 < pictures[0][..., 3].mean() < 255


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P"])
def test_a_large_picture_is_reduced_to_the_means_of_its_blocks(mode: str) -> None:
    """By numpy; those that may be transparent are reduced in several strips."""
    large = Image.radial_gradient("L").resize((960, 720))
    image = large.convert(mode)
    data = encode(image, transparency=255) if mode == "P" else encode(image)
    small = np.asarray(reduced(open_picture(data), 160).convert("RGBA")).astype(float)
    opaque = np.asarray(large) < 255 if mode == "P" else np.full((720, 960), True)
    levels = np.asarray(large), np.array(255)
    blocks = [np.where(opaque, each, 0).reshape(120, 6, 160, 6) for each in levels]
    gray, alpha = (block.mean((1, 3)) for block in blocks)
    np.testing.assert_allclose(small[..., 3], alpha, rtol=0, atol=2)
    seen = alpha > 200
    np.testing.assert_allclose(small[seen, 0], (255 * gray / alpha)[seen], rtol=0, atol=3)
    assert seen.mean() > 0.8


@pytest.mark.parametrize("size", [(962, 722), (1003, 655)])
def test_a_picture_whose_blocks_do_not_fit_is_opaque_up_to_its_edges(
    size: tuple[int, int],
) -> None:
    alpha = np.asarray(reduced(open_picture(encode(Image.new("LA", size, (90, 255)))), 160))
    assert (alpha == [90, 90, 90, 255]).all()


# Refused pictures


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.new("L", (28, 28)), "TIFF"),
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
        bytes(784),
    ],
    ids=["TIFF", "nothing", "text", "SVG", "PDF", "zeros"],
)
def test_other_files_are_an_unsupported_media_type(data: bytes) -> None:
    with pytest.raises(UnsupportedMediaType, match="PNG, JPEG"):
        read_picture(data)


def png_header(width: int, height: int) -> bytes:
    return png(chunk(b"IDAT"), size=(width, height), colour=2)


@pytest.mark.parametrize(
    "size", [(4000, 2500), (8193, 1), (1, 8193), (10000, 10000), (65000, 65000)]
)
def test_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    """The files end after the header: decoding them would give another error, "damaged"."""
    with pytest.raises(PayloadTooLarge):
        read_picture(png_header(*size))
    with pytest.raises(InvalidInput, match="damaged"):
        read_picture(png_header(4000, 2400))


@pytest.mark.parametrize(
    ("format_", "mode", "size", "options"),
    [
        ("JPEG", "RGB", (8064, 6048), {}),
        ("JPEG", "RGB", (4000, 3000), {"progressive": True}),
        ("PNG", "RGBA", (3840, 2160), {}),
        ("PNG", "L", (4000, 3500), {}),
        ("WEBP", "RGB", (4000, 3000), {"method": 0}),
        ("GIF", "L", (3200, 3200), {}),
        ("BMP", "RGB", (4000, 3000), {}),
        ("AVIF", "RGB", (4000, 3000), {"speed": 10}),
    ],
)
def test_usual_pictures_are_taken_and_slow_ones_are_not(
    format_: str, mode: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    picture = Image.new(mode, size, 255)
    assert open_picture(encode(picture, format_, **options)).size == size
    larger = encode(picture.resize((size[0], size[1] * 6 // 5)), format_, **options)
    with pytest.raises(PayloadTooLarge, match="million in all"):
        open_picture(larger)
    assert open_picture(larger, limited=False).size == (size[0], size[1] * 6 // 5)


def test_a_png_of_16_bits_costs_more_than_one_of_8() -> None:
    """A gray pixel costs 3 bytes and its own: 58 MB are 14.5 or 11.6 million pixels."""
    deep, flat = (png(chunk(b"IDAT"), size=(4000, 3250), depth=depth) for depth in (16, 8))
    with pytest.raises(PayloadTooLarge, match=r"11\.6 million in all"):
        open_picture(deep)
    assert open_picture(flat).size == (4000, 3250)


def test_only_lossy_webp_is_limited_in_bytes() -> None:
    """Of a lossless one, the pixels cost more than the bytes."""
    lossless = encode(worn(plain()), "WEBP", lossless=True)
    assert open_picture(lossless + bytes(5_000_000)).size == (200, 240)


READ_WITH_LITTLE_MEMORY = """
import json, resource, sys
from pathlib import Path
from service.errors import ServiceError
from service.pictures.conversion import read_picture
from service.pictures.decoding import configure_pillow
from service.pictures.thread import PictureThread

configure_pillow()
PictureThread()
files = [Path(file).read_bytes() for file in sys.argv[1:]]
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, [size + 8 * 2**20] * 2)
for file in files:
    try:
        read_picture(file)
        print("ok")
    except ServiceError as error:
        print(error.status, error.headers.get("Retry-After"))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's addresses")
def test_a_lack_of_memory_is_not_taken_for_damage(tmp_path: Path) -> None:
    """Some decoders only report that they failed. The client may try the same file again."""
    large = worn(plain()).resize((2000, 1500))
    small = encode(worn(plain()).resize((40, 40)))
    files = {
        encode(large, "WEBP", method=0): "503 1",
        encode(large, "AVIF", speed=10): "503 1",
        encode(large, "JPEG", progressive=True): "503 1",
        encode(large, "BMP"): "503 1",
        small: "ok",
        small[:-40]: "422 None",
    }
    paths = [tmp_path / str(i) for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-c", READ_WITH_LITTLE_MEMORY, *map(str, paths)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines() == [*files.values()], result.stderr


def test_compressed_comments_are_unpacked_only_up_to_four_megabytes() -> None:
    """A kilobyte of a PNG can hold a megabyte of spaces."""
    comment = chunk(b"zTXt", b"a\0\0" + zlib.compress(b" " * 900_000))
    data = encode(GRAY)
    few, many = (data[:33] + comment * count + data[33:] for count in (4, 5))
    assert open_picture(few).size == GRAY.size
    with pytest.raises(InvalidInput, match="header is damaged"):
        open_picture(many)


def test_an_avif_is_decoded_by_one_thread() -> None:
    """A worker has one core."""
    configure_pillow()
    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def jpeg(side: int, scans: list[list[int]], frame: int = 0xC0, more: bytes = b"") -> bytes:
    """Write a gray square by hand: every block's only bits are two zeros, "as before" and "end".

    Args:
        side: in pixels, a multiple of 32.
        scans: the components of each scan, of three in all.
        frame: the marker of its kind; 0xC0 is baseline.
        more: further segments and scans.
    """
    parts = [b"\xff\xd8", segment(0xDB, b"\0" + b"\1" * 64)]
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    parts.append(segment(frame, struct.pack(">BHHB", 8, side, side, 3) + components))
    parts += [segment(0xC4, bytes([table, 1, *[0] * 16])) for table in (0x00, 0x10)]
    for scan in scans:
        tables = b"".join(bytes([number, 0]) for number in scan)
        parts.append(segment(0xDA, bytes([len(scan)]) + tables + b"\0\x3f\0"))
        parts.append(bytes((side // 8) ** 2 * len(scan) // 4))
    return b"".join(parts) + more + b"\xff\xd9"


@pytest.mark.parametrize("scans", [[[1], [2], [3]], [[1, 2], [3]]])
def test_a_jpeg_with_separate_components_has_the_limit_of_progressive_ones(
    scans: list[list[int]],
) -> None:
    """The decoder keeps all coefficients in memory, six bytes a pixel."""
    assert open_picture(jpeg(7072, [[1, 2, 3]])).size == (7072, 7072)
    assert read_picture(jpeg(64, scans)).notes == read_picture(jpeg(64, [[1, 2, 3]])).notes
    with pytest.raises(PayloadTooLarge, match=r"12\.6 million in all"):
        read_picture(jpeg(7072, scans))


@pytest.mark.parametrize("frame", [0xC0, 0xC1])
@pytest.mark.parametrize("filling", [b"", b"\xff", b"\xff\xff"])
def test_a_sequential_jpeg_has_the_larger_limit(frame: int, filling: bytes) -> None:
    """Extended ones too, and with fill bytes before a marker (ITU-T T.81, section B.1.1.2)."""
    data = jpeg(7072, [[1, 2, 3]], frame)
    assert open_picture(data[:2] + filling + data[2:]).size == (7072, 7072)


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    """A scan has only a few bytes, but takes a pass over the picture."""
    table = segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))  # one code: a run of blocks without
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + b"\x7f\xfe"
    begin = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(8)
    few, many = (jpeg(64, [], 0xC2, begin + table + scan * count) for count in (49, 50))
    assert read_picture(few).preprocessing == "dataset"
    with pytest.raises(PayloadTooLarge, match="more than 50 scans"):
        read_picture(many)


@pytest.mark.parametrize("junk", [b"\xff\x00", b"\xff\xd0", b"\xff\xd7"])
def test_junk_hides_no_scans_of_a_jpeg(junk: bytes) -> None:
    """The decoder skips these two bytes; they have no length, and the next marker is none."""
    table = segment(0xC4, bytes([0x10, 1, *[0] * 15, 0xE0]))
    scan = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + b"\x7f\xfe"
    begin = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + bytes(8)
    whole = jpeg(64, [], 0xC2, begin + table + scan * 60)
    quantization, rest = whole[2:71], whole[71:]
    head = whole[:2] + junk + quantization
    looks_baseline = jpeg(64, [[1, 2, 3]])[71:]
    at = 4 + int.from_bytes(quantization[:2], "big")  # where the next marker would be
    comment = segment(0xFE, bytes(at - len(head) - 4) + looks_baseline[:80])
    with pytest.raises(PayloadTooLarge, match="more than 50 scans"):
        read_picture(head + comment + rest)


def test_files_with_very_many_parts_are_refused() -> None:
    whole = encode(GRAY)
    piece = struct.pack(">I", 0) + b"prVt" + struct.pack(">I", zlib.crc32(b"prVt"))
    data = [whole[:33] + piece * count + whole[33:] for count in (1_000, 20_000)]
    assert read_picture(data[0]).notes == ()
    with pytest.raises(InvalidInput, match="too many small parts"):
        read_picture(data[1])


def test_a_gif_with_very_many_parts_gives_its_first_frame() -> None:
    whole = encode(GRAY, "GIF")
    assert whole.endswith(b"\0;")
    assert read_picture(whole[:-2] + b"\1\0" * 100_000 + b"\0;").notes == ()


@pytest.mark.parametrize("compression", [1, 2])
def test_a_run_length_encoded_bmp_is_refused(compression: int) -> None:
    """Pillow decodes them in Python, at half a microsecond a pixel."""
    data = bytearray(encode(GRAY.quantize(16), "BMP"))
    data[30] = compression  # in the header: of 8 or 4 bits a pixel
    with pytest.raises(UnsupportedMediaType, match="run-length"):
        read_picture(bytes(data))


@pytest.mark.parametrize(
    ("format_", "options", "limit"),
    [
        ("WEBP", {"quality": 100, "method": 0}, 4_000_000),
        ("AVIF", {"quality": 95, "speed": 10}, 2_500_000),
        ("JPEG", {"progressive": True}, 6_000_000),
    ],
)
def test_formats_whose_bytes_are_slow_are_limited_in_bytes(
    format_: str, options: dict[str, Any], limit: int
) -> None:
    data = encode(worn(plain()), format_, **options).ljust(limit, b"\0")
    assert open_picture(data).size == (200, 240)
    with pytest.raises(PayloadTooLarge, match=f"bytes; for .* at most {limit:,}, or use another"):
        open_picture(data + b"\0")


def test_other_jpeg_is_not_limited_in_bytes() -> None:
    assert open_picture(encode(GRAY, "JPEG") + bytes(6_000_000)).size == (200, 240)


PEAK = """
import re, sys
from pathlib import Path
from service.pictures.conversion import read_picture
from service.pictures.decoding import configure_pillow
configure_pillow()
data = Path(sys.argv[1]).read_bytes()
read_picture(Path(sys.argv[2]).read_bytes())  # loads the libraries
def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
read_picture(data)
print((status("VmHWM") - before) * 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.parametrize(
    ("format_", "mode", "options"),
    [
        ("PNG", "RGBA", {"compress_level": 1}),
        ("PNG", "LA", {"compress_level": 1}),
        ("PNG", "P", {"compress_level": 1}),
        ("WEBP", "RGBA", {"lossless": True, "method": 0, "quality": 0}),
        ("WEBP", "RGB", {"method": 0, "quality": 0}),
        ("JPEG", "RGB", {"progressive": True, "subsampling": 0, "quality": 20}),
        ("AVIF", "RGBA", {"speed": 10, "quality": 30}),
    ],
)
def test_the_largest_picture_of_a_kind_takes_less_than_150_megabytes(
    tmp_path: Path, format_: str, mode: str, options: dict[str, Any]
) -> None:
    """Measured on smaller pictures, as bytes for each pixel."""
    large, small, size = tmp_path / "large", tmp_path / "small", (2048, 1536)
    noise = Image.effect_noise((256, 256), 60).convert("RGB")
    picture = Image.new("RGB", size)
    for left, top in product(range(0, size[0], 256), range(0, size[1], 256)):
        picture.paste(noise, (left, top))
    picture.putalpha(200 if "A" in mode else 255)
    large.write_bytes(encode(picture.convert(mode), format_, **options))
    small.write_bytes(encode(noise, format_))
    command = [sys.executable, "-c", PEAK, str(large), str(small)]
    peak = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kind = "progressive JPEG" if format_ == "JPEG" else format_
    # PNG's limit counts cost, so gray PNGs may have the most pixels.
    max_pixels = MAX_PIXELS.get(kind, MAX_PNG_COST / 4)
    assert float(peak) / (size[0] * size[1]) * max_pixels < 150e6


SAMPLES = {format_: encode(worn(shaded()), format_) for format_ in FORMATS}


@pytest.mark.parametrize("format_", FORMATS)
def test_a_truncated_file_is_an_error(format_: str) -> None:
    data = SAMPLES[format_]
    with pytest.raises((InvalidInput, UnsupportedMediaType)):
        read_picture(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("preprocessing", ["auto", "none", "dataset"])
@pytest.mark.parametrize(
    "data",
    [png(END), png(END, depth=4), png(END, size=(9, 9), colour=2), png(chunk(b"IDAT"), END)],
    ids=["gray", "4 bits", "colour", "empty"],
)
def test_a_png_without_pixels_is_damaged(data: bytes, preprocessing: Preprocessing) -> None:
    with pytest.raises(InvalidInput):
        read_picture(data, preprocessing)


@pytest.mark.parametrize(
    "brand", [b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"]
)
def test_heic_is_read_if_its_package_is_installed_else_the_error_names_it(brand: bytes) -> None:
    if find_spec("pillow_heif"):
        assert read_picture(encode(worn(plain()), "HEIF")).notes == ()
    else:
        heic = struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1heic" + bytes(100)
        with pytest.raises(UnsupportedMediaType, match="pillow-heif"):
            read_picture(heic)
        with pytest.raises(UnsupportedMediaType, match="known format"):
            read_picture(heic.replace(b"ftyp", b"fxyp"))


def test_a_png_that_does_not_begin_with_its_header_is_damaged() -> None:
    data = encode(GRAY)
    with pytest.raises(InvalidInput, match="header is damaged"):
        read_picture(data[:8] + chunk(b"tEXt", b"a\0b") + data[8:])


@pytest.mark.parametrize("format_", FORMATS)
def test_damaged_files_give_pixels_or_one_of_the_services_errors(format_: str) -> None:
    random = np.random.default_rng(0)
    sound = np.frombuffer(SAMPLES[format_], np.uint8)
    outcomes: set[object] = set()
    for _ in range(60):
        data = sound.copy()
        where = random.integers(0, min(len(data), int(random.choice([64, 512, len(data)]))), 8)
        data[where[: random.integers(1, 9)]] = random.integers(0, 256)
        try:
            decoded = read_picture(data[: random.integers(1, 2 * len(data))].tobytes())
        except ServiceError as error:
            outcomes.add((error.status, str(error)[-1]))
        else:
            outcomes.add((decoded.pixels.shape, decoded.pixels.dtype.name))
    assert len(outcomes) > 1
    assert outcomes <= {(413, "."), (415, "."), (422, "."), ((28, 28), "uint8")}


@pytest.mark.parametrize(
    ("size", "decoded"),
    [
        ((640, 480), (160, 120)),
        ((640, 427), (160, 107)),
        ((1290, 900), (162, 113)),
        ((600, 400), (600, 400)),
        ((1000, 750), (500, 375)),
        ((4000, 3000), (500, 375)),
    ],
)
def test_a_jpeg_is_decoded_at_the_size_asked_for_or_at_twice_that_or_more(
    size: tuple[int, int], decoded: tuple[int, int]
) -> None:
    image = open_picture(encode(Image.new("RGB", size), "JPEG"))
    assert max(reduced(image, 160).size) == 160
    assert image.size == decoded
