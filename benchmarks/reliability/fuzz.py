"""A million inputs for the decoders of pictures, bodies and tensors: pixels, or our errors.

If atheris is installed, it chooses the inputs by the coverage of the Python code, the service's and
Pillow's. Otherwise they are mutations of valid files. Separate processes try them, so that a crash
or a hang ends only one process; inputs that fail are saved.
"""

import hashlib
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FunctionType
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.load import BenchmarkError
from benchmarks.reliability.report import Options, Row
from benchmarks.reliability.traffic import BOUNDARY, form
from benchmarks.serving import binary_head, open_inference_json, plain_json, png
from service.errors import ServiceError
from service.pictures.conversion import read_picture
from service.pictures.decoding import configure_pillow
from service.routes.bodies import read_body
from service.routes.tensors import decode
from tests.service.pictures.drawings import encode, shaded, worn

LIMIT_SECONDS = 2.0  # processor time of an input
STUCK_SECONDS = 60.0  # wall-clock time of an input
GUIDED = find_spec("atheris") is not None
SHAPE = (28, 28)
MAX_BYTES = 65_536  # of an input
LENGTH_BYTES = 4  # an input of binary tensors begins with the length of its JSON
EDGES = np.array([0, 1, 0x7F, 0x80, 0xFE, 0xFF, 0x22, 0x2C, 0x5B, 0x7B], np.uint8)


def run(options: Options) -> list[Row]:
    """Try the inputs in as many processes as there are cores."""
    count = options.count(1_000_000, 400)
    lanes = 1 if options.quick else os.cpu_count() or 1
    shares = [count * (lane + 1) // lanes - count * lane // lanes for lane in range(lanes)]
    with ThreadPoolExecutor(lanes) as pool:
        found = [*pool.map(lambda lane: hunt(options, lane, shares[lane]), range(lanes))]
    how = "guided by coverage (atheris)" if GUIDED else "mutations of valid files"
    return [
        Row("inputs", f"{count:,}, {how}"),
        Row.at_most("crashes, hangs and exceptions that are not ours", sum(n for n, _ in found), 0),
        Row.at_most(
            "processor time of the slowest input", max(s for _, s in found), LIMIT_SECONDS, " s"
        ),
    ]


def hunt(
    options: Options,
    seed: int,
    count: int,
    attempt_all: Callable[..., None] | None = None,
    stuck_seconds: float = STUCK_SECONDS,
) -> tuple[int, float]:
    """Try inputs in a separate process; start another if it crashes or hangs.

    Args:
        options: has the folder for inputs that fail.
        seed: decides the mutations.
        count: the number of inputs.
        attempt_all: tries the inputs, in the process.
        stuck_seconds: an input that takes longer counts as a hang.

    Returns:
        the number of failures, and the seconds of the slowest input.
    """
    context = multiprocessing.get_context("spawn")
    done, failed, slowest = (context.Value(kind, 0) for kind in "qqd")
    with TemporaryDirectory() as folder:
        current = Path(folder) / "input"
        while done.value < count:
            arguments = (options, seed, count, current, done, failed, slowest)
            process = context.Process(target=attempt_all or _try_all, args=arguments)
            current.unlink(missing_ok=True)
            process.start()
            before = -1
            while process.is_alive():
                process.join(stuck_seconds)
                if done.value == before:
                    process.kill()
                elif current.exists():  # the process has started
                    before = done.value
            if done.value < count:  # the process crashed, or was killed
                if not current.exists():
                    raise BenchmarkError("the process that tries inputs does not start")
                done.value += 1
                failed.value += 1
                keep(options, current.read_bytes())
    return failed.value, slowest.value


def _try_all(
    options: Options,
    seed: int,
    count: int,
    current: Path,
    done: "Synchronized[int]",
    failed: "Synchronized[int]",
    slowest: "Synchronized[float]",
) -> None:
    """Try the remaining inputs."""
    configure_pillow()
    logging.disable()
    file = os.open(current, os.O_RDWR | os.O_CREAT)

    def one(data: bytes) -> None:
        os.ftruncate(file, 0)
        os.pwrite(file, data, 0)
        error, seconds = attempt(data)
        slowest.value = max(slowest.value, seconds)
        if error or seconds > LIMIT_SECONDS:
            failed.value += 1
            keep(options, data, error)
        done.value += 1

    if GUIDED:
        _guided(one, count - done.value, seed + done.value)  # does not return
    valid = seeds()
    for index in range(done.value, count):
        one(mutated(valid, np.random.default_rng([seed, index])))


def _guided(one: Callable[[bytes], None], count: int, seed: int) -> None:
    """Let libFuzzer choose the inputs; it ends the process."""
    atheris: Any = __import__("atheris")
    for function in _functions():
        atheris.instrument_func(function)
    with TemporaryDirectory() as corpus:
        for index, data in enumerate(seeds()):
            (Path(corpus) / str(index)).write_bytes(data)
        switches = [f"-runs={count}", f"-seed={seed + 1}", f"-max_len={MAX_BYTES}", "-verbosity=0"]
        atheris.Setup(["fuzz", *switches, corpus], one)
        atheris.Fuzz()


def _functions() -> Iterator[FunctionType]:
    """Yield the functions whose coverage guides: the service's and Pillow's own."""
    for name, module in [*sys.modules.items()]:
        if name.startswith(("service.", "PIL.")):
            for value in [*vars(module).values()]:
                members = [*vars(value).values()] if isinstance(value, type) else [value]
                for one in members:
                    if isinstance(one, FunctionType) and one.__module__ == name:
                        yield one


def attempt(data: bytes) -> tuple[str, float]:
    """Try one input.

    Args:
        data: the first byte is the kind of input, the rest its content.

    Returns:
        the exception, if it is not ours, else an empty text; and the seconds of processor time.
    """
    begin, error = time.process_time(), ""
    try:
        read(data)
    except ServiceError:
        pass
    except Exception as exc:  # any other exception is a finding
        error = repr(exc)
    return error, time.process_time() - begin


def read(data: bytes) -> None:
    """Read an input as the service does.

    Raises:
        ServiceError: it is refused.
        ValueError: it is taken, and is not one image, or a batch of them.
    """
    kind, body = data[:1], data[1:]
    if kind in b"PA":
        image = read_picture(body, "auto" if kind == b"A" else "none")
        shape, dtype = image.pixels.shape, image.pixels.dtype
    elif kind == b"J":
        document = read_body(b"application/json", body)
        if isinstance(document, bytes):
            raise ValueError("JSON gave a file")
        shape, dtype = document.images.shape[2:], document.images.dtype
    elif kind == b"F":
        file = read_body(f"multipart/form-data; boundary={BOUNDARY}".encode(), body)
        shape, dtype = SHAPE, np.dtype(np.uint8)
        if not isinstance(file, bytes):
            raise ValueError("a form gave no file")
    else:
        length, rest = (None, body) if kind == b"T" else (body[:LENGTH_BYTES], body[LENGTH_BYTES:])
        tensor = decode(rest, length).pixels
        shape, dtype = tensor.shape[2:], tensor.dtype
    if shape != SHAPE or dtype != np.uint8:
        raise ValueError(f"{dtype} {shape} was read")


def seeds() -> list[bytes]:
    """Return valid inputs of all kinds."""
    image = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    small = worn(shaded()).resize((50, 60))
    colours = small.quantize(16)
    see_through = small.convert("RGBA")
    see_through.putalpha(Image.fromarray(np.tile(np.arange(50, dtype=np.uint8) * 5, (60, 1))))
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures = [
        png(image),
        encode(colours, transparency=3),
        encode(see_through),
        encode(Image.fromarray(np.arange(1680, dtype=np.uint16).reshape(40, 42))),
        encode(small, "JPEG", exif=exif),
        encode(small, "JPEG", progressive=True),
        encode(small.convert("CMYK"), "JPEG"),
        encode(small, "WEBP", quality=50),
        encode(see_through, "WEBP", lossless=True),
        encode(colours, "GIF", save_all=True, append_images=[colours.rotate(90)]),
        encode(small, "BMP"),
        encode(small, "AVIF"),
    ]
    head, text = binary_head(), open_inference_json(image)
    return [
        *(kind + picture for picture in pictures for kind in (b"A", b"P")),
        b"J" + plain_json(image),
        b"J" + plain_json(image.reshape(1, -1)[0]),
        b"F" + form(png(image)).partition(b"\r\n\r\n")[2],
        b"T" + text,
        b"T" + text.replace(b"UINT8", b"FP32"),
        b"B" + b"%04d" % len(head) + head + image.tobytes(),
        b"B" + b"0000" + image.tobytes(),
    ]


def mutated(valid: list[bytes], random: np.random.Generator) -> bytes:
    """Return a valid input, changed in one to eight places; its first byte stays."""
    data = valid[random.integers(len(valid))]
    head, values = data[:1], np.frombuffer(data[1:], np.uint8)
    for _ in range(random.integers(1, 9)):
        values = _changed(values, valid, random)
    return head + values[:MAX_BYTES].tobytes()


def _changed(values: Any, valid: list[bytes], random: np.random.Generator) -> Any:
    """Change one place: headers, which begin a file, as often as all the rest."""
    size = len(values)
    most = size if random.random() < 0.5 else min(size, 200)
    at = int(random.integers(most + 1))
    end = min(size, at + int(random.choice((1, 1, 2, 4, 16, 64))))
    piece = values[at:end]
    match random.integers(7):
        case 0:  # bits
            piece = piece ^ np.uint8(1 << random.integers(8))
        case 1:
            piece = random.integers(0, 256, end - at, np.uint8)
        case 2:
            piece = random.choice(EDGES, end - at)
        case 3:  # twice
            piece = np.concatenate([piece, piece])
        case 4:  # left out
            piece = piece[:0]
        case 5:  # something of another file
            other = np.frombuffer(valid[random.integers(len(valid))], np.uint8)
            start = int(random.integers(len(other)))
            piece = other[start : start + 64]
        case _:  # cut short, one time in three
            end = size if random.random() < 1 / 3 else end
    return np.concatenate([values[:at], piece, values[end:]])


def keep(options: Options, data: bytes, error: str = "crash or hang") -> None:
    """Save an input that failed, and why."""
    name = f"fuzz-{hashlib.sha256(data).hexdigest()[:12]}"
    options.save(f"{name}.bin", data)
    options.save(f"{name}.txt", error.encode())
