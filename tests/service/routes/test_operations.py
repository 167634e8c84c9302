"""Health describes the process, readiness describes traffic."""

import json
import re
from collections.abc import Callable

import pytest

from service.http.gate import Gate
from service.model.classifier import Classifier
from tests.service.conftest import BYTES, Conversation, ask

pytestmark = pytest.mark.anyio


async def get(app: Gate, target: str) -> Conversation:
    return await ask(app, b"", method="GET", target=target)


async def test_readiness_names_the_model_and_its_provider(
    make_app: Callable[..., Gate], classifier: Classifier
) -> None:
    ready = json.loads((await get(make_app(), "/readyz")).body)
    model = {
        "name": "bn-lenet",
        "version": "1",
        "revision": classifier.info.revision,
        "provider": "CPUExecutionProvider",
        "test_accuracy": "0.1000",
    }
    assert ready == {"status": "ready", "model": model, "picture_model": model}


async def test_a_draining_server_is_alive_but_not_ready(make_app: Callable[..., Gate]) -> None:
    app = make_app()
    app.admission.draining = True
    assert (await get(app, "/livez")).status == 200
    refused = await get(app, "/readyz")
    assert refused.status == 503
    assert json.loads(refused.body)["code"] == "not_ready"
    assert (await ask(app, b"", method="HEAD", target="/readyz")).status == 503
    assert (await ask(app)).status == 200


async def test_requests_in_flight_are_shown(make_app: Callable[..., Gate]) -> None:
    """A request is in flight once it has arrived completely."""
    app = make_app()
    requests = [Conversation(app, send_headers=BYTES) for _ in range(2)]
    requests[0].send(bytes(783))
    requests[1].send(bytes(784))
    text = (await get(app, "/metrics")).body
    assert b"\nhttp_requests_in_flight 0.0\n" in text  # it was answered before this one
    app.admission.in_flight = 1
    assert b"\nhttp_requests_in_flight 1.0\n" in (await get(app, "/metrics")).body
    requests[0].leave()
    answer = await get(app, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")


async def test_metrics_have_the_form_that_the_client_accepts(make_app: Callable[..., Gate]) -> None:
    accept = {"Accept": "application/openmetrics-text;version=1.0.0"}
    answer = await ask(make_app(), b"", method="GET", target="/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.body.endswith(b"\n# EOF\n")


@pytest.mark.parametrize("kind", ["application/openmetrics-text", "text/plain"])
async def test_metrics_of_an_unknown_version_are_answered(
    make_app: Callable[..., Gate], kind: str
) -> None:
    """Newer versions of Prometheus's own library raise an error at such a version."""
    accept = {"Accept": f"{kind};version=latest"}
    answer = await ask(make_app(), b"", method="GET", target="/metrics", headers=accept)
    assert answer.status == 200
    plain, older = "text/plain; version=0.0.4", "application/openmetrics-text; version=1.0.0"
    assert answer.headers["content-type"].startswith((plain, older))


async def test_every_stage_of_a_prediction_is_counted(make_app: Callable[..., Gate]) -> None:
    app = make_app()
    for _ in range(3):
        await ask(app)
    await ask(app, bytes(783))  # refused before the first stage ends
    text = (await get(app, "/metrics")).body.decode()
    for stage in ("decode", "queue", "inference", "encode"):
        assert f"\nbnlenet_{stage}_duration_seconds_count 3.0\n" in text
        (seconds,) = re.findall(rf"^bnlenet_{stage}_duration_seconds_sum (.*)$", text, re.MULTILINE)
        assert float(seconds) > 0 or stage == "queue"  # a request that is alone does not wait
    stats = json.loads((await get(app, "/v2/models/bn-lenet/stats")).body)["model_stats"][0]
    counts = {stage: each["count"] for stage, each in stats["inference_stats"].items()}
    assert counts == {
        **dict.fromkeys(("success", "compute_input", "queue"), 3),
        **dict.fromkeys(("compute_infer", "compute_output"), 3),
        "fail": 1,
        **dict.fromkeys(("cache_hit", "cache_miss"), 0),
    }


async def test_refusals_are_counted_by_their_code(make_app: Callable[..., Gate]) -> None:
    app = make_app()
    await ask(app, bytes(783))
    await ask(app, b"{", headers={"Content-Type": "application/json"})
    await get(app, "/nothing")
    await get(app, "/v2/models/another")
    text = (await get(app, "/metrics")).body.decode()
    assert '\nbnlenet_rejected_total{reason="not_found"} 1.0\n' in text
    assert '\nbnlenet_rejected_total{reason="unknown_model"} 1.0\n' in text
    assert '\nbnlenet_rejected_total{reason="invalid_input"} 1.0\n' in text
    assert '\nbnlenet_rejected_total{reason="malformed_json"} 1.0\n' in text


async def test_a_request_whose_client_left_is_counted_as_499(
    make_app: Callable[..., Gate],
) -> None:
    app = make_app()
    gone = Conversation(app, send_headers=BYTES)
    gone.leave()
    await gone.answer()
    text = (await get(app, "/metrics")).body.decode()
    assert 'http_requests_total{method="POST",route="/predict",status="499"} 1.0' in text
