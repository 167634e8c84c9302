"""The Dockerfile and the compose files, value by value; `tests/docker.sh` checks a container."""

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # PyYAML ships no types

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[1]
PACKAGES = sorted((ROOT / "deploy" / "image").glob("*.txt"))
PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)(?: ; .*)? \\$", re.MULTILINE)


def service(path: str) -> dict[str, Any]:
    """Return our service's entry in a compose file."""
    (only,) = yaml.safe_load((ROOT / path).read_text())["services"].values()
    return dict(only)


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, each with its arguments on one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\s*\\\n\s*", " ", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines) if word]


@pytest.fixture(scope="module")
def variables(instructions: list[tuple[str, str]]) -> dict[str, str]:
    """Return the image's environment."""
    pairs = [pair for word, rest in instructions if word == "ENV" for pair in rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


class TestDockerfile:
    def test_the_environment(self, variables: dict[str, str]) -> None:
        assert variables == {
            "PATH": "/opt/venv/bin:$PATH",
            "ORT_DISABLE_TELEMETRY": "1",
            "BNLENET_HOST": "::",
            "BNLENET_PORT": "8000",
            "BNLENET_LOG_FORMAT": "json",
        }

    def test_the_command_and_its_user(self, instructions: list[tuple[str, str]]) -> None:
        last_stage = dict(instructions)  # the last of each kind
        assert last_stage["USER"] == "10001:10001"
        assert last_stage["EXPOSE"] == "8000"
        assert last_stage["STOPSIGNAL"] == "SIGTERM"
        assert last_stage["WORKDIR"] == "/app"
        assert last_stage["CMD"] == '["python", "-m", "service"]'
        options = "--interval=5s --timeout=3s --start-period=10s --retries=3 CMD "
        assert last_stage["HEALTHCHECK"].startswith(options)
        assert last_stage["LABEL"].endswith('licenses="MIT"')

    @pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (404, 1)])
    def test_the_health_check_asks_whether_the_service_is_ready(
        self, instructions: list[tuple[str, str]], status: int, code: int
    ) -> None:
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(self.path)
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        _, _, command = dict(instructions)["HEALTHCHECK"].partition(" CMD ")
        python, *arguments = json.loads(command)
        assert python == "python"
        with HTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.handle_request).start()
            environment = os.environ | {"BNLENET_PORT": str(server.server_port)}
            done = subprocess.run([sys.executable, *arguments], env=environment, check=False)
        assert (done.returncode, asked) == (code, ["/readyz"])

    def test_the_stages(self, instructions: list[tuple[str, str]]) -> None:
        """The last one gets the packages and the code, and neither pip nor a compiler."""
        assert [rest for word, rest in instructions if word == "FROM"] == [
            *("${BASE_IMAGE} AS build", "${BASE_IMAGE}")
        ]
        arguments = dict(rest.split("=") for word, rest in instructions if word == "ARG")
        assert arguments == {"BASE_IMAGE": "python:3.11-slim-bookworm", "RUNTIME": "cpu"}
        assert [rest for word, rest in instructions if word == "COPY"] == [
            "deploy/image/${RUNTIME}.txt /tmp/packages.txt",
            "service service",
            "models models",
            "--from=build /opt/venv /opt/venv",
            "--from=build /app /app",
        ]
        install, compiled = (rest for word, rest in instructions if word == "RUN")
        assert install.split(" && ") == [  # a step that fails ends the build
            "python -m venv /opt/venv",
            (
                "/opt/venv/bin/python -m pip install --no-cache-dir --require-hashes"
                " --only-binary :all: --requirement /tmp/packages.txt"
            ),
            "/opt/venv/bin/python -m pip uninstall --yes --quiet setuptools pip",
            "find /opt/venv -type d -name tests -prune -exec rm -rf {} +",
        ]
        assert compiled == "python -m compileall -q --invalidation-mode unchecked-hash service"

    def test_the_order_of_the_instructions(self, instructions: list[tuple[str, str]]) -> None:
        """Arguments before their use, the rarest changes first, and the user after the files."""
        words = [word for word, _ in instructions]
        assert words == [
            *("ARG", "FROM", "ARG", "WORKDIR", "COPY", "RUN", "COPY", "COPY", "RUN"),
            *("FROM", "LABEL", "ENV", "COPY", "COPY", "WORKDIR", "USER", "EXPOSE", "STOPSIGNAL"),
            *("HEALTHCHECK", "CMD"),
        ]

    def test_only_the_files_of_the_image_are_sent_to_the_builder(self) -> None:
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        assert [line for line in lines if not line.startswith("#")] == [
            *("*", "!deploy/image", "!service", "!models", "**/__pycache__")
        ]


class TestPackages:
    @pytest.mark.parametrize("path", PACKAGES, ids=lambda path: path.stem)
    def test_each_has_the_tested_version_and_a_digest(self, path: Path) -> None:
        tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
        tested = {normalised(name): version for name, version in tested.items()}
        text = path.read_text()
        pinned = {normalised(name): version for name, version in PINNED.findall(text)}
        assert len(pinned) == text.count("==") - text.count(" == ") > 25
        # With torch, CUDA comes in the versions that torch asks for; the image is free of that.
        ours = {name: v for name, v in pinned.items() if not name.startswith("nvidia-")}
        assert ours.items() <= tested.items(), "run `make lock`"
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        needed = [*project["dependencies"], *project["optional-dependencies"][path.stem]]
        names = {normalised(re.split(r"[^\w.-]", each)[0]) for each in needed}
        assert names <= pinned.keys(), "run `make lock`"
        assert all("--hash=sha256:" in entry for entry in re.split(r"^(?=\w)", text)[1:])

    def test_each_runtime_has_its_own_build(self) -> None:
        texts = {path.stem: path.read_text() for path in PACKAGES}
        assert texts.keys() == {"cpu", "gpu"}
        assert ("onnxruntime==" in texts["cpu"], "onnxruntime-gpu==" in texts["cpu"]) == (
            True,
            False,
        )
        assert ("onnxruntime==" in texts["gpu"], "onnxruntime-gpu==" in texts["gpu"]) == (
            False,
            True,
        )


def normalised(name: str) -> str:
    """Return a package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


class TestCompose:
    def test_every_value(self) -> None:
        compose = service("compose.yaml")
        del compose["environment"]
        assert compose == {
            "image": "bn-lenet",
            "build": {
                "context": ".",
                "args": {
                    "BASE_IMAGE": "${BASE_IMAGE:-python:3.11-slim-bookworm}",
                    "RUNTIME": "${RUNTIME:-cpu}",
                },
            },
            "ports": ["127.0.0.1:${PORT:-8000}:8000"],
            "restart": "unless-stopped",
            "stop_grace_period": "30s",
            "read_only": True,
            "tmpfs": ["/tmp:size=64m,mode=1777,noexec,nosuid,nodev"],  # noqa: S108 - the container's
            "cap_drop": ["ALL"],
            "security_opt": ["no-new-privileges:true"],
            "mem_limit": "512m",
            "pids_limit": 128,
        }

    def test_every_value_on_a_gpu(self) -> None:
        assert service("compose.gpu.yaml") == {
            "image": "bn-lenet:gpu",
            "build": {"args": {"RUNTIME": "gpu"}},
            "environment": ["BNLENET_DEVICE=cuda"],
            "mem_limit": "4g",
            "deploy": {
                "resources": {
                    "reservations": {
                        "devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
                    }
                }
            },
        }

    def test_every_setting_is_passed_except_host_and_port(self, variables: dict[str, str]) -> None:
        """A variable that is not set outside has the image's value; else compose would unset it."""
        names = [f"{PREFIX}{n.upper()}" for n in Settings.model_fields if n not in ("host", "port")]
        assert set(service("compose.yaml")["environment"]) == {
            f"{name}=${{{name}:-{variables[name]}}}" if name in variables else name
            for name in names
        }
