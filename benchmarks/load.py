"""Runs servers pinned to one core, and `wrk`, which sends prepared requests from another core."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection, HTTPException
from pathlib import Path

START_SECONDS = 60
STOP_SECONDS = 20
QUIET = {"OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}

# Prepares every request once, sends them in turn, and prints the outcome as JSON.
SCRIPT = """
local prepared, count, turn = {}, 0, 0
function init(arguments)
  count = tonumber(arguments[2])
  for i = 1, count do
    local file = assert(io.open(arguments[1] .. "/" .. (i - 1), "rb"))
    prepared[i] = wrk.format("POST", nil, nil, file:read("*a"))
    file:close()
  end
end
function request()
  turn = turn % count + 1
  return prepared[turn]
end
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\\n{"requests": %d, "microseconds": %d, "failed": %d, "p50": %f, "p99": %f}',
    summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


class BenchmarkError(Exception):
    """The measurement is impossible; the message says why."""


@dataclass(frozen=True)
class Cores:
    """The core of the servers, and the core of the load generator."""

    server: int
    load: int

    @classmethod
    def choose(cls) -> "Cores":
        """Take the first and the last core that this process may use.

        Raises:
            BenchmarkError: there is only one core, or `wrk` or `taskset` is missing.
        """
        for program, package in (("wrk", "wrk"), ("taskset", "util-linux")):
            if shutil.which(program) is None:
                raise BenchmarkError(f"{program} is needed: apt-get install {package}")
        allowed = sorted(os.sched_getaffinity(0))
        if len(allowed) < 2:
            raise BenchmarkError("Two cores are needed: one for a server, one for the load.")
        return cls(allowed[0], allowed[-1])


@dataclass(frozen=True)
class Server:
    """A running server; all its processes are in one POSIX session."""

    port: int
    seconds_to_ready: float
    session: int

    def pause(self) -> None:
        """Stop its processes while another server is measured."""
        os.killpg(self.session, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue its processes."""
        os.killpg(self.session, signal.SIGCONT)

    def megabytes(self) -> float:
        """Return the resident memory of all its processes."""
        total = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if os.getsid(int(process.name)) == self.session:
                    pages = int((process / "statm").read_text().split()[1])
                    total += pages * os.sysconf("SC_PAGE_SIZE")
            except (ProcessLookupError, FileNotFoundError):
                continue  # the process ended meanwhile
        return total / 1e6


def pinned(core: int, *command: str) -> list[str]:
    """Return the command, bound to a core together with its child processes."""
    return ["taskset", "--cpu-list", str(core), *command]


@contextmanager
def serving(
    command: Sequence[str],
    *,
    cores: Cores,
    port: int,
    ready: str,
    environment: Mapping[str, str],
    folder: Path | None = None,
) -> Iterator[Server]:
    """Run a server within the block.

    Args:
        command: starts the server.
        cores: the server runs on `cores.server`.
        port: the port that it listens on.
        ready: the path that answers 200 once the server is ready.
        environment: variables added to the current environment.
        folder: the working directory.

    Raises:
        BenchmarkError: the server exited, or was not ready in time; the message has its output.
    """
    with tempfile.TemporaryFile() as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            pinned(cores.server, *command),
            env={**os.environ, **QUIET, **environment},
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            while not _ready(port, ready):
                if process.poll() is not None or time.perf_counter() > begin + START_SECONDS:
                    log.seek(0)
                    tail = log.read().decode(errors="replace").strip()[-1000:]
                    raise BenchmarkError(f"{' '.join(command)} did not start:\n{tail}")
                time.sleep(0.002)
            yield Server(port, time.perf_counter() - begin, process.pid)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for kind in (signal.SIGCONT, signal.SIGTERM):
        if process.poll() is None:
            process.send_signal(kind)
    with suppress(subprocess.TimeoutExpired):  # killed below
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):  # no process is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ready(port: int, path: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=1)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Requests:
    """Requests to send in turn: one path, one set of header fields, many bodies."""

    path: str
    headers: Mapping[str, str]
    bodies: Sequence[bytes]

    @cached_property
    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """A folder with the bodies as files; a file's name is the body's number."""
        folder = tempfile.TemporaryDirectory()
        for i, body in enumerate(self.bodies):
            (Path(folder.name) / str(i)).write_bytes(body)
        return folder


@dataclass(frozen=True)
class Sample:
    """Requests a second, and percentiles of the latency in milliseconds."""

    rate: float
    p50: float
    p99: float


def run_wrk(
    script: str, port: int, requests: Requests, connections: int, seconds: int, cores: Cores
) -> dict[str, float]:
    """Run `wrk` with a Lua script; return the figures that the script prints.

    Raises:
        BenchmarkError: `wrk` failed.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        headers = [part for item in requests.headers.items() for part in ("-H", ": ".join(item))]
        done = subprocess.run(
            pinned(
                cores.load,
                *("wrk", "--threads=1", f"--connections={connections}", f"--duration={seconds}"),
                *("--latency", "--timeout=10s", f"--script={file.name}", *headers),
                f"http://127.0.0.1:{port}{requests.path}",
                *("--", requests.folder.name, str(len(requests.bodies))),
            ),
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        raise BenchmarkError(f"wrk failed: {done.stderr or done.stdout}")
    outcome: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def measure(
    server: Server, requests: Requests, connections: int, seconds: int, cores: Cores
) -> Sample:
    """Run `wrk`: every connection sends its next request as soon as it has its answer.

    Args:
        server: the server to measure.
        requests: the requests, sent in turn.
        connections: the number of connections.
        seconds: the length of the measurement.
        cores: `wrk` runs on `cores.load`.

    Raises:
        BenchmarkError: `wrk` failed, an answer was an error, or no answer came.
    """
    outcome = run_wrk(SCRIPT, server.port, requests, connections, seconds, cores)
    if outcome["failed"] or not outcome["requests"]:
        raise BenchmarkError(f"{requests.path}: requests failed: {outcome}")
    return Sample(
        rate=outcome["requests"] / outcome["microseconds"] * 1e6,
        p50=outcome["p50"] / 1000,
        p99=outcome["p99"] / 1000,
    )
