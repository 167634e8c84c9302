"""`POST /predict` gives the answers of ONNX Runtime, for every form of body."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.contract.conftest import ROOT
from training.dataset import CLASS_NAMES, FashionMNIST

COUNT = 1_000
Request = dict[str, Any]
Pixels = NDArray[np.uint8]


def png(image: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def as_bytes(image: Pixels) -> Request:
    return {"content": image.tobytes(), "headers": {"content-type": "application/octet-stream"}}


def as_rows(image: Pixels) -> Request:
    return {"json": {"pixels": image.tolist()}}


def as_flat(image: Pixels) -> Request:
    return {"json": {"pixels": image.ravel().tolist()}}


def as_png(image: Pixels) -> Request:
    return {"content": png(image), "headers": {"content-type": "image/png"}}


def as_form(image: Pixels) -> Request:
    return {"files": {"image": ("boot.png", png(image), "image/png")}}


FORMS = [as_bytes, as_rows, as_flat, as_png, as_form]


@pytest.fixture(scope="session")
def images(fashion_mnist: FashionMNIST) -> Pixels:
    return fashion_mnist.test.images[:COUNT]


@pytest.fixture(scope="session")
def offline(images: Pixels) -> NDArray[np.float32]:
    """Probabilities of the images, float32 [n, 10], from ONNX Runtime's defaults."""
    session = onnxruntime.InferenceSession(ROOT / "models" / "bn_lenet.onnx")
    return session.run(None, {"pixels": images[:, None]})[0]  # type: ignore[no-any-return] # untyped


def probabilities(answer: Any) -> NDArray[np.float64]:
    """Return an answer's probabilities by class id."""
    by_class = {p["class_id"]: p["probability"] for p in answer["predictions"]}
    return np.array([by_class[i] for i in range(10)])


@pytest.mark.parametrize(
    ("form", "count"), [(as_bytes, COUNT), *((form, COUNT // 5) for form in FORMS[1:])]
)
def test_the_first_test_images_get_the_offline_answers(
    client: httpx.Client,
    images: Pixels,
    offline: NDArray[np.float32],
    form: Callable[[Pixels], Request],
    count: int,
) -> None:
    answers = [
        client.post("/predict", **form(image)).raise_for_status().json() for image in images[:count]
    ]
    assert [a["class_id"] for a in answers] == offline[:count].argmax(axis=1).tolist()
    served = np.stack([probabilities(a) for a in answers])
    np.testing.assert_allclose(served, offline[:count], rtol=0, atol=1e-5)
    assert {a["preprocessing"] for a in answers} == {"none"}


def test_every_form_gives_the_same_bits(client: httpx.Client, images: Pixels) -> None:
    for image in images[:20]:
        answers = [client.post("/predict", **form(image)).content for form in FORMS]
        assert len(set(answers)) == 1


def test_the_answer_has_the_documented_shape(client: httpx.Client, images: Pixels) -> None:
    response = client.post("/predict", **as_rows(images[0]))
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert list(answer) == [
        *("class_id", "label", "confidence", "predictions", "preprocessing", "model")
    ]
    ranked = answer["predictions"]
    assert [p["probability"] for p in ranked] == sorted(
        (p["probability"] for p in ranked), reverse=True
    )
    assert sum(p["probability"] for p in ranked) == pytest.approx(1, abs=1e-6)
    assert sorted(p["class_id"] for p in ranked) == list(range(10))
    assert all(p["label"] == CLASS_NAMES[p["class_id"]] for p in ranked)
    best = {"class_id": answer["class_id"], "label": answer["label"]}
    assert ranked[0] == {**best, "probability": answer["confidence"]}
    assert set(answer["model"]) == {"name", "version", "revision"}


def test_probabilities_are_whole_float32_values(client: httpx.Client, images: Pixels) -> None:
    """JSON carries exact float32 values, not rounded ones."""
    served = probabilities(client.post("/predict", **as_bytes(images[0])).json())
    assert np.array_equal(served.astype(np.float32).astype(np.float64), served)


@pytest.mark.parametrize("top_k", range(1, 11))
def test_top_k_lists_so_many(client: httpx.Client, images: Pixels, top_k: int) -> None:
    all_ten = client.post("/predict", **as_bytes(images[1])).json()
    answer = client.post(f"/predict?top_k={top_k}", **as_bytes(images[1])).json()
    assert answer == {**all_ten, "predictions": all_ten["predictions"][:top_k]}


def test_echo_returns_what_the_model_saw(client: httpx.Client, images: Pixels) -> None:
    for form in FORMS:
        answer = client.post("/predict?echo=pixels", **form(images[2])).json()
        assert answer["pixels"] == images[2].tolist()


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", lambda b: zlib.compress(b, wbits=-15)),
        ("identity", bytes),
    ],
)
def test_content_encodings_are_undone(
    client: httpx.Client, images: Pixels, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    body = pack(json.dumps({"pixels": images[3].tolist()}).encode())
    headers = {"content-type": "application/json", "content-encoding": encoding}
    answer = client.post("/predict", content=body, headers=headers)
    assert answer.content == client.post("/predict", **as_bytes(images[3])).content


def test_a_chunked_body_is_read_to_its_end(client: httpx.Client, images: Pixels) -> None:
    pieces = (images[4].tobytes()[i : i + 100] for i in range(0, 784, 100))
    headers = {"content-type": "application/octet-stream"}
    answer = client.post("/predict", content=pieces, headers=headers)
    assert answer.content == client.post("/predict", **as_bytes(images[4])).content


@pytest.mark.parametrize(
    "content_type",
    ["APPLICATION/JSON", "application/json; charset=utf-8", "application/json ;charset=utf-8"],
)
def test_content_types_follow_http(client: httpx.Client, images: Pixels, content_type: str) -> None:
    body = json.dumps({"pixels": images[5].tolist()}, indent=2)
    answer = client.post("/predict", content=body, headers={"content-type": content_type})
    assert answer.status_code == 200


def test_a_valid_request_id_is_returned_and_others_are_replaced(
    client: httpx.Client, images: Pixels
) -> None:
    request = as_bytes(images[0])
    ids = [client.post("/predict", **request).headers["x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    for own in ("7b0f7c9a-0000-4000-8000-000000000000", "trace:1/2"):
        answer = client.post(
            "/predict", **{**request, "headers": {**request["headers"], "x-request-id": own}}
        )
        assert answer.headers["x-request-id"] == own
    for unsound in ("x" * 129, "a b", 'a"b', "ä"):
        headers = {**request["headers"], "x-request-id": unsound.encode("utf-8")}
        answer = client.post("/predict", **{**request, "headers": headers})
        assert answer.status_code == 200
        assert re.fullmatch(r"[0-9a-f]{12}-[0-9a-f]+", answer.headers["x-request-id"])
