"""Programs that a service is run with, started for a test."""

import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest


@contextmanager
def running(package: str, program: str, *arguments: str) -> Iterator[None]:
    """Run a program of a Debian package; without it, the test is left out."""
    with subprocess.Popen([executable(package, program), *arguments]) as process:
        try:
            yield
        finally:
            process.kill()


def executable(package: str, program: str) -> str:
    """Return the program's path; without it, the test is left out."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed: apt-get install {package}")
    return path


def free_port() -> int:
    """Return a port for a program that cannot choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what comes about within half a minute even on a busy machine."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "gave up waiting"
        time.sleep(0.02)


def answers(url: str) -> bool:
    """Tell whether there is a good answer to a GET."""
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False
