"""Reads and writes the Open Inference Protocol's messages: bytes to pixels, probabilities to bytes.

Fields that the protocol says to ignore are ignored. Some clients send null for an absent field;
both mean the same. A request that the model could only answer wrongly is refused.
"""

from array import array
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeVar

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
MAX_JSON_BYTES = 2**22  # the largest batch, with 20 bytes for a number and its white space
# Twice as many as the largest batch has; a bracket takes as long as 40 numbers.
MAX_JSON_BRACKETS = 2**14
FP32 = np.dtype("<f4")
NOT_PIXELS = (
    "Pixels must be whole numbers from 0 to 255 in both datatypes, as in the data set; do not"
    " scale them to 0..1."
)
KINDS: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a whole number",
}


class InferenceRequest(NamedTuple):
    """The images to classify, and the form of the answer.

    Attributes:
        pixels: uint8 [n, 1, 28, 28], n from 1 to 256.
        id: the request's id, for the answer; None for none.
        binary: answer with binary data after the JSON.
        classification: the number of classes to list for each image; 0: answer the probabilities.
        preprocessing: "dataset" for pixels of a converted picture, as `POST /predict` names it.
    """

    pixels: NDArray[np.uint8]
    id: str | None = None
    binary: bool = False
    classification: int = 0
    preprocessing: Literal["none", "dataset"] = "none"


def decode(body: bytes, json_length: bytes | None = None) -> InferenceRequest:
    """Read an inference request.

    Args:
        body: JSON, with or without binary data after it; or only the bytes of one image.
        json_length: the header field `Inference-Header-Content-Length`; 0 for only bytes.

    Raises:
        BadRequest: the request is malformed, or does not fit the model.
        PayloadTooLarge: the JSON is longer than MAX_JSON_BYTES.
    """
    text, tail = body, b""
    if json_length is not None:
        # No body's length has more than nine digits; `int` is slow for very many.
        if not (json_length.isdigit() and len(json_length) < 10 and int(json_length) <= len(body)):
            raise _invalid(
                "Inference-Header-Content-Length must be the length of the JSON at the start of"
                " the body, or 0."
            )
        text, tail = body[: int(json_length)], body[int(json_length) :]
        if not text:
            if len(tail) != IMAGE_SIZE:
                raise _invalid(
                    f"A body without JSON must have {IMAGE_SIZE} bytes, one for each pixel."
                )
            image = np.frombuffer(tail, np.uint8).reshape(1, *IMAGE_SHAPE)
            return InferenceRequest(image, binary=True)
    document = _parsed(text)
    parameters = _optional(document, "parameters", dict) or {}
    binary = _optional(parameters, "binary_data_output", bool) or False
    preprocessing = _optional(parameters, "preprocessing", str) or "none"
    if preprocessing not in ("none", "dataset"):
        raise _invalid("The parameter `preprocessing` must be none or dataset.")
    classification = 0
    outputs = _optional(document, "outputs", list)
    if outputs:
        wanted = _only_tensor(outputs, "output", OUTPUT[0])
        own = _optional(wanted, "binary_data", bool)
        binary = binary if own is None else own
        classification = _optional(wanted, "classification", int) or 0
        if classification < 0:
            raise _invalid("The parameter `classification` must be a number of classes, or 0.")
    inputs = _optional(document, "inputs", list) or []
    pixels = _pixels(inputs, _only_tensor(inputs, "input", INPUT[0]), text, tail)
    id_ = _optional(document, "id", str)
    converted: Literal["none", "dataset"] = "dataset" if preprocessing == "dataset" else "none"
    return InferenceRequest(pixels, id_, binary, classification, converted)


def encode(
    model: ModelInfo, request: InferenceRequest, probabilities: NDArray[np.float32]
) -> tuple[bytes, int | None]:
    """Write the answer to a request.

    Args:
        model: the model that answers.
        request: the request.
        probabilities: float32 [n, 10].

    Returns:
        the body; and the length of its JSON if binary data follows, else None.
    """
    shape, datatype = probabilities.shape, "FP32"
    values: list[Any] = []
    if request.classification:
        # Sorting is stable: of equally probable classes, the lower id comes first.
        for row in probabilities.tolist():
            order = sorted(CLASS_IDS, key=row.__getitem__, reverse=True)
            best = order[: request.classification]
            values += [f"{row[i]}:{i}:{model.classes[i]}" for i in best]
        shape, datatype = (len(probabilities), len(best)), "BYTES"
    elif not request.binary:
        # Python floats: JSON then carries the exact float32 values.
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


def _parsed(text: bytes) -> Json:
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


def _only_tensor(tensors: list[Any], what: str, name: str) -> Json:
    """Check that the list has the model's only tensor, once; return its parameters."""
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
        set(map(type, shape)) != {int}  # True == 1.0 == 1
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
        raise _invalid(
            "Send the values as `data`; or as binary data after the JSON, with `binary_data_size`."
        )
    if len(tail) != (size or 0):
        raise _invalid(
            f"After the JSON come {len(tail)} bytes, but `binary_data_size` is {size or 0}."
        )
    if data is None:
        if size != count * (1 if datatype == "UINT8" else FP32.itemsize):
            raise _invalid(
                f"The shape needs {count} values of {datatype}; {size} bytes do not match it."
            )
        if datatype == "UINT8":
            return np.frombuffer(tail, np.uint8).reshape(shape)
        return _to_pixels(np.frombuffer(tail, FP32)).reshape(shape)
    flat = _flatten(data)
    if len(flat) != count:
        raise _invalid(f"The shape needs {count} values; `data` has {len(flat)}.")
    # Searching the text first is faster than checking every type.
    if (b"true" in text or b"false" in text) and bool in map(type, flat):
        raise _invalid("The values must be numbers, not true and false.")
    if datatype == "UINT8":
        try:
            return np.frombuffer(bytes(flat), np.uint8).reshape(shape)  # checks every value, in C
        except TypeError:  # clients generated from the protocol send 0 as 0.0
            pass
        except ValueError:
            raise _invalid(NOT_PIXELS) from None
    try:
        numbers = np.frombuffer(array("d", flat))
    except TypeError:
        raise _invalid(NOT_PIXELS) from None
    return _to_pixels(numbers).reshape(shape)


def _flatten(data: list[Any]) -> list[Any]:
    """Return regularly nested data as one flat list, row by row."""
    while data and type(data[0]) is list:
        if set(map(type, data)) != {list} or len(set(map(len, data))) != 1:
            raise _invalid("`data` must be flat, or nested in rows of equal length.")
        data = list(chain.from_iterable(data))
    return data


def _to_pixels(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Convert numbers to pixels, or refuse them; NaN fails every comparison."""
    if values.min() >= 0 and values.max() <= 255:
        pixels = values.astype(np.uint8)
        if (pixels == values).all():
            return pixels
    raise _invalid(NOT_PIXELS)


def _optional(holder: Json, name: str, kind: type[Kind]) -> Kind | None:
    """Return a field, or None if it is absent or null; refuse a wrong JSON type."""
    value = holder.get(name)
    if value is not None and type(value) is not kind:
        raise _invalid(f"`{name}` must be {KINDS[kind]}.")
    return value


def _invalid(message: str) -> BadRequest:
    return BadRequest(message, code="invalid_input")
