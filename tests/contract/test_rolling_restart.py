"""Two instances behind a real load balancer are restarted one by one, and nobody notices."""

import signal
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.contract.conftest import serving
from tests.contract.neighbours import answers, free_port, running, wait_until
from training.dataset import FashionMNIST

CLIENTS = 4

HAPROXY = """
defaults
    mode http
    timeout connect 1s
    timeout client 10s
    timeout server 10s
    timeout check 2s
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
    settings = {"drain_seconds": 1.0}  # several of the balancer's checks
    with ExitStack() as stack:
        instances = [
            stack.enter_context(serving(tmp_path / name, **settings))
            for name in ("first", "second")
        ]
        ports = [httpx.URL(url).port for url, _ in instances]
        frontend = free_port()
        config = tmp_path / "haproxy.cfg"
        config.write_text(HAPROXY.format(frontend=frontend, first=ports[0], second=ports[1]))
        stack.enter_context(running("haproxy", "haproxy", "-db", "-q", "-f", str(config)))
        wait_until(lambda: answers(f"http://127.0.0.1:{frontend}/readyz"))

        with Load(frontend, fashion_mnist.test.images[0].tobytes()) as load:
            load.wait_until_served_by(2)
            for served_by, (port, (_, process)) in enumerate(zip(ports, instances, strict=True), 3):
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
                stack.enter_context(serving(tmp_path / f"{served_by}", port=port, **settings))
                load.wait_until_served_by(served_by)

    assert len(load.outcomes) > 100
    assert set(load.outcomes) == {200}


class Load:
    """Clients that classify one image again and again, each as soon as it has its answer.

    Attributes:
        outcomes: every answer's status, or the exception that came instead.
        processes: the server processes that answered, by the beginning of their request ids.
    """

    def __init__(self, port: int, image: bytes) -> None:
        self.outcomes: list[int | str] = []
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
        with httpx.Client(headers=headers) as client:
            while not self._stop.is_set():
                try:
                    answer = client.post(self._url, content=self._image)
                except httpx.HTTPError as exc:
                    self.outcomes.append(repr(exc))
                else:
                    self.outcomes.append(answer.status_code)
                    if answer.is_success:
                        self.processes.add(answer.headers["X-Request-ID"].split("-")[0])
                time.sleep(0.01)  # leaves the two cores some air
