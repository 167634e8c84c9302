"""Several workers act as one server, also when one of them dies or hangs."""

import asyncio
import errno
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import onnx
import pytest

from service import __version__
from service.http import channel as channel_module
from service.http import workers as workers_module
from service.http.workers import Supervisor
from service.telemetry.tallies import Totals
from tests.contract.conftest import ROOT, serving
from tests.service.conftest import make_artefact, make_weights

BYTES = {"content-type": "application/octet-stream"}


class Server(NamedTuple):
    """A service with two workers."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path

    def ready(self) -> int:
        """Return how many workers have become ready so far."""
        return self.log.read_text().count("a worker is ready")

    def kill(self, victims: set[int]) -> None:
        """Kill workers, and wait until their replacements are ready."""
        ready = self.ready()
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        wait_until(lambda: self.ready() == ready + len(victims))
        assert not workers(self.process.pid) & victims


@contextmanager
def two_workers(log: Path, model: Path) -> Iterator[Server]:
    with serving(log, model_path=model, workers=2, drain_seconds=30) as (address, process):
        server = Server(address, process, log)
        wait_until(lambda: server.ready() == 2)
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, artefact: Path) -> Path:
    """Return the shared server's own model file."""
    return Path(shutil.copy(artefact, tmp_path_factory.mktemp("model") / "model.onnx"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Server]:
    """Share one server between the tests that leave it with two workers.

    It can write nothing to a disk: the folders for it do not exist.
    """
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name in ("TMPDIR", "PROMETHEUS_MULTIPROC_DIR"):
            patch.setenv(name, "/nowhere")
        log = tmp_path_factory.mktemp("workers") / "log"
        server = stack.enter_context(two_workers(log, model))
        patch.undo()
        yield server


@pytest.fixture
def own_server(tmp_path: Path, artefact: Path) -> Iterator[Server]:
    with two_workers(tmp_path / "log", artefact) as server:
        yield server


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes() -> dict[int, tuple[int, float]]:
    """Return the parent and the resident memory in bytes of each running process."""
    lines: list[list[str]] = []
    if Path("/proc/self/stat").exists():
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has just ended
                before, _, after = stat.read_text().rpartition(")")
                fields = after.split()
                kilobytes = int(fields[21]) * os.sysconf("SC_PAGE_SIZE") // 1024
                lines.append([before.split()[0], fields[1], str(kilobytes), fields[0]])
    else:
        command = ["/bin/ps", "-A", "-o", "pid=,ppid=,rss=,stat="]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        lines = [line.split() for line in listed.splitlines()]
    return {
        int(pid): (int(parent), int(kilobytes) * 1024)
        for pid, parent, kilobytes, state in lines
        if state[0] != "Z"  # has ended, and waits for its parent
    }


def workers(supervisor: int) -> set[int]:
    """Return the process ids of the supervisor's workers."""
    return {pid for pid, (parent, _) in processes().items() if parent == supervisor}


def alive(pid: int) -> bool:
    return pid in processes()


def predict(address: str) -> None:
    """Send a request on a new connection, so that any worker may answer."""
    httpx.post(
        f"{address}/predict", content=bytes(784), headers=BYTES, timeout=60
    ).raise_for_status()


def metric(address: str, series: str) -> float:
    text = httpx.get(f"{address}/metrics", timeout=60).raise_for_status().text
    found = re.search(rf"^{re.escape(series)} (.*)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def predictions(address: str) -> float:
    return metric(address, 'http_requests_total{method="POST",route="/predict",status="200"}')


def revisions(address: str) -> set[str]:
    return {
        httpx.get(f"{address}/readyz", timeout=60).json()["model"]["revision"] for _ in range(10)
    }


def resident(supervisor: int) -> float:
    """Return the resident memory of all workers in bytes."""
    return sum(memory for parent, memory in processes().values() if parent == supervisor)


def test_any_worker_shows_the_sum_of_all(server: Server) -> None:
    address, process, _ = server
    assert len(workers(process.pid)) == 2
    before = predictions(address)
    for _ in range(40):
        predict(address)
    assert {predictions(address) for _ in range(10)} == {before + 40}


def test_the_memory_of_all_workers_is_shown(server: Server) -> None:
    """The alert on memory needs it; compared with the kernel's numbers."""
    address, process, _ = server

    def equal() -> bool:
        shown = metric(address, "process_resident_memory_bytes")
        return shown == pytest.approx(resident(process.pid), rel=0.1)

    wait_until(equal)


def test_a_worker_that_dies_is_replaced_and_its_counts_stay(server: Server, model: Path) -> None:
    """The new ones serve the model that was read first, though the file has changed."""
    address, process, _ = server
    predict(address)
    counted = predictions(address)
    (first,) = revisions(address)
    onnx.save(make_artefact(make_weights(1)), model)
    server.kill(workers(process.pid))
    assert predictions(address) == counted
    assert httpx.get(f"{address}/readyz", timeout=60).status_code == 200
    assert revisions(address) == {first}


def test_a_stopped_worker_is_replaced(server: Server) -> None:
    address, process, _ = server
    before = workers(process.pid)
    stopped = min(before)
    ready = server.ready()
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: not alive(stopped))  # long before a slow start would be given up
    wait_until(lambda: server.ready() > ready)
    predict(address)


@contextmanager
def connections(address: str, count: int) -> Iterator[list[socket.socket]]:
    """Open all connections first, then send a request on each."""
    with ExitStack() as stack:
        where = (httpx.URL(address).host, httpx.URL(address).port or 0)
        opened = [stack.enter_context(socket.create_connection(where, 60)) for _ in range(count)]
        for connection in opened:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        yield opened


def test_a_worker_that_gets_a_signal_alone_is_replaced_at_its_listener(server: Server) -> None:
    address, process, _ = server
    ready = server.ready()
    stopped = min(workers(process.pid))
    while alive(stopped):
        with suppress(ProcessLookupError):
            os.kill(stopped, signal.SIGTERM)
        time.sleep(0.1)
    wait_until(lambda: server.ready() > ready)
    with connections(address, 32) as opened:
        for connection in opened:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the workers share a listener")
def test_connections_opened_at_once_are_spread_over_the_workers(server: Server) -> None:
    """The kernel spreads them by chance: one of two gets over 96 of 128 once in 10^8 runs."""
    address = server.address
    answered_by: Counter[bytes] = Counter()
    with connections(address, 128) as opened:
        for connection in opened:
            found = re.search(rb"x-request-id: ([0-9a-f]+)-", connection.recv(10_000))
            assert found
            answered_by[found[1]] += 1
    assert len(answered_by) == 2
    assert max(answered_by.values()) <= 96


def test_no_client_waits_for_a_stopped_worker(server: Server) -> None:
    """The other accepts its connections, before it is replaced."""
    address, process, _ = server
    before = workers(process.pid)
    stopped = min(before)
    os.kill(stopped, signal.SIGSTOP)
    with connections(address, 16) as opened:
        for connection in opened:
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert alive(stopped)
    server.kill({stopped})


def test_a_second_service_cannot_share_the_port(server: Server, artefact: Path) -> None:
    address = server.address
    environment = os.environ | {
        "BNLENET_PORT": str(httpx.URL(address).port),
        "BNLENET_MODEL_PATH": str(artefact),
        "BNLENET_WORKERS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: Cannot listen on")


def test_a_stopped_worker_does_not_block_the_stop(own_server: Server) -> None:
    process = own_server.process
    children = workers(process.pid)
    os.kill(min(children), signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 1
    assert not any(map(alive, children))


def test_all_drain_and_end_with_the_supervisor(own_server: Server) -> None:
    address, process, _ = own_server
    children = workers(process.pid)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: httpx.get(f"{address}/readyz", timeout=60).status_code == 503)
    wait_until(
        lambda: {httpx.get(f"{address}/readyz", timeout=60).status_code for _ in range(8)} == {503}
    )
    predict(address)
    process.send_signal(signal.SIGTERM)  # a second one ends the drain
    assert process.wait(20) == 0
    assert not any(map(alive, children))


def test_workers_do_not_outlive_a_killed_supervisor(own_server: Server) -> None:
    process = own_server.process
    children = workers(process.pid)
    process.kill()
    process.wait()
    wait_until(lambda: not any(map(alive, children)))


def test_workers_run_the_code_of_their_supervisor(tmp_path: Path, artefact: Path) -> None:
    """Not a package of the same name in the current folder, and not an installed one."""
    for folder, says in (("current", "a stranger"), ("ours", "ours")):
        shutil.copytree(ROOT / "service", tmp_path / folder / "service")
        with (tmp_path / folder / "service" / "__init__.py").open("a") as module:
            # In one write: `print` makes two, and another worker's may come between.
            module.write(f"import sys\nsys.stderr.write({says + chr(10)!r})\n")
    start = (
        f"import sys; sys.path[0] = {str(tmp_path / 'ours')!r};"
        " from service.__main__ import main; main()"
    )
    environment = os.environ | {
        "BNLENET_PORT": "0",
        "BNLENET_WORKERS": "2",
        "BNLENET_MODEL_PATH": str(artefact),
    }
    with subprocess.Popen(
        [sys.executable, "-c", start],
        cwd=tmp_path / "current",
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said: list[str] = []
        while "ready" not in "".join(said[-1:]):
            said.append(process.stderr.readline())
            assert said[-1]
        process.send_signal(signal.SIGINT)
        said += process.stderr.readlines()
    assert said.count("ours\n") == 3
    assert "a stranger\n" not in said


def test_a_closed_terminal_stops_the_service_but_not_under_nohup(
    tmp_path: Path, artefact: Path
) -> None:
    for ignored in (True, False):
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
        log = tmp_path / f"{ignored}"
        with serving(log, model_path=artefact, drain_seconds=0) as (address, process):
            signal.signal(signal.SIGHUP, handler)
            process.send_signal(signal.SIGHUP)
            if ignored:
                predict(address)
                process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the workers share a listener")
@pytest.mark.parametrize(
    ("family", "host", "only"),
    [(socket.AF_INET, "127.0.0.1", None), (socket.AF_INET6, "::", 0), (socket.AF_INET6, "::", 1)],
)
def test_every_worker_has_a_listener_at_the_same_address(
    family: int, host: str, only: int | None
) -> None:
    with ExitStack() as stack:
        try:
            first = stack.enter_context(socket.socket(family))
            if only is not None:
                first.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            first.bind((host, 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        made = [stack.enter_context(one) for one in workers_module.listeners(first, 3)]
        assert made[0] is first
        assert [one.getsockname() for one in made] == [first.getsockname()] * 3
        for one in made:
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
        for one in made[1:]:  # a port whose old connections are still closing can be bound
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        if only is not None:
            found = [one.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) for one in made]
            assert found == [only] * 3


STUB = """
import os, signal, socket, sys, time
from service.telemetry.tallies import Totals
channel = socket.socket(fileno=int(sys.argv[2]))  # after the supervisor's process id
folder = os.environ["STUB_FOLDER"]
with open(f"{folder}/starts", "a") as starts:
    starts.write(f"{os.getpid()} {os.getsid(0)}\\n")
pids = [int(line.split()[0]) for line in open(f"{folder}/starts")]
number = pids.index(os.getpid())  # of this start, from 0
first = number == 0
def report():
    channel.sendall(b"0 " + Totals().to_json() + b"\\n")
"""


class Stub:
    """Stands in for a worker: a program of a few lines."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        monkeypatch.setenv("STUB_FOLDER", str(folder))
        monkeypatch.setattr(workers_module, "TICK_SECONDS", 0.02)
        monkeypatch.setattr(workers_module, "RESTART_AFTER_SECONDS", 0.01)
        for name in ("START", "HANGS_AFTER", "GIVE_UP"):
            monkeypatch.setattr(workers_module, f"{name}_TICKS", 10**6)

    def supervise(self, program: str, workers: int = 1) -> int:
        """Run a program as the worker, and return the supervisor's exit status."""

        async def run() -> int:
            command = [sys.executable, "-c", STUB + program]
            self.supervisor = Supervisor([listener] * workers, [b"model"], "http://here/", command)
            return await asyncio.wait_for(self.supervisor.run(), 60)

        with socket.socket() as listener:
            return asyncio.run(run())

    def starts(self) -> list[list[int]]:
        """Return the process id and the session of each worker that was started."""
        lines = (self._folder / "starts").read_text().splitlines()
        return [[int(number) for number in line.split()] for line in lines]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    return Stub(tmp_path, monkeypatch)


STOP_SUPERVISOR = "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)\n"
BECOME_READY = f"""stream = channel.makefile("rb")
stream.read({len(channel_module.models_message([b"model"]))})
channel.sendall(b"-1 " + Totals().to_json() + b"\\n")
stream.readline()  # the answer: the supervisor knows that this worker is ready
"""


def test_the_service_ends_when_no_worker_can_be_started_any_more(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Then systemd or Kubernetes can restart it; clients would wait at the open port for ever."""
    monkeypatch.setattr(workers_module, "GIVE_UP_TICKS", 150)
    assert stub.supervise("if first: report()\nsys.exit(1)") == 1
    assert len(stub.starts()) > 2
    assert "no worker can be started" in caplog.text


@pytest.mark.parametrize(("other", "starts"), [("report(); sys.exit(3)", 4), ("time.sleep(60)", 2)])
def test_a_worker_that_cannot_be_replaced_does_not_end_the_others(
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    other: str,
    starts: int,
) -> None:
    """Whether it dies again and again, or never becomes ready."""
    monkeypatch.setattr(workers_module, "GIVE_UP_TICKS", 150)
    report_and_stop = f"for _ in range(400): report(); time.sleep(0.01)\n{STOP_SUPERVISOR}"
    status = stub.supervise(f"if not first: {other}\n{report_and_stop}", workers=2)
    assert status in (0, 1)  # 1 if the other one dies in the moment of the stop
    assert "the service ends" not in caplog.text
    assert len(stub.starts()) >= starts


def test_a_first_worker_that_fails_ends_the_service(stub: Stub) -> None:
    assert stub.supervise("sys.exit(1)") == 1
    assert len(stub.starts()) == 1


@pytest.mark.parametrize("program", ["report(); time.sleep(60)", "time.sleep(60)"])
def test_a_worker_that_hangs_is_killed_and_replaced(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, program: str
) -> None:
    """Whether it was ready, or never became so."""
    monkeypatch.setattr(workers_module, "HANGS_AFTER_TICKS", 5)
    monkeypatch.setattr(workers_module, "START_TICKS", 100)
    stub.supervise(f"if first:\n {program}\nelse: {STOP_SUPERVISOR}")
    assert len(stub.starts()) == 2
    assert "a worker hangs" in caplog.text
    assert f"{-signal.SIGKILL}" in str([vars(record).get("fields") for record in caplog.records])


def test_a_worker_that_reports_is_not_killed(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service")
    monkeypatch.setattr(workers_module, "HANGS_AFTER_TICKS", 50)
    program = f"for _ in range(150): report(); time.sleep(0.01)\n{STOP_SUPERVISOR}"
    assert stub.supervise(program) == 0
    assert len(stub.starts()) == 1
    (ready,) = caplog.records  # once, and nothing hangs
    assert (ready.message, vars(ready)["fields"]) == (
        "ready",
        {"page": "http://here/", "version": __version__, "workers": 1},
    )


def test_counters_of_a_dead_worker_stay_and_its_gauges_go(stub: Stub, tmp_path: Path) -> None:
    program = f"""
def send(number):
    totals = Totals({{("requests",): [2]}}, {{("in_flight",): [1]}})
    channel.sendall(b"%d " % number + totals.to_json() + b"\\n")
if first:
    send(0)
    sys.exit(3)
channel.recv(100)  # the model
send(-1)
with open(f"{{folder}}/sum", "wb") as file:
    file.write(channel.recv(1000))
{STOP_SUPERVISOR}"""
    assert stub.supervise(program) == 0
    total = Totals.from_json((tmp_path / "sum").read_bytes())
    assert total == Totals({("requests",): [4]}, {("in_flight",): [1]})


def test_a_worker_that_does_not_answer_does_not_block_the_sum(stub: Stub, tmp_path: Path) -> None:
    """Its last report counts."""
    program = """
channel.recv(100)
if first:
    channel.sendall(b"0 " + Totals({("requests",): [2]}).to_json() + b"\\n")
    open(f"{folder}/reported", "w")
    time.sleep(600)
while not os.path.exists(f"{folder}/reported"):
    time.sleep(0.2)
channel.sendall(b"-1 " + Totals({("requests",): [40]}).to_json() + b"\\n")
with open(f"{folder}/sum", "wb") as file:
    file.write(channel.recv(1000))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""
    assert stub.supervise(program, workers=2) == 0
    assert Totals.from_json((tmp_path / "sum").read_bytes()).counters == {("requests",): [42]}


def test_a_sum_has_the_present_counts_of_the_others(stub: Stub, tmp_path: Path) -> None:
    """Not those of their last report."""
    program = """
channel.recv(100)
def send(number, count):
    channel.sendall(b"%d " % number + Totals({("requests",): [count]}).to_json() + b"\\n")
if first:
    send(0, 2)
    open(f"{folder}/reported", "w")
    send(int(channel.recv(100)), 5)
    time.sleep(600)
while not os.path.exists(f"{folder}/reported"):
    time.sleep(0.2)
send(-1, 40)
with open(f"{folder}/sum", "wb") as file:
    file.write(channel.recv(1000))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""
    assert stub.supervise(program, workers=2) == 0
    assert Totals.from_json((tmp_path / "sum").read_bytes()).counters == {("requests",): [45]}


ASK_FOR_THE_SUM = f"""
channel.recv(100)
channel.sendall(b"-1 " + Totals({{("requests",): [40]}}).to_json() + b"\\n")
with open(f"{{folder}}/sum", "wb") as file:
    file.write(channel.recv(1000))
{STOP_SUPERVISOR}"""


def test_a_worker_that_dies_when_it_is_asked_does_not_delay_the_sum(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its last report counts."""
    monkeypatch.setattr(workers_module, "COLLECT_SECONDS", 3600)
    program = f"""
if first:
    channel.recv(100)
    channel.sendall(b"0 " + Totals({{("requests",): [2]}}).to_json() + b"\\n")
    open(f"{{folder}}/reported", "w")
    channel.recv(100)  # the question
    sys.exit(3)
if number == 2: time.sleep(60)
while not os.path.exists(f"{{folder}}/reported"):
    time.sleep(0.02)
time.sleep(0.2)  # for the report to arrive
{ASK_FOR_THE_SUM}"""
    assert stub.supervise(program, workers=2) == 0
    assert Totals.from_json((tmp_path / "sum").read_bytes()).counters == {("requests",): [42]}


def test_a_worker_that_starts_is_not_asked(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It loads the model, and cannot answer."""
    monkeypatch.setattr(workers_module, "COLLECT_SECONDS", 3600)
    program = f"""
if not first: time.sleep(60)
while len(open(f"{{folder}}/starts").readlines()) < 2:
    time.sleep(0.02)
{ASK_FOR_THE_SUM}"""
    assert stub.supervise(program, workers=2) == 0
    assert Totals.from_json((tmp_path / "sum").read_bytes()).counters == {("requests",): [40]}


def test_many_questions_at_once_are_one_for_the_other_workers(stub: Stub, tmp_path: Path) -> None:
    """However many clients ask for `/metrics`, one collection runs at a time."""
    program = f"""
lines = channel.makefile("rb")
lines.read(21)  # the number of models, the length of one, and its bytes
def send(number, count):
    channel.sendall(b"%d " % number + Totals({{("requests",): [count]}}).to_json() + b"\\n")
if first:
    send(0, 2)
    open(f"{{folder}}/reported", "w")
    for question, line in enumerate(lines, 1):
        time.sleep(0.2)  # long enough for the others' questions to arrive
        open(f"{{folder}}/questions", "w").write(str(question))
        send(int(line), 2)
while not os.path.exists(f"{{folder}}/reported"):
    time.sleep(0.02)
time.sleep(0.2)  # for the report to arrive
for _ in range(100):
    send(-1, 40)
for _ in range(100):
    assert Totals.from_json(lines.readline()).counters == {{("requests",): [42]}}
open(f"{{folder}}/answered", "w")
{STOP_SUPERVISOR}"""
    assert stub.supervise(program, workers=2) == 0
    assert (tmp_path / "answered").exists()
    assert 1 <= int((tmp_path / "questions").read_text()) <= 3


def test_a_report_may_be_long_or_cut_off(stub: Stub) -> None:
    """Many routes make it long; a worker that is killed leaves half of one."""
    program = f"""
channel.recv(100)
channel.sendall(b"0 " + Totals({{("a" * 200_000,): [1]}}).to_json() + b"\\n")
if first:
    channel.sendall(b"0 [[")
    sys.exit(3)
{STOP_SUPERVISOR}"""
    assert stub.supervise(program) == 0
    assert len(stub.starts()) == 2


def test_there_is_a_pause_before_a_worker_is_replaced(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that die at once do not keep the CPU busy; a signal ends the pause."""
    monkeypatch.setattr(workers_module, "RESTART_AFTER_SECONDS", 3600)
    signal_later = (
        "import subprocess; subprocess.Popen([sys.executable, '-c', 'import os, sys, time;"
        " time.sleep(1); os.kill(int(sys.argv[1]), 15)', str(os.getppid())])\n"
    )
    assert stub.supervise(signal_later + "report(); os._exit(0)") == 0
    assert len(stub.starts()) == 1


def test_a_worker_has_a_session_of_its_own(stub: Stub) -> None:
    """Otherwise it would get a terminal's Ctrl-C twice, and stop at once."""
    stub.supervise(STOP_SUPERVISOR)
    ((pid, session),) = stub.starts()
    assert session == pid


@pytest.mark.parametrize(("ends", "status"), [("sys.exit(3)", 1), ("sys.exit(0)", 0)])
def test_the_exit_status_is_one_when_a_worker_ended_badly(
    stub: Stub, ends: str, status: int
) -> None:
    handler = f"def end(*_): {ends}\nsignal.signal(signal.SIGTERM, end)\n"
    assert stub.supervise(handler + STOP_SUPERVISOR) == status


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT"])
def test_a_worker_that_dies_by_the_signal_to_stop_did_not_end_badly(stub: Stub, sent: str) -> None:
    program = f"""
signal.signal(signal.SIGINT, signal.SIG_DFL)
{BECOME_READY}os.kill(os.getppid(), signal.{sent})
time.sleep(60)
"""
    assert stub.supervise(program) == 0


@pytest.mark.parametrize(
    ("sent", "received"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGHUP", "SIGTERM")]
)
def test_a_worker_gets_the_signal_that_stops_the_supervisor(
    stub: Stub, tmp_path: Path, sent: str, received: str
) -> None:
    """SIGTERM drains, SIGINT does not; a closed terminal drains."""
    program = f"""
def end(number, _):
    with open(f"{{folder}}/signal", "w") as file:
        file.write(signal.Signals(number).name)
    sys.exit(0)
for name in ("SIGTERM", "SIGINT", "SIGHUP"):
    signal.signal(getattr(signal, name), end)
{BECOME_READY}os.kill(os.getppid(), signal.{sent})
time.sleep(60)
"""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert stub.supervise(program) == 0
    signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "signal").read_text() == received


def test_under_nohup_a_closed_terminal_stops_no_supervisor(stub: Stub, tmp_path: Path) -> None:
    program = f"""
os.kill(os.getppid(), signal.SIGHUP)
time.sleep(0.3)
open(f"{{folder}}/still here", "w")
{STOP_SUPERVISOR}"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stub.supervise(program) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "still here").exists()


def test_the_supervisor_closes_the_port_before_it_stops_the_workers(
    stub: Stub, tmp_path: Path
) -> None:
    """Otherwise clients would wait at a port where nobody accepts their connections."""
    program = f"""
listener = socket.socket(fileno=int(sys.argv[3]))
listener.listen()
port = listener.getsockname()[1]
def end(*_):
    listener.close()
    with open(f"{{folder}}/connected", "w") as file, socket.socket() as client:
        print(client.connect_ex(("127.0.0.1", port)), file=file)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
{STOP_SUPERVISOR}"""
    assert stub.supervise(program) == 0
    assert (tmp_path / "connected").read_text() == f"{errno.ECONNREFUSED}\n"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux lists open files there")
def test_a_worker_that_ended_leaves_no_open_file(stub: Stub, tmp_path: Path) -> None:
    program = f"""
channel.recv(100)  # with unread bytes, the connection would be reset and closed
with open(f"{{folder}}/files", "a") as files:
    print(len(os.listdir(f"/proc/{{os.getppid()}}/fd")), file=files)
report()
if number < 5: sys.exit(3)
{STOP_SUPERVISOR}"""
    stub.supervise(program)
    _, *later = (tmp_path / "files").read_text().split()
    assert len(later) == 5
    assert len({*later}) == 1


def test_a_starting_worker_that_is_stopped_is_not_a_failure(stub: Stub) -> None:
    """Click ends a program with status 1 after Ctrl-C, as if the worker could not start."""
    program = "signal.signal(signal.SIGINT, lambda *_: sys.exit(1))"
    assert stub.supervise(f"{program}; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)") == 0


def test_a_starting_worker_that_ignores_the_stop_is_killed(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the time that a start may take."""
    monkeypatch.setattr(workers_module, "HANGS_AFTER_TICKS", 5)
    program = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{STOP_SUPERVISOR}"
    assert stub.supervise(program) == 1


def test_the_waits_fit_together() -> None:
    """A worker reports often before it counts as hung, and outwaits the supervisor's collecting."""
    hangs_after = workers_module.HANGS_AFTER_TICKS * workers_module.TICK_SECONDS
    assert hangs_after >= 5 * channel_module.REPORT_SECONDS
    assert workers_module.COLLECT_SECONDS < channel_module.ANSWER_SECONDS < hangs_after
    assert workers_module.HANGS_AFTER_TICKS < workers_module.START_TICKS


def test_a_signal_during_the_start_of_a_worker_reaches_it(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = asyncio.create_subprocess_exec

    async def start_and_signal(*args: Any, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*args, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start_and_signal)
    monkeypatch.setattr(workers_module, "START_TICKS", 10**6)
    assert stub.supervise("time.sleep(600)") == 0


def test_a_worker_that_cannot_be_started_is_tried_again(
    stub: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When memory or processes run out for a moment, the service goes on."""
    tries = 0

    async def fail(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
    assert stub.supervise("") == 0
    assert tries == 3
    assert caplog.text.count("a worker cannot be started") == 3
    reasons = [vars(record)["fields"]["reason"] for record in caplog.records]
    assert reasons == ["Resource temporarily unavailable"] * 3
