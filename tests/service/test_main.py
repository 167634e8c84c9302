"""The command line: its options, what it prints at the start, and what it logs."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import httpx
import pytest

from service import __version__
from service.__main__ import OPTIONS, main
from service.settings import Settings
from tests.contract.conftest import ROOT, serving
from tests.contract.neighbours import answers, free_port, wait_until


def service(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_version_is_the_packages() -> None:
    assert service("--version").stdout == f"bn-lenet, version {__version__}\n"


@pytest.mark.parametrize("command", [[], ["serve"], ["classify"]])
def test_h_is_help(command: list[str]) -> None:
    short, long = service(*command, "-h"), service(*command, "--help")
    assert short.returncode == 0
    assert short.stdout == long.stdout
    options = ["--url"] if command == ["classify"] else ["--host", "--port", "--workers"]
    assert all(option in short.stdout for option in options)


def test_the_options_have_the_limits_and_defaults_of_their_settings() -> None:
    context = click.Context(main)
    ranges = {it.name: it.type for it in main.get_params(context)}
    for option, _, default, text in OPTIONS:
        field = Settings.model_fields[option.removeprefix("--")]
        assert default == str(field.default)
        assert text == field.description
        if isinstance(limits := ranges[option.removeprefix("--")], click.IntRange):
            assert [limits.min, limits.max] == [
                next(getattr(it, end) for it in field.metadata if hasattr(it, end))
                for end in ("ge", "le")
            ]


@pytest.mark.parametrize("option", [["--port", "65536"], ["--port", "x"], ["--workers", "0"]])
def test_a_wrong_option_is_named(option: list[str]) -> None:
    done = service(*option)
    assert done.returncode == 2
    assert f"Invalid value for '{option[0]}'" in done.stderr


def test_options_of_serve_are_not_ignored_before_another_command() -> None:
    done = service("--port", "9000", "classify", "a.png")
    assert done.returncode == 2
    assert "Write --host, --port and --workers after `serve`." in done.stderr


@pytest.mark.parametrize(("pid", "status"), [(1, 143), (2, -signal.SIGTERM)])
def test_a_container_can_be_stopped_while_it_starts(pid: int, status: int) -> None:
    """The kernel drops a signal to process 1 of a container that has no handler for it."""
    program = f"""
import os, signal, service.__main__ as main
os.getpid = lambda: {pid}
main._settings = lambda: signal.raise_signal(signal.SIGTERM)
main.main(["serve"])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == status


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Start two workers with options, where the environment is wrong; return what they log."""
    path = tmp_path_factory.mktemp("start") / "log"
    options = ("--host", "127.0.0.1", "--port", "0", "--workers", "2")
    wrong = {"host": "nowhere.invalid", "port": "tcp://10.0.0.1:80", "workers": 1, "prot": 1}
    with serving(path, *options, **wrong) as (address, _):
        page = httpx.get(f"{address}/")
        for _ in range(600):
            if path.read_text().count("a worker is ready") == 2:
                break
            time.sleep(0.05)
    assert page.headers["content-type"].startswith("text/html")
    return path.read_text()


class TestStart:
    def test_options_win_over_the_environment(self, log: str) -> None:
        assert log.count("a worker is ready") == 2

    def test_the_address_of_the_page_is_logged_once(self, log: str) -> None:
        (banner,) = [line for line in log.splitlines() if "http://" in line]
        pattern = rf" info    ready page=http://127\.0\.0\.1:\d+/ version={__version__} workers=2$"
        assert re.search(pattern, banner)

    def test_a_misspelt_variable_is_warned_of_once(self, log: str) -> None:
        assert log.count("BNLENET_PROT is not a setting; did you mean BNLENET_PORT?") == 1


def test_requests_are_logged_with_what_helps_to_find_them(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "serve", "--port", "0", port="x", log_level="debug") as (
        address,
        process,
    ):
        for path in ("/livez", "/readyz", "/metrics", "/no/such%20path", "/v2/models/other/ready"):
            httpx.get(address + path)
        process.terminate()
        process.wait(20)
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if " request " in line]
    levels = [line.split()[1] for line in lines]
    assert levels == ["debug"] * 3 + ["info"] * 2
    for part in ("status=404", 'path="/no/such path"', "code=not_found", "client=127.0.0.1"):
        assert part in lines[3]
    assert "code=unknown_model" in lines[4]


def test_classify_warns_of_a_misspelt_variable_too() -> None:
    done = service("classify", "nowhere.png", BNLENET_MODEL="x")
    assert done.stderr.splitlines()[0] == (
        "Warning: BNLENET_MODEL is not a setting; did you mean BNLENET_MODEL_PATH?"
    )


@pytest.mark.parametrize("no_color", ["", "1"])
def test_only_a_terminal_gets_colours(no_color: str) -> None:
    """The start fails after a warning, so that it ends soon."""
    variables = {"BNLENET_PROT": "1", "BNLENET_HOST": "nowhere.invalid", "NO_COLOR": no_color}
    plain = service(**variables).stderr
    ours, terminal = os.openpty()
    subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env=os.environ | variables,
        stderr=terminal,
        check=False,
    )
    printed = os.read(ours, 10_000).decode()
    os.close(terminal)  # after reading: macOS drops unread output
    os.close(ours)
    assert "warning BNLENET_PROT" in plain
    assert "\x1b" not in plain
    assert ("\x1b[33m" in printed) == (no_color == "")


def test_classify_takes_folders_and_patterns(tmp_path: Path) -> None:
    done = service("classify", "docs", "docs/trou*.png", str(tmp_path))
    files = [line.split("\t")[0] for line in done.stdout.splitlines()]
    pictures = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.png"))
    assert files == [*pictures, "docs/trousers.png"]
    assert done.stderr.startswith(f"Error: {tmp_path}: The folder has no pictures; ")
    assert done.returncode == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_serves_without_standard_error(workers: str) -> None:
    """Else the log would go to a client: a socket would take the number of standard error."""
    port = free_port()
    command = [sys.executable, "-m", "service", "--port", str(port), "--workers", workers]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    environment = os.environ | {"BNLENET_DRAIN_SECONDS": "0"}
    with subprocess.Popen(shell, cwd=ROOT, env=environment) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/readyz"))
        finally:
            process.terminate()
    assert process.returncode == 0
