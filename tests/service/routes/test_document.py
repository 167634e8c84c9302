"""The OpenAPI document describes what the service does: key, errors and requests."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import service
from service.http.gate import Gate
from service.routes.document import CODES, ERRORS, Error
from tests.service.conftest import ask

pytestmark = pytest.mark.anyio
MakeApp = Callable[..., Gate]
OPEN = {"/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}


async def document(app: Gate) -> Any:
    return json.loads((await ask(app, b"", method="GET", target="/openapi.json")).body)


def operations(document: Any) -> Iterator[tuple[str, Any]]:
    for path, methods in document["paths"].items():
        for operation in methods.values():
            yield path, operation


def codes_in_the_source() -> set[str]:
    """Return every error code in the source: of error classes, and of raised errors."""
    found = set()
    for file in Path(service.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "code":
                found.add(node.value)
            elif file.name == "errors.py" and isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(t, ast.Name) and t.id == "code" for t in targets) and node.value:
                    found.add(node.value)
    return {node.value for node in found if isinstance(node, ast.Constant)}  # type: ignore[misc] # all are strings


async def test_every_error_code_is_documented_with_an_example(make_app: MakeApp) -> None:
    codes = codes_in_the_source()
    assert len(codes) > 20
    assert codes == set(CODES)
    made = await document(make_app())
    assert made["components"]["schemas"]["Error"]["properties"]["code"]["enum"] == CODES
    seen = set()
    for _, operation in operations(made):
        for status, response in operation["responses"].items():
            if status == "200":
                continue
            content = response["content"]["application/json"]
            assert list(response["content"]) == ["application/json"]
            assert content["schema"] == {"$ref": "#/components/schemas/Error"}
            assert content["examples"].keys() == ERRORS[int(status)].keys()
            for code, example in content["examples"].items():
                error = Error.model_validate(example["value"], strict=True)
                assert error.code == code
                assert re.fullmatch(r"[A-Z][^\n]*\.", error.error)
                seen.add(code)
    elsewhere = {"method_not_allowed", "headers_too_large", "unsupported_transfer_coding"}
    assert seen == set(CODES) - elsewhere - {"unsupported_http_version"}


@pytest.mark.parametrize("key", [None, "opensesame"])
async def test_routes_that_need_the_key_say_so(make_app: MakeApp, key: str | None) -> None:
    app = make_app(api_key=key)
    made = await document(app)
    scheme = {"type": "http", "scheme": "bearer"}
    assert made["components"]["securitySchemes"] == {"HTTPBearer": scheme}
    optional: list[dict[str, Any]] = [] if key else [{}]
    closed = set()
    for path, operation in operations(made):
        assert operation.get("security", []) == (
            [] if path in OPEN else [{"HTTPBearer": []}, *optional]
        ), path
        closed |= {path} - OPEN
    assert len(closed) == 14
    for path in (*OPEN, *closed):
        target = path.format(model_name="bn-lenet", model_version="1")
        answer = await ask(app, b"", method="GET", target=target)
        assert (answer.status == 401) == (key is not None and path in closed), path


async def test_answers_that_never_come_are_not_documented(make_app: MakeApp) -> None:
    made = await document(make_app())
    for path, operation in operations(made):
        assert ("422" in operation["responses"]) == (path == "/predict"), path
    assert not {"HTTPValidationError", "ValidationError"} & made["components"]["schemas"].keys()


async def test_clients_get_clean_names(make_app: MakeApp) -> None:
    made = await document(make_app())
    ids = [operation["operationId"] for _, operation in operations(made)]
    models = ["model_metadata", "model_ready", "model_config", "model_statistics", "infer"]
    assert sorted(ids) == sorted(
        [
            *("predict", "livez", "readyz", "prometheus", "repository_index", "statistics"),
            *("server_metadata", "server_live", "server_ready"),
            *models,
            *(f"{name}_of_version" for name in models),
        ]
    )
    assert made["servers"] == [{"url": "/", "description": "This service."}]
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(made)))
    assert references <= made["components"]["schemas"].keys()
    assert {"InferenceRequest", "InferenceInput", "PredictionRequest"} <= references


async def test_binary_tensors_are_documented(make_app: MakeApp) -> None:
    made = await document(make_app())
    name = "Inference-Header-Content-Length"
    for path in ("/v2/models/{model_name}", "/v2/models/{model_name}/versions/{model_version}"):
        operation = made["paths"][f"{path}/infer"]["post"]
        (header,) = (p for p in operation["parameters"] if p["in"] == "header")
        assert (header["name"], header["required"]) == (name, False)
        assert "application/octet-stream" in operation["requestBody"]["content"]
        assert "application/octet-stream" in operation["responses"]["200"]["content"]
        assert name in operation["responses"]["200"]["headers"]
    data = made["components"]["schemas"]["InferenceInput"]["properties"]["data"]
    assert {"number", "array"} == {item["type"] for item in data["items"]["anyOf"]}


async def test_the_document_is_the_same_each_time(make_app: MakeApp) -> None:
    app = make_app()
    assert await document(app) == await document(app)
