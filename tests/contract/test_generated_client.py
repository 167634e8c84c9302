"""A client that openapi-python-client writes from the service's document calls every route."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

PIXELS = (np.arange(784) * 7 % 256).astype(np.uint8)
MODEL = {"model_name": "bn-lenet"}
VERSION = {**MODEL, "model_version": "1"}


class Generated:
    """The generated package.

    Args:
        name: of the package, which can be imported.
        base_url: of the service.
        document: the one that it was generated from.
    """

    def __init__(self, name: str, base_url: str, document: Any) -> None:
        self.models: Any = importlib.import_module(f"{name}.models")
        self.types: Any = importlib.import_module(f"{name}.types")
        client: Any = importlib.import_module(f"{name}.client")
        self.client = client.AuthenticatedClient(
            base_url=base_url,
            token=os.environ.get("BNLENET_API_KEY", "any"),
            raise_on_unexpected_status=True,
        )
        self.modules = {
            operation[
                "operationId"
            ]: f"{name}.api.{tag.lower().replace(' ', '_')}.{operation['operationId']}"
            for operations in document["paths"].values()
            for operation in operations.values()
            for tag in operation["tags"]
        }

    def __call__(self, operation: str, **arguments: Any) -> Any:
        """Call an operation; return what the client makes of the answer."""
        module = importlib.import_module(self.modules[operation])
        answer = module.sync_detailed(client=self.client, **arguments)
        assert answer.status_code == 200, answer.content
        return answer.parsed

    def file(self, content: bytes, name: str = "") -> Any:
        return self.types.File(payload=BytesIO(content), file_name=name)


@pytest.fixture(scope="module")
def generated(base_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generated]:
    folder = tmp_path_factory.mktemp("client")
    document = httpx.get(f"{base_url}/openapi.json").json()
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    command += ["--path", "openapi.json", "--output-path", "generated_client"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    unsupported = {f"Unsupported content type image/{kind}" for kind in ("png", "jpeg", "webp")}
    told = {line for line in done.stdout.splitlines() if line.startswith(("Unsupp", "ERROR"))}
    assert told <= unsupported, done.stdout  # pictures go as a form
    sys.path.insert(0, str(folder))
    generated = Generated("generated_client", base_url, document)
    with generated.client:
        yield generated
    sys.path.remove(str(folder))


def inference(
    generated: Generated, data: Sequence[float] | None = None, size: int | None = None
) -> Any:
    """Return a request for one image, as numbers or as so many bytes after the JSON."""
    models, unset = generated.models, generated.types.UNSET
    parameters = models.InferenceInputParameters(binary_data_size=size) if size else unset
    tensor = models.InferenceInput(
        name=models.InferenceInputName.PIXELS,
        shape=[1, 1, 28, 28],
        datatype=models.InferenceInputDatatype.UINT8,
        data=unset if data is None else list(data),
        parameters=parameters,
    )
    return models.InferenceRequest(inputs=[tensor])


def test_every_operation_is_called(generated: Generated) -> None:
    models = generated.models
    numbers = inference(generated, [float(pixel) for pixel in PIXELS])  # as its annotation says
    calls: dict[str, dict[str, Any]] = {
        "predict": {"body": models.PredictionRequest(pixels=PIXELS.tolist())},
        **{plain: {} for plain in ("server_metadata", "server_live", "server_ready", "statistics")},
        **{plain: {} for plain in ("livez", "readyz", "prometheus")},
        "repository_index": {"body": models.IndexRequest(ready=True)},
        "infer": {**MODEL, "body": numbers},
        "infer_of_version": {**VERSION, "body": numbers},
    }
    for operation in ("model_metadata", "model_ready", "model_config", "model_statistics"):
        calls |= {operation: MODEL, f"{operation}_of_version": VERSION}
    assert calls.keys() == generated.modules.keys()
    for operation, arguments in calls.items():
        assert generated(operation, **arguments) is not None, operation


def test_every_form_gives_the_same_answer(generated: Generated) -> None:
    models = generated.models
    image = BytesIO()
    Image.fromarray(PIXELS.reshape(28, 28)).save(image, "PNG")
    bodies = [
        models.PredictionRequest(pixels=PIXELS.reshape(28, 28).tolist()),
        models.PredictionForm(image=generated.file(image.getvalue(), "shirt.png")),
        generated.file(PIXELS.tobytes()),
    ]
    answers = [generated("predict", body=body, top_k=10) for body in bodies]
    by_class = {p.class_id: p.probability for p in answers[0].predictions}
    for answer in answers:
        assert {p.class_id: p.probability for p in answer.predictions} == by_class

    text = json.dumps(inference(generated, size=784).to_dict()).encode()
    binary = generated.file(text + PIXELS.tobytes())
    length = {"inference_header_content_length": len(text)}
    for answer in (
        generated("infer", **MODEL, body=inference(generated, PIXELS.tolist())),
        generated("infer", **MODEL, body=binary, **length),
    ):
        assert answer.outputs[0].data == [by_class[i] for i in range(10)]


def test_refusals_are_the_documented_error(generated: Generated) -> None:
    module = importlib.import_module(generated.modules["infer"])
    answer = module.sync_detailed(
        client=generated.client, **MODEL, body=inference(generated, [0.5] * 784)
    )
    assert (answer.status_code, answer.parsed.code) == (
        400,
        generated.models.ErrorCode.INVALID_INPUT,
    )
