"""Servers and the load on them, with the real `wrk` and `taskset` and with stand-ins."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from benchmarks.load import (
    BenchmarkError,
    Cores,
    Requests,
    Sample,
    Server,
    free_port,
    measure,
    pinned,
    serving,
)

CORES = Cores(server=0, load=1)
SERVER = Server(port=8123, seconds_to_ready=0.5, session=0)
OUTCOME = {"requests": 3000, "microseconds": 2_000_000, "failed": 0, "p50": 250.0, "p99": 4000.0}


@pytest.fixture
def requests() -> Iterator[Requests]:
    made = Requests("/predict", {"Content-Type": "text/plain", "X-More": "a"}, [b"one", b"two"])
    with made.folder:
        yield made


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a folder of stand-ins first on the path; its `taskset` runs the command on any core."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    stand_in(tmp_path, "taskset", 'shift 2; exec "$@"')
    return tmp_path


def stand_in(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def wrk(folder: Path, outcome: dict[str, float], status: int = 0) -> None:
    """Make a `wrk` that records its arguments, prints this outcome and exits with this status."""
    printed = f"  3000 requests in 2.00s\n{json.dumps(outcome)}"
    stand_in(
        folder,
        "wrk",
        f"printf '%s\\n' \"$@\" > {folder}/called\ncat <<'END'\n{printed}\nEND\nexit {status}",
    )


def test_a_sample_is_requests_a_second_and_milliseconds(programs: Path, requests: Requests) -> None:
    """3,000 requests in 2,000,000 us; latencies of 250 and 4,000 us."""
    wrk(programs, OUTCOME)
    assert measure(SERVER, requests, 16, 2, CORES) == Sample(rate=1500.0, p50=0.25, p99=4.0)


def test_wrk_is_asked_for_these_requests_from_one_thread(
    programs: Path, requests: Requests
) -> None:
    wrk(programs, OUTCOME)
    measure(SERVER, requests, 16, 2, CORES)
    called = (programs / "called").read_text().splitlines()
    assert {"--threads=1", "--connections=16", "--duration=2"} <= set(called)
    assert called[called.index("-H") + 1] == "Content-Type: text/plain"
    assert called.count("-H") == 2
    assert called[-4:] == ["http://127.0.0.1:8123/predict", "--", requests.folder.name, "2"]
    bodies = [(Path(requests.folder.name) / str(i)).read_bytes() for i in range(2)]
    assert bodies == [b"one", b"two"]


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(OUTCOME | {"failed": 1}, 0), (OUTCOME | {"requests": 0}, 0), (OUTCOME, 1)],
)
def test_a_failed_request_is_an_error(
    outcome: dict[str, float], status: int, programs: Path, requests: Requests
) -> None:
    wrk(programs, outcome, status)
    with pytest.raises(BenchmarkError, match="failed"):
        measure(SERVER, requests, 16, 2, CORES)


def test_a_command_is_bound_to_its_core() -> None:
    assert pinned(3, "wrk", "-t1") == ["taskset", "--cpu-list", "3", "wrk", "-t1"]


def test_the_server_and_the_load_run_on_different_cores(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrk(programs, OUTCOME)
    allowed = {5, 2, 7}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
    assert Cores.choose() == Cores(server=2, load=7)
    allowed = {5}
    with pytest.raises(BenchmarkError, match="Two cores are needed"):
        Cores.choose()


@pytest.mark.parametrize("missing", ["wrk", "taskset"])
def test_a_missing_program_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == missing else name)
    with pytest.raises(BenchmarkError, match=f"{missing} is needed: apt-get install"):
        Cores.choose()


SLOW_START = """
import http.server, os, sys, time
time.sleep(0.3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        here = f"{os.getcwd()} {os.environ['GIVEN']} {os.environ['OMP_NUM_THREADS']}"
        here = f"{here} {os.environ['ORT_DISABLE_TELEMETRY']}".encode()
        self.send_response(200 if self.path == "/ready" else 404)
        self.send_header("Content-Length", str(len(here)))
        self.end_headers()
        self.wfile.write(here)
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.usefixtures("programs")
def test_a_server_runs_from_ready_to_the_end(tmp_path: Path) -> None:
    port = free_port()
    with serving(
        [sys.executable, "-c", SLOW_START, str(port)],
        cores=CORES,
        port=port,
        ready="/ready",
        environment={"GIVEN": "this"},
        folder=tmp_path,
    ) as server:
        assert server.port == port
        assert server.seconds_to_ready > 0.3
        asked = httpx.get(f"http://127.0.0.1:{port}/ready")
        assert asked.text.split() == [str(tmp_path), "this", "1", "1"]
        server.pause()
        server.resume()
        os.killpg(server.session, 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(server.session, 0)


TIDY = """
import signal, sys
def end(*_):
    open("tidied", "w").close()
    sys.exit()
signal.signal(signal.SIGTERM, end)
"""


@pytest.mark.usefixtures("programs")
def test_a_paused_server_can_end_in_its_own_way(tmp_path: Path) -> None:
    port = free_port()
    with serving(
        [sys.executable, "-c", TIDY + SLOW_START, str(port)],
        cores=CORES,
        port=port,
        ready="/ready",
        environment={"GIVEN": ""},
        folder=tmp_path,
    ) as server:
        server.pause()
    assert (tmp_path / "tidied").exists()


@pytest.mark.usefixtures("programs")
def test_a_server_that_exits_at_once_is_reported_with_its_output() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(BenchmarkError, match=r"did not start:\nno such model$"),
        serving(command, cores=CORES, port=free_port(), ready="/", environment={}),
    ):
        pass


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_is_the_sum_over_all_processes_of_the_session() -> None:
    """Compares two processes that hold 100 MB each with two that do not."""
    code = """
import subprocess, sys
held = bytearray(b"x" * {size})
child = subprocess.Popen([sys.executable, "-c", 'held = bytearray(b"x" * {size}); print(flush=True); input()'])
input()
"""  # noqa: E501 - a program in one line
    found = []
    for size in (100_000_000, 1):
        process = subprocess.Popen(
            [sys.executable, "-c", code.format(size=size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            found.append(Server(0, 0, process.pid).megabytes())
            os.killpg(process.pid, signal.SIGKILL)
    assert found[0] - found[1] == pytest.approx(200, rel=0.1)
    assert found[1] > 5


@pytest.fixture
def counted() -> Iterator[tuple[int, list[bytes]]]:
    """Start a server that answers 200, records the bodies, and refuses `bad`."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            bodies.append(body)
            time.sleep(0.001)
            self.send_response(400 if body == b"bad" else 200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Print nothing about connections that `wrk` breaks at its end."""

    server = Quiet(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield server.server_port, bodies
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(
    shutil.which("wrk") is None or shutil.which("taskset") is None, reason="wrk and taskset needed"
)
def test_wrk_itself_sends_the_bodies_in_turn_and_counts_refusals(
    counted: tuple[int, list[bytes]],
) -> None:
    port, bodies = counted
    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    cores, server = Cores(core, core), Server(port, 0.0, 0)
    good, bad = Requests("/", {}, [b"a", b"b", b"c"]), Requests("/", {}, [b"a", b"bad"])
    with good.folder, bad.folder:
        sample = measure(server, good, 1, 1, cores)
        sent = list(bodies)
        with pytest.raises(BenchmarkError, match="requests failed"):
            measure(server, bad, 1, 1, cores)
    after = {b"a": b"b", b"b": b"c", b"c": b"a"}
    assert all(after[one] == other for one, other in itertools.pairwise(sent))
    assert 0 < sample.rate < 1.1 * len(sent)  # which took a second or longer
    assert 1 < sample.p50 <= sample.p99  # of answers that each take a millisecond and more
