"""Two instances behind a real load balancer are restarted one by one, and nobody notices."""

import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from training.dataset import FashionMNIST

CLIENTS = 8

HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout client 10s
    timeout server 10s
    # The balancer must not hide a failure by trying again.
    retries 0
frontend http
    bind 127.0.0.1:{frontend}
    default_backend instances
backend instances
    balance roundrobin
    option httpchk GET /readyz
    http-check expect status 200
    default-server check inter 200ms fall 1 rise 1
    server first 127.0.0.1:{first}
    server second 127.0.0.1:{second}
"""


def test_a_rolling_restart_under_load_fails_no_request(
    tmp_path: Path, fashion_mnist: FashionMNIST
) -> None:
    haproxy = shutil.which("haproxy")
    if haproxy is None:
        pytest.skip("haproxy is not installed: apt-get install haproxy")
    frontend, first, second = free_ports(3)
    config = tmp_path / "haproxy.cfg"
    config.write_text(HAPROXY.format(frontend=frontend, first=first, second=second))

    with ExitStack() as running:
        instances = {port: start(running, *serve(port)) for port in (first, second)}
        for port in instances:
            wait_until_ready(port)
        start(running, haproxy, "-db", "-q", "-f", str(config))
        wait_until_ready(frontend)
        with Load(frontend, fashion_mnist.test.images[0].tobytes()) as load:
            load.wait_until_served_by(2)
            for served_by, (port, instance) in enumerate(instances.items(), start=3):
                instance.send_signal(signal.SIGTERM)
                assert instance.wait(30) == 0
                start(running, *serve(port))
                load.wait_until_served_by(served_by)

    assert load.outcomes[200] > 500
    assert load.outcomes == {200: load.outcomes[200]}


class Load:
    """Clients that classify one image again and again, each as soon as it has its answer.

    Attributes:
        outcomes: how often each status came, or each exception.
        processes: the server processes that answered, by the beginning of their request ids.
    """

    def __init__(self, port: int, image: bytes) -> None:
        self.outcomes: Counter[int | str] = Counter()
        self.processes: set[str] = set()
        self._url = f"http://127.0.0.1:{port}/predict"
        self._image = image
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_until_served_by(self, processes: int) -> None:
        wait_until(lambda: len(self.processes) == processes)

    def _client(self) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        with httpx.Client(headers=headers, trust_env=False) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self._url, content=self._image)
                except httpx.HTTPError as exc:
                    self.outcomes[repr(exc)] += 1
                else:
                    self.outcomes[answer.status_code] += 1
                    if answer.is_success:
                        self.processes.add(answer.headers["X-Request-ID"].split("-")[0])
                time.sleep(0.002)  # leaves the two cores some air


def serve(port: int) -> tuple[str, ...]:
    """Return the command of a service that drains for several of the balancer's checks."""
    settings = (f"BNLENET_PORT={port}", "BNLENET_DRAIN_SECONDS=1.5", "BNLENET_LOG_LEVEL=warning")
    return ("env", *settings, sys.executable, "-m", "service")


def start(running: ExitStack, *command: str) -> subprocess.Popen[bytes]:
    process = running.enter_context(subprocess.Popen(command))
    running.callback(process.kill)
    return process


def wait_until_ready(port: int) -> None:
    def is_ready() -> bool:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    wait_until(is_ready)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
