"""The Open Inference Protocol's messages: bytes to pixels, probabilities to bytes. Knows no HTTP.

Everything the protocol says to ignore is ignored, and null stands for an absent field, as some
clients send it. What could only be answered wrongly is refused.
"""

from array import array
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from service.errors import BadRequest, PayloadTooLarge
from service.model.artefact import CLASSES, IMAGE_SIZE, INPUT, OUTPUT, ModelInfo

Json = dict[str, Any]
Kind = TypeVar("Kind")

MAX_BATCH_SIZE = 256
IMAGE_SHAPE = INPUT[2]
CLASS_IDS = range(CLASSES)
MAX_JSON_BYTES = 2**22  # the largest batch with 20 bytes for a number and its white space
MAX_JSON_BRACKETS = 2**14  # twice those of the largest batch; each takes as long as 40 numbers
FP32 = np.dtype("<f4")
NOT_PIXELS = (
    "Pixels must be whole numbers from 0 to 255 in either datatype, as in the data set (not scaled"
    " to 0..1)."
)
KINDS: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a whole number",
}


class InferenceRequest(NamedTuple):
    """What is to be classified, and how it is to be answered.

    Attributes:
        pixels: uint8 [n, 1, 28, 28], n from 1 to 256.
        id: to be echoed, if there is one.
        binary: the output follows the JSON as bytes.
        classification: answer this many classes for each image; 0: answer the probabilities.
    """

    pixels: NDArray[np.uint8]
    id: str | None = None
    binary: bool = False
    classification: int = 0


def decode(body: bytes, json_length: bytes | None = None) -> InferenceRequest:
    """Read an inference request.

    Args:
        body: JSON, with or without binary tensors after it; or one image's bytes alone.
        json_length: the header field `Inference-Header-Content-Length`, 0 for the bytes alone.

    Raises:
        BadRequest: the request is damaged, or not for this model.
        PayloadTooLarge: the JSON is longer than any sound request.
    """
    text, tail = body, b""
    if json_length is not None:
        # Nine digits are more than any body has, and few enough for `int`.
        if not (json_length.isdigit() and len(json_length) < 10 and int(json_length) <= len(body)):
            raise _invalid(
                "Inference-Header-Content-Length must be the length of the JSON that begins the"
                " body, or 0."
            )
        text, tail = body[: int(json_length)], body[int(json_length) :]
        if not text:
            if len(tail) != IMAGE_SIZE:
                raise _invalid(
                    f"A body that is one raw tensor must be {IMAGE_SIZE} bytes, one a pixel."
                )
            image = np.frombuffer(tail, np.uint8).reshape(1, *IMAGE_SHAPE)
            return InferenceRequest(image, binary=True)
    document = _document(text)
    parameters = _optional(document, "parameters", dict) or {}
    binary = _optional(parameters, "binary_data_output", bool) or False
    classification = 0
    outputs = _optional(document, "outputs", list)
    if outputs:
        wanted = _only(outputs, "output", OUTPUT[0])
        own = _optional(wanted, "binary_data", bool)
        binary = binary if own is None else own
        classification = _optional(wanted, "classification", int) or 0
        if classification < 0:
            raise _invalid("The parameter `classification` must be the number of classes wanted.")
    inputs = _optional(document, "inputs", list) or []
    pixels = _pixels(inputs, _only(inputs, "input", INPUT[0]), text, tail)
    return InferenceRequest(pixels, _optional(document, "id", str), binary, classification)


def encode(
    model: ModelInfo, request: InferenceRequest, probabilities: NDArray[np.float32]
) -> tuple[bytes, int | None]:
    """Write the answer to a request.

    Args:
        model: what answers.
        request: what was asked.
        probabilities: float32 [n, 10].

    Returns:
        the body; and the length of the JSON that begins it, if binary data follows.
    """
    shape, datatype = probabilities.shape, "FP32"
    values: list[Any] = []
    if request.classification:
        # Sorting is stable, so of equally probable classes the lower id comes first.
        for row in probabilities.tolist():
            order = sorted(CLASS_IDS, key=row.__getitem__, reverse=True)
            best = order[: request.classification]
            values += [f"{row[i]}:{i}:{model.classes[i]}" for i in best]
        shape, datatype = (len(probabilities), len(best)), "BYTES"
    elif not request.binary:
        # Python floats: their JSON reads back as the very float32 bits, whatever the width.
        values = probabilities.ravel().tolist()
    output: Json = {"name": OUTPUT[0], "datatype": datatype, "shape": shape}
    answer: Json = {"model_name": model.name, "model_version": model.version, "outputs": [output]}
    if request.id is not None:
        answer["id"] = request.id
    if not request.binary:
        output["data"] = values
        return orjson.dumps(answer), None
    if request.classification:
        encoded = [text.encode() for text in values]
        tail = b"".join(len(text).to_bytes(4, "little") + text for text in encoded)
    else:
        tail = probabilities.astype(FP32, copy=False).tobytes()
    output["parameters"] = {"binary_data_size": len(tail)}
    text = orjson.dumps(answer)
    return text + tail, len(text)


def _document(text: bytes) -> Json:
    if len(text) > MAX_JSON_BYTES:
        raise PayloadTooLarge(f"Send at most {MAX_JSON_BYTES:,} bytes of JSON.")
    if text.count(b"[") + text.count(b"{") > MAX_JSON_BRACKETS:
        raise _invalid(f"Send at most {MAX_JSON_BRACKETS:,} arrays and objects.")
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise BadRequest("The request is not valid JSON.", code="malformed_json") from None
    if type(document) is not dict:
        raise _invalid("The request must be a JSON object with `inputs`.")
    return document


def _only(tensors: list[Any], what: str, name: str) -> Json:
    """Check that the list names the model's one tensor, once; return its parameters."""
    if len(tensors) != 1 or type(tensors[0]) is not dict or tensors[0].get("name") != name:
        raise _invalid(f"The model has one {what}, `{name}`; name it once, and no other.")
    parameters = _optional(tensors[0], "parameters", dict) or {}
    if "shared_memory_region" in parameters:
        raise _invalid("Shared memory is not supported; send tensors in the body.")
    return parameters


def _pixels(inputs: list[Json], parameters: Json, text: bytes, tail: bytes) -> NDArray[np.uint8]:
    tensor = inputs[0]
    shape = _optional(tensor, "shape", list) or []
    if (
        set(map(type, shape)) != {int}  # true and 1.0 are equal to 1
        or shape[1:] != IMAGE_SHAPE
        or not 1 <= shape[0] <= MAX_BATCH_SIZE
    ):
        raise _invalid(f"The shape must be [n, 1, 28, 28], n from 1 to {MAX_BATCH_SIZE}.")
    datatype = tensor.get("datatype")
    if datatype not in ("UINT8", "FP32"):
        raise _invalid("The datatype must be UINT8, or FP32 with whole numbers from 0 to 255.")
    count = shape[0] * IMAGE_SIZE
    data = _optional(tensor, "data", list)
    size = _optional(parameters, "binary_data_size", int)
    if (data is None) == (size is None):
        raise _invalid("Send the values as `data`, or after the JSON and their `binary_data_size`.")
    if len(tail) != (size or 0):
        raise _invalid(
            f"After the JSON come {len(tail)} bytes; its `binary_data_size` says {size or 0}."
        )
    if data is None:
        if size != count * (1 if datatype == "UINT8" else FP32.itemsize):
            raise _invalid(f"{size} bytes are not the {count} values that the shape says.")
        if datatype == "UINT8":
            return np.frombuffer(tail, np.uint8).reshape(shape)
        return _whole(np.frombuffer(tail, FP32)).reshape(shape)
    flat = _flatten(data)
    if len(flat) != count:
        raise _invalid(f"There are {len(flat)} values, but the shape says {count}.")
    # Searching the text first takes a fraction of looking at every type.
    if (b"true" in text or b"false" in text) and bool in map(type, flat):
        raise _invalid("The values must be numbers, not true and false.")
    if datatype == "UINT8":
        try:
            return np.frombuffer(bytes(flat), np.uint8).reshape(shape)  # checks all, in C
        except TypeError:  # clients made from the protocol's own file send 0 as 0.0
            pass
        except ValueError:
            raise _invalid(NOT_PIXELS) from None
    try:
        numbers = np.frombuffer(array("d", flat))
    except TypeError:
        raise _invalid(NOT_PIXELS) from None
    return _whole(numbers).reshape(shape)


def _flatten(data: list[Any]) -> list[Any]:
    """Undo any regular nesting, row by row."""
    while data and type(data[0]) is list:
        if set(map(type, data)) != {list} or len(set(map(len, data))) != 1:
            raise _invalid("`data` must be flat, or nested with rows of equal length.")
        data = list(chain.from_iterable(data))
    return data


def _whole(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Convert numbers that are pixels; a NaN fails every comparison."""
    if values.min() >= 0 and values.max() <= 255:
        pixels = values.astype(np.uint8)
        if (pixels == values).all():
            return pixels
    raise _invalid(NOT_PIXELS)


def _optional(holder: Json, name: str, kind: type[Kind]) -> Kind | None:
    """Return a field of the right JSON type, or None if it is absent or null."""
    value = holder.get(name)
    if value is not None and type(value) is not kind:
        raise _invalid(f"`{name}` must be {KINDS[kind]}.")
    return value


def _invalid(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_input")
