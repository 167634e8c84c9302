"""What those who run the service rely on: health, readiness, metrics, documentation."""

import re

import httpx
import onnxruntime
import pytest

from tests.contract.conftest import ROOT


def test_health_and_readiness(client: httpx.Client) -> None:
    assert client.get("/livez").json() == {"status": "live"}
    ready = client.get("/readyz").json()
    assert ready["status"] == "ready"
    session = onnxruntime.InferenceSession(ROOT / "models" / "bn_lenet.onnx")
    metadata = session.get_modelmeta().custom_metadata_map
    assert ready["model"]["name"] == metadata["name"]
    assert ready["model"]["test_accuracy"] == metadata["test_accuracy"]
    assert ready["model"]["provider"] in {"CPUExecutionProvider", "CUDAExecutionProvider"}


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_load_balancers_may_ask_with_head(client: httpx.Client, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")
    assert client.get(path).status_code == 200  # the connection is still in step


def test_metrics_are_counted_by_route_method_and_status(client: httpx.Client) -> None:
    def count(status: int) -> float:
        pattern = rf'^http_requests_total{{method="POST",route="/predict",status="{status}"}} (.*)$'
        found = re.search(pattern, client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    good, bad = count(200), count(422)
    headers = {"content-type": "application/octet-stream"}
    for _ in range(3):
        client.post("/predict", content=bytes(784), headers=headers)
    for _ in range(2):
        client.post("/predict", content=bytes(783), headers=headers)
    assert (count(200) - good, count(422) - bad) == (3, 2)


def test_cardinality_is_bounded_whatever_clients_send(client: httpx.Client) -> None:
    def series() -> set[str]:
        lines = client.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def strange(i: int) -> None:
        client.get(f"/strange/{i}")
        client.request(f"STRANGE{i}" if i % 2 else "PURGE", "/predict")
        client.post("/predict", params={"top_k": i}, headers={"content-type": f"x/{i}"})

    strange(0)
    strange(1)
    before = series()
    for i in range(2, 12):
        strange(i)
    assert series() == before


def test_histograms_start_at_15_microseconds(client: httpx.Client) -> None:
    text = client.get("/metrics").text
    for name in ("bnlenet_inference_duration_seconds", "bnlenet_decode_duration_seconds"):
        bounds = re.findall(rf'^{name}_bucket{{le="(.*?)"}}', text, re.MULTILINE)
        assert bounds[:3] == ["1.5e-05", "3e-05", "4.5e-05"]


def test_the_documented_example_is_the_real_answer(client: httpx.Client) -> None:
    operation = client.get("/openapi.json").json()["paths"]["/predict"]["post"]
    request = operation["requestBody"]["content"]["application/json"]["example"]
    answer = operation["responses"]["200"]["content"]["application/json"]["example"]
    served = client.post(f"/predict?top_k={len(answer['predictions'])}", json=request)
    assert served.json() == answer


def test_the_documentation_is_served(client: httpx.Client) -> None:
    response = client.get("/docs")
    assert response.status_code == 200
    assert "openapi.json" in response.text
