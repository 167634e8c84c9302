"""The gate, tested with the whole application but without a network."""

import asyncio
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from service.http import admission as admission_module
from service.http import connection as connection_module
from service.http.exchange import Answer, Exchange
from service.http.gate import Gate, HotPath
from service.routes.bodies import body_limit
from tests.service.conftest import BYTES, Conversation, ask, through_framework

pytestmark = pytest.mark.anyio
MakeApp = Callable[..., Gate]
ORIGIN = "https://shop.example"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
KEY = {"Authorization": "Bearer opensesame"}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def never_ready(app: Gate) -> asyncio.Event:
    """Make `POST /predict` read the body and then wait for the event returned."""
    event = asyncio.Event()

    async def handler(exchange: Exchange) -> Answer:
        await exchange.body()
        await event.wait()
        return Answer(b"{}")

    app.hot_paths["POST", "/predict"] = HotPath(handler, body_limit)
    return event


async def test_fastapi_and_the_hot_path_give_the_same_answers(make_app: MakeApp) -> None:
    """FastAPI's route calls the same handler."""
    hot, documented = make_app(), through_framework(make_app())
    requests: list[dict[str, Any]] = [
        {},
        {"target": "/predict?top_k=3&echo=pixels"},
        {"target": "/predict?top_k=11"},
        {"body": bytes(783)},
        {"body": b"{", "headers": {"Content-Type": "application/json"}},
        {"headers": {"Content-Type": "text/plain"}},
        {"headers": {"Content-Length": "100000000"}},
        {"headers": {"Content-Encoding": "br"}},
    ]
    for wanted in requests:
        request = {**wanted, "headers": {"X-Request-ID": "same", **wanted.get("headers", {})}}
        one, other = await ask(hot, **request), await ask(documented, **request)
        assert (one.status, one.body) == (other.status, other.body)
        assert one.headers["content-type"] == other.headers["content-type"]
        assert one.headers.get("accept-encoding") == other.headers.get("accept-encoding")


async def test_every_hot_path_is_documented_and_routed(make_app: MakeApp) -> None:
    app = make_app()
    schema = app.application.openapi()  # type: ignore[attr-defined] # it is FastAPI
    for method, path in app.hot_paths:
        template = path.replace("/bn-lenet", "/{model_name}").replace("/1/", "/{model_version}/")
        assert method.lower() in schema["paths"][template]


class TestAdmission:
    async def test_a_request_over_the_limit_gets_503_at_once(self, make_app: MakeApp) -> None:
        app = make_app(max_in_flight=2)
        done = never_ready(app)
        inside = [Conversation(app, send_headers=BYTES) for _ in range(2)]
        for conversation in inside:
            conversation.send(bytes(784))
        await until(lambda: app.admission.in_flight == 2)
        refused = Conversation(app, send_headers=BYTES)
        refused.send(bytes(784))
        assert refused.status == 503  # without a turn of the event loop
        assert refused.headers["retry-after"] == "1"
        assert b'"code":"overloaded"' in refused.body
        assert (await ask(app, b"", method="GET", target="/readyz")).status == 200
        assert (await ask(app, b"", method="GET", target="/livez")).status == 200
        done.set()
        for conversation in inside:
            await conversation.answer()
            assert conversation.status == 200
        refused.leave()
        assert app.admission.in_flight == 0
        assert (await ask(app)).status == 200

    async def test_requests_are_admitted_when_they_arrive(self, make_app: MakeApp) -> None:
        """A burst waits in the event loop before it runs; what is over the limit is refused."""
        app = make_app(max_in_flight=3)
        burst = [Conversation(app, send_headers=BYTES) for _ in range(10)]
        for conversation in burst:
            conversation.send(bytes(784))
        for conversation in burst:
            await conversation.answer()
        assert [c.status for c in burst] == [200] * 3 + [503] * 7

    async def test_an_incomplete_request_is_not_in_flight(self, make_app: MakeApp) -> None:
        """Heads without bodies cost their sender little, and must not block others."""
        app = make_app(max_in_flight=1)
        halves = [Conversation(app, send_headers=BYTES) for _ in range(100)]
        for half in halves[50:]:
            half.send(bytes(783))
        assert app.admission.in_flight == 0
        assert (await ask(app)).status == 200
        halves[99].send(b"a")
        await halves[99].answer()
        assert halves[99].status == 200
        for half in halves:
            half.leave()

    async def test_a_slow_sender_is_evicted_to_free_memory(
        self, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Bodies that never end fill the budget; those of complete requests are not evicted."""
        monkeypatch.setattr(admission_module, "SLOW_AFTER_SECONDS", 0.05)
        app = make_app(max_body_bytes=1024)
        event = never_ready(app)
        budget = app.admission.budget.bytes_left
        headers = {**BYTES, "Content-Length": "1024"}
        whole = Conversation(app, send_headers=headers)
        whole.send(bytes(1024))
        slow = [Conversation(app, send_headers=headers) for _ in range(budget // 1024 - 1)]
        for conversation in slow:
            conversation.send(bytes(1023))
        refused = await ask(app)
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        await asyncio.sleep(0.06)
        other = Conversation(app, send_headers=BYTES)
        other.send(bytes(784))
        assert (await slow[0].answer())["code"] == "request_timeout"
        assert (slow[0].status, slow[0].headers["connection"]) == (408, "close")
        assert [c.status for c in (whole, slow[1], other)] == [0, 0, 0]
        event.set()
        await whole.answer()
        await other.answer()
        assert (whole.status, other.status) == (200, 200)
        for conversation in slow[1:]:
            conversation.leave()
        await until(lambda: app.admission.budget.bytes_left == budget)

    async def test_work_for_a_client_that_leaves_is_cancelled(
        self, make_app: MakeApp, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "service.access")
        app = make_app()
        never_ready(app)
        gone = Conversation(app, send_headers=BYTES)
        gone.send(bytes(784))
        await until(lambda: app.admission.in_flight == 1)
        gone.leave()
        await until(lambda: app.admission.in_flight == 0)
        await until(lambda: len(caplog.records) == 1)
        assert caplog.records[0].__dict__["fields"]["status"] == 499
        assert gone.status == 0

    @pytest.mark.parametrize("whole", [True, False])
    async def test_the_memory_of_a_client_that_leaves_is_freed(
        self, make_app: MakeApp, whole: bool
    ) -> None:
        app = make_app(max_in_flight=1)
        budget = app.admission.budget.bytes_left
        gone = Conversation(app, send_headers=BYTES)
        gone.send(bytes(784 if whole else 783))
        assert app.admission.budget.bytes_left < budget
        gone.leave()
        await until(lambda: app.admission.budget.bytes_left == budget)
        assert app.admission.in_flight == 0
        assert (await ask(app)).status == 200

    async def test_answered_requests_leave_no_objects(self, make_app: MakeApp) -> None:
        """No exchanges, connections or timers: memory would grow."""
        app = make_app()
        seen: list[weakref.ref[Any]] = []
        answer = app.answer

        async def watched(exchange: Exchange) -> Answer:
            seen.append(weakref.ref(exchange))
            return await answer(exchange)

        app.answer = watched  # type: ignore[method-assign] # to see what it is given
        for _ in range(20):
            conversation = await ask(app)
            seen.append(weakref.ref(conversation._connection))
            del conversation
        await asyncio.sleep(2 * admission_module.SWEEP_SECONDS)
        assert [ref() for ref in seen] == [None] * 40
        timers = [t for t in asyncio.get_running_loop()._scheduled if not t.cancelled()]  # type: ignore[attr-defined] # there is no public way
        assert timers == []


class TestDeadline:
    async def test_a_body_that_comes_too_slowly_is_408(self, make_app: MakeApp) -> None:
        app = make_app(request_timeout_seconds=0.2)
        slow = Conversation(app, send_headers=BYTES)
        begin = time.perf_counter()
        while not slow.closed and time.perf_counter() - begin < 5:
            slow.send(b"a")
            await asyncio.sleep(0.02)
        assert time.perf_counter() - begin >= 0.2
        assert (await slow.answer())["code"] == "request_timeout"
        assert slow.status == 408
        assert slow.headers["connection"] == "close"

    async def test_each_request_of_a_connection_has_its_own_deadline(
        self, make_app: MakeApp
    ) -> None:
        """Even when a part of the next request arrives before each answer."""
        conversation = Conversation(make_app(request_timeout_seconds=0.3), send_headers=BYTES)
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 784\r\n"
        head += b"Content-Type: application/octet-stream\r\n\r\n"
        for _ in range(8):
            conversation.send(bytes(784) + head)
            await asyncio.sleep(0.1)
        assert b"".join(conversation.transport.sent).count(b"HTTP/1.1 200 OK") == 8
        assert not conversation.transport.ended
        conversation.leave()

    async def test_no_body_at_all_is_408(self, make_app: MakeApp) -> None:
        slow = Conversation(make_app(request_timeout_seconds=0.1), send_headers=BYTES)
        assert (await slow.answer())["code"] == "request_timeout"

    async def test_work_that_takes_too_long_is_504(self, make_app: MakeApp) -> None:
        app = make_app(request_timeout_seconds=0.1)
        never_ready(app)
        refused = await ask(app)
        assert refused.status == 504
        assert b'"code":"deadline_exceeded"' in refused.body
        assert app.admission.in_flight == 0

    async def test_an_answer_that_is_ready_too_late_is_504(self, make_app: MakeApp) -> None:
        """Work that blocks the event loop cannot be cancelled, but its answer is still too late."""
        app = make_app(request_timeout_seconds=0.05)

        async def handler(exchange: Exchange) -> Answer:
            await exchange.body()
            time.sleep(0.06)  # noqa: ASYNC251 - blocks on purpose
            return Answer(b"{}")

        app.hot_paths["POST", "/predict"] = HotPath(handler, body_limit)
        assert (await ask(app)).status == 504


class TestKey:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 401),
            ({"Authorization": "opensesame"}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer opensesame2"}, 401),
            ({"Authorization": "Bearer opensesam"}, 401),
            ({"Authorization": "Bearer o"}, 401),
            ({"Authorization": "Bearer "}, 401),
            ({"Authorization": "Bearer"}, 401),
            ({"Authorization": "Bearer ä"}, 401),
            ({"Authorization": "Basic opensesame"}, 401),
            ({"Authorization": "bearer  opensesame "}, 200),  # RFC 9110, sections 5.5 and 11.4
            (KEY, 200),
        ],
    )
    async def test_predictions_need_the_key(
        self, make_app: MakeApp, headers: dict[str, str], status: int
    ) -> None:
        answer = await ask(make_app(api_key="opensesame"), headers=headers)
        assert answer.status == status
        assert ("www-authenticate" in answer.headers) == (status == 401)

    async def test_neither_the_key_nor_a_wrong_one_is_logged(
        self, make_app: MakeApp, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        app = make_app(api_key="opensesame")
        for key in ("opensesame", "openBARLEY"):
            for target in ("/predict", "/nothing"):
                await ask(app, target=target, headers={"Authorization": f"Bearer {key}"})
        assert len([r for r in caplog.records if r.name == "service.access"]) == 4
        logged = "".join(str(r.__dict__) for r in caplog.records)
        assert "opensesame" not in logged
        assert "BARLEY" not in logged

    @pytest.mark.parametrize("target", ["/livez", "/readyz", "/metrics", "/docs", "/openapi.json"])
    async def test_health_metrics_and_documentation_do_not_need_it(
        self, make_app: MakeApp, target: str
    ) -> None:
        answer = await ask(make_app(api_key="opensesame"), b"", method="GET", target=target)
        assert answer.status == 200

    async def test_all_other_paths_need_it_even_unknown_ones(self, make_app: MakeApp) -> None:
        app = make_app(api_key="opensesame")
        assert (await ask(app, b"", method="GET", target="/nothing")).status == 401
        answer = await ask(app, b"", method="GET", target="/nothing", headers=KEY)
        assert answer.status == 404

    async def test_without_the_setting_no_key_is_needed(self, make_app: MakeApp) -> None:
        assert (await ask(make_app())).status == 200


class TestCrossOrigin:
    async def test_it_is_off_by_default(self, make_app: MakeApp) -> None:
        answer = await ask(make_app(), headers={"Origin": ORIGIN})
        assert answer.status == 200
        assert not [name for name in answer.headers if name.startswith("access-control")]
        preflight = await ask(make_app(), b"", method="OPTIONS", headers=PREFLIGHT)
        assert preflight.status == 405

    async def test_a_listed_origin_may_call(self, make_app: MakeApp) -> None:
        app = make_app(cors_origins=(ORIGIN,), api_key="opensesame")
        preflight = await ask(app, b"", method="OPTIONS", headers={**PREFLIGHT, **KEY})
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        assert preflight.headers["access-control-allow-methods"] == "GET, POST"
        assert set(preflight.headers["access-control-allow-headers"].split(", ")) == {
            *("Authorization", "Content-Type", "Content-Encoding", "X-Request-ID"),
            *("Inference-Header-Content-Length", "traceparent", "tracestate"),
        }
        assert preflight.headers["access-control-max-age"] == "600"
        for headers in ({**KEY, "Origin": ORIGIN}, {"Origin": ORIGIN}):
            answer = await ask(app, headers=headers)
            assert answer.headers["access-control-allow-origin"] == ORIGIN
            assert answer.headers["vary"] == "Origin"
            # Without it, a page cannot tell where an answer's binary tensors begin.
            exposed = answer.headers["access-control-expose-headers"].split(", ")
            assert sorted(exposed) == [
                *("Inference-Header-Content-Length", "Retry-After", "X-Request-ID")
            ]
            assert "access-control-allow-credentials" not in answer.headers

    async def test_a_preflight_carries_no_key(self, make_app: MakeApp) -> None:
        """Browsers send a preflight without the key."""
        app = make_app(cors_origins=(ORIGIN,), api_key="opensesame")
        assert (await ask(app, b"", method="OPTIONS", headers=PREFLIGHT)).status == 200

    async def test_another_origin_may_not(self, make_app: MakeApp) -> None:
        app = make_app(cors_origins=(ORIGIN,))
        other = {**PREFLIGHT, "Origin": "https://other.example"}
        assert (await ask(app, b"", method="OPTIONS", headers=other)).status == 400
        answer = await ask(app, headers={"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in answer.headers

    async def test_a_star_allows_all_without_credentials(self, make_app: MakeApp) -> None:
        answer = await ask(make_app(cors_origins=("*",)), headers={"Origin": ORIGIN})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers


class TestFailures:
    @pytest.mark.parametrize("hot", [True, False])
    async def test_a_bug_is_a_500_without_internals(
        self, make_app: MakeApp, caplog: pytest.LogCaptureFixture, hot: bool
    ) -> None:
        app = make_app()

        async def on_hot_path(exchange: Exchange) -> Answer:
            raise RuntimeError(f"secret detail of {exchange}")

        async def in_framework() -> None:
            raise RuntimeError("secret detail")

        app.hot_paths["POST", "/hot"] = HotPath(on_hot_path, body_limit)
        app.application.add_api_route("/other", in_framework, methods=["POST"])  # type: ignore[attr-defined] # it is FastAPI
        target = "/hot" if hot else "/other"
        answer = await ask(app, headers={"X-Request-ID": "mine"}, target=target)
        assert answer.status == 500
        assert answer.headers["x-request-id"] == "mine"
        assert b"secret" not in answer.body
        assert b'"request_id":"mine"' in answer.body
        (failure,) = (r for r in caplog.records if r.exc_info)
        assert failure.__dict__["fields"] == {"request_id": "mine"}
        assert (await ask(app)).status == 200

    async def test_no_part_of_an_image_is_logged(
        self, make_app: MakeApp, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        app = make_app()
        marker = b"MARKERMARKER" * 100
        for content_type in ("application/json", "image/png", "application/octet-stream"):
            await ask(app, marker, headers={"Content-Type": content_type})
        assert len([r for r in caplog.records if r.name == "service.access"]) == 3
        assert "MARKER" not in "".join(str(r.__dict__) for r in caplog.records)


async def test_answers_while_draining_close_their_connections(make_app: MakeApp) -> None:
    app = make_app()
    assert "connection" not in (await ask(app)).headers
    app.admission.draining = True
    assert (await ask(app)).headers["connection"] == "close"
    ready = await ask(app, b"", method="GET", target="/readyz")
    assert (ready.status, ready.headers["connection"]) == (503, "close")
    assert (await ask(app, b"", method="GET", target="/livez")).status == 200


@pytest.mark.parametrize(
    ("method", "target", "code"),
    [
        ("POST", "/predict", b"payload_too_large"),
        ("POST", "/nothing", b"not_found"),
        ("PUT", "/predict", b"method_not_allowed"),
        ("POST", "/v2/models/another/infer", b"unknown_model"),
    ],
)
async def test_a_large_refused_upload_lingers_before_it_closes(
    make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, method: str, target: str, code: bytes
) -> None:
    monkeypatch.setattr(connection_module, "LINGER_SECONDS", 0.1)
    app = make_app()
    upload = Conversation(app, method, target, {**BYTES, "Content-Length": "1000000000"})
    await until(lambda: code in upload.body)
    assert upload.headers["connection"] == "close"
    assert upload.transport.ended
    assert not upload.transport.closed
    upload.send(bytes(1000))
    await until(lambda: upload.transport.closed)
    assert app.admission.in_flight == 0


async def test_a_small_refused_upload_keeps_its_connection(make_app: MakeApp) -> None:
    answer = await ask(make_app(api_key="opensesame"))
    assert answer.status == 401
    assert "connection" not in answer.headers
    assert not answer.transport.ended


async def test_a_refused_upload_of_unknown_length_closes_its_connection(make_app: MakeApp) -> None:
    app = make_app(api_key="opensesame")
    chunked = {"Content-Type": "image/png", "Transfer-Encoding": "chunked"}
    upload = Conversation(app, send_headers=chunked)
    await upload.answer()
    assert (upload.status, upload.headers["connection"]) == (401, "close")
    assert upload.transport.ended
    upload.leave()


async def test_each_request_is_one_log_line(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    app = make_app()
    await ask(app, headers={"X-Request-ID": "mine"})
    await ask(app, b"", method="GET", target="/nothing/else?secret=1")
    first, second = (r.__dict__["fields"] for r in caplog.records if r.name == "service.access")
    assert 0 < first.pop("milliseconds") < 1000
    assert first == {
        "request_id": "mine",
        "client": "192.0.2.1",
        "method": "POST",
        "route": "/predict",
        "status": 200,
    }
    assert (second["route"], second["status"]) == ("unmatched", 404)
    assert (second["path"], second["code"]) == ("/nothing/else", "not_found")


async def test_an_unknown_path_is_logged_up_to_a_limit(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service.access")
    await ask(make_app(), b"", method="GET", target="/" + 1000 * "a")
    (line,) = (r.__dict__["fields"] for r in caplog.records if r.name == "service.access")
    assert line["path"] == "/" + 199 * "a"


async def test_refusals_are_logged_with_their_code(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a hot path, of the framework, and of the gate itself."""
    caplog.set_level(logging.INFO, "service.access")
    app = make_app(api_key="opensesame")
    key = {"Authorization": "Bearer opensesame"}
    await ask(app, bytes(3), headers=key)
    await ask(app, b"", method="GET", target="/v2/models/other", headers=key)
    await ask(app)
    lines = [r.__dict__["fields"] for r in caplog.records if r.name == "service.access"]
    assert [line["code"] for line in lines] == ["invalid_input", "unknown_model", "unauthorized"]


async def test_probes_are_logged_at_debug(
    make_app: MakeApp, caplog: pytest.LogCaptureFixture
) -> None:
    """Load balancers send them every few seconds."""
    caplog.set_level(logging.DEBUG, "service.access")
    app = make_app()
    for target in ("/livez", "/readyz", "/metrics"):
        await ask(app, b"", method="GET", target=target)
    records = [r for r in caplog.records if r.name == "service.access"]
    assert [r.levelname for r in records] == ["DEBUG"] * 3
