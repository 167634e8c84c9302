"""The commands that `make` runs, with stand-ins for the programs."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Runs the probe as python does; writes down what pip is asked.
PYTHON = f"""#!/bin/sh
if [ "$1" = -c ]; then exec "{sys.executable}" "$@"; fi
echo "asked: $*"
"""
PIP = "-m pip install --quiet --disable-pip-version-check --constraint constraints.txt"


def make(*arguments: str, path: Path | None = None) -> list[str]:
    """Run make, and return the commands that its stand-ins got."""
    settable = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    environment = {  # `make test-lowest` sets VENV for the make in which this test runs
        k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in settable
    }
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    done = subprocess.run(
        ["make", "--no-print-directory", *arguments],  # noqa: S607 - whichever there is
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    return [line.removeprefix("asked: ") for line in lines if line.startswith("asked: ")]


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """Make a stand-in for an empty virtual environment."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return folder


def installed(venv: Path, runtime: str, index: str, kind: str = "training") -> list[str]:
    """Return the arguments of `pip install`, without `PIP`."""
    stamp = f"{venv}/.{kind}-{runtime}"
    asked = make(stamp, f"VENV={venv}", f"RUNTIME={runtime}", f"TORCH_INDEX={index}")
    return [line.removeprefix(f"{PIP} ") for line in asked if line.startswith(PIP)]


class Index(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def index() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Index) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/cpu"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="torch has CUDA on Linux alone")
class TestTorch:
    @pytest.mark.parametrize("kind", ["training", "dev"])
    def test_without_a_driver_torch_comes_without_cuda(self, venv: Path, kind: str) -> None:
        extras = {"training": "training", "dev": "training,dev"}[kind]
        with index() as address:
            asked = installed(venv, "cpu", address, kind)
        assert asked == [f"--no-deps --index-url {address} torch", f".[cpu,{extras}]"]

    def test_with_a_driver_torch_comes_from_the_ordinary_index(self, venv: Path) -> None:
        with index() as address:
            assert installed(venv, "gpu", address) == [".[gpu,training]"]

    def test_an_unreachable_index_is_skipped(self, venv: Path) -> None:
        assert installed(venv, "cpu", "http://127.0.0.1:9/cpu") == [".[cpu,training]"]

    def test_an_index_that_never_answers_is_skipped_after_seconds(self, venv: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            started = time.monotonic()
            asked = installed(venv, "cpu", f"http://127.0.0.1:{silent.getsockname()[1]}/cpu")
        assert asked == [".[cpu,training]"]
        assert time.monotonic() - started < 30  # three seconds, and what a busy machine adds


class TestInstalling:
    def test_the_service_installs_no_torch(self, venv: Path) -> None:
        assert installed(venv, "cpu", "", "service") == [".[cpu]"]

    def test_packages_are_installed_once(self, venv: Path) -> None:
        assert installed(venv, "cpu", "", "dev") == [".[cpu,training,dev]"]
        for kind in ("dev", "training", "service"):
            assert installed(venv, "cpu", "", kind) == []

    def test_the_other_runtime_is_removed_first(self, venv: Path) -> None:
        """The two packages overwrite each other's files, and pip would keep torch without CUDA."""
        installed(venv, "cpu", "", "dev")
        asked = make(f"{venv}/.service-gpu", f"VENV={venv}", "RUNTIME=gpu")
        uninstall = "-m pip uninstall --quiet --yes --disable-pip-version-check onnxruntime torch"
        assert asked == [uninstall, f"{PIP} .[gpu]"]
        assert not list(venv.glob(".*-cpu"))


class TestTrain:
    """The first `make train` fits; the next continues that fit, or exports it again."""

    @pytest.mark.parametrize(
        ("files", "fits"),
        [
            ((), ["-m training fit --recipe chapter --out {run}"]),
            (("config.json",), ["-m training fit --recipe chapter --out {run} --resume"]),
            (("config.json", "results.json"), []),
        ],
    )
    def test_only_the_missing_steps_run(
        self, venv: Path, tmp_path: Path, files: tuple[str, ...], fits: list[str]
    ) -> None:
        run = tmp_path / "run"
        run.mkdir()
        for name in files:
            (run / name).touch()
        asked = make("train", f"VENV={venv}", "RUNTIME=cpu", "RECIPE=chapter", f"RUN={run}")
        ours = [line.strip() for line in asked if line.startswith("-m training")]
        assert ours == [
            *(fit.format(run=run) for fit in fits),
            f"-m training export {run} --out {run}/bn_lenet.onnx",
            f"-m training evaluate {run}/bn_lenet.onnx",
        ]


class TestImage:
    @staticmethod
    def asked(folder: Path, stand_in: str, *arguments: str) -> list[str]:
        docker = folder / "docker"
        docker.write_text(f"#!/bin/sh\n{stand_in}\necho asked: docker $*\n")
        docker.chmod(0o755)
        return make("image", *arguments, path=folder)

    def test_without_buildx_the_image_is_for_this_processor(self, tmp_path: Path) -> None:
        asked = self.asked(tmp_path, '[ "$1" != buildx ] || exit 1')
        assert asked == ["docker build --tag bn-lenet ."]

    def test_with_buildx_the_image_is_for_both_processors(self, tmp_path: Path) -> None:
        *_, asked = self.asked(tmp_path, "", "IMAGE=example.org/bn-lenet:1", "PUSH=1")
        platforms = "--platform linux/amd64,linux/arm64"
        tag = "--tag example.org/bn-lenet:1"
        assert asked == f"docker buildx build --builder bn-lenet {platforms} {tag} --push ."
