"""The protocol's routes describe the model correctly, and run it like `/predict`."""

import gzip
import json
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service.app import create_app
from service.http.gate import Gate
from service.model.classifier import Classifier
from service.routes import bodies, prediction, tensors
from service.settings import Settings
from tests.service.conftest import Conversation, ask, through_framework

pytestmark = pytest.mark.anyio
MakeApp = Callable[..., Gate]
MODEL = "/v2/models/bn-lenet"
PATHS = [MODEL, f"{MODEL}/versions/1"]
VERSIONS = pytest.mark.parametrize("path", PATHS)
JSON = {"Content-Type": "application/json"}
DATATYPES = {onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.FLOAT: "FP32"}


async def get(app: Gate, target: str, status: int = 200, **headers: str) -> Any:
    conversation = await ask(app, b"", method="GET", target=target, headers=headers)
    assert (conversation.status, conversation.headers["content-type"]) == (
        status,
        "application/json",
    )
    return json.loads(conversation.body)


def message(count: int = 1, **extra: Any) -> bytes:
    shape = [count, 1, 28, 28]
    pixels = (np.arange(784 * count) % 251).tolist()
    tensor = {"name": "pixels", "shape": shape, "datatype": "UINT8", "data": pixels}
    return json.dumps({"inputs": [tensor], **extra}).encode()


async def infer(app: Gate, body: bytes, path: str = MODEL, **headers: str) -> Conversation:
    return await ask(app, body, target=f"{path}/infer", headers={**JSON, **headers})


def signature(values: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": value.name,
            "datatype": DATATYPES[value.type.tensor_type.elem_type],
            "shape": [d.dim_value or -1 for d in value.type.tensor_type.shape.dim],
        }
        for value in values
    ]


async def test_the_server_lists_its_extensions(make_app: MakeApp) -> None:
    metadata = await get(make_app(), "/v2")
    assert set(metadata) == {"name", "version", "extensions"}
    assert sorted(metadata["extensions"]) == [
        *("binary_tensor_data", "classification", "model_configuration", "statistics")
    ]
    assert await get(make_app(), "/v2/") == metadata


@VERSIONS
async def test_metadata_and_configuration_are_those_of_the_file(
    make_app: MakeApp, classifier: Classifier, artefact: Path, path: str
) -> None:
    graph = onnx.load(artefact).graph
    metadata = await get(make_app(), path)
    assert metadata == {
        "name": "bn-lenet",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": signature(graph.input),
        "outputs": signature(graph.output),
        "properties": {
            "provider": "CPUExecutionProvider",
            "revision": classifier.info.revision,
        },
    }
    config = await get(make_app(), f"{path}/config")
    (given,), (answered,) = metadata["inputs"], metadata["outputs"]
    assert config["max_batch_size"] == 256
    assert config["input"] == [
        {
            "name": given["name"],
            "data_type": f"TYPE_{given['datatype']}",
            "format": "FORMAT_NCHW",
            "dims": given["shape"][1:],
        }
    ]
    assert [tensor["dims"] for tensor in config["output"]] == [answered["shape"][1:]]


@VERSIONS
async def test_draining_changes_only_readiness(make_app: MakeApp, path: str) -> None:
    app = make_app()
    assert await get(app, "/v2/health/ready") == {"ready": True}
    assert await get(app, f"{path}/ready") == {"name": "bn-lenet", "ready": True}
    app.admission.draining = True
    assert (await get(app, "/v2/health/ready", 503))["code"] == "not_ready"
    assert (await get(app, f"{path}/ready", 503))["code"] == "not_ready"
    assert await get(app, "/v2/health/live") == {"live": True}
    assert (await infer(app, message(), path)).status == 200


@pytest.mark.parametrize("tail", ["", "/ready", "/config", "/stats", "/infer"])
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v2/models/other", "unknown_model"),
        ("/v2/models/other/versions/1", "unknown_model"),
        (f"{MODEL}/versions/2", "unknown_version"),
        (f"{MODEL}/versions/01", "unknown_version"),
    ],
)
async def test_other_models_and_versions_are_not_found(
    make_app: MakeApp, path: str, code: str, tail: str
) -> None:
    method = "POST" if tail == "/infer" else "GET"
    answer = await ask(make_app(), b"{}", method=method, target=path + tail)
    assert (answer.status, json.loads(answer.body)["code"]) == (404, code)
    assert "unknown model" in json.loads(answer.body)["error"]  # the words in NVIDIA's examples


@VERSIONS
async def test_a_wrong_method_gets_405_with_the_allowed_ones(make_app: MakeApp, path: str) -> None:
    answer = await ask(make_app(), b"", method="GET", target=f"{path}/infer")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


@VERSIONS
async def test_infer_gives_the_classifiers_own_bits(
    make_app: MakeApp, classifier: Classifier, path: str
) -> None:
    answer = await infer(make_app(), message(3, id="x"), path)
    pixels = (np.arange(784 * 3) % 251).astype(np.uint8).reshape(3, 1, 28, 28)
    assert json.loads(answer.body) == {
        "model_name": "bn-lenet",
        "model_version": "1",
        "id": "x",
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [3, 10],
                "data": classifier.probabilities(pixels).ravel().tolist(),
            }
        ],
    }


async def test_the_framework_and_the_hot_path_give_the_same_answer(make_app: MakeApp) -> None:
    hot, documented = make_app(), through_framework(make_app())
    binary = message(outputs=[{"name": "probabilities", "parameters": {"binary_data": True}}])
    requests: list[dict[str, Any]] = [
        {"body": message(4), "headers": {"Accept-Encoding": "gzip"}},
        {"body": binary},
        {"body": bytes(784), "headers": {"Inference-Header-Content-Length": "0"}},
        {"body": b"{"},
        {"body": bytes(784)},
        {"headers": {"Content-Encoding": "br"}},
        {"target": "/v2/repository/index", "body": b'{"ready": true}'},
        {"target": "/v2/repository/index", "body": b"{"},
    ]
    for wanted in requests:
        headers = {"X-Request-ID": "same", **wanted.get("headers", {})}
        request = {"target": f"{MODEL}/infer", **wanted, "headers": headers}
        one, other = await ask(hot, **request), await ask(documented, **request)
        assert (one.status, one.body) == (other.status, other.body)
        assert one.headers == other.headers


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("GZIP;q=0.5, deflate", "gzip"),
        ("br, gzip;q=0, deflate ; q=1.0", "deflate"),
        ("gzip;q=0.000,deflate;q=0", None),
        ("br, zstd", None),
        ("identity", None),
        ("", None),
        (";;,,=", None),
    ],
)
async def test_answers_are_compressed_as_asked(
    make_app: MakeApp, accepted: str, encoding: str | None
) -> None:
    app = make_app()
    plain = await infer(app, message(8))
    answer = await infer(app, message(8), **{"Accept-Encoding": accepted})
    assert answer.headers.get("content-encoding") == encoding
    assert answer.headers["content-length"] == str(len(answer.body))
    undo: dict[str | None, Callable[[bytes], bytes]] = {
        "gzip": gzip.decompress,
        "deflate": zlib.decompress,
        None: bytes,
    }
    assert undo[encoding](answer.body) == plain.body


async def test_short_answers_and_errors_are_not_compressed(make_app: MakeApp) -> None:
    app = make_app()
    for body, status in [(message(), 200), (b"x", 400)]:
        answer = await infer(app, body, **{"Accept-Encoding": "gzip"})
        assert answer.status == status
        assert "content-encoding" not in answer.headers


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
async def test_compressed_requests_are_limited_by_their_unpacked_size(
    make_app: MakeApp, pack: Callable[[bytes], bytes]
) -> None:
    app = make_app(max_body_bytes=5_000)
    headers = {"Content-Encoding": "gzip" if pack is gzip.compress else "deflate"}
    assert (await infer(app, pack(message()), **headers)).status == 200
    assert (await infer(app, pack(message() + b" " * 5_000), **headers)).status == 413


@pytest.mark.parametrize("body", [b"", b"{}", b'{"ready": true}', b'{"ready": null}'])
async def test_the_index_lists_the_model(make_app: MakeApp, body: bytes) -> None:
    length = {"Content-Length": str(len(body))} if body else {}
    conversation = Conversation(make_app(), target="/v2/repository/index", send_headers=length)
    conversation.send(body)
    assert await conversation.answer() == [
        {"name": "bn-lenet", "version": "1", "state": "READY", "reason": ""}
    ]


@pytest.mark.parametrize(
    ("path", "limit"),
    [("/v2/repository/index", 1024), ("/v2/models/bn-lenet/infer", 2**22 + 256 * 784 * 4)],
)
@pytest.mark.parametrize("more", [0, 1])
async def test_a_route_has_a_limit_of_its_own(
    make_app: MakeApp, path: str, limit: int, more: int
) -> None:
    """Also where a larger BNLENET_MAX_BODY_BYTES allows more."""
    headers = {"Content-Type": "application/json", "Content-Length": str(limit + more)}
    conversation = Conversation(make_app(max_body_bytes=2**30), target=path, send_headers=headers)
    assert (conversation.status == 413) == bool(more)
    conversation.leave()


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"ready": 1}', b'{"ready": "yes"}', b"\xff"])
async def test_a_damaged_request_for_the_index_is_refused(make_app: MakeApp, body: bytes) -> None:
    answer = await ask(make_app(), body, target="/v2/repository/index")
    assert answer.status == 400


@pytest.mark.parametrize("path", [*PATHS, "/v2/models"])
async def test_statistics_count_every_route_that_runs_the_model(
    make_app: MakeApp, path: str
) -> None:
    app = make_app()
    (idle,) = (await get(app, f"{path}/stats"))["model_stats"]
    assert (idle["inference_count"], idle["last_inference"]) == (0, 0)
    assert {stage["count"] for stage in idle["inference_stats"].values()} == {0}

    for count in (1, 5):
        await infer(app, message(count))
    await infer(app, message(2), PATHS[1])
    await ask(app)  # one image to /predict
    await infer(app, b"{")
    await ask(app, bytes(3))
    for untold in ("/v2/models/other/infer", "/v2/repository/index"):
        await ask(app, b"[", target=untold)

    (busy,) = (await get(app, f"{path}/stats"))["model_stats"]
    assert (await get(app, f"{path}/stats"))["model_stats"] == [busy]  # reading changes nothing
    assert (busy["inference_count"], busy["execution_count"]) == (9, 4)
    stages = busy["inference_stats"]
    assert {name: stage["count"] for name, stage in stages.items()} == {
        **dict.fromkeys(("success", "queue", "compute_input", "compute_infer"), 4),
        "compute_output": 4,
        "fail": 2,
        "cache_hit": 0,
        "cache_miss": 0,
    }
    parts = sum(stages[n]["ns"] for n in ("compute_input", "compute_infer", "compute_output"))
    assert 0 < parts + stages["queue"]["ns"] < stages["success"]["ns"] < 60e9
    assert stages["compute_infer"]["ns"] > 1_000  # a run takes microseconds; this is in nanoseconds
    assert stages["fail"]["ns"] > 0


@pytest.mark.parametrize("target", ["/predict", f"{MODEL}/infer"])
async def test_each_stage_has_its_own_time(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """The test slows one stage by more than all others take; a busy machine only adds time."""

    def slowed(function: Any, seconds: float) -> Any:
        def slow(*arguments: Any, **options: Any) -> Any:
            time.sleep(seconds)
            return function(*arguments, **options)

        return slow

    routes = "service.routes"
    monkeypatch.setattr(f"{routes}.open_inference.decode", slowed(tensors.decode, 0.02))
    monkeypatch.setattr(f"{routes}.open_inference.encode", slowed(tensors.encode, 0.04))
    monkeypatch.setattr(f"{routes}.predict.read_body", slowed(bodies.read_body, 0.02))
    monkeypatch.setattr(prediction.Renderer, "__call__", slowed(prediction.Renderer.__call__, 0.04))
    monkeypatch.setattr(Classifier, "probabilities", slowed(Classifier.probabilities, 0.08))
    app = make_app()
    begin = time.perf_counter()
    body = bytes(784) if target == "/predict" else message()
    content = {"Content-Type": "application/octet-stream"} if target == "/predict" else JSON
    assert (await ask(app, body, target=target, headers=content)).status == 200
    taken = (time.perf_counter() - begin) * 1e9
    (stats,) = (await get(app, "/v2/models/stats"))["model_stats"]
    stages = {name: stage["ns"] for name, stage in stats["inference_stats"].items()}
    slept = {"compute_input": 20e6, "compute_infer": 80e6, "compute_output": 40e6}
    for stage, least in slept.items():
        assert least <= stages[stage] <= taken - (sum(slept.values()) - least)
    (batch,) = stats["batch_stats"]
    assert batch["batch_size"] == 1
    for stage in slept:
        assert batch[stage] == {"count": 1, "ns": stages[stage]}


async def test_a_set_model_name_is_used_everywhere(artefact: Path) -> None:
    """KServe's clients use the name of the service, not the name in the file."""
    app = create_app(Settings(), Classifier.load(artefact, name="garments"))
    assert (await infer(app, message(), "/v2/models/garments")).status == 200
    assert (await infer(app, message())).status == 404
    assert (await get(app, "/v2/models/garments"))["name"] == "garments"
    assert json.loads((await ask(app)).body)["model"]["name"] == "garments"
    assert (await get(app, "/readyz"))["model"]["name"] == "garments"
    (stats,) = (await get(app, "/v2/models/stats"))["model_stats"]
    assert (stats["name"], stats["inference_count"]) == ("garments", 2)
    metrics = await ask(app, b"", method="GET", target="/metrics")
    assert b'bnlenet_model_info{name="garments"' in metrics.body


async def test_the_documented_example_is_the_real_answer(make_app: MakeApp) -> None:
    app = make_app()
    paths = (await get(app, "/openapi.json"))["paths"]
    for template in ("", "/versions/{model_version}"):
        operation = paths[f"/v2/models/{{model_name}}{template}/infer"]["post"]
        request = operation["requestBody"]["content"]["application/json"]["example"]
        answer = operation["responses"]["200"]["content"]["application/json"]["example"]
        assert json.loads((await infer(app, json.dumps(request).encode())).body) == answer


async def test_only_health_is_open_without_the_key(make_app: MakeApp) -> None:
    app = make_app(api_key="opensesame")
    for path in ("/v2/health/live", "/v2/health/ready"):
        await get(app, path)
    for path in ("/v2", MODEL, f"{MODEL}/ready", f"{MODEL}/config", f"{MODEL}/stats"):
        await get(app, path, 401)
        await get(app, path, Authorization="Bearer opensesame")
    assert (await infer(app, message())).status == 401
    assert (await infer(app, message(), Authorization="Bearer opensesame")).status == 200
