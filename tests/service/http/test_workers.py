"""Several workers look like one server, and go on when one of them dies."""

import asyncio
import errno
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.http import workers as workers_module
from service.http.workers import Supervisor, SupervisorError, supervise
from tests.contract.conftest import serving

BYTES = {"content-type": "application/octet-stream"}


@pytest.fixture
def server(tmp_path: Path, artefact: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    settings = {"model_path": artefact, "workers": 2, "drain_seconds": 30}
    with serving(tmp_path / "log", **settings) as (address, process):
        yield address, process


def workers(supervisor: int) -> set[int]:
    """Return the ids of the processes whose parent is the supervisor."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text()
    return set(map(int, children.split()))


def predict(address: str) -> None:
    """Ask on a connection of its own, so that any worker may answer."""
    httpx.post(f"{address}/predict", content=bytes(784), headers=BYTES).raise_for_status()


def predictions(address: str) -> float:
    pattern = r'^http_requests_total{method="POST",route="/predict",status="200"} (.*)$'
    found = re.search(pattern, httpx.get(f"{address}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_any_worker_tells_the_sum_of_all(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    address, process = server
    assert len(workers(process.pid)) == 2
    for _ in range(40):
        predict(address)
    assert {predictions(address) for _ in range(10)} == {40}


def test_the_memory_of_all_workers_is_told(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    """As the alert on memory needs it; compared with what the kernel says of each."""
    address, process = server
    deadline = time.monotonic() + 20
    pattern = r"^process_resident_memory_bytes (.*)$"
    while True:
        predict(address)
        found = re.search(pattern, httpx.get(f"{address}/metrics").text, re.MULTILINE)
        statuses = [Path(f"/proc/{pid}/status").read_text() for pid in workers(process.pid)]
        lines = [re.search(r"VmRSS:\s+(\d+) kB", status) for status in statuses]
        kilobytes = sum(int(line[1]) for line in lines if line)
        if found and float(found[1]) == pytest.approx(kilobytes * 1024, rel=0.1):
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_that_dies_is_replaced_and_its_counts_are_kept(
    server: tuple[str, subprocess.Popen[bytes]],
) -> None:
    address, process = server
    for _ in range(20):
        predict(address)
    before = workers(process.pid)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while len(workers(process.pid) - {victim}) < 2:
        assert time.monotonic() < deadline
        predict(address)
        time.sleep(0.02)
    assert predictions(address) >= 20
    assert httpx.get(f"{address}/readyz").status_code == 200


def test_all_drain_and_end_with_the_supervisor(
    server: tuple[str, subprocess.Popen[bytes]],
) -> None:
    address, process = server
    children = workers(process.pid)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert {httpx.get(f"{address}/readyz").status_code for _ in range(8)} == {503}
    predict(address)
    process.send_signal(signal.SIGTERM)  # a second one ends the drain
    assert process.wait(20) == 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_workers_do_not_outlive_a_killed_supervisor(
    server: tuple[str, subprocess.Popen[bytes]],
) -> None:
    _, process = server
    children = workers(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_a_writable_directory_it_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with socket.socket() as unused, pytest.raises(SupervisorError, match="set TMPDIR"):
        supervise(2, unused)


def test_a_worker_that_cannot_be_started_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As when memory or processes run out for a moment; the others must not end with it."""
    monkeypatch.setattr(workers_module, "RESTART_AFTER_SECONDS", 0.01)
    tries = 0

    async def fail(*_: object, **__: object) -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fail)
    with socket.socket() as unused:
        assert asyncio.run(Supervisor(unused, str(tmp_path)).run(1)) == 0
    assert tries == 3
    assert caplog.text.count("a worker cannot be started") == 3


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended may wait for its parent as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
