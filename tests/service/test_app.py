"""The application as a whole: its OpenAPI document, its errors, its imports."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from pydantic import TypeAdapter

from service.app import create_app
from service.http.gate import Gate
from service.model.classifier import Classifier
from service.routes.document import Error
from service.routes.prediction import Prediction
from service.settings import Settings
from tests.service.conftest import ask

pytestmark = pytest.mark.anyio


async def schema(app: Gate) -> Any:
    return json.loads((await ask(app, b"", method="GET", target="/openapi.json")).body)


async def test_answers_keep_the_documented_schema(make_app: Callable[..., Gate]) -> None:
    """Strictly: no extra field, no missing one, no converted type."""
    app = make_app()
    for target in ("/predict", "/predict?top_k=1", "/predict?echo=pixels"):
        body = (await ask(app, target=target)).body
        answer = TypeAdapter(Prediction).validate_json(body, strict=True)
        assert answer.model_dump(exclude_unset=True) == json.loads(body)
    refusal = await ask(app, bytes(3))
    assert Error.model_validate_json(refusal.body).model_dump() == json.loads(refusal.body)


async def test_the_document_has_every_body_form_and_every_error(
    make_app: Callable[..., Gate],
) -> None:
    document = await schema(make_app())
    operation = document["paths"]["/predict"]["post"]
    assert {
        "application/json",
        "application/octet-stream",
        "image/png",
        "image/jpeg",
        "image/webp",
        "multipart/form-data",
    } == set(operation["requestBody"]["content"])
    errors = {"400", "401", "408", "411", "413", "415", "422", "500", "503", "504"}
    assert set(operation["responses"]) == errors | {"200"}
    for status in errors:
        reference = operation["responses"][status]["content"]["application/json"]["schema"]
        assert reference == {"$ref": "#/components/schemas/Error"}


async def test_every_path_is_counted_by_its_template(
    make_app: Callable[..., Gate],
) -> None:
    app = make_app()
    paths = (await schema(app))["paths"]
    templates = [path for path, operations in paths.items() if "get" in operations]
    assert len([template for template in templates if "{" in template]) == 8
    templates += ["/", "/inside", "/docs", "/static/{name}"]
    for template in templates:
        target = template.format(model_name="bn-lenet", model_version="1", name="app.js")
        assert (await ask(app, b"", method="GET", target=target)).status == 200
    text = (await ask(app, b"", method="GET", target="/metrics")).body.decode()
    for template in [*templates, "/openapi.json"]:
        assert f'http_requests_total{{method="GET",route="{template}",status="200"}} 1.0' in text


async def test_every_path_with_get_has_head(make_app: Callable[..., Gate]) -> None:
    """RFC 9110, section 9.1, demands it, and load balancers use it."""
    app = make_app()
    paths = [path for path, found in (await schema(app))["paths"].items() if "get" in found]
    paths += ["/", "/docs", "/openapi.json", "/static/app.js", "/v2/"]
    for path in paths:
        target = path.format(model_name="bn-lenet", model_version="1")
        get, head = [await ask(app, b"", method=m, target=target) for m in ("GET", "HEAD")]
        assert (head.status, head.body) == (200, b""), path
        assert head.headers.keys() == get.headers.keys(), path
        assert head.headers["content-type"] == get.headers["content-type"], path
        other = await ask(app, b"", method="PUT", target=target)
        assert (other.status, other.headers["allow"]) == (405, "GET, HEAD"), path


async def test_a_gpu_is_reported_everywhere_and_gives_each_request_its_answer(
    artefact: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU: the session here only claims to have CUDA."""
    cuda = "CUDAExecutionProvider"
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: [cuda])
    app = create_app(Settings(), Classifier.load(artefact))

    async def get(target: str) -> str:
        return (await ask(app, b"", method="GET", target=target)).body.decode()

    assert json.loads(await get("/readyz"))["model"]["provider"] == cuda
    assert json.loads(await get("/v2/models/bn-lenet"))["properties"]["provider"] == cuda
    assert re.search(
        rf'^bnlenet_model_info{{.*provider="{cuda}"', await get("/metrics"), re.MULTILINE
    )

    images = np.random.default_rng(3).integers(0, 256, (60, 784), dtype=np.uint8)
    expected = classifier.probabilities(images.reshape(-1, 1, 28, 28))
    answers = await asyncio.gather(*(ask(app, image.tobytes()) for image in images))
    for answer, row in zip(answers, expected, strict=True):
        served = {p["class_id"]: p["probability"] for p in json.loads(answer.body)["predictions"]}
        assert [served[i] for i in range(10)] == row.tolist()
    runs = re.search(
        r"^bnlenet_inference_duration_seconds_count (.*)", await get("/metrics"), re.MULTILINE
    )
    assert runs
    assert float(runs[1]) < 60  # some shared a run


WITHOUT = """
import sys
for name in ("torch", "onnx", "onnxscript", "training"):
    sys.modules[name] = None  # importing it fails
from pathlib import Path
from service.app import create_app
from service.model.classifier import Classifier
from service.settings import Settings
create_app(Settings(), Classifier.load(Path(sys.argv[1])))
import service.__main__, service.http.server, service.http.workers
"""


def test_the_service_needs_neither_torch_nor_onnx_nor_training(artefact: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT, str(artefact)], check=True)


@pytest.mark.parametrize(("places", "pictures"), [(1, 1), (7, 3), (512, 256)])
async def test_pictures_may_take_half_of_the_places_and_wait_half_of_the_deadline(
    classifier: Classifier, monkeypatch: pytest.MonkeyPatch, places: int, pictures: int
) -> None:
    made: list[dict[str, float]] = []
    monkeypatch.setattr("service.app.PictureThread", lambda **limits: made.append(limits))
    create_app(Settings(max_in_flight=places, request_timeout_seconds=3), classifier)
    assert made == [{"max_pictures": pictures, "max_wait": 1.5}]
