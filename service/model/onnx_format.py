"""Parses an ONNX file as the export writes it, and refuses all other content.

The service does not import `onnx`, and ONNX Runtime accepts far more than this project's files
have: external data, subgraphs, functions. Here any field outside the schema is an error, and no
schema contains itself. So the depth is bounded, and the time grows with the size alone.

Wire format: https://protobuf.dev/programming-guides/encoding/; messages:
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from collections.abc import Iterator
from typing import Any

Schema = dict[int, tuple[str, Any]]
"""Field number: (name, kind). A kind is `int` (a varint), `str`, `bytes` or another schema. In a
list, it is a repeated field."""

Message = dict[str, Any]
"""All fields of a schema by name. An absent field is None, or [] if it is a repeated one."""

VALUE_INFO: Schema = {
    1: ("name", str),
    2: (
        "type",
        {
            1: (
                "tensor_type",
                {
                    1: ("elem_type", int),
                    2: ("shape", {1: ("dim", [{1: ("dim_value", int), 2: ("dim_param", str)}])}),
                },
            )
        },
    ),
}
TENSOR: Schema = {
    1: ("dims", [int]),
    2: ("data_type", int),
    8: ("name", str),
    9: ("raw_data", bytes),
}
ATTRIBUTE: Schema = {1: ("name", str), 3: ("i", int), 8: ("ints", [int]), 20: ("type", int)}
NODE: Schema = {
    1: ("input", [str]),
    2: ("output", [str]),
    3: ("name", str),
    4: ("op_type", str),
    5: ("attribute", [ATTRIBUTE]),
}
GRAPH: Schema = {
    1: ("node", [NODE]),
    2: ("name", str),
    5: ("initializer", [TENSOR]),
    11: ("input", [VALUE_INFO]),
    12: ("output", [VALUE_INFO]),
}
MODEL: Schema = {
    1: ("ir_version", int),
    2: ("producer_name", str),
    7: ("graph", GRAPH),
    8: ("opset_import", [{1: ("domain", str), 2: ("version", int)}]),
    14: ("metadata_props", [{1: ("key", str), 2: ("value", str)}]),
}
MAX_VARINT_BYTES = 10  # 64 bits, 7 in a byte


class FormatError(Exception):
    """The bytes are not a message of the schema; the error's text is a clause that says why."""


def parse(data: bytes, schema: Schema = MODEL) -> Message:
    """Parse one message.

    Args:
        data: the whole message.
        schema: the fields that it may have.

    Raises:
        FormatError: the bytes are damaged; or a field is not in the schema, has another type, or
            occurs twice and is not a repeated one.
    """
    message: Message = {
        name: [] if isinstance(kind, list) else None for name, kind in schema.values()
    }
    for number, value in _fields(data):
        name, kind = schema.get(number, (f"field {number}", None))
        one = kind[0] if isinstance(kind, list) else kind
        if one is None or isinstance(value, int) != (one is int):
            raise FormatError(f"{name} is not what the export writes")
        content = _content(value, one) if isinstance(value, bytes) else value
        if isinstance(kind, list):
            message[name].append(content)
        elif message[name] is None:
            message[name] = content
        else:
            raise FormatError(f"{name} occurs twice")
    return message


def _content(value: bytes, kind: Any) -> bytes | str | Message:
    if kind is bytes:
        return value
    if kind is not str:
        return parse(value, kind)
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise FormatError("a text is not UTF-8") from None


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field, in the order of the bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        value, position = _varint(data, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            yield number, value
        elif wire_type == 2 and value <= len(data) - position:  # a length, then the bytes
            yield number, data[position : position + value]
            position += value
        else:
            raise FormatError("its messages are damaged")


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the unsigned integer at a position, and the position after it."""
    value = 0
    for index, byte in enumerate(data[position : position + MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise FormatError("its messages are damaged")
