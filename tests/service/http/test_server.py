"""The real process: its start, its stop, and clients that misbehave in between."""

import errno
import gc
import gzip
import io
import json
import os
import re
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image

from service.http import connection as connection_module
from service.http import server
from service.http.gate import Gate
from service.settings import Settings
from tests.contract.conftest import ROOT, serving

BYTES = {"content-type": "application/octet-stream"}
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/octet-stream\r\n"


@pytest.fixture
def start(tmp_path: Path, artefact: Path) -> Iterator[Callable[..., Any]]:
    """Return a function that starts a server with settings; it returns address and process."""
    with ExitStack() as running:

        def start(**settings: object) -> tuple[str, subprocess.Popen[bytes]]:
            settings = {"model_path": artefact, **settings}
            return running.enter_context(serving(tmp_path / "log", **settings))

        yield start


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, artefact: Path) -> Iterator[str]:
    """Return the address of a server with the default settings, which tests leave as it was."""
    with serving(tmp_path_factory.mktemp("shared") / "log", model_path=artefact) as (address, _):
        yield address


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=10)


@contextmanager
def serving_here(app: Gate, listener: socket.socket) -> Iterator[server.Server]:
    """Serve in this process, where a test can change constants and read the server's state."""
    running = server.Server(app, Settings())
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield running
    finally:
        running.should_exit = True
        thread.join(10)


@pytest.fixture
def start_here(make_app: Callable[..., Gate]) -> Iterator[Callable[..., str]]:
    """Return a function that serves in this process, with settings; it returns the address."""
    with ExitStack() as running:

        def start(**settings: object) -> str:
            listener = server.bind(Settings(port=0))
            running.enter_context(serving_here(make_app(**settings), listener))
            return server.url(listener)

        yield start


def slow_picture() -> bytes:
    """Return a request with a picture whose file is small, and which takes long to decode."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((1800, 1800)).save(file, "PNG")
    head = HEAD.replace(b"application/octet-stream", b"image/png")
    return head + b"Content-Length: %d\r\n\r\n" % file.tell() + file.getvalue()


def refuse_to_start(**settings: str) -> tuple[int, str]:
    """Run the service, which must end by itself; return its status and its standard error."""
    environment = {k: v for k, v in os.environ.items() if k.startswith("PATH")}
    environment |= {"BNLENET_PORT": "0"}
    environment |= {f"BNLENET_{k.upper()}": v for k, v in settings.items()}
    command = [sys.executable, "-m", "service"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout == ""
    return done.returncode, done.stderr


class TestStart:
    @pytest.mark.parametrize("workers", ["1", "2"])
    def test_a_missing_model_is_one_sentence(self, workers: str) -> None:
        status, said = refuse_to_start(model_path="/nowhere/model.onnx", workers=workers)
        assert status == 1
        sentences = said.splitlines()
        assert len(set(sentences)) == 1
        assert sentences[0].startswith("Error: The model file /nowhere/model.onnx cannot be read")

    def test_a_damaged_model_is_one_sentence(self, tmp_path: Path, artefact: Path) -> None:
        damaged = tmp_path / "damaged.onnx"
        damaged.write_bytes(artefact.read_bytes()[:100_000])
        status, said = refuse_to_start(model_path=str(damaged))
        assert (status, said.count("\n")) == (1, 1)
        assert said.startswith(f"Error: The model file {damaged} is damaged")

    def test_a_wrong_setting_is_one_sentence(self) -> None:
        status, said = refuse_to_start(port="http")
        assert (status, said.count("\n")) == (2, 1)
        assert said.startswith("Error: BNLENET_PORT is set wrongly: ")

    def test_a_port_in_use_is_one_sentence(self, artefact: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            status, said = refuse_to_start(model_path=str(artefact), port=str(port))
        assert (status, said.count("\n")) == (1, 1)
        assert said.startswith(f"Error: Cannot listen on 127.0.0.1:{port} (Address already in use)")

    def test_another_machines_address_is_one_sentence(self, artefact: Path) -> None:
        status, said = refuse_to_start(model_path=str(artefact), host="192.0.2.1")
        assert (status, said.count("\n")) == (1, 1)

    def test_an_invalid_host_is_one_sentence(self) -> None:
        with pytest.raises(server.StartError, match=r"Cannot listen on a\.\.b:0"):
            server.bind(Settings(host="a..b", port=0))

    def test_the_host_of_two_colons_is_ipv6_and_ipv4(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with server.bind(Settings(host="::", port=0)) as listener:
            listener.listen()
            socket.create_connection(("127.0.0.1", listener.getsockname()[1]), timeout=10).close()
            if listener.family == socket.AF_INET6:
                only = listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
                assert only == 0  # also where the system's default is 1

        def without_ipv6(family: int, *arguments: int) -> socket.socket:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            return original(family, *arguments)

        original = socket.socket
        monkeypatch.setattr(socket, "socket", without_ipv6)
        with server.bind(Settings(host="::", port=0)) as listener:
            assert listener.getsockname()[0] == "0.0.0.0"  # noqa: S104 - asked for

    def test_a_port_taken_while_the_model_was_loaded_is_one_sentence(
        self, make_app: Callable[..., Gate]
    ) -> None:
        settings = Settings(port=0)
        with server.bind(settings) as listener, socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(listener.getsockname())
            other.listen()
            with pytest.raises(server.StartError, match=r"\(Address already in use\)"):
                server.run(make_app(), settings, listener)

    def test_an_ipv6_address_becomes_a_url(self) -> None:
        with socket.socket(socket.AF_INET6) as unbound:
            assert server.url(unbound) == "http://[::]:0"

    @pytest.mark.parametrize(
        ("host", "shown"),
        [("0.0.0.0", "localhost"), ("::", "localhost"), ("127.0.0.1", "127.0.0.1")],  # noqa: S104 - nothing listens
    )
    def test_the_pages_address_can_be_opened_on_this_machine(self, host: str, shown: str) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as listener:
            listener.bind((host, 0))
            port = listener.getsockname()[1]
            assert server.page(listener) == f"http://{shown}:{port}/"

    def test_it_may_open_as_many_files_as_the_system_allows_and_seldom_looks_for_garbage(
        self, make_app: Callable[..., Gate], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every connection is an open file; the usual limit is 1,024 of them."""
        done: list[Any] = []
        monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 4096))
        monkeypatch.setattr(resource, "setrlimit", lambda *limit: done.append(limit))
        monkeypatch.setattr(gc, "freeze", lambda: done.append("frozen"))
        monkeypatch.setattr(gc, "set_threshold", lambda *numbers: done.append(numbers))
        monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)  # it sets no handler
        monkeypatch.setattr(server.Server, "run", lambda *_: done.append("serving"))
        with server.bind(Settings(port=0)) as listener:
            server.run(make_app(), Settings(), listener)
        limit = (resource.RLIMIT_NOFILE, (4096, 4096))
        assert done == ["frozen", (10_000, 20, 50), limit, "serving"]

    def test_the_stop_waits_as_long_as_a_request_may_take(
        self, make_app: Callable[..., Gate]
    ) -> None:
        settings = Settings(request_timeout_seconds=2.5)
        found = server.Server(make_app(), settings).config.timeout_graceful_shutdown
        assert found is not None
        assert 2.5 < found < 5

    def test_start_up_needs_little_time_and_memory(self, start: Callable[..., Any]) -> None:
        """Compared with the CPU time and the memory of importing its libraries alone."""
        libraries = (
            "import fastapi, onnxruntime, resource; u = resource.getrusage(resource.RUSAGE_SELF);"
            "print(u.ru_utime + u.ru_stime, u.ru_maxrss)"
        )
        alone = subprocess.run(
            [sys.executable, "-c", libraries], capture_output=True, text=True, check=True
        )
        seconds, kilobytes = map(float, alone.stdout.split())
        address, process = start()
        assert httpx.get(f"{address}/readyz").status_code == 200
        stat = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        used = (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
        assert used < 3 * seconds
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert resident
        assert int(resident[1]) < 2 * kilobytes


class TestMisbehavingClients:
    def test_a_thousand_idle_connections_delay_no_request(self, shared: str) -> None:
        with ExitStack() as idle:
            for _ in range(800):
                idle.enter_context(connect(shared))
            for _ in range(200):
                idle.enter_context(connect(shared)).sendall(b"POST /predict HTTP/1.1\r\nHost:")
            with httpx.Client(base_url=shared) as client:
                for _ in range(20):
                    answer = client.post("/predict", content=bytes(784), headers=BYTES)
                    assert answer.status_code == 200
                    assert answer.elapsed.total_seconds() < 1

    def test_connections_without_a_request_are_closed(
        self, monkeypatch: pytest.MonkeyPatch, make_app: Callable[..., Gate]
    ) -> None:
        """After different times: never used, stopped within a head, or idle after an answer."""
        for name, seconds in [("FIRST_HEAD", 0.3), ("KEEP_ALIVE", 2.0), ("IDLE_CHECK", 0.05)]:
            monkeypatch.setattr(connection_module, f"{name}_SECONDS", seconds)
        listener = server.bind(Settings(port=0))
        address = server.url(listener)
        with serving_here(make_app(), listener):
            begin = time.monotonic()
            lives = []
            for sent in (
                b"",
                b"GET /livez HTTP/1.1\r\nHost:",
                b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n",
            ):
                connection = connect(address)
                connection.sendall(sent)
                lives.append(connection)
            ends, answers = [], []
            for connection in lives:
                answers.append(connection.makefile("rb").read())
                ends.append(time.monotonic() - begin)
                connection.close()
        assert 0.3 <= ends[0] <= ends[1] < 2 <= ends[2]
        assert answers[0] == b""
        assert answers[1].startswith(b"HTTP/1.1 408 ")
        assert answers[2].startswith(b"HTTP/1.1 200 ")

    def test_a_client_that_reads_no_answer_is_disconnected(
        self,
        monkeypatch: pytest.MonkeyPatch,
        make_app: Callable[..., Gate],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setattr(connection_module, "IDLE_CHECK_SECONDS", 0.5)
        listener = server.bind(Settings(port=0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with serving_here(make_app(), listener) as running, connect(server.url(listener)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
            deadline = time.monotonic() + 20
            while running.server_state.total_requests == 0:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            while running.server_state.connections or running.server_state.tasks:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert running.server_state.total_requests < 1000
        assert "Exception" not in caplog.text

    def test_slow_senders_block_no_request(self, start_here: Callable[..., str]) -> None:
        """There are as many slow senders as requests may be in flight."""
        address = start_here(max_in_flight=10, request_timeout_seconds=60)
        with ExitStack() as slow:
            connections = [slow.enter_context(connect(address)) for _ in range(10)]
            for connection in connections:
                connection.sendall(HEAD + b"Content-Length: 784\r\n\r\n")
            time.sleep(0.1)
            for connection in connections:
                connection.sendall(b"a")
            for _ in range(20):
                answer = httpx.post(f"{address}/predict", content=bytes(784), headers=BYTES)
                assert answer.status_code == 200

    def test_a_slow_head_has_the_deadline_of_the_request(
        self, start_here: Callable[..., str]
    ) -> None:
        address = start_here(request_timeout_seconds=0.5)
        with connect(address) as connection:
            begin = time.monotonic()
            connection.sendall(HEAD)
            assert connection.makefile("rb").readline() == b"HTTP/1.1 408 Request Timeout\r\n"
            assert 0.4 < time.monotonic() - begin < 3

    def test_a_body_sent_byte_by_byte_gets_408(self, start_here: Callable[..., str]) -> None:
        address = start_here(request_timeout_seconds=0.5)
        with connect(address) as connection:
            connection.sendall(HEAD + b"Content-Length: 784\r\n\r\n")
            begin = time.monotonic()
            connection.settimeout(0.1)
            answer = b""
            while not answer and time.monotonic() - begin < 5:
                connection.sendall(b"a")
                try:
                    answer = connection.recv(10_000)
                except TimeoutError:
                    continue
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer
        assert 0.4 < time.monotonic() - begin < 2

    def test_clients_that_leave_within_a_body_are_not_in_flight(
        self, start_here: Callable[..., str]
    ) -> None:
        address = start_here(max_in_flight=1)
        for _ in range(20):
            with connect(address) as connection:
                connection.sendall(HEAD + b"Content-Length: 784\r\n\r\nhalf")
        with httpx.Client(base_url=address) as client:
            deadline = time.monotonic() + 5
            while "\nhttp_requests_in_flight 0.0" not in client.get("/metrics").text:
                assert time.monotonic() < deadline
            assert client.post("/predict", content=bytes(784), headers=BYTES).status_code == 200

    def test_abandoned_pictures_are_not_decoded(self, start: Callable[..., Any]) -> None:
        """They queue for the decoder's thread, and would delay all other clients."""
        address, _ = start()
        post = slow_picture()
        with ExitStack() as clients:
            for _ in range(150):
                clients.enter_context(connect(address)).sendall(post)
        deadline = time.monotonic() + 10
        while not (text := httpx.get(f"{address}/metrics").text).count("in_flight 0.0"):
            assert time.monotonic() < deadline
        left = re.search(r'route="/predict",status="499"} (.*)', text)
        decoded = re.search(r"bnlenet_decode_duration_seconds_count (.*)", text)
        assert left
        assert decoded
        assert float(left[1]) > float(decoded[1])

    def test_overload_gets_503_and_health_stays_200(self, make_app: Callable[..., Gate]) -> None:
        app, listener = make_app(max_in_flight=1), server.bind(Settings(port=0))
        app.admission.in_flight = 1
        with (
            serving_here(app, listener),
            httpx.Client(base_url=server.url(listener)) as client,
        ):
            refused = client.post("/predict", content=bytes(784), headers=BYTES)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["code"] == "overloaded"
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 200

    def test_a_client_that_asks_again_at_once_takes_little_time(
        self, make_app: Callable[..., Gate]
    ) -> None:
        """Its connection rests after a refusal; or refusals would take the time of the answers."""
        app, listener = make_app(max_in_flight=1), server.bind(Settings(port=0))
        app.admission.in_flight = 1
        with (
            serving_here(app, listener),
            httpx.Client(base_url=server.url(listener)) as client,
        ):
            begin = time.monotonic()
            for _ in range(5):
                refused = client.post("/predict", content=bytes(784), headers=BYTES)
                assert refused.status_code == 503
            assert time.monotonic() - begin >= 4 * 0.1

    def test_pictures_leave_places_for_other_requests(self, start_here: Callable[..., str]) -> None:
        """At most half of the places are for pictures."""
        address = start_here(max_in_flight=20, request_timeout_seconds=60)
        picture = slow_picture()
        with ExitStack() as clients, httpx.Client(base_url=address) as client:
            connections = [clients.enter_context(connect(address)) for _ in range(15)]
            for connection in connections:
                connection.sendall(picture)
            for _ in range(10):
                answer = client.post("/predict", content=bytes(784), headers=BYTES)
                assert answer.status_code == 200
            statuses = [connection.recv(12)[-3:] for connection in connections]
        assert statuses.count(b"200") >= 10
        assert {*statuses} == {b"200", b"503"}

    def test_a_connection_stays_open_after_a_small_upload_is_refused(
        self, start_here: Callable[..., str]
    ) -> None:
        """The rest of the body, which is longer than a head may be, is read and discarded."""
        address = start_here(api_key="opensesame")
        with connect(address) as connection:
            connection.sendall(HEAD + b"Content-Length: 60000\r\n\r\n" + bytes(10_000))
            answers = connection.makefile("rb")
            assert answers.readline().startswith(b"HTTP/1.1 401 ")
            for _ in range(50):
                connection.sendall(bytes(1000))
                time.sleep(0.001)
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"HTTP/1.1 200 OK\r\n" in answers.read()

    def test_trailer_fields_are_limited_and_ignored(self, shared: str) -> None:
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n310\r\n" + bytes(784) + b"\r\n0\r\n"
        with connect(shared) as connection:
            connection.sendall(chunked + b"X-Request-ID: late\r\nContent-Encoding: br\r\n\r\n")
            answer = connection.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"late" not in answer
        with connect(shared) as connection:
            connection.sendall(chunked)
            with suppress(ConnectionError):  # it closes before all is sent
                for _ in range(1000):
                    connection.sendall(b"X-Field: " + b"a" * 1000 + b"\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 431 ")

    def test_the_end_of_an_upload_does_not_count_as_a_head(self, shared: str) -> None:
        """The next request's head arrives in the same packet, and its body later."""
        with connect(shared) as connection:
            picture = HEAD.replace(b"application/octet-stream", b"image/png")
            connection.sendall(picture + b"Content-Length: 80000\r\n\r\n" + bytes(40_000))
            time.sleep(0.2)
            connection.sendall(bytes(40_000) + HEAD + b"Content-Length: 784\r\n\r\n")
            time.sleep(0.2)
            connection.sendall(bytes(784))
            connection.shutdown(socket.SHUT_WR)
            answers = connection.makefile("rb").read()
        assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"415", b"200"]

    def test_upgrades_are_ignored(self, shared: str) -> None:
        """Java's client offers HTTP/2 with a request that has a body, in one packet or several."""
        offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n"
        post = HEAD + offer + b"Content-Length: 784\r\n\r\n"
        get = b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"
        last = get.replace(b"upgrade\r\n", b"upgrade, close\r\n")
        with connect(shared) as connection, connection.makefile("rb") as answers:
            for piece in (post + bytes(784) + get + post, bytes(400), bytes(384) + last):
                connection.sendall(piece)
                time.sleep(0.1)
            assert re.findall(rb"HTTP/1.1 \d+", answers.read()) == [b"HTTP/1.1 200"] * 4
        with connect(shared) as connection:
            connection.sendall(b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 400 ")

    def test_invalid_http_is_refused_after_the_answers_before_it(self, shared: str) -> None:
        """No client takes the refusal for the answer to an earlier request."""
        post = HEAD + b"Content-Length: 784\r\n\r\n" + bytes(784)
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        for sent, statuses in (
            (post + b"NONSENSE\r\n\r\n", [b"200", b"400"]),
            (post + post + b"NONSENSE\r\n\r\n", [b"200", b"200", b"400"]),
            (chunked + b"NONSENSE\r\n\r\n", [b"400"]),
        ):
            with connect(shared) as connection, connection.makefile("rb") as answers:
                connection.sendall(sent)
                assert re.findall(rb"HTTP/1.1 (\d+)", answers.read()) == statuses
        with connect(shared) as connection, connection.makefile("rb") as answers:
            connection.sendall(chunked + b"a00001\r\n" + bytes(0xA00001) + b"\r\n")
            assert answers.readline().startswith(b"HTTP/1.1 413 ")
            connection.sendall(b"NONSENSE\r\n\r\n")
            assert b"HTTP/1.1" not in answers.read()

    def test_pipelined_requests_are_answered_in_order(self, shared: str) -> None:
        one = HEAD + b"Content-Length: 784\r\nX-Request-ID: %d\r\n\r\n" + bytes(784)
        with connect(shared) as connection:
            connection.sendall(b"".join(one.replace(b"%d", b"%d" % i) for i in range(20)))
            text = b""
            while text.count(b'"model"') < 20:
                text += connection.recv(100_000)
        assert re.findall(rb"x-request-id: (\d+)", text) == [b"%d" % i for i in range(20)]


@pytest.mark.skipif(sys.platform != "linux", reason="a process's memory is read from /proc")
class TestMemory:
    """Floods of a second and a half. Without limits, twice as long took from 0.2 to 1.5 GB."""

    GZIP = gzip.compress(bytes(10 * 2**20 - 100))
    ZIPPED = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    ZIPPED += b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(GZIP) + GZIP

    @pytest.mark.parametrize(
        ("connections", "sent"),
        [
            (1, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 2000),
            (100, ZIPPED),
            (800, b"GET /livez HTTP/1.1\r\nX: " + b"a" * 1_000_000),
            (800, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 5000),
        ],
        ids=["pipelining", "gzip", "endless head", "many that pipeline"],
    )
    def test_a_flood_takes_no_more_than_150_megabytes(
        self, start: Callable[..., Any], connections: int, sent: bytes
    ) -> None:
        address, process = start()

        def kilobytes(name: str) -> int:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(rf"{name}:\s+(\d+) kB", status)
            assert found
            return int(found[1])

        before = kilobytes("VmRSS")
        with ExitStack() as clients, selectors.DefaultSelector() as ready:
            for _ in range(connections):
                client = clients.enter_context(connect(address))
                client.setblocking(False)
                ready.register(client, selectors.EVENT_READ | selectors.EVENT_WRITE, [sent])
            deadline = time.monotonic() + 1.5
            while time.monotonic() < deadline:
                for key, events in ready.select(0.1):
                    flood(key.fileobj, events, key.data, sent)
        assert kilobytes("VmHWM") - before < 150_000
        assert httpx.post(
            f"{address}/predict", content=bytes(784), headers=BYTES, timeout=60
        ).is_success


def flood(client: Any, events: int, left: list[bytes], sent: bytes) -> None:
    """Send as much as the socket takes, and a head only once; drop the answers."""
    with suppress(OSError):
        if events & selectors.EVENT_READ:
            client.recv(65536)
        if events & selectors.EVENT_WRITE and left[0]:
            left[0] = left[0][client.send(left[0]) :] or (b"" if sent.endswith(b"a") else sent)


class TestStop:
    def test_it_drains_before_it_stops(self, start: Callable[..., Any]) -> None:
        """It is not ready at once, serves during the drain, finishes requests, and exits with 0."""
        address, process = start(drain_seconds=1)
        half = connect(address)
        half.sendall(HEAD + b"Content-Length: 784\r\n\r\n" + bytes(400))
        idle = httpx.Client(base_url=address)
        assert idle.get("/readyz").status_code == 200
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert idle.get("/readyz").status_code == 503
        answer = httpx.post(f"{address}/predict", content=bytes(784), headers=BYTES)
        assert answer.status_code == 200
        assert answer.headers["connection"] == "close"
        time.sleep(1)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/livez")
        half.sendall(bytes(384))
        assert half.recv(100).startswith(b"HTTP/1.1 200 OK")
        half.close()
        assert process.wait(5) == 0

    def test_no_request_is_lost_when_it_stops_under_load(self, start: Callable[..., Any]) -> None:
        """Clients that honour `Connection: close` see no failure."""
        address, process = start(drain_seconds=3)  # a busy machine wakes the clients late
        outcomes: list[int] = []
        stopping = threading.Event()

        def client() -> None:
            with httpx.Client(base_url=address) as client:
                while not stopping.is_set():
                    answer = client.post("/predict", content=bytes(784), headers=BYTES)
                    outcomes.append(answer.status_code)

        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        stopping.set()
        for thread in threads:
            thread.join()
        assert process.wait(20) == 0
        assert len(outcomes) > 50
        assert set(outcomes) == {200}

    @pytest.mark.skipif(sys.platform != "linux", reason="the packet filter is Linux's")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_no_request_is_lost_when_each_has_a_new_connection(
        self, start: Callable[..., Any], workers: int
    ) -> None:
        """No connection is reset before its answer; after the end, all are refused."""
        address, process = start(drain_seconds=0.3, workers=workers)
        post = HEAD + b"Content-Length: 784\r\n\r\n" + bytes(784)
        answers: list[bytes] = []

        def client() -> None:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                try:
                    connection = connect(address)
                except ConnectionRefusedError:
                    return
                with connection:
                    try:
                        connection.sendall(post)
                        answers.append(connection.recv(100)[:15])
                    except OSError as exc:
                        answers.append(repr(exc).encode())

        threads = [threading.Thread(target=client) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(5) == 0
        assert len(answers) > 50
        assert set(answers) == {b"HTTP/1.1 200 OK"}

    def test_ctrl_c_stops_without_a_drain(self, start: Callable[..., Any]) -> None:
        _, process = start(drain_seconds=60)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0

    def test_two_ctrl_c_exit_with_0(self, start: Callable[..., Any], tmp_path: Path) -> None:
        _, process = start()
        process.send_signal(signal.SIGINT)
        time.sleep(0.03)  # less than the stop takes; without a pause, the two would be one
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()

    def test_a_second_signal_ends_the_drain(self, start: Callable[..., Any]) -> None:
        _, process = start(drain_seconds=60)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0

    def test_a_slow_sender_does_not_delay_the_stop(self, start: Callable[..., Any]) -> None:
        address, process = start(drain_seconds=0, request_timeout_seconds=0.5)
        with connect(address) as connection:
            connection.sendall(HEAD + b"Content-Length: 784\r\n\r\nhalf")
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")
        assert process.wait(5) == 0


def test_all_log_lines_are_json_if_set(start: Callable[..., Any], tmp_path: Path) -> None:
    address, process = start(log_format="json")
    httpx.post(f"{address}/predict", content=bytes(784), headers={**BYTES, "x-request-id": "mine"})
    with connect(address) as connection:
        connection.sendall(b"NONSENSE\r\n\r\n")
        connection.recv(1000)
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {"service", "service.access", "uvicorn.error"} == {line["logger"] for line in lines}
    request, nonsense = (line for line in lines if line["logger"] == "service.access")
    assert (request["request_id"], request["route"]) == ("mine", "/predict")
    assert (nonsense["route"], nonsense["status"]) == ("unmatched", 400)
