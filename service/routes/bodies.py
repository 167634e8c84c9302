"""Reads the four forms of body that `POST /predict` takes: bytes, JSON, picture, form."""

import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray
from python_multipart import create_form_parser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field as FormField
from python_multipart.multipart import File, parse_options_header

from service.errors import BadRequest, InvalidInput, UnsupportedMediaType
from service.pictures.conversion import ModelInput

SIDE = 28
SIZE = SIDE * SIDE
MAX_DELIMITERS = 100  # of a form, which needs two; its parser is slow at delimiters
MAX_CONTENT_TYPE_BYTES = 1024  # of a form; its parser takes 40 ms for 32 KB of parameters
# Body limits by media type, in bytes. For pictures and forms, only the service's own limit counts.
# Raw pixels need 784 bytes; with a limit of 1024, the error can say how many bytes came.
MAX_BYTES = {
    b"application/octet-stream": 1024,
    b"application/json": 2**18,  # ten times the space for 784 numbers in any layout
    b"multipart/form-data": sys.maxsize,
}


def body_limit(headers: Mapping[bytes, bytes]) -> int:
    """Return the body limit of a request with these header fields, in bytes.

    Raises:
        UnsupportedMediaType: the service does not take this media type.
    """
    media_type = _media_type(headers.get(b"content-type", b""))
    if media_type.startswith(b"image/"):
        return sys.maxsize
    try:
        return MAX_BYTES[media_type]
    except KeyError:
        raise UnsupportedMediaType(
            "Set Content-Type to application/json, application/octet-stream, image/png (or another"
            " picture format), or multipart/form-data."
        ) from None


def read_body(content_type: bytes, body: bytes) -> ModelInput | bytes:
    """Return a body's pixels, or the file of a picture that is still to be read.

    Args:
        content_type: one that `body_limit` accepts.
        body: the whole body, without its content encoding.

    Raises:
        BadRequest: the body is malformed.
        InvalidInput: the body is not one image.
    """
    media_type = _media_type(content_type)
    if media_type == b"application/octet-stream":
        pixels = _from_bytes(body)
    elif media_type == b"application/json":
        pixels = _from_json(body)
    elif media_type == b"multipart/form-data":
        return _from_form(content_type, body)
    else:
        return body
    return ModelInput(pixels, "none")  # the model takes pixels as they are


@lru_cache(64)
def _media_type(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()


def _from_bytes(body: bytes) -> NDArray[np.uint8]:
    if len(body) != SIZE:
        raise InvalidInput(
            f"Send exactly {SIZE} bytes, one for each pixel; the body has {len(body)}."
        )
    return np.frombuffer(body, np.uint8)


def _from_json(body: bytes) -> NDArray[np.uint8]:
    """Read 28 rows of 28 whole numbers, or a flat list of 784."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("The body is not valid JSON.", code="malformed_json") from None
    pixels = document.get("pixels") if isinstance(document, dict) else None
    try:
        if not isinstance(pixels, list) or len(pixels) not in (SIDE, SIZE):
            raise ValueError
        try:
            flat = _flat(pixels, body)
        except TypeError:  # generated clients may send 0 as 0.0
            flat = _flat(_integers(pixels), body)
    except (TypeError, ValueError):
        raise InvalidInput(
            'Send {"pixels": …} with 28 rows of 28 whole numbers from 0 to 255, or a list of 784.'
        ) from None
    return np.frombuffer(flat, np.uint8)


def _flat(pixels: list[Any], body: bytes) -> bytes:
    """Return the pixels' bytes.

    `bytes` checks in C that all values are integers from 0 to 255. It also accepts booleans, a
    single count, and other iterables; these are checked here.

    Raises:
        TypeError, ValueError: the values are not 784 integers from 0 to 255.
    """
    if len(pixels) == SIDE and set(map(type, pixels)) == {list}:
        if set(map(len, pixels)) != {SIDE}:
            raise ValueError
        flat = b"".join(map(bytes, pixels))
        # Searching for letters of `true` and `false` is faster than checking 784 types.
        booleans = (b"t" in body or b"f" in body) and any(bool in map(type, r) for r in pixels)
    else:
        flat = bytes(pixels)
        booleans = (b"t" in body or b"f" in body) and bool in map(type, pixels)
    if booleans or len(flat) != SIZE:
        raise ValueError
    return flat


def _integers(values: list[Any]) -> list[Any]:
    """Return numbers, or rows of numbers, with whole floats turned into integers."""
    return [[*map(_integer, value)] if type(value) is list else _integer(value) for value in values]


def _integer(value: Any) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def _from_form(content_type: bytes, body: bytes) -> bytes:
    parts: list[File] = []
    one_file = InvalidInput("Send one file in the form, in the field `image`, and no other field.")

    def keep(part: File | FormField) -> None:
        if parts or not isinstance(part, File) or part.field_name != b"image":
            raise one_file
        parts.append(part)

    damaged = BadRequest(
        "The form is damaged, or Content-Type lacks its boundary.", code="malformed_form"
    )
    if len(content_type) > MAX_CONTENT_TYPE_BYTES:
        raise damaged
    _, options = parse_options_header(content_type)
    if body.count(b"\r\n--" + options.get(b"boundary", b"")) > MAX_DELIMITERS:
        raise one_file

    headers = {"Content-Type": content_type}
    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    try:
        parser = create_form_parser(headers, keep, keep, config=in_memory)
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError):
        raise damaged from None
    if not parts:
        raise InvalidInput("Send one file in the form, in the field `image`.")
    file = parts[0].file_object
    file.seek(0)
    return file.read()
