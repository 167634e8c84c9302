"""`POST /predict` in detail: any body of any type, ties, and refused requests."""

import gzip
import io
import json
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from service.app import create_app
from service.http.gate import Gate
from service.model.classifier import Classifier
from service.pictures.conversion import ModelInput
from service.routes import bodies as bodies_module
from service.routes.predict import RING, example
from service.routes.prediction import Prediction, Renderer
from service.settings import Settings
from tests.service.conftest import Conversation, ask

pytestmark = pytest.mark.anyio
Oracle = Callable[[NDArray[np.uint8]], NDArray[np.float64]]

scalars = st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5)
documents = st.recursive(
    scalars,
    lambda d: st.lists(d, max_size=30) | st.dictionaries(st.text(max_size=6), d, max_size=3),
)
nearly_pixels = st.lists(
    st.lists(st.integers(0, 255) | scalars, min_size=27, max_size=29), min_size=27, max_size=29
)


def encoded(size: tuple[int, int], form: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).save(file, form)
    return file.getvalue()


PICTURES = [
    encoded(size, f) for size in ((28, 28), (40, 30)) for f in ("PNG", "JPEG", "GIF", "BMP")
]


@st.composite
def damaged_pictures(draw: st.DrawFn) -> bytes:
    """Draw a picture's file with a few bytes changed or its end cut off."""
    data = bytearray(draw(st.sampled_from(PICTURES)))
    for place in draw(st.lists(st.integers(0, len(data) - 1), max_size=3)):
        data[place] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


pictures = st.sampled_from(PICTURES) | damaged_pictures()
parts = st.tuples(st.sampled_from(["image", "file"]), st.booleans(), pictures).map(
    lambda part: (
        b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
        % (part[0].encode(), b'; filename="a"' * part[1], part[2])
    )
)
forms = st.tuples(st.lists(parts, max_size=3), st.sampled_from([b"--b--\r\n", b"--b", b""])).map(
    lambda form: b"".join(form[0]) + form[1]
)
bodies = (
    st.binary(max_size=2000)
    | pictures
    | forms
    | documents.map(json.dumps).map(str.encode)
    | st.one_of(documents, nearly_pixels).map(lambda d: json.dumps({"pixels": d}).encode())
    | st.binary(min_size=784, max_size=784)
)
types = st.sampled_from(
    [
        "application/json",
        "application/octet-stream",
        "image/png",
        "image/jpeg",
        "image/x-none",
        "multipart/form-data; boundary=b",
        "multipart/form-data",
        "text/plain",
        "",
    ]
) | st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=20)
packers: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "gzip, br": bytes,
}
queries = st.sampled_from(["", "?top_k=3", "?top_k=x", "?echo=pixels", "?preprocessing=dataset"])


@pytest.fixture(scope="module")
def app(classifier: Classifier) -> Gate:
    return create_app(Settings(), classifier)


@given(bodies, types, queries, st.sampled_from(list(packers)), st.booleans())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
async def test_any_body_of_any_type_gets_an_answer_or_a_refusal(
    app: Gate, body: bytes, content_type: str, query: str, encoding: str, packed: bool
) -> None:
    headers = {"Content-Type": content_type}
    if encoding:
        headers["Content-Encoding"] = encoding
        body = packers[encoding](body) if packed else body
    answer = await ask_latin(app, body, f"/predict{query}", headers)
    assert answer.status in {200, 400, 413, 415, 422}, answer.body
    if answer.status == 200:
        result = json.loads(answer.body)
        assert sum(p["probability"] for p in result["predictions"]) <= 1 + 1e-6
    else:
        assert set(json.loads(answer.body)) == {"error", "code", "request_id"}


async def ask_latin(app: Gate, body: bytes, target: str, headers: dict[str, str]) -> Conversation:
    conversation = Conversation(app, "POST", target, {"Content-Length": str(len(body)), **headers})
    conversation.send(body)
    await conversation.answer()
    return conversation


def is_an_image(document: Any) -> bool:
    """Check the documented form in a slow and simple way."""

    def is_pixel(value: Any) -> bool:
        whole = type(value) is int or (type(value) is float and value.is_integer())
        return whole and 0 <= value <= 255

    def is_row(row: Any) -> bool:
        return type(row) is list and len(row) == 28 and all(map(is_pixel, row))

    if type(document) is not list:
        return False
    flat = len(document) == 784 and all(map(is_pixel, document))
    return flat or (len(document) == 28 and all(map(is_row, document)))


@pytest.mark.parametrize("change", [[], [0.5], [256.0], [-1.0], [1e300], [True], [None], ["0"]])
@pytest.mark.parametrize("nested", [False, True])
async def test_whole_numbers_may_be_written_as_floats(
    app: Gate, nested: bool, change: list[Any]
) -> None:
    """Generated clients do this, because the document says `number`."""
    flat = [float(i % 256) for i in range(784)]
    flat[: len(change)] = change
    pixels = [flat[i : i + 28] for i in range(0, 784, 28)] if nested else flat
    body = json.dumps({"pixels": pixels}).encode()
    answer = await ask(app, body, headers={"Content-Type": "application/json"})
    assert answer.status == (422 if change else 200), answer.body
    if not change:
        plain = await ask(app, bytes(i % 256 for i in range(784)))
        assert plain.body == answer.body


@given(
    st.lists(st.integers(0, 255), min_size=784, max_size=784),
    st.booleans(),
    st.none() | scalars | st.integers(-1, 256).map(float) | st.lists(st.integers(0, 255)),
    st.integers(0, 783),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
async def test_pixels_in_json_are_taken_exactly_when_they_are_an_image(
    app: Gate, flat: list[Any], nested: bool, intruder: Any, place: int
) -> None:
    if intruder is not None:
        flat[place] = intruder
    pixels = [flat[i : i + 28] for i in range(0, 784, 28)] if nested else flat
    if isinstance(intruder, float) and not math.isfinite(intruder):
        return  # not JSON
    body = json.dumps({"pixels": pixels, "note": "true or false"}).encode()
    answer = await ask(
        app, body, target="/predict?echo=pixels", headers={"Content-Type": "application/json"}
    )
    assert (answer.status == 200) == is_an_image(pixels), answer.body
    if answer.status == 200:
        assert [p for row in json.loads(answer.body)["pixels"] for p in row] == flat


async def test_the_answer_is_that_of_the_network_in_float64(app: Gate, reference: Oracle) -> None:
    images = np.random.default_rng(1).integers(0, 256, (50, 28, 28), dtype=np.uint8)
    for image, expected in zip(images, reference(images[:, None]), strict=True):
        answer = json.loads((await ask(app, image.tobytes())).body)
        assert answer["class_id"] == expected.argmax()
        served = {p["class_id"]: p["probability"] for p in answer["predictions"]}
        np.testing.assert_allclose([served[i] for i in range(10)], expected, rtol=0, atol=1e-5)


def test_of_equally_probable_classes_the_lower_id_comes_first(classifier: Classifier) -> None:
    image = ModelInput(np.zeros((28, 28), np.uint8), "none")
    probabilities = np.array(
        [[0.1, 0.2, 0.05, 0.2, 0.1, 0.2, 0.05, 0.05, 0.025, 0.025]], np.float32
    )
    answer = json.loads(Renderer(classifier.info)(probabilities, image, 10, echo=False))
    assert [p["class_id"] for p in answer["predictions"]] == [1, 3, 5, 0, 4, 2, 6, 7, 8, 9]


@given(st.lists(st.floats(0, 1, width=32), min_size=10, max_size=10), st.integers(1, 10))
@settings(deadline=None)
def test_json_carries_every_float32_exactly(
    classifier: Classifier, values: list[float], top_k: int
) -> None:
    image = ModelInput(np.zeros((28, 28), np.uint8), "none")
    body = Renderer(classifier.info)(np.array([values], np.float32), image, top_k, echo=False)
    answer = json.loads(body)
    expected = sorted(enumerate(values), key=lambda pair: -pair[1])[:top_k]
    assert [(p["class_id"], p["probability"]) for p in answer["predictions"]] == expected
    assert answer["confidence"] == max(values)


@given(st.lists(st.floats(0, 1, width=32), min_size=10, max_size=10), st.integers(1, 10))
@settings(deadline=None, max_examples=20)
def test_the_record_and_the_json_say_the_same(
    classifier: Classifier, values: list[float], top_k: int
) -> None:
    probabilities = np.array([values, values[::-1]], np.float32)
    for image in (
        ModelInput(np.zeros((28, 28), np.uint8), "none"),
        ModelInput(np.zeros((28, 28), np.uint8), "dataset", ('The "border" was guessed.',)),
    ):
        record = Prediction.of(classifier.info, probabilities, image, top_k)
        body = Renderer(classifier.info)(probabilities, image, top_k, echo=False)
        expected = json.dumps(record.model_dump(exclude_none=True))
        assert json.dumps(json.loads(body)) == expected  # in the same order


def test_notes_of_the_conversion_are_passed_on(classifier: Classifier) -> None:
    image = ModelInput(np.zeros((28, 28), np.uint8), "dataset", ('The "border" was guessed.',))
    sure, unsure = np.eye(10, dtype=np.float32)[[3, 3]], np.eye(10, dtype=np.float32)[[3, 4]]
    answer = json.loads(Renderer(classifier.info)(sure, image, 1, echo=True))
    assert answer["preprocessing"] == "dataset"
    assert answer["notes"] == ['The "border" was guessed.']
    notes = json.loads(Renderer(classifier.info)(unsure, image, 1, echo=True))["notes"]
    assert notes[0] == 'The "border" was guessed.'
    assert notes[1].startswith("Not sure: ")
    assert answer["pixels"] == [[0] * 28] * 28


async def test_pixels_are_never_converted(app: Gate) -> None:
    for preprocessing in ("auto", "none", "dataset"):
        answer = await ask(app, target=f"/predict?preprocessing={preprocessing}")
        assert answer.status == 200
        assert json.loads(answer.body)["preprocessing"] == "none"


async def test_the_documented_example_is_a_ring_with_its_real_answer(
    app: Gate, classifier: Classifier
) -> None:
    """Its radii are 3 and 10 pixels, about the middle."""
    row, column = np.mgrid[:28, :28] - 13.5
    radius = np.hypot(row, column)
    assert np.array_equal(np.array(RING) == 255, (radius >= 3) & (radius <= 10))
    assert {pixel for row in RING for pixel in row} == {0, 255}
    body = json.dumps({"pixels": RING}).encode()
    headers = {"Content-Type": "application/json"}
    answer = await ask(app, body, target="/predict?top_k=3", headers=headers)
    assert example(classifier) == json.loads(answer.body)
    assert len(example(classifier)["predictions"]) == 3


@pytest.mark.parametrize("filling", [b"\r\n--bx", b"\r\n--b\r\n"])
async def test_a_form_full_of_delimiters_is_refused_without_parsing(
    app: Gate, monkeypatch: pytest.MonkeyPatch, filling: bytes
) -> None:
    """Ten megabytes of delimiters would block the event loop for seconds."""

    def parse(*_: object, **__: object) -> None:
        raise AssertionError("the form is parsed")

    monkeypatch.setattr(bodies_module, "create_form_parser", parse)
    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    body = head + filling * 1_000_000 + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    answer = await ask(app, body, headers=headers)
    assert (answer.status, json.loads(answer.body)["code"]) == (422, "invalid_input")
