"""A second model answers for the pictures that the service converts, and for nothing else."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from service.__main__ import main
from service.app import create_app
from service.http.gate import Gate
from service.model.artefact import ModelError, read_files
from service.model.classifier import Classifier, load_classifiers
from service.settings import Settings
from tests.service.conftest import ask, forward, make_artefact, make_weights, seal

pytestmark = pytest.mark.anyio

PIXELS = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def picture() -> bytes:
    """Draw a black triangle on white, which the service converts."""
    image = Image.new("L", (90, 90), 255)
    ImageDraw.Draw(image).polygon([(20, 10), (70, 30), (30, 80)], fill=0)
    return png(image)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model file with other random weights than `artefact`."""
    path = tmp_path_factory.mktemp("other") / "photos.onnx"
    path.write_bytes(seal(make_artefact(make_weights(1), name="photos", test_accuracy="0.2000")))
    return path


@pytest.fixture
def app(artefact: Path, other: Path) -> Gate:
    return create_app(Settings(), *load_classifiers([artefact, other]))


async def post(app: Gate, body: bytes, content_type: str, target: str = "/predict") -> Any:
    answer = await ask(app, body, target=target, headers={"Content-Type": content_type})
    assert answer.status == 200, answer.body
    return json.loads(answer.body)


def by_class(answer: Any) -> list[float]:
    return [
        one["probability"] for one in sorted(answer["predictions"], key=lambda p: p["class_id"])
    ]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (PIXELS.tobytes(), "application/octet-stream"),
        (json.dumps({"pixels": PIXELS.tolist()}).encode(), "application/json"),
        (png(Image.fromarray(PIXELS)), "image/png"),
    ],
    ids=["bytes", "json", "small png"],
)
async def test_pixels_are_answered_by_the_first_model(
    app: Gate, artefact: Path, body: bytes, content_type: str
) -> None:
    answer = await post(app, body, content_type)
    alone = await post(create_app(Settings(), Classifier.load(artefact)), body, content_type)
    assert answer == alone


async def test_a_converted_picture_is_answered_by_the_second(
    app: Gate, other: Path, picture: bytes
) -> None:
    answer = await post(app, picture, "image/png", "/predict?echo=pixels")
    seen = np.array(answer["pixels"], np.uint8)
    expected = forward(make_weights(1), seen[None, None])[0]
    np.testing.assert_allclose(by_class(answer), expected, rtol=0, atol=1e-5)
    second = Classifier.load(other).info
    assert answer["model"] == {"name": "bn-lenet", "version": "1", "revision": second.revision}


async def test_pixels_of_a_converted_picture_can_be_sent_again_as_a_tensor(
    app: Gate, picture: bytes
) -> None:
    answer = await post(app, picture, "image/png", "/predict?echo=pixels")
    tensor = {"name": "pixels", "shape": [1, 1, 28, 28], "datatype": "UINT8"}
    request: dict[str, Any] = {"inputs": [tensor | {"data": answer["pixels"]}]}

    async def infer() -> NDArray[np.float64]:
        body = json.dumps(request).encode()
        output = (await post(app, body, "application/json", "/v2/models/bn-lenet/infer"))["outputs"]
        return np.array(output[0]["data"])

    images = np.array(answer["pixels"], np.uint8)[None, None]
    for parameters, seed in (({}, 0), ({"preprocessing": "dataset"}, 1)):
        request["parameters"] = parameters
        expected = forward(make_weights(seed), images)[0]
        np.testing.assert_allclose(await infer(), expected, rtol=0, atol=1e-5)


async def test_readiness_names_both(app: Gate, artefact: Path, other: Path) -> None:
    ready = json.loads((await ask(app, b"", method="GET", target="/readyz")).body)
    for key, path in (("model", artefact), ("picture_model", other)):
        assert ready[key]["revision"] == Classifier.load(path).info.revision
    assert ready["picture_model"]["test_accuracy"] == "0.2000"


def test_the_command_line_uses_the_same_models(
    artefact: Path, other: Path, picture: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNLENET_MODEL_PATH", str(artefact))
    monkeypatch.setenv("BNLENET_PICTURE_MODEL_PATH", str(other))
    for content, path in ((picture, other), (png(Image.fromarray(PIXELS)), artefact)):
        result = CliRunner().invoke(main, ["classify", "--json", "-"], input=content)
        revision = json.loads(result.stdout)["model"]["revision"]
        assert revision == Classifier.load(path).info.revision


def test_one_file_is_loaded_once(artefact: Path) -> None:
    first, second = load_classifiers([artefact])
    assert first is second


@pytest.mark.parametrize("content", [None, b"rubbish"])
def test_an_error_names_the_setting_of_the_bad_file(
    artefact: Path, tmp_path: Path, content: bytes | None
) -> None:
    """Also where a supervisor reads the files."""
    bad = tmp_path / "bad.onnx"
    if content is not None:
        bad.write_bytes(content)
    of_pictures = r"bad.onnx .* or set BNLENET_PICTURE_MODEL_PATH"
    with pytest.raises(ModelError, match=r"bad.onnx .* or set BNLENET_MODEL_PATH"):
        load_classifiers([bad, artefact])
    with pytest.raises(ModelError, match=of_pictures):
        load_classifiers([artefact, bad])
    if content is None:
        with pytest.raises(ModelError, match=of_pictures):
            read_files([artefact, bad])


def test_models_with_different_classes_are_refused(artefact: Path, tmp_path: Path) -> None:
    classes = json.dumps([f"class {i}" for i in range(10)])
    path = tmp_path / "others.onnx"
    path.write_bytes(seal(make_artefact(make_weights(), classes=classes)))
    with pytest.raises(ModelError, match="different classes: set BNLENET_PICTURE_MODEL_PATH"):
        load_classifiers([artefact, path])
