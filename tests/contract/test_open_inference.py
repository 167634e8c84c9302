"""Other vendors' clients work unmodified."""

import asyncio
import json
import re
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from tests.contract.conftest import Serve
from training.dataset import CLASS_NAMES, FashionMNIST

Pixels = NDArray[np.uint8]
INFER = "/v2/models/bn-lenet/infer"


@pytest.fixture(scope="session")
def images(fashion_mnist: FashionMNIST) -> Pixels:
    """Return the first real test images, uint8 [64, 1, 28, 28]."""
    return fashion_mnist.test.images[:64, None]


@pytest.fixture(scope="session")
def predicted(client: httpx.Client, images: Pixels) -> NDArray[np.float32]:
    """Return the answers of `POST /predict`, float32 [64, 10]."""
    headers = {"content-type": "application/octet-stream"}
    rows = []
    for image in images:
        answer = client.post("/predict", content=image.tobytes(), headers=headers).json()
        by_class = {p["class_id"]: p["probability"] for p in answer["predictions"]}
        rows.append([by_class[i] for i in range(10)])
    return np.array(rows, np.float32)


@pytest.fixture(scope="module")
def server(base_url: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(httpx.URL(base_url).netloc.decode()) as server:
        yield server


def given_input(pixels: Pixels, *, binary: bool = True, datatype: str = "UINT8") -> Any:
    tensor = triton.InferInput("pixels", list(pixels.shape), datatype)
    values = pixels.astype(np.float32) if datatype == "FP32" else pixels
    return tensor.set_data_from_numpy(values, binary_data=binary)


def wanted_output(*, binary: bool = True, class_count: int = 0) -> list[Any]:
    return [triton.InferRequestedOutput("probabilities", binary, class_count)]


COMPRESSION = [None, "gzip", "deflate"]


@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
def test_every_form_gives_the_bits_of_predict(
    server: triton.InferenceServerClient,
    images: Pixels,
    predicted: NDArray[np.float32],
    datatype: str,
    binary_input: bool,
    binary_output: bool,
) -> None:
    for image, expected in zip(images, predicted, strict=True):
        result = server.infer(
            "bn-lenet",
            [given_input(image[None], binary=binary_input, datatype=datatype)],
            outputs=wanted_output(binary=binary_output),
        )
        probabilities = result.as_numpy("probabilities")
        assert probabilities.dtype == np.float32
        assert np.array_equal(probabilities, expected[None])


@pytest.mark.parametrize("packed", COMPRESSION)
@pytest.mark.parametrize("answered", COMPRESSION)
@pytest.mark.parametrize("binary", [True, False])
def test_a_batch_gives_the_same_bits_compressed_or_not(
    server: triton.InferenceServerClient,
    images: Pixels,
    predicted: NDArray[np.float32],
    packed: str | None,
    answered: str | None,
    binary: bool,
) -> None:
    result = server.infer(
        "bn-lenet",
        [given_input(images, binary=binary)],
        model_version="1",
        outputs=wanted_output(binary=binary),
        request_id="a batch",
        request_compression_algorithm=packed,
        response_compression_algorithm=answered,
        priority=1,
        timeout=1_000_000,
        parameters={"own": "parameter"},
    )
    assert np.array_equal(result.as_numpy("probabilities"), predicted)
    head = result.get_response()
    assert (head["id"], head["model_name"], head["model_version"]) == ("a batch", "bn-lenet", "1")


def test_without_outputs_everything_comes_in_binary(
    server: triton.InferenceServerClient, images: Pixels, predicted: NDArray[np.float32]
) -> None:
    """The client asks for binary output with a parameter of the request."""
    result = server.infer("bn-lenet", [given_input(images)])
    assert result.get_output("probabilities")["parameters"] == {"binary_data_size": 64 * 40}
    assert np.array_equal(result.as_numpy("probabilities"), predicted)


@pytest.mark.parametrize("binary", [True, False])
def test_classification(
    server: triton.InferenceServerClient,
    images: Pixels,
    predicted: NDArray[np.float32],
    binary: bool,
) -> None:
    outputs = wanted_output(binary=binary, class_count=3)
    result = server.infer("bn-lenet", [given_input(images)], outputs=outputs)
    texts = result.as_numpy("probabilities")
    assert texts.shape == (64, 3)
    for row, probabilities in zip(texts, predicted, strict=True):
        best = np.argsort(-probabilities, kind="stable")[:3]
        for text, i in zip(row, best, strict=True):
            value, index, label = (text.decode() if binary else text).split(":")
            assert np.float32(value) == probabilities[i]
            assert (int(index), label) == (i, CLASS_NAMES[i])


def test_what_tritons_image_client_does(
    server: triton.InferenceServerClient, images: Pixels, predicted: NDArray[np.float32]
) -> None:
    """It reads metadata and configuration to learn what to send, then classifies."""
    metadata = server.get_model_metadata("bn-lenet", "1")
    config = server.get_model_config("bn-lenet", "1")
    (tensor,), (answered,), (form,) = metadata["inputs"], metadata["outputs"], config["input"]
    assert config["max_batch_size"] > 0
    assert form["format"] == "FORMAT_NCHW"
    _, channels, height, width = tensor["shape"]
    batch = images[:8].reshape(-1, channels, height, width)
    request = triton.InferInput(tensor["name"], list(batch.shape), tensor["datatype"])
    request.set_data_from_numpy(batch.astype(triton_to_np_dtype(tensor["datatype"])))
    output = triton.InferRequestedOutput(answered["name"], class_count=1)
    results = server.infer("bn-lenet", [request], outputs=[output], model_version="1")
    labels = [row[0].decode().split(":")[2] for row in results.as_numpy(answered["name"])]
    assert labels == [CLASS_NAMES[i] for i in predicted[:8].argmax(axis=1)]


def test_health_metadata_and_index(server: triton.InferenceServerClient) -> None:
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready("bn-lenet")
    assert server.is_model_ready("bn-lenet", "1")
    assert not server.is_model_ready("bn-lenet", "2")
    assert not server.is_model_ready("other")
    assert "binary_tensor_data" in server.get_server_metadata()["extensions"]
    assert [m["name"] for m in server.get_model_repository_index()] == ["bn-lenet"]


def test_statistics_are_true_counts(server: triton.InferenceServerClient, images: Pixels) -> None:
    def statistics(**model: str) -> Any:
        (one,) = server.get_inference_statistics(**model)["model_stats"]
        return one

    before = statistics()
    for count in (1, 2, 64):
        server.infer("bn-lenet", [given_input(images[:count])])
    after = statistics(model_name="bn-lenet", model_version="1")
    assert after["inference_count"] - before["inference_count"] == 67
    assert after["execution_count"] - before["execution_count"] == 3
    old, new = before["inference_stats"], after["inference_stats"]
    for stage in ("success", "compute_input", "compute_infer", "compute_output"):
        assert new[stage]["count"] - old[stage]["count"] == 3
        assert new[stage]["ns"] > old[stage]["ns"]
    assert abs(after["last_inference"] / 1e3 - time.time()) < 60


@pytest.mark.parametrize("workers", [1, 2])
def test_the_stages_have_equal_counts_at_any_moment(serve: Serve, workers: int) -> None:
    """`perf_analyzer` stops if they differ."""
    body = {
        "inputs": [
            {"name": "pixels", "shape": [1, 1, 28, 28], "datatype": "UINT8", "data": [0] * 784}
        ]
    }
    with serve(workers=workers) as (address, _), ThreadPoolExecutor(8) as clients:

        def ask(_: int) -> None:
            with httpx.Client(base_url=address, timeout=60) as client:
                for _ in range(10):
                    client.post(INFER, json=body).raise_for_status()

        sent = [clients.submit(ask, i) for i in range(16)]
        answered: list[int] = []
        with httpx.Client(base_url=address, timeout=60) as client:
            while not answered or not all(one.done() for one in sent):
                (model,) = client.get("/v2/models/stats").json()["model_stats"]
                stages = model["inference_stats"]
                counts = {
                    stages[name]["count"]
                    for name in ("compute_input", "compute_infer", "compute_output", "queue")
                }
                assert len(counts) == 1
                answered += counts
            (model,) = client.get("/v2/models/stats").json()["model_stats"]
        for one in sent:
            one.result()
    assert answered == sorted(answered)
    stages = model["inference_stats"]
    assert stages["compute_infer"]["count"] == model["inference_count"] == 160
    batches = model["batch_stats"]
    assert sum(b["compute_infer"]["count"] for b in batches) == model["execution_count"]
    assert sum(b["batch_size"] * b["compute_infer"]["count"] for b in batches) == 160


def test_statistics_are_those_of_all_workers(serve: Serve) -> None:
    body = {
        "inputs": [
            {"name": "pixels", "shape": [2, 1, 28, 28], "datatype": "UINT8", "data": [0] * 1568}
        ]
    }
    with serve(workers=2) as (address, _):
        for _ in range(20):  # with new connections, so that both workers get some
            assert httpx.post(address + INFER, json=body).status_code == 200
        for _ in range(5):
            (counted,) = httpx.get(f"{address}/v2/models/stats").json()["model_stats"]
            assert (counted["inference_count"], counted["execution_count"]) == (40, 20)


@pytest.mark.parametrize(
    ("model", "version", "status", "says"),
    [("other", "", "404", "bn-lenet"), ("bn-lenet", "2", "404", "only 1")],
)
def test_unknown_models_and_versions(
    server: triton.InferenceServerClient,
    images: Pixels,
    model: str,
    version: str,
    status: str,
    says: str,
) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: server.infer(model, [given_input(images)], model_version=version),
        lambda: server.get_model_metadata(model, version),
        lambda: server.get_model_config(model, version),
        lambda: server.get_inference_statistics(model, version),
    ]
    for call in calls:
        with pytest.raises(InferenceServerException, match=says) as refused:
            call()
        assert refused.value.status() == status


def test_wrong_requests_are_explained(server: triton.InferenceServerClient, images: Pixels) -> None:
    scaled = triton.InferInput("pixels", [1, 1, 28, 28], "FP32")
    scaled.set_data_from_numpy((images[:1] / 255).astype(np.float32))
    named = triton.InferInput("input", [1, 1, 28, 28], "UINT8")
    named.set_data_from_numpy(images[:1])
    memory = triton.InferInput("pixels", [1, 1, 28, 28], "UINT8")
    memory.set_shared_memory("region", 784)
    empty = triton.InferInput("pixels", [0, 1, 28, 28], "UINT8")
    empty.set_data_from_numpy(images[:0])
    whole, once = [given_input(images)], wanted_output()
    unknown = [triton.InferRequestedOutput("logits")]
    many = given_input(np.zeros((257, 1, 28, 28), np.uint8))
    cases: list[tuple[list[Any], list[Any] | None, str]] = [
        ([scaled], None, "0 to 255"),
        ([named], None, "`pixels`"),
        ([memory], None, "[Ss]hared memory"),
        ([empty], None, "n from 1"),
        ([many], None, "256"),
        (whole * 2, None, "once"),
        (whole, once * 2, "once"),
        (whole, unknown, "`probabilities`"),
        ([], None, "`pixels`"),
    ]
    for inputs, outputs, says in cases:
        with pytest.raises(InferenceServerException, match=says) as refused:
            server.infer("bn-lenet", inputs, outputs=outputs)
        assert refused.value.status() == "400"


def test_the_asyncio_client(base_url: str, images: Pixels, predicted: NDArray[np.float32]) -> None:
    """It decompresses answers itself, but only those of inference."""

    async def talk() -> None:
        address = httpx.URL(base_url).netloc.decode()
        async with triton_aio.InferenceServerClient(address) as server:
            assert await server.is_server_live()
            assert await server.is_server_ready()
            assert await server.is_model_ready("bn-lenet")
            assert (await server.get_server_metadata())["name"]
            assert (await server.get_model_metadata("bn-lenet"))["versions"] == ["1"]
            assert (await server.get_model_config("bn-lenet"))["max_batch_size"] == 256
            assert (await server.get_inference_statistics())["model_stats"]
            assert await server.get_model_repository_index()
            results = await asyncio.gather(
                *(
                    server.infer(
                        "bn-lenet",
                        [given_input(images, binary=binary)],
                        outputs=wanted_output(binary=binary),
                        request_compression_algorithm=packed,
                        response_compression_algorithm=answered,
                    )
                    for binary in (True, False)
                    for packed in COMPRESSION
                    for answered in COMPRESSION
                )
            )
            for result in results:
                assert np.array_equal(result.as_numpy("probabilities"), predicted)
            outputs = [triton.InferRequestedOutput("logits")]
            with pytest.raises(InferenceServerException, match="`probabilities`"):
                await server.infer("bn-lenet", [given_input(images)], outputs=outputs)

    asyncio.run(talk())


def message(pixels: Pixels, **extra: Any) -> dict[str, Any]:
    tensor = {"name": "pixels", "shape": list(pixels.shape), "datatype": "UINT8"}
    return {"inputs": [{**tensor, "data": pixels.tolist()}], **extra}


@pytest.mark.parametrize(
    "extra",
    [
        {"id": "1f"},
        {"id": None, "parameters": None, "outputs": None},
        {"parameters": {"content_type": "np", "headers": {}}, "outputs": []},
        {"model_name": "bn-lenet", "model_version": None},
    ],
)
def test_requests_of_other_clients_are_understood(
    client: httpx.Client, images: Pixels, predicted: NDArray[np.float32], extra: dict[str, Any]
) -> None:
    """KServe's and MLServer's clients add fields, or send them as null."""
    document = message(images[:4], **extra)
    document["inputs"][0]["parameters"] = {"content_type": "np"}
    answer = client.post(INFER, json=document).raise_for_status().json()
    assert np.array_equal(answer["outputs"][0]["data"], predicted[:4].ravel().astype(float))
    assert answer.get("id") == extra.get("id")
    assert None not in answer.values()


def test_a_request_without_content_type_is_served(base_url: str, images: Pixels) -> None:
    body = json.dumps(message(images[:1])).encode()
    request = httpx.Request("POST", base_url + INFER, content=body)
    assert "content-type" not in request.headers
    with httpx.Client() as client:
        assert client.send(request).status_code == 200


def test_a_raw_body_is_answered_in_binary(
    client: httpx.Client, images: Pixels, predicted: NDArray[np.float32]
) -> None:
    headers = {"inference-header-content-length": "0", "accept-encoding": "identity"}
    answer = client.post(INFER, content=images[0].tobytes(), headers=headers)
    assert answer.headers["content-type"] == "application/octet-stream"
    length = int(answer.headers["inference-header-content-length"])
    assert answer.content[length:] == predicted[0].tobytes()


def test_the_json_length_of_a_compressed_body_is_the_unpacked_one(
    client: httpx.Client, images: Pixels, predicted: NDArray[np.float32]
) -> None:
    document = message(images)
    tensor = document["inputs"][0]
    del tensor["data"]
    tensor["parameters"] = {"binary_data_size": images.size}
    text = json.dumps(document).encode()
    headers = {"inference-header-content-length": str(len(text)), "content-encoding": "deflate"}
    body = zlib.compress(text + images.tobytes())
    answer = client.post(INFER, content=body, headers=headers).raise_for_status()
    assert np.array_equal(answer.json()["outputs"][0]["data"], predicted.ravel().astype(float))


@given(st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_never_fails_the_server(client: httpx.Client, data: st.DataObject) -> None:
    """A damaged request gets an answer or a refusal at once."""
    sound = json.dumps(message(np.zeros((1, 1, 28, 28), np.uint8), id="1")).encode()
    begin = data.draw(st.integers(0, len(sound)))
    end = data.draw(st.integers(begin, min(len(sound), begin + 40)))
    body = sound[:begin] + data.draw(st.binary(max_size=8)) + sound[end:]
    headers = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "inference-header-content-length": st.integers(-1, 4_000).map(str),
                "content-encoding": st.sampled_from(["gzip", "deflate", "identity", "br"]),
                "content-type": st.sampled_from(["application/json", "text/plain", ";"]),
            },
        )
    )
    answer = client.post(INFER, content=body, headers=headers)
    if answer.status_code == 200:
        assert answer.json()["outputs"][0]["shape"] == [1, 10]
    else:
        assert 400 <= answer.status_code < 500
        assert list(answer.json()) == ["error", "code", "request_id"]
        assert re.fullmatch(r"[A-Z`][^\n]*\.", answer.json()["error"])
