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


def printed(
    *arguments: str, path: Path | None = None, variables: dict[str, str] | None = None
) -> list[str]:
    """Run make, with `path` first on the path, and return the lines that it prints."""
    settable = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE)
    environment = {  # `make test-lowest` sets VENV for the make in which this test runs
        k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k not in settable
    }
    environment |= variables or {}
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
    return done.stdout.splitlines()


def make(*arguments: str, path: Path | None = None) -> list[str]:
    """Run make, and return the commands that its stand-ins got."""
    lines = printed(*arguments, path=path)
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


PYTEST = "python -m pytest -n 3 --dist loadfile --no-loadscope-reorder"
CHECKS = ["python -m ruff format --check .", "python -m ruff check .", "python -m mypy"]


class TestTargets:
    """What make would run (`make -n`) when all packages are installed."""

    @staticmethod
    def planned(venv: Path, target: str, *arguments: str, **variables: str) -> list[str]:
        for kind in ("runtime", "service", "training", "dev"):
            (venv / f".{kind}-cpu").touch()
        chosen = (f"VENV={venv}", "RUNTIME=cpu", *arguments)
        lines = printed("-n", target, *chosen, variables=variables)
        return [" ".join(line.replace(f"{venv}/bin/", "").split()) for line in lines]

    @pytest.mark.parametrize(
        ("target", "commands"),
        [
            ("serve", ["python -m service"]),
            ("data", ["python -c 'from training.dataset import load; load()'"]),
            ("test", [*CHECKS, "lint-imports", PYTEST]),
            ("tests", [PYTEST]),
            ("test-elsewhere", ["./tests/elsewhere.sh"]),
            ("test-docker", ["./tests/docker.sh"]),
            ("test-mutants", [f"python {PIP} mutmut", "mutmut run", "mutmut results"]),
            ("format", ["python -m ruff format .", "python -m ruff check --fix ."]),
            ("bench", ["python -m benchmarks.training", "python -m benchmarks.serving"]),
            ("gpu", ["python -m benchmarks.gpu --write docs/performance.md"]),
            (
                "clean",
                [
                    (
                        "rm -rf .venv .venv-* .cache .coverage* .hypothesis .mypy_cache"
                        " .pytest_cache .ruff_cache build dist mutants *.egg-info"
                    )
                ],
            ),
        ],
    )
    def test_it_runs_these_commands(self, venv: Path, target: str, commands: list[str]) -> None:
        assert self.planned(venv, target) == commands

    @pytest.mark.parametrize(
        ("folder", "floor"), [("/data", ""), ("", " --cov-fail-under=0")], ids=["data", "no data"]
    )
    def test_all_tests_run_with_the_floor_of_coverage_if_the_data_is_there(
        self, venv: Path, tmp_path: Path, folder: str, floor: str
    ) -> None:
        variables = {"FASHION_MNIST_DIR": folder, "HOME": str(tmp_path)}
        *checks, tests = self.planned(venv, "test-all", **variables)
        assert checks == [*CHECKS, "lint-imports"]
        assert tests == f'{PYTEST} --cov{floor} -m "" --hypothesis-profile search'

    def test_the_lowest_versions_are_those_of_the_direct_packages(self, venv: Path) -> None:
        *lines, tests = self.planned(venv, "test-lowest", "MAKE=echo again")
        planned = " ".join(lines)
        assert (
            "--resolution lowest-direct \\ --extra cpu --extra training --extra dev"
            " --output-file .cache/lowest.txt pyproject.toml"
        ) in planned
        assert tests == "again tests VENV=.venv-lowest CONSTRAINTS=.cache/lowest.txt"

    def test_the_newest_versions_have_no_constraint(self, venv: Path) -> None:
        first, _, tests = self.planned(venv, "test-newest", "MAKE=echo again")
        assert first == "mkdir -p .cache && : > .cache/newest.txt"
        assert tests == "again tests VENV=.venv-newest CONSTRAINTS=.cache/newest.txt"

    def test_the_images_packages_are_locked_with_digests(self, venv: Path) -> None:
        planned = " ".join(self.planned(venv, "lock")).replace(" \\", "")
        assert planned.startswith("for runtime in cpu gpu; do python -m uv pip compile ")
        for option in (
            "--universal --python-version 3.11 --generate-hashes",
            "--extra $runtime --constraint constraints.txt",
            "--output-file deploy/image/$runtime.txt pyproject.toml || exit; done",
        ):
            assert option in planned

    def test_help_lists_every_target_but_parts_of_others(self) -> None:
        text = (ROOT / "Makefile").read_text()
        (declared,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)", text, re.MULTILINE)
        listed = [line.split()[1] for line in printed("help")]
        parts = {"tests", "checks"}
        assert sorted(listed) == sorted({*declared.replace("\\", "").split()} - parts)
        assert printed() == printed("help")


class TestChoice:
    """Of the interpreter, and of ONNX Runtime's build."""

    @staticmethod
    def stand_in(folder: Path, name: str, script: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)

    @pytest.mark.parametrize(
        ("version", "chosen"),
        [((3, 10, 9), False), ((3, 11), True), ((3, 14, 9), True), ((3, 15), False)],
    )
    def test_the_first_interpreter_of_a_supported_version_is_used(
        self, tmp_path: Path, version: tuple[int, ...], chosen: bool
    ) -> None:
        for name in ("python3", "python3.14", "python3.13", "python3.11"):
            self.stand_in(tmp_path, name, "exit 1")
        as_version = f"import sys; sys.version_info = {version}; $2"
        self.stand_in(tmp_path, "python3.12", f'exec "{sys.executable}" -c "{as_version}"')
        planned = printed(
            "-n", f"{tmp_path}/venv/bin/python", f"VENV={tmp_path}/venv", path=tmp_path
        )
        found = "python3.12" if chosen else ""
        assert planned[-1] == f'"{found}" -m venv {tmp_path}/venv'
        assert planned[0].startswith(f'test -n "{found}" || {{ echo "Python 3.11 to 3.14 with venv')

    @pytest.mark.parametrize(("driver", "runtime"), [("exit 0", "gpu"), ("exit 9", "cpu")])
    def test_the_runtime_follows_the_driver(
        self, tmp_path: Path, venv: Path, driver: str, runtime: str
    ) -> None:
        self.stand_in(tmp_path, "nvidia-smi", driver)
        planned = printed("-n", "serve", f"VENV={venv}", path=tmp_path)
        assert f"{venv}/bin/python {PIP} '.[{runtime}]'" in planned
        assert planned[-1] == f"{venv}/bin/python -m service"


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
