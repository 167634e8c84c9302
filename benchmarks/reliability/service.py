"""The service under attack: a real one with its workers, and their use of the machine."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import psutil

from benchmarks.load import BenchmarkError, free_port

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
STOP_SECONDS = 30


@dataclass(frozen=True)
class Usage:
    """The usage of a worker: bytes of resident memory, open descriptors, threads."""

    memory: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class Service:
    """A running service; with one worker, its process is the worker."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    count: int

    def workers(self) -> list[psutil.Process]:
        """Return the worker processes, by their ids."""
        main = psutil.Process(self.process.pid)
        return sorted(main.children(), key=lambda one: one.pid) if self.count > 1 else [main]

    def usage(self) -> dict[int, Usage]:
        """Return the present usage of each worker, by its process id."""
        taken = {}
        for one in self.workers():
            with suppress(psutil.NoSuchProcess), one.oneshot():  # the worker died meanwhile
                size = one.memory_info().rss
                taken[one.pid] = Usage(size, one.num_fds(), one.num_threads())
        return taken

    def ready(self) -> bool:
        """Return whether all workers listen and one says that it is ready."""
        with suppress(psutil.Error):
            open_ports = psutil.Process(self.process.pid).net_connections("inet")
            listening = [c for c in open_ports if c.status == psutil.CONN_LISTEN]
            needed = self.count if sys.platform == "linux" else 1  # elsewhere they share one
            alive = [one for one in self.workers() if one.status() != psutil.STATUS_ZOMBIE]
            return (
                len(listening) >= needed and len(alive) == self.count and bool(self.get("/readyz"))
            )
        return False

    def get(self, path: str) -> str:
        """Return the text of a 200 answer; empty if there is none."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.read().decode() if answer.status == 200 else ""
        except (OSError, HTTPException):
            return ""
        finally:
            connection.close()

    def wait_until_ready(self) -> float:
        """Wait until all workers are ready; return the seconds.

        Raises:
            BenchmarkError: the service exited, or is not ready in time; the message has its log.
        """
        begin = time.monotonic()
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > begin + START_SECONDS:
                raise BenchmarkError(f"the service is not ready:\n{self.log.read_text()[-1000:]}")
            time.sleep(0.02)
        return time.monotonic() - begin

    def tracebacks(self) -> int:
        """Return the number of tracebacks in the log."""
        return self.log.read_text(errors="replace").count("Traceback")


def environment(**settings: object) -> dict[str, str]:
    """Return the current environment, with only these settings of the service."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("BNLENET_")}
    given = {"LOG_LEVEL": "warning", "DRAIN_SECONDS": 0, "DEVICE": "cpu"} | settings
    return ours | {f"BNLENET_{name.upper()}": str(value) for name, value in given.items()}


@contextmanager
def serving(
    workers: int = 2,
    *,
    wrapper: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
    log: Path | None = None,
    **settings: object,
) -> Iterator[Service]:
    """Run a service within the block.

    Args:
        workers: the number of workers.
        wrapper: the beginning of a command line that runs the service's command.
        extra: further environment variables.
        log: the file for standard error.
        settings: settings of the service, by name.

    Raises:
        BenchmarkError: the service does not start.
    """
    port = free_port()
    variables = environment(port=port, workers=workers, **settings) | dict(extra or {})
    with tempfile.TemporaryDirectory() as folder:
        log = log or Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*wrapper, sys.executable, "-m", "service"],
                cwd=ROOT,
                env=variables,
                stderr=output,
                start_new_session=True,
            )
        service = Service(port, process, log, workers)
        try:
            service.wait_until_ready()
            yield service
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    children: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
    for signal_number in (signal.SIGCONT, signal.SIGINT):
        if process.poll() is None:
            process.send_signal(signal_number)
    with suppress(subprocess.TimeoutExpired):  # killed below
        process.wait(STOP_SECONDS)
    if process.poll() is None:
        process.kill()
        process.wait()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()


@contextmanager
def apart(service: Service) -> Iterator[None]:
    """Run this process on the last core and the service on the others, if the system allows it."""
    ours = psutil.Process()
    if not hasattr(ours, "cpu_affinity") or len(cores := ours.cpu_affinity()) < 2:
        yield
        return
    for one in (psutil.Process(service.process.pid), *service.workers()):
        one.cpu_affinity(cores[:-1])
    ours.cpu_affinity(cores[-1:])
    try:
        yield
    finally:
        ours.cpu_affinity(cores)
