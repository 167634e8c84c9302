"""Inference requests are read as the protocol says; answers keep every bit."""

import contextlib
import dataclasses
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from service.errors import BadRequest, PayloadTooLarge, ServiceError
from service.model.classifier import Classifier
from service.routes.tensors import (
    MAX_JSON_BRACKETS,
    MAX_JSON_BYTES,
    InferenceRequest,
    decode,
    encode,
)

Json = dict[str, Any]
Pixels = NDArray[np.uint8]

IMAGE: Pixels = (np.arange(784) % 256).astype(np.uint8).reshape(1, 1, 28, 28)
SOME = arrays(np.uint8, st.tuples(*map(st.just, (3, 1, 28, 28))), elements=st.integers(0, 255))


def request(pixels: Pixels = IMAGE, **tensor: Any) -> Json:
    """Return a valid JSON request; keywords change fields of its tensor, None removes them."""
    fields = {"name": "pixels", "shape": list(pixels.shape), "datatype": "UINT8"} | {
        "data": pixels.ravel().tolist(),
        **tensor,
    }
    return {"inputs": [{k: v for k, v in fields.items() if v is not None}]}


def dump(document: Any) -> bytes:
    return json.dumps(document).encode()


def binary(tail: bytes, size: int | None = None, **tensor: Any) -> tuple[bytes, bytes]:
    """Return a body with a binary tensor, and the length of its JSON."""
    size = len(tail) if size is None else size
    text = dump(request(data=None, parameters={"binary_data_size": size}, **tensor))
    return text + tail, b"%d" % len(text)


LAYOUTS: dict[str, Callable[[Pixels], Any]] = {
    "flat": lambda p: p.ravel().tolist(),
    "nested": lambda p: p.tolist(),
    "a row an image": lambda p: p.reshape(len(p), -1).tolist(),
}


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@given(pixels=SOME)
@settings(max_examples=10)
def test_json_pixels_are_read_with_any_nesting(datatype: str, layout: str, pixels: Pixels) -> None:
    """Whole numbers may be written as 3 or as 3.0; some clients write 3.0 for every datatype."""
    for number in (np.uint8, np.float64):
        data = LAYOUTS[layout](pixels.astype(number))
        read = decode(dump(request(pixels, datatype=datatype, data=data)))
        assert np.array_equal(read.pixels, pixels)
        assert read.pixels.dtype == np.uint8
        assert read[1:4] == (None, False, 0)


@pytest.mark.parametrize("kind", ["<u1", "<f4"])
@given(pixels=SOME)
@settings(max_examples=10)
def test_binary_pixels_arrive(kind: str, pixels: Pixels) -> None:
    datatype = {"<u1": "UINT8", "<f4": "FP32"}[kind]
    body, length = binary(pixels.astype(kind).tobytes(), shape=[3, 1, 28, 28], datatype=datatype)
    assert np.array_equal(decode(body, length).pixels, pixels)


def test_a_raw_body_is_one_image_and_answered_in_binary() -> None:
    read = decode(IMAGE.tobytes(), b"0")
    assert np.array_equal(read.pixels, IMAGE)
    assert read[1:4] == (None, True, 0)


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({}, (None, False, 0)),
        ({"id": "42"}, ("42", False, 0)),
        ({"id": ""}, ("", False, 0)),
        ({"id": None, "outputs": None, "parameters": None}, (None, False, 0)),
        ({"outputs": []}, (None, False, 0)),
        ({"outputs": [{"name": "probabilities"}]}, (None, False, 0)),
        ({"parameters": {"binary_data_output": True}}, (None, True, 0)),
        ({"parameters": {"priority": 1, "timeout": 5, "own": "x"}}, (None, False, 0)),
        ({"model_name": "anything", "unknown": [1]}, (None, False, 0)),
        ({"outputs": [{"name": "probabilities", "parameters": None}]}, (None, False, 0)),
        (
            {"outputs": [{"name": "probabilities", "parameters": {"classification": 3}}]},
            (None, False, 3),
        ),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "probabilities", "parameters": {"binary_data": False}}],
            },
            (None, False, 0),
        ),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "probabilities", "parameters": {"content_type": "np"}}],
            },
            (None, True, 0),
        ),
    ],
)
def test_known_parameters_are_used_and_others_ignored(
    extra: Json, wanted: tuple[str | None, bool, int]
) -> None:
    assert decode(dump({**request(parameters={"content_type": "np"}), **extra}))[1:4] == wanted


@pytest.mark.parametrize(
    ("parameters", "wanted"),
    [
        (None, "none"),
        ({"preprocessing": "none"}, "none"),
        ({"preprocessing": "dataset"}, "dataset"),
    ],
)
def test_a_parameter_says_that_the_pixels_are_of_a_converted_picture(
    parameters: Json | None, wanted: str
) -> None:
    assert decode(dump({**request(), "parameters": parameters})).preprocessing == wanted


@pytest.mark.parametrize("value", ["auto", "Dataset", 1])
def test_another_preprocessing_is_refused(value: Any) -> None:
    with pytest.raises(BadRequest, match="`preprocessing` must be"):
        decode(dump({**request(), "parameters": {"preprocessing": value}}))


def test_the_largest_batch_is_taken_and_one_more_is_not() -> None:
    batch = np.zeros((256, 1, 28, 28), np.uint8)
    assert decode(dump(request(batch))).pixels.shape == batch.shape
    with pytest.raises(ServiceError, match="256"):
        decode(dump(request(np.zeros((257, 1, 28, 28), np.uint8))))


def ragged(level: int) -> Any:
    """Return nested pixels, with one number moved to the next list of the same level."""
    data = IMAGE.reshape(28, 28).tolist()
    data[1].append(data[2].pop())
    return [[data]] if level else data


FLAT: list[Any] = IMAGE.ravel().tolist()
BAD_DATA: dict[str, Any] = {
    "too few": FLAT[1:],
    "too many": [*FLAT, 0],
    "none": [],
    "nested nothing": [[], []],
    "ragged": ragged(0),
    "ragged inside": ragged(1),
    "a list among numbers": [*FLAT[1:], [0]],
    "numbers among lists": [[0], *FLAT[1:]],
    "negative": [-1, *FLAT[1:]],
    "256": [256, *FLAT[1:]],
    "huge": [10**30, *FLAT[1:]],
    "infinite": [1e308 * 10, *FLAT[1:]],
    "a fraction": [0.5, *FLAT[1:]],
    "whole floats but one": [*map(float, FLAT[1:]), 0.5],
    "floats and true": [*map(float, FLAT[1:]), True],
    "floats and 256": [*map(float, FLAT[1:]), 256],
    "floats beyond any": [*map(float, FLAT[1:]), 1e300],
    "null": [None, *FLAT[1:]],
    "true": [True, *FLAT[1:]],
    "false nested": [[[[False, *FLAT[1:28]], *IMAGE[0, 0, 1:].tolist()]]],
    "text": ["0", *FLAT[1:]],
    "long text": ["0" * 10_000, *FLAT[1:]],
    "objects": [{"0": 0}] * 784,
    "empty texts": [*FLAT, "", ""],
    "a string": "0" * 784,
    "an object": {"0": 0},
    "a count": 784,
}


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("data", BAD_DATA.values(), ids=BAD_DATA)
def test_data_that_are_not_pixels_are_refused(data: Any, datatype: str) -> None:
    with pytest.raises(ServiceError) as refused:
        decode(dump(request(data=data, datatype=datatype)))
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "values",
    [
        [0.5],
        [-1],
        [256],
        [np.nan],
        [np.inf],
        [-np.inf],
        [3.0000002384185791],
        [1e-40],
    ],
)
def test_binary_fp32_must_be_whole_numbers_in_range(values: list[float]) -> None:
    pixels = np.zeros(784, "<f4")
    pixels[: len(values)] = values
    with pytest.raises(ServiceError, match="whole numbers from 0 to 255"):
        decode(*binary(pixels.tobytes(), datatype="FP32"))


@pytest.mark.parametrize(
    "shape",
    [
        *([], [1], [784], [1, 784], [28, 28], [1, 28, 28], [1, 28, 28, 1], [1, 1, 28, 28, 1]),
        *([0, 1, 28, 28], [-1, 1, 28, 28], [-1, -1, 28, 28], [1, 1, 784, 1], [2, 1, 28, 28]),
        *([2**31, 1, 28, 28], [2**62, 1, 28, 28], [2**64, 1, 28, 28], [1, 1, 2**63, 2**63]),
        *([True, True, 28, 28], [1.0, 1, 28, 28], ["1", 1, 28, 28], [None, 1, 28, 28]),
        *([[1], 1, 28, 28], "1,1,28,28", 1, {}, None),
    ],
)
def test_other_shapes_are_refused(shape: Any) -> None:
    for body, length in [(dump(request(shape=shape)), None), binary(bytes(784), shape=shape)]:
        with pytest.raises(ServiceError) as refused:
            decode(body, length)
        assert refused.value.status == 400


def test_a_batch_of_no_images_is_refused() -> None:
    for body, length in [
        (dump(request(shape=[0, 1, 28, 28], data=[])), None),
        binary(b"", shape=[0, 1, 28, 28]),
    ]:
        with pytest.raises(BadRequest, match="n from 1 to 256"):
            decode(body, length)


def also(**extra: Any) -> Json:
    return {**request(), **extra}


def asking(*parameters: Any) -> list[Json]:
    return [also(outputs=[{"name": "probabilities", "parameters": p}]) for p in parameters]


TEXTS: list[Any] = ["", "input", "Pixels", 1, ["pixels"], None]
TYPES: list[Any] = ["", "INT8", "INT64", "FP16", "FP64", "BOOL", "BYTES", "uint8", 1, [], None]
LISTS: list[Any] = [None, [], {}, [None], [[]], "pixels", 1, [{}], [{"name": "scores"}]]
OBJECTS: list[Any] = [[], "x", 1, True]
IDS: list[Any] = [1, True, [], {}]


@pytest.mark.parametrize(
    "document",
    [
        *([], [request()], 1, "inputs", None, True, {}),
        *({"inputs": inputs} for inputs in LISTS),
        {"inputs": request()["inputs"] * 2},
        *(request(name=name) for name in TEXTS),
        *(request(datatype=datatype) for datatype in TYPES),
        *(request(parameters=parameters) for parameters in OBJECTS),
        request(data=None),
        request(parameters={"binary_data_size": 784}),
        request(data=None, parameters={"binary_data_size": 784}),
        request(data=None, parameters={"shared_memory_region": "r"}),
        *(also(id=value) for value in IDS),
        *(also(parameters=value) for value in (*OBJECTS, {"binary_data_output": 1})),
        *(also(outputs=outputs) for outputs in LISTS[2:]),
        also(outputs=[{"name": "probabilities"}] * 2),
        also(outputs=[{"name": "probabilities"}, {"name": "scores"}]),
        *asking(*OBJECTS, {"binary_data": "yes"}, {"shared_memory_region": "r"}),
        *asking(*({"classification": k} for k in (-1, 1.5, "3", True))),
    ],
)
def test_other_documents_are_refused(document: Any) -> None:
    with pytest.raises(ServiceError) as refused:
        decode(dump(document))
    assert (refused.value.status, refused.value.code) == (400, "invalid_input")


def test_values_given_twice_are_refused_and_neither_is_taken() -> None:
    """The values come as `data` and as bytes, both with the right size."""
    text = dump(request(parameters={"binary_data_size": 784}))
    for body, length in [(text + bytes(784), b"%d" % len(text)), (text, None)]:
        with pytest.raises(ServiceError, match="as `data`; or as binary data after the JSON"):
            decode(body, length)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b" ", b"{", b"\x00", b"\xff\xfe", b'{"inputs": [NaN]}', dump(request()) + b"x"),
        *(b"[" * 120, b"[" * 100_000, b'{"inputs":' * 5_000, b"[" * 5_000 + b"]" * 5_000),
        b'{"id": "\xff", "inputs": []}',
        b'{"id": "\\ud800", "inputs": []}',
    ],
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    for length in (None, b"%d" % len(body)):
        with pytest.raises(BadRequest) as refused:
            decode(body, length)
        assert (refused.value.message == "The request is not valid JSON.") == (
            refused.value.code == "malformed_json"
        )


def test_json_nested_120_deep_is_refused_as_data() -> None:
    deep: Any = 0
    for _ in range(120):
        deep = [deep]
    for document in (request(data=deep), {"inputs": deep}, {**request(), "parameters": deep}):
        with pytest.raises(ServiceError) as refused:
            decode(dump(document))
        assert refused.value.code == "invalid_input"


def test_json_above_the_limit_is_not_parsed() -> None:
    with pytest.raises(PayloadTooLarge):
        decode(dump(request()) + b" " * MAX_JSON_BYTES)


@pytest.mark.parametrize("piece", ["[]", "{}"])
def test_json_with_too_many_brackets_is_not_parsed(piece: str) -> None:
    """A million empty arrays would block the event loop for more than half a second."""
    largest = json.dumps(request(np.zeros((256, 1, 28, 28), np.uint8)))
    assert largest.count("[") < MAX_JSON_BRACKETS / 2
    with pytest.raises(BadRequest, match="at most"):
        decode(f'{{"inputs":[{",".join([piece] * MAX_JSON_BRACKETS)}]}}'.encode())


@pytest.mark.parametrize("body", [b"", b"{", b'{"inputs": [NaN]}', dump(request()) + b"x"])
def test_damaged_json_has_a_code_of_its_own(body: bytes) -> None:
    with pytest.raises(BadRequest) as refused:
        decode(body)
    assert (refused.value.status, refused.value.code) == (400, "malformed_json")


def test_the_longest_json_is_parsed_and_one_byte_more_is_not() -> None:
    """The limit has room for 20 bytes for each number of the largest batch."""
    batch = np.full((256, 1, 28, 28), 255, np.uint8)
    wide = json.dumps(request(batch), indent=17).encode()  # a line break, 17 spaces or more, 255,
    assert len(wide) > 20 * batch.size
    with pytest.raises(PayloadTooLarge, match=r"at most 4,194,304 bytes"):
        decode(wide)
    text = dump(request(batch)).replace(b" ", b"").replace(b",", b"," + b" " * 16)
    assert 19 * batch.size < len(text) < MAX_JSON_BYTES
    longest = text + b" " * (MAX_JSON_BYTES - len(text))
    assert np.array_equal(decode(longest).pixels, batch)
    with pytest.raises(PayloadTooLarge):
        decode(longest + b" ")


def test_json_at_the_limit_of_brackets_is_parsed_and_one_more_is_not() -> None:
    most = b'{"inputs":[' + b",".join([b"[]"] * (MAX_JSON_BRACKETS - 2)) + b"]}"
    assert most.count(b"[") + most.count(b"{") == MAX_JSON_BRACKETS
    with pytest.raises(BadRequest, match="name it once"):
        decode(most)
    with pytest.raises(BadRequest, match=r"at most 16,384 arrays and objects"):
        decode(most.replace(b"]}", b",{}]}"))


def test_the_length_of_the_json_may_be_all_of_the_body_and_have_nine_digits() -> None:
    text = dump(request())
    for length in (b"%d" % len(text), b"%09d" % len(text)):
        assert np.array_equal(decode(text, length).pixels, IMAGE)
    for length in (b"%010d" % len(text), b"%d" % (len(text) + 1)):
        with pytest.raises(BadRequest, match="must be the length of the JSON"):
            decode(text, length)


LENGTH = (
    "Inference-Header-Content-Length must be the length of the JSON at the start of the body, or 0."
)
ONE_INPUT = "The model has one input, `pixels`; name it once, and no other."
ONE_OUTPUT = "The model has one output, `probabilities`; name it once, and no other."
ONE_WAY = "Send the values as `data`; or as binary data after the JSON, with `binary_data_size`."
PIXELS = (
    "Pixels must be whole numbers from 0 to 255 in both datatypes, as in the data set; do not scale"
    " them to 0..1."
)
SENTENCES: list[tuple[Json, str]] = [
    (request(data=[0] * 785), "The shape needs 784 values; `data` has 785."),
    (request(data=[]), "The shape needs 784 values; `data` has 0."),
    (request(data=[[0], [0, 0]]), "`data` must be flat, or nested in rows of equal length."),
    (request(data=[256, *FLAT[1:]]), PIXELS),
    (request(data=["0", *FLAT[1:]]), PIXELS),
    (request(data=[0.5, *FLAT[1:]]), PIXELS),
    (request(data=[True, *FLAT[1:]]), "The values must be numbers, not true and false."),
    (
        request(datatype=1),
        "The datatype must be UINT8, or FP32 with whole numbers from 0 to 255.",
    ),
    (request(shape=[1]), "The shape must be [n, 1, 28, 28], n from 1 to 256."),
    (request(name="x"), ONE_INPUT),
    (request(data=None), ONE_WAY),
    (request(parameters={"binary_data_size": 784}), ONE_WAY),
    (
        request(data=None, parameters={"shared_memory_region": "r"}),
        "Shared memory is not supported; send tensors in the body.",
    ),
    (
        request(data=None, parameters={"binary_data_size": "1"}),
        "`binary_data_size` must be a whole number.",
    ),
    (also(outputs=[{}]), ONE_OUTPUT),
    (
        asking({"classification": -1})[0],
        "The parameter `classification` must be a number of classes, or 0.",
    ),
    (also(id=1), "`id` must be a string."),
    (also(parameters=1), "`parameters` must be an object."),
    (
        also(parameters={"binary_data_output": 1}),
        "`binary_data_output` must be true or false.",
    ),
    (
        also(parameters={"preprocessing": "auto"}),
        "The parameter `preprocessing` must be none or dataset.",
    ),
    ({"inputs": 1}, "`inputs` must be an array."),
]
BINARY_SENTENCES: list[tuple[tuple[bytes, bytes], str]] = [
    (
        binary(bytes(784), datatype="FP32"),
        "The shape needs 784 values of FP32; 784 bytes do not match it.",
    ),
    (binary(bytes(3136)), "The shape needs 784 values of UINT8; 3136 bytes do not match it."),
    (
        binary(bytes(784), 785),
        "After the JSON come 784 bytes, but `binary_data_size` is 785.",
    ),
    (
        (dump(request()) + b"ab", b"%d" % len(dump(request()))),
        "After the JSON come 2 bytes, but `binary_data_size` is 0.",
    ),
    ((b"", b"0"), "A body without JSON must have 784 bytes, one for each pixel."),
    ((b"{}", b"3"), LENGTH),
    ((b"[]", b"2"), "The request must be a JSON object with `inputs`."),
]


@pytest.mark.parametrize(
    ("body", "length", "sentence"),
    [
        *((dump(document), None, sentence) for document, sentence in SENTENCES),
        *((body, length, sentence) for (body, length), sentence in BINARY_SENTENCES),
    ],
)
def test_the_sentence_says_what_is_wrong(body: bytes, length: bytes | None, sentence: str) -> None:
    with pytest.raises(BadRequest) as refused:
        decode(body, length)
    assert (refused.value.message, refused.value.code) == (sentence, "invalid_input")


@pytest.mark.parametrize(
    "length",
    [b"", b"-1", b"+5", b"1e3", b"0x10", b" 5", b"1_0", b"\xb2", b"9" * 5_000, b"784"],
)
def test_a_wrong_length_of_the_json_is_refused(length: bytes) -> None:
    with pytest.raises(ServiceError, match="Inference-Header-Content-Length"):
        decode(b"{}", length)


@pytest.mark.parametrize("size", [0, 1, 783, 785, -784, 784 * 4, 2**31, 2**63])
def test_a_binary_size_that_disagrees_is_refused(size: int) -> None:
    for tail in (bytes(784), bytes(783), bytes(785), b""):
        with pytest.raises(ServiceError) as refused:
            decode(*binary(tail, size))
        assert refused.value.status == 400


def test_unannounced_bytes_after_the_json_are_refused() -> None:
    text = dump(request())
    with pytest.raises(ServiceError, match="3 bytes"):
        decode(text + b"abc", b"%d" % len(text))
    for size in (783, 785):
        with pytest.raises(ServiceError, match="784 bytes"):
            decode(bytes(size), b"0")


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["pixels", "probabilities", "UINT8", "FP32", 784, 28, [1, 1, 28, 28]]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
PLACES: list[list[Any]] = [
    *(["id"], ["parameters"], ["parameters", "binary_data_output"], ["inputs"], ["inputs", 0]),
    *(["inputs", 0, k] for k in ("name", "shape", "datatype", "data", "parameters")),
    *(["inputs", 0, "shape", i] for i in range(4)),
    *(["inputs", 0, "data", i] for i in (0, 783)),
    *(["inputs", 0, "parameters", "binary_data_size"], ["outputs"], ["outputs", 0]),
    *(["outputs", 0, "name"], ["outputs", 0, "parameters"]),
    *(["outputs", 0, "parameters", k] for k in ("binary_data", "classification")),
]


def sound(tail: bytes) -> Json:
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True, "classification": 2}}]
    base = request(data=None, parameters={"binary_data_size": 784}) if tail else request()
    return {"id": "1", "parameters": {"binary_data_output": False}, "outputs": outputs, **base}


def put(document: Any, place: list[Any], value: Any) -> None:
    """Change a document at this path, if it has the path."""
    *path, last = place
    with contextlib.suppress(KeyError, IndexError, TypeError):
        for step in path:
            document = document[step]
        document[last] = value


@st.composite
def mutated(draw: st.DrawFn) -> tuple[bytes, bytes | None]:
    """Return a valid body with a few changes, and the length of its JSON."""
    tail = bytes(784) if draw(st.booleans()) else b""
    document = sound(tail)
    changes = draw(st.lists(st.tuples(st.sampled_from(PLACES), JUNK), max_size=3))
    for place, value in changes:
        put(document, place, value)
    text = dump(document)
    if draw(st.integers(0, 4)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=3)) + text[at + draw(st.integers(0, 3)) :]
    right = b"%d" % len(text) if tail else None
    length = draw(st.just(right) | st.none() | st.integers(-2, 3000).map(lambda n: b"%d" % n))
    return text + draw(st.just(tail) | st.binary(max_size=5)), length


@given(mutated())
@settings(max_examples=100)
def test_any_request_is_read_or_refused(case: tuple[bytes, bytes | None]) -> None:
    try:
        read = decode(*case)
    except ServiceError as error:
        refused = error
    else:
        assert read.pixels.shape == (len(read.pixels), 1, 28, 28)
        assert read.pixels.dtype == np.uint8
        assert 1 <= len(read.pixels) <= 256
        assert read.id is None or isinstance(read.id, str)
        assert isinstance(read.binary, bool)
        assert read.classification >= 0
        return
    assert 400 <= refused.status < 500


@pytest.fixture(scope="module")
def probabilities(classifier: Classifier) -> NDArray[np.float32]:
    random = np.random.default_rng(0)
    return classifier.probabilities(random.integers(0, 256, (5, 1, 28, 28), np.uint8))


def test_json_probabilities_read_back_as_the_same_bits(
    classifier: Classifier, probabilities: NDArray[np.float32]
) -> None:
    body, length = encode(classifier.info, InferenceRequest(IMAGE, "a"), probabilities)
    answer = json.loads(body)
    data = answer["outputs"][0].pop("data")
    assert length is None
    assert np.array_equal(np.array(data).reshape(5, 10), probabilities.astype(np.float64))
    assert answer == {
        "model_name": "bn-lenet",
        "model_version": "1",
        "id": "a",
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [5, 10]}],
    }


def test_an_empty_id_is_echoed_too(
    classifier: Classifier, probabilities: NDArray[np.float32]
) -> None:
    body, _ = encode(classifier.info, InferenceRequest(IMAGE, ""), probabilities)
    assert json.loads(body)["id"] == ""


def test_binary_probabilities_are_the_same_bits(
    classifier: Classifier, probabilities: NDArray[np.float32]
) -> None:
    request = InferenceRequest(IMAGE, binary=True)
    body, length = encode(classifier.info, request, probabilities)
    answer = json.loads(body[:length])
    assert body[length:] == struct.pack("<50f", *probabilities.ravel())
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": 200}
    assert "data" not in answer["outputs"][0]
    assert "id" not in answer


def test_of_equally_probable_classes_the_lower_comes_first(classifier: Classifier) -> None:
    rows = np.full((2, 10), 0.1, np.float32)
    rows[1, [8, 3]] = 0.5
    body, _ = encode(classifier.info, InferenceRequest(IMAGE, classification=4), rows)
    (output,) = json.loads(body)["outputs"]
    assert [int(text.split(":")[1]) for text in output["data"]] == [0, 1, 2, 3, 3, 8, 0, 1]


@pytest.mark.parametrize("binary", [True, False])
def test_the_answer_names_the_model_that_gave_it(
    classifier: Classifier, probabilities: NDArray[np.float32], binary: bool
) -> None:
    other = dataclasses.replace(classifier.info, name="other", version="7")
    body, length = encode(other, InferenceRequest(IMAGE, binary=binary), probabilities)
    answer = json.loads(body[:length])
    assert (answer["model_name"], answer["model_version"]) == ("other", "7")


@pytest.mark.parametrize("count", [1, 3, 10, 11, 10**9])
def test_classification_lists_the_most_probable_classes(
    classifier: Classifier, probabilities: NDArray[np.float32], count: int
) -> None:
    """An entry has value, index and label; like Triton, at most all classes are listed."""
    expected = [
        f"{float(row[i])!r}:{i}:{classifier.info.classes[i]}"
        for row in probabilities
        for i in np.argsort(-row, kind="stable")[:count]
    ]
    plain, _ = encode(classifier.info, InferenceRequest(IMAGE, classification=count), probabilities)
    (output,) = json.loads(plain)["outputs"]
    assert (output["datatype"], output["shape"]) == ("BYTES", [5, min(count, 10)])
    assert output["data"] == expected

    body, length = encode(
        classifier.info, InferenceRequest(IMAGE, None, True, count), probabilities
    )
    tail = body[length:]
    assert json.loads(body[:length])["outputs"][0]["parameters"]["binary_data_size"] == len(tail)
    texts = []
    while tail:
        (size,) = struct.unpack_from("<I", tail)
        texts.append(tail[4 : 4 + size].decode())
        tail = tail[4 + size :]
    assert texts == expected


def test_equally_probable_classes_are_listed_by_number(classifier: Classifier) -> None:
    even = np.full((1, 10), 0.1, np.float32)
    body, _ = encode(classifier.info, InferenceRequest(IMAGE, classification=4), even)
    assert [text.split(":")[1] for text in json.loads(body)["outputs"][0]["data"]] == list("0123")
