"""A connection answers complete requests in order, and holds a bounded number of bytes."""

import asyncio
import importlib
import logging
import re
import socket
from collections.abc import Callable
from typing import Any

import pytest
from uvicorn.server import ServerState

from service.errors import SlowRequest
from service.http import admission as admission_module
from service.http import connection as connection_module
from service.http.connection import (
    FIELD_OVERHEAD_BYTES,
    MAX_HEAD_BYTES,
    PARSE_CHUNK_BYTES,
    QUEUED_REQUEST_BYTES,
    Connection,
)
from service.http.gate import Gate
from tests.service.conftest import Transport, connect
from tests.service.http.test_gate import never_ready, until

pytestmark = pytest.mark.anyio
MakeApp = Callable[..., Gate]
WAITS = ("KEEP_ALIVE", "FIRST_HEAD", "IDLE_CHECK", "LINGER", "SHUTDOWN_GRACE", "PROBE")
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"
CHUNKS = b"310\r\n" + bytes(784) + b"\r\n0\r\n\r\n"
POST = HEAD + b"Content-Length: 784\r\n\r\n" + bytes(784)


def statuses(transport: Transport) -> list[int]:
    return [int(s) for s in re.findall(rb"HTTP/1.1 (\d+)", b"".join(transport.sent))]


async def talk(app: Gate, *pieces: bytes, answers: int = 1) -> Transport:
    """Send pieces; wait for this number of answers, or until the connection is closed."""
    connection, transport = connect(app)
    for piece in pieces:
        connection.data_received(piece)
    await until(lambda: len(statuses(transport)) >= answers or transport.closed)
    return transport


class TestPipelining:
    async def test_a_flood_is_parsed_in_small_chunks_and_then_not_read(
        self, make_app: MakeApp
    ) -> None:
        """One client took 1.4 GB in seconds with such a flood, before its API key was checked."""
        app = make_app()
        done = never_ready(app)
        connection, transport = connect(app)
        connection.data_received(POST + GET * 10_000)
        assert len(connection._queue) <= PARSE_CHUNK_BYTES // len(GET) + 2
        assert not transport.reading
        done.set()
        await until(lambda: bool(transport.sent))
        for _ in range(20):
            assert not transport.reading  # there is still more to parse
            await asyncio.sleep(0)
        transport.close()

    async def test_reading_resumes_when_all_is_answered(self, make_app: MakeApp) -> None:
        app = make_app()
        budget = app.admission.budget.bytes_left
        connection, transport = connect(app)
        connection.data_received(GET * 300)
        paused_at = []
        while not transport.reading:
            paused_at.append(len(transport.sent))
            await asyncio.sleep(0)
        assert max(paused_at) > 200  # the last requests are parsed after the first are answered
        await until(lambda: len(transport.sent) == 300)
        assert statuses(transport) == [200] * 300
        assert app.admission.budget.bytes_left == budget
        transport.close()

    async def test_the_socket_is_read_while_a_request_is_answered(self, make_app: MakeApp) -> None:
        """Otherwise the server would not notice that the client leaves."""
        app = make_app()
        never_ready(app)
        connection, transport = connect(app)
        connection.data_received(POST)
        assert transport.reading
        transport.close()
        await until(lambda: app.admission.in_flight == 0)

    async def test_the_deadline_of_a_request_begins_with_its_turn(self, make_app: MakeApp) -> None:
        app = make_app()
        done = never_ready(app)
        connection, transport = connect(app)
        connection.data_received(POST + POST)
        connection._queue[1].started -= 3600
        done.set()
        await until(lambda: len(transport.sent) == 2)
        assert statuses(transport) == [200, 200]
        transport.close()

    async def test_a_client_that_does_not_read_gets_no_more_answers(
        self, make_app: MakeApp
    ) -> None:
        app = make_app()
        connection, transport = connect(app)
        connection.data_received(POST)
        await until(lambda: len(transport.sent) == 1)
        budget = app.admission.budget.bytes_left
        transport.unread = 5000
        connection.pause_writing()
        connection.data_received(POST)
        await asyncio.sleep(0.02)
        assert len(transport.sent) == 1
        assert budget - app.admission.budget.bytes_left == 5000 + len(POST)
        transport.unread = 0
        connection.resume_writing()
        await until(lambda: len(transport.sent) == 2)
        assert app.admission.budget.bytes_left == budget
        transport.close()


class TestMemory:
    @pytest.mark.parametrize(
        ("sent", "held"),
        [
            (b"GET /livez HTTP/1.1\r\nX: " + b"a" * 1000, 1024),
            (POST + GET * 3, 784 + 3 * QUEUED_REQUEST_BYTES),
            (POST + GET * 1000, 784 + 61 * QUEUED_REQUEST_BYTES + len(POST + GET * 1000)),
        ],
    )
    async def test_waiting_bytes_count_in_the_budget(
        self, make_app: MakeApp, sent: bytes, held: int
    ) -> None:
        app = make_app()
        never_ready(app)
        budget = app.admission.budget
        before = budget.bytes_left
        connection, transport = connect(app)
        connection.data_received(sent)
        waiting = len(connection._queue) - 1
        if waiting > 3:
            held += (waiting - 61) * QUEUED_REQUEST_BYTES
        assert before - budget.bytes_left == held
        transport.close()
        await until(lambda: budget.bytes_left == before)

    @pytest.mark.parametrize(
        "sent", [b"GET /livez HTTP/1.1\r\nX: " + b"a" * 1000, GET[:-2] + b"a:\r\n" * 200]
    )
    async def test_a_head_that_does_not_fit_the_budget_is_refused(
        self, make_app: MakeApp, sent: bytes
    ) -> None:
        app = make_app()
        budget = app.admission.budget
        budget.bytes_left = 500
        connection, transport = connect(app)
        connection.data_received(sent)
        await until(lambda: transport.ended)
        assert statuses(transport) == [503]
        assert budget.bytes_left == 500
        connection.data_received(b"more")  # dropped
        assert budget.bytes_left == 500
        transport.close()

    @pytest.mark.parametrize("count", [3, 10_000])
    async def test_a_flood_that_does_not_fit_the_budget_gets_one_answer(
        self, make_app: MakeApp, count: int
    ) -> None:
        app = make_app()
        done = never_ready(app)
        budget = app.admission.budget
        budget.bytes_left = 5000
        connection, transport = connect(app)
        connection.data_received(POST + GET * count)
        assert budget.bytes_left == 5000 - 784
        done.set()
        await until(lambda: transport.ended)
        assert statuses(transport) == [200, 503]
        assert budget.bytes_left == 5000
        transport.close()

    async def test_dropped_requests_are_logged_in_one_line(
        self, make_app: MakeApp, caplog: pytest.LogCaptureFixture
    ) -> None:
        """They have no lines in the access log; the answer 503 stands for all of them."""
        caplog.set_level(logging.INFO, "service")
        app = make_app()
        app.admission.budget.bytes_left = 5000
        done = never_ready(app)
        connection, transport = connect(app)
        connection.data_received(POST + GET * 3)
        done.set()
        await until(lambda: transport.ended)
        lines = [(r.message, vars(r)["fields"]) for r in caplog.records if r.name == "service"]
        fields = {"client": "192.0.2.1", "count": 3}
        assert lines == [("queued requests are dropped", fields)]
        transport.close()

    async def test_a_client_that_does_not_read_is_disconnected_when_the_budget_is_full(
        self, make_app: MakeApp
    ) -> None:
        app = make_app()
        app.admission.budget.bytes_left = 1000
        connection, transport = connect(app)
        connection.data_received(GET)
        await until(lambda: bool(transport.sent))
        transport.unread = 5000
        connection.pause_writing()
        assert transport.closed
        await until(lambda: app.admission.budget.bytes_left == 1000)

    async def test_an_unread_answer_counts_in_the_budget(self, make_app: MakeApp) -> None:
        app = make_app()
        before = app.admission.budget.bytes_left
        connection, transport = connect(app)
        transport.unread = 5000
        connection.pause_writing()
        assert app.admission.budget.bytes_left == before - 5000
        transport.unread = 0
        connection.resume_writing()
        assert app.admission.budget.bytes_left == before
        transport.close()

    async def test_a_body_counts_in_the_budget_until_its_answer(self, make_app: MakeApp) -> None:
        app = make_app()
        done = never_ready(app)
        before = app.admission.budget.bytes_left
        connection, transport = connect(app)
        connection.data_received(POST[:-1])
        assert app.admission.budget.bytes_left == before - 783
        connection.data_received(POST[-1:])
        await asyncio.sleep(0.02)
        assert app.admission.budget.bytes_left == before - 784
        done.set()
        await until(lambda: bool(transport.sent))
        assert app.admission.budget.bytes_left == before
        transport.close()

    @pytest.mark.parametrize(
        "more",
        [b"a" * 20_000 + b":\r\n", b"".join(b"%03x:\r\n" % i for i in range(850))],
        ids=["a long field", "many fields"],
    )
    async def test_a_large_head_counts_in_the_budget_until_its_body_is_complete(
        self, make_app: MakeApp, more: bytes
    ) -> None:
        """8,000 connections with such heads and without their bodies took 744 MB."""
        app = make_app()
        before = app.admission.budget.bytes_left
        connection, transport = connect(app)
        head = HEAD + more + b"Content-Length: 784\r\n\r\n"
        connection.data_received(head)
        assert before - app.admission.budget.bytes_left > 15_000
        connection.data_received(bytes(784))
        await until(lambda: statuses(transport) == [200])
        assert app.admission.budget.bytes_left == before
        assert not connection._headers  # nor does the idle connection hold them
        assert not connection._url
        transport.close()

    async def test_an_idle_connection_is_closed_for_a_new_one(
        self, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection_module, "MAX_CONNECTIONS", 2)
        app = make_app()
        never_ready(app)
        state = ServerState()
        busy, busy_transport = connect(app, state)
        busy.data_received(POST)
        _, idle_transport = connect(app, state)
        new, new_transport = connect(app, state)
        assert (busy_transport.closed, idle_transport.closed) == (False, True)
        new.data_received(POST)
        _, last_transport = connect(app, state)
        assert (busy_transport.closed, new_transport.closed) == (False, False)
        assert last_transport.closed  # no other connection is idle
        busy_transport.close()
        new_transport.close()

    async def test_the_slowest_sender_makes_room_for_a_new_connection(
        self, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Otherwise clients that send bytes now and then would lock out all others."""
        monkeypatch.setattr(connection_module, "MAX_CONNECTIONS", 3)
        monkeypatch.setattr(admission_module, "SLOW_AFTER_SECONDS", 0.1)
        app, state = make_app(), ServerState()
        slow = [connect(app, state) for _ in range(2)]
        for connection, _ in slow:
            connection.data_received(HEAD)
        await asyncio.sleep(0.15)
        quick, quick_transport = connect(app, state)
        quick.data_received(HEAD)
        new, new_transport = connect(app, state)
        assert [statuses(transport) for _, transport in slow] == [[408], []]
        assert not quick_transport.closed
        new.data_received(POST)
        await until(lambda: statuses(new_transport) == [200])
        for transport in (slow[1][1], quick_transport, new_transport):
            transport.close()


class TestHead:
    @pytest.mark.parametrize(
        ("head", "status"),
        [
            (b"GET /livez HTTP/1.1\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: a:b\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost: [::1\r\n\r\n", 400),
            (b"GET /livez HTTP/1.1\r\nHost:\r\n\r\n", 200),
            (b"GET /livez HTTP/1.1\r\nHost: [::1]:80\r\n\r\n", 200),
            (b"GET /livez HTTP/1.1\r\nHost: a-b.example:8000\r\n\r\n", 200),
            (b"GET http://a/livez HTTP/1.1\r\nHost: a\r\n\r\n", 200),
            (b"GET http://a/livez#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"GET /livez#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"GET /livez?a#b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"GET /livez HTTP/1.0\r\n\r\n", 200),
            (b"GET /livez HTTP/1.0\r\nHost: a b\r\n\r\n", 400),
            (b"GET /livez HTTP/2.0\r\nHost: a\r\n\r\n", 505),
            (b"GET /livez HTTP/3.0\r\nHost: a\r\n\r\n", 505),
            (b"GET /livez HTTP/0.9\r\n\r\n", 505),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
            (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"CONNECT /livez HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (b"CONNECT http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
            (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
            (HEAD + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
            (HEAD + b"Transfer-Encoding: Chunked \r\n\r\n" + CHUNKS, 200),
            (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 400),
            (HEAD + b"Content-Length: 000784\r\n\r\n" + bytes(784), 200),
            (HEAD + b"Content-Length: " + b"0" * 5000 + b"784\r\n\r\n", 400),
        ],
    )
    async def test_the_head_is_checked_as_the_standard_says(
        self, make_app: MakeApp, head: bytes, status: int
    ) -> None:
        """RFC 9112, sections 2.3, 3.2 and 6.1."""
        transport = await talk(make_app(), head)
        assert statuses(transport) == [status]
        transport.close()

    @pytest.mark.parametrize("before", [b"", POST, GET * 3])
    @pytest.mark.parametrize("more", [0, 1])
    async def test_a_head_may_have_exactly_the_limit(
        self, make_app: MakeApp, before: bytes, more: int
    ) -> None:
        """Names, values and an overhead for each field count; also in a pipelined request."""
        size = MAX_HEAD_BYTES - len(b"/livezHostxX") - 2 * FIELD_OVERHEAD_BYTES + more
        head = GET[:-2] + b"X: " + b"a" * size + b"\r\n\r\n"
        wanted = len(re.findall(b"HTTP/1.1", before)) + 1
        transport = await talk(make_app(), before + head, answers=wanted)
        assert statuses(transport)[-1] == (431 if more else 200)
        assert transport.ended == bool(more)
        transport.close()

    async def test_an_offered_upgrade_does_not_lift_the_limit(self, make_app: MakeApp) -> None:
        """Without it, the last fields were lost, and the body was taken for a request."""
        offer = HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
        many = b"".join(b"%x:\r\n" % i for i in range(MAX_HEAD_BYTES // FIELD_OVERHEAD_BYTES))
        body = GET.ljust(784)
        transport = await talk(make_app(), offer + many + b"Content-Length: 784\r\n\r\n" + body)
        assert statuses(transport) == [431]
        transport.close()

    async def test_the_values_of_a_repeated_field_are_joined(self, make_app: MakeApp) -> None:
        """RFC 9110, section 5.3. Two ids become one that is not well-formed: neither is used."""
        ids = b"X-Request-ID: one\r\nx-request-id: two\r\n\r\n"
        transport = await talk(make_app(), GET[:-2] + ids)
        assert b"one" not in transport.sent[0]
        assert b"two" not in transport.sent[0]
        transport.close()

    async def test_a_page_of_another_origin_can_read_a_refusal(self, make_app: MakeApp) -> None:
        app = make_app(cors_origins=("https://shop.example",))
        head = GET[:-2] + b"Origin: https://shop.example\r\nX: " + b"a" * 40_000 + b"\r\n\r\n"
        transport = await talk(app, head)
        assert statuses(transport) == [431]
        assert b"access-control-allow-origin: https://shop.example\r\n" in transport.sent[0]
        transport.close()


class TestRest:
    """With the server at its limit, a client that asks again at once is read again later."""

    @pytest.fixture
    def full(self, make_app: MakeApp) -> Gate:
        """Return a server at its limit."""
        app = make_app(max_in_flight=1)
        app.admission.in_flight = 1
        return app

    async def test_a_refused_client_is_not_read_for_a_moment(self, full: Gate) -> None:
        connection, transport = connect(full)
        connection.data_received(POST)
        assert (statuses(transport), transport.reading) == ([503], False)
        await until(lambda: transport.reading)
        connection.data_received(POST)
        assert (statuses(transport), transport.reading) == ([503, 503], False)
        await until(lambda: transport.reading)
        full.admission.in_flight = 0
        connection.data_received(POST)
        await until(lambda: statuses(transport) == [503, 503, 200])
        assert transport.reading
        transport.close()

    async def test_other_refusals_are_no_reason_to_rest(self, full: Gate) -> None:
        connection, transport = connect(full)
        connection.data_received(HEAD + b"Content-Length: 4000\r\n\r\n" + bytes(4000))
        assert (statuses(transport), transport.reading) == ([413], True)
        connection.data_received(GET)
        await until(lambda: statuses(transport) == [413, 200])
        assert transport.reading
        transport.close()

    @pytest.mark.parametrize(("more", "rest"), [(POST * 3, GET), (POST[:-1], b"\0")])
    async def test_what_has_arrived_is_answered_but_no_more_is_read(
        self, full: Gate, more: bytes, rest: bytes
    ) -> None:
        budget = full.admission.budget.bytes_left
        connection, transport = connect(full)
        connection.data_received(POST + more)
        answered = (POST + more).count(POST)
        assert (statuses(transport), transport.reading) == ([503] * answered, False)
        await until(lambda: transport.reading)
        connection.data_received(rest)
        await until(lambda: len(statuses(transport)) == answered + 1)
        transport.close()
        await until(lambda: full.admission.budget.bytes_left == budget)

    async def test_a_stop_first_reads_what_waits_in_the_kernel(
        self, full: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """To close the socket would reset the connection, and the request would be lost."""
        monkeypatch.setattr(connection_module, "SHUTDOWN_GRACE_SECONDS", 0.05)
        connection, transport = connect(full)
        connection.data_received(POST)
        full.admission.draining = True
        connection.shutdown()
        assert (transport.closed, transport.reading) == (False, True)
        connection.data_received(POST)
        await until(lambda: transport.closed)
        assert statuses(transport) == [503, 503]

    async def test_a_client_that_rests_and_is_silent_does_not_block_a_stop(
        self, full: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection_module, "SHUTDOWN_GRACE_SECONDS", 0.05)
        connection, transport = connect(full)
        connection.data_received(POST)
        connection.shutdown()
        await until(lambda: transport.closed)

    async def test_a_closing_connection_is_read_to_its_end(self, full: Gate) -> None:
        connection, transport = connect(full)
        connection.data_received(POST.replace(b"Host", b"Connection: close\r\nHost"))
        assert (statuses(transport), transport.closed) == ([503], True)


async def test_a_refused_request_that_never_ends_is_the_last(make_app: MakeApp) -> None:
    """The rest of the connection is not parsed: a next request would wait for ever."""
    app = make_app()
    done = never_ready(app)
    connection, transport = connect(app)
    refused = HEAD.replace(b"octet", b"odd") + b"Content-Length: 9\r\n\r\n"
    connection.data_received(POST + refused + b"1")
    connection.evict(SlowRequest("Too slow."))
    done.set()
    await until(lambda: transport.ended)
    assert statuses(transport) == [200, 415]
    assert b"\r\nconnection: close\r\n" in transport.sent[1]
    transport.close()


class TestContinue:
    EXPECT = HEAD + b"Content-Length: 784\r\nExpect: 100-Continue\r\n\r\n"

    async def test_a_client_that_waits_gets_100_continue(self, make_app: MakeApp) -> None:
        connection, transport = connect(make_app())
        connection.data_received(self.EXPECT)
        assert transport.sent == [b"HTTP/1.1 100 Continue\r\n\r\n"]
        connection.data_received(bytes(784))
        await until(lambda: statuses(transport) == [100, 200])
        transport.close()

    async def test_it_follows_the_answer_to_the_request_before(self, make_app: MakeApp) -> None:
        app = make_app()
        done = never_ready(app)
        connection, transport = connect(app)
        connection.data_received(POST + self.EXPECT)
        assert transport.sent == []
        done.set()
        await until(lambda: statuses(transport) == [200, 100])
        transport.close()

    async def test_a_refused_upload_gets_no_100_continue(self, make_app: MakeApp) -> None:
        head = self.EXPECT.replace(b"784", b"784000")
        transport = await talk(make_app(), head)
        assert statuses(transport) == [413]
        transport.close()

    async def test_http_1_0_has_no_interim_answers(self, make_app: MakeApp) -> None:
        connection, transport = connect(make_app())
        connection.data_received(self.EXPECT.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert transport.sent == []
        connection.data_received(bytes(784))
        await until(lambda: transport.closed)
        assert statuses(transport) == [200]


class TestAnswers:
    @pytest.mark.parametrize(
        "sent", [POST, GET, b"NONSENSE\r\n\r\n", HEAD + b"Content-Length: 99999999\r\n\r\n"]
    )
    async def test_head_and_body_leave_in_one_write(self, make_app: MakeApp, sent: bytes) -> None:
        transport = await talk(make_app(), sent)
        assert len(transport.sent) == 1
        head, _, body = transport.sent[0].partition(b"\r\n\r\n")
        assert b"\r\ncontent-length: %d\r\n" % len(body) in head + b"\r\n"
        transport.close()

    async def test_a_head_request_gets_no_body(self, make_app: MakeApp) -> None:
        transport = await talk(make_app(), GET.replace(b"GET", b"HEAD"), GET, answers=2)
        assert transport.sent[0].endswith(b"\r\n\r\n")
        assert re.findall(rb"content-length: (\d+)", transport.sent[0]) == re.findall(
            rb"content-length: (\d+)", transport.sent[1]
        )
        transport.close()

    async def test_a_304_has_no_content_length(self, make_app: MakeApp) -> None:
        app = make_app()
        page = await talk(app, GET.replace(b"/livez", b"/"))
        tag = re.findall(rb"etag: (.*?)\r\n", page.sent[0])[0]
        unchanged = await talk(
            app, GET.replace(b"/livez", b"/")[:-2] + b"If-None-Match: %b\r\n\r\n" % tag
        )
        assert statuses(unchanged) == [304]
        assert b"content-length" not in unchanged.sent[0]
        page.close()
        unchanged.close()

    @pytest.mark.parametrize("closing", [b"Connection: close\r\n", b""])
    async def test_the_connection_closes_when_the_client_asks_for_it(
        self, make_app: MakeApp, closing: bytes
    ) -> None:
        transport = await talk(make_app(), GET[:-2] + closing + b"\r\n")
        await asyncio.sleep(0)
        assert transport.closed == bool(closing)
        assert (b"connection: close" in transport.sent[0]) == bool(closing)
        if not closing:
            transport.close()

    async def test_bytes_after_the_last_request_are_ignored(
        self, make_app: MakeApp, caplog: pytest.LogCaptureFixture
    ) -> None:
        """They are neither answered nor logged as a request."""
        caplog.set_level(logging.DEBUG, "service.access")
        transport = await talk(make_app(), GET[:-2] + b"Connection: close\r\n\r\n" + GET)
        await until(lambda: transport.closed)
        assert statuses(transport) == [200]
        assert len([r for r in caplog.records if r.name == "service.access"]) == 1


class TestHalfClosed:
    async def test_complete_requests_are_answered(self, make_app: MakeApp) -> None:
        connection, transport = connect(make_app())
        connection.data_received(POST + GET + POST[:-1])
        assert connection.eof_received()
        await until(lambda: transport.closed)
        assert statuses(transport) == [200, 200]
        assert b"connection: close" in transport.sent[1]

    @pytest.mark.parametrize("sent", [b"", GET[:-1], POST[:-1], HEAD + b"Content-Length: 784\r\n"])
    async def test_half_a_request_is_dropped(self, make_app: MakeApp, sent: bytes) -> None:
        app = make_app()
        before = app.admission.budget.bytes_left
        connection, transport = connect(app)
        if sent:
            connection.data_received(sent)
        assert not connection.eof_received()  # so the event loop closes the connection
        transport.close()
        await until(lambda: app.admission.budget.bytes_left == before)
        assert transport.sent == []

    async def test_a_request_refused_by_its_head_is_answered(self, make_app: MakeApp) -> None:
        connection, transport = connect(make_app())
        connection.data_received(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n1")
        assert connection.eof_received()
        await until(lambda: transport.closed)
        assert statuses(transport) == [404]

    @pytest.mark.parametrize("left", [True, False])
    async def test_a_client_that_has_left_is_noticed(
        self, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch, left: bool
    ) -> None:
        """A close first looks like a half-close; then the client's system resets our probe."""
        monkeypatch.setattr(connection_module, "PROBE_SECONDS", 0.05)
        app = make_app()
        done = never_ready(app)
        async with serving(app) as port:
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(POST)
            await until(lambda: app.admission.in_flight == 1)
            if left:
                client.close()
                await until(lambda: app.admission.in_flight == 0)
            else:
                client.shutdown(socket.SHUT_WR)
                await asyncio.sleep(0.2)
                assert app.admission.in_flight == 1
                done.set()
                answer = await asyncio.to_thread(client.makefile("rb").read)
                assert re.fullmatch(
                    rb"(HTTP/1.1 100 Continue\r\n\r\n)+HTTP/1.1 200 OK\r\n.*", answer, re.DOTALL
                )
                client.close()

    async def test_http_1_0_has_no_interim_answers(
        self, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection_module, "PROBE_SECONDS", 0.01)
        app = make_app()
        done = never_ready(app)
        connection, transport = connect(app)
        connection.data_received(POST.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert connection.eof_received()
        await asyncio.sleep(0.05)
        done.set()
        await until(lambda: transport.closed)
        assert statuses(transport) == [200]

    async def test_a_client_that_does_not_read_is_disconnected(
        self, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Probes that wait with the unread answers do not look like progress."""
        monkeypatch.setattr(connection_module, "PROBE_SECONDS", 0.01)
        connection, transport = connect(make_app(request_timeout_seconds=0.1))
        write = transport.write

        def keep(data: bytes) -> None:
            transport.unread += len(data)
            write(data)

        monkeypatch.setattr(transport, "write", keep)
        connection.data_received(GET + GET)
        connection.pause_writing()
        assert connection.eof_received()
        await until(lambda: transport.closed)
        assert statuses(transport) == [200]


class serving:  # noqa: N801 - used like a function
    """Serve on a real port, on this test's event loop."""

    def __init__(self, app: Gate) -> None:
        self._app = app

    async def __aenter__(self) -> int:
        config: Any = type("Config", (), {"loaded_app": self._app})
        state = ServerState()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(config, state, {}), "127.0.0.1", 0
        )
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self._server.close()


class TestShutdown:
    async def test_an_idle_connection_closes_at_once(self, make_app: MakeApp) -> None:
        connection, transport = connect(make_app())
        connection.data_received(GET)
        await until(lambda: bool(transport.sent))
        connection.shutdown()
        assert transport.closed

    async def test_a_new_one_gets_time_for_a_first_request(
        self, make_app: MakeApp, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection_module, "SHUTDOWN_GRACE_SECONDS", 0.05)
        app = make_app()
        app.admission.draining = True
        connection, transport = connect(app)
        silent, silent_transport = connect(app)
        connection.shutdown()
        silent.shutdown()
        connection.data_received(GET)
        await until(lambda: transport.closed and silent_transport.closed)
        assert (statuses(transport), statuses(silent_transport)) == ([200], [])

    async def test_a_busy_one_first_sends_its_answer(self, make_app: MakeApp) -> None:
        app = make_app()
        done = never_ready(app)
        connection, transport = connect(app)
        connection.data_received(POST)
        connection.shutdown()
        app.admission.draining = True
        await asyncio.sleep(0.02)
        assert not transport.closed
        done.set()
        await until(lambda: transport.closed)
        assert statuses(transport) == [200]


async def test_the_trace_id_is_logged(make_app: MakeApp, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "service.access")
    trace = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\r\n"
    (await talk(make_app(), GET[:-2] + trace)).close()
    (await talk(make_app(), GET)).close()
    first, second = (r.__dict__["fields"] for r in caplog.records if r.name == "service.access")
    assert first["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert "trace_id" not in second


def test_the_waits_fit_together() -> None:
    """The usual load balancers keep an idle connection for 60 seconds, and must close it first."""
    waits = {name: getattr(connection_module, f"{name}_SECONDS") for name in WAITS}
    assert 60 < waits["KEEP_ALIVE"] <= 120
    assert waits["IDLE_CHECK"] < waits["FIRST_HEAD"] <= 30
    assert waits["PROBE"] < waits["LINGER"] < waits["SHUTDOWN_GRACE"] < waits["IDLE_CHECK"]


def test_an_incompatible_uvicorn_is_refused_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("uvicorn.server.ServerState.__init__", lambda _: None)
    with pytest.raises(ImportError, match=r"uvicorn .* lacks one of connections, .*bounds\.$"):
        importlib.reload(connection_module)
    monkeypatch.undo()
