"""The server under test: a real process started here, or any at the address in BASE_URL."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.contract.browser import SWITCHES
from tests.contract.neighbours import executable

ROOT = Path(__file__).parents[2]
Serve = Callable[..., Any]


@contextmanager
def serving(
    log: Path, *arguments: str, **settings: object
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Run the service on a free port; give its address and its process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BNLENET_")}
    environment |= {"BNLENET_PORT": "0", "BNLENET_LOG_LEVEL": "info", "BNLENET_DRAIN_SECONDS": "0"}
    environment |= {f"BNLENET_{k.upper()}": str(v) for k, v in settings.items()}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "service", *arguments], cwd=ROOT, env=environment, stderr=output
        )
    try:
        yield _address(log, process), process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)  # without draining
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait for the line that tells the address."""
    for _ in range(1_200):
        found = re.search(r"ready.*?(http://[\d.:]+)", log.read_text())
        if found:
            return found[1]
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        break
    pytest.fail(f"the service did not start: {log.read_text()}")


@pytest.fixture(scope="session")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of the server that the contract is held against."""
    if address := os.environ.get("BASE_URL"):
        yield address.rstrip("/")
        return
    with serving(tmp_path_factory.mktemp("service") / "log") as (address, _):
        yield address


@pytest.fixture(scope="session")
def client(base_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base_url, timeout=10) as client:
        yield client


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Return what starts a server with settings of a test's own; it gives address and process."""
    return lambda **settings: serving(tmp_path / "log", **settings)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start Chromium, for a module: while it runs, no test may run an event loop of its own."""
    path = executable("chromium", "chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def context(browser: Browser) -> Iterator[BrowserContext]:
    with browser.new_context() as context:
        yield context


@pytest.fixture(scope="module")
def tab(context: BrowserContext) -> Page:
    """Return a tab, for the tests of a module to use in turn."""
    return context.new_page()
