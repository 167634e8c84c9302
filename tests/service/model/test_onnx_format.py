"""The parser agrees with `onnx`, and refuses what the export never writes."""

import random
from pathlib import Path

import onnx
import pytest

from service.model.onnx_format import FormatError, Message, Schema, parse

PAIR: Schema = {
    1: ("number", int),
    2: ("text", str),
    3: ("many", [int]),
    4: ("inner", {1: ("b", bytes)}),
}


def test_it_reads_what_onnx_reads(artefact: Path) -> None:
    expected = onnx.load(artefact)
    model = parse(artefact.read_bytes())
    assert model["ir_version"] == expected.ir_version
    assert model["opset_import"] == [{"domain": "", "version": 20}]
    assert {e["key"]: e["value"] for e in model["metadata_props"]} == {
        e.key: e.value for e in expected.metadata_props
    }
    for node, other in zip(model["graph"]["node"], expected.graph.node, strict=True):
        assert node["op_type"] == other.op_type
        assert node["input"] == other.input
        assert node["output"] == other.output
        given = {a["name"]: a["ints"] or a["i"] for a in node["attribute"]}
        assert given == {a.name: onnx.helper.get_attribute_value(a) for a in other.attribute}
    for tensor, weights in zip(
        model["graph"]["initializer"], expected.graph.initializer, strict=True
    ):
        assert tensor["name"] == weights.name
        assert tensor["dims"] == weights.dims
        assert tensor["raw_data"] == weights.raw_data
    (dims,) = (v["type"]["tensor_type"]["shape"]["dim"] for v in model["graph"]["input"])
    assert [d["dim_param"] or d["dim_value"] for d in dims] == ["batch", 1, 28, 28]


def test_absent_fields_are_none_and_absent_lists_empty() -> None:
    assert parse(b"", PAIR) == {"number": None, "text": None, "many": [], "inner": None}


def test_numbers_of_every_length_are_read() -> None:
    for number in (0, 1, 127, 128, 300, 2**31, 2**63, 2**64 - 1):
        tensor = onnx.TensorProto(dims=[number - 2**64 if number >= 2**63 else number])
        assert parse(tensor.SerializeToString(), {1: ("dims", [int])}) == {"dims": [number]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\x08", "damaged"),  # no number after the tag
        (b"\x08\x80", "damaged"),  # a number without an end
        (b"\x08" + b"\xff" * 11, "damaged"),
        (b"\x08" + b"\x80" * 10 + b"\x01", "damaged"),  # a number of 11 bytes
        (b"\x12\x05abc", "damaged"),  # a text longer than the rest
        (b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "damaged"),
        (b"\x0d\x00\x00\x00\x00", "damaged"),  # four bytes: no field of the export has this type
        (b"\x0b\x0c", "damaged"),  # a group, which is deprecated
        (b"\x12\x02\xff\xfe", "a text is not UTF-8"),
        (b"\x12\x03\xed\xa0\x80", "a text is not UTF-8"),  # half of a surrogate pair
        (b"\x28\x01", "field 5 is not what the export writes"),
        (b"\x10\x01", "text is not what the export writes"),
        (b"\x0a\x01\x01", "number is not what the export writes"),
        (b"\x08\x01\x08\x01", "number occurs twice"),
        (b"\x22\x00\x22\x00", "inner occurs twice"),
        (b"\x22\x02\x10\x01", "field 2 is not what the export writes"),
    ],
)
def test_other_messages_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        parse(data, PAIR)


def test_any_bytes_are_read_or_refused_in_bounded_depth() -> None:
    """A message nested a thousand times is outside every schema; random bytes do not crash."""
    nested = b""
    for _ in range(1000):
        nested = b"\x3a" + onnx_varint(len(nested)) + nested
    with pytest.raises(FormatError):
        parse(nested)
    generator = random.Random(0)  # noqa: S311 - nothing is kept secret with it
    for _ in range(2000):
        data = generator.randbytes(generator.randrange(40))
        try:
            message: Message = parse(data, PAIR)
        except FormatError:
            continue
        assert message.keys() == {"number", "text", "many", "inner"}


def onnx_varint(number: int) -> bytes:
    return onnx.ModelProto(ir_version=number).SerializeToString()[1:] if number else b"\x00"
