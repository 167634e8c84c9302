"""The application as a whole: its document, its errors, and what it does not need."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from service.app import Error
from service.gate import Gate
from service.predict import Prediction
from tests.service.conftest import ask

pytestmark = pytest.mark.anyio


async def schema(app: Gate) -> Any:
    return json.loads((await ask(app, b"", method="GET", target="/openapi.json")).body)


async def test_answers_keep_the_documented_schema(make_app: Callable[..., Gate]) -> None:
    """Strictly: no field too many, none missing, no type converted."""
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


async def test_a_key_is_documented_where_one_is_set(make_app: Callable[..., Gate]) -> None:
    assert "securitySchemes" not in (await schema(make_app()))["components"]
    with_key = await schema(make_app(api_key="opensesame"))
    assert with_key["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert with_key["paths"]["/predict"]["post"]["security"]
    assert "security" not in with_key["paths"]["/livez"]["get"]


WITHOUT = """
import sys
for name in ("torch", "onnx", "onnxscript", "training"):
    sys.modules[name] = None  # importing it fails
from pathlib import Path
from service.app import create_app
from service.classifier import Classifier
from service.settings import Settings
create_app(Settings(), Classifier.load(Path(sys.argv[1])))
import service.__main__, service.server, service.workers
"""


def test_the_service_needs_neither_torch_nor_onnx_nor_training(artefact: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT, str(artefact)], check=True)
