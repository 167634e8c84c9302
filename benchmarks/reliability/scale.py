"""Real containers behind HAProxy under load: scaled up and down, given a new model, killed.

Builds the image `bn-lenet` and starts `compose.yaml` with `deploy/compose.scale.yaml`, as in
docs/operations.md. BASE_IMAGE and HAPROXY_IMAGE set other base images.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import httpx

from benchmarks.load import BenchmarkError, free_port
from benchmarks.reliability.faults import IN_FLIGHT, another_model
from benchmarks.reliability.overload import percentile
from benchmarks.reliability.report import Options, Row
from benchmarks.reliability.service import ROOT
from benchmarks.reliability.traffic import Load, Outcome, good

FILES = ("-f", "compose.yaml", "-f", "deploy/compose.scale.yaml")
PORTS = "8101-8116"  # published by the containers; not used here
QUIET_SECONDS = 10.0  # before each step, and after it
HEALTHY_SECONDS = 120.0
CLIENTS = 16


@dataclass(frozen=True)
class Containers:
    """The containers of a compose project."""

    environment: dict[str, str]
    compose: tuple[str, ...]

    def run(self, *command: str) -> str:
        """Run a command and return its output.

        Raises:
            BenchmarkError: the command fails; the message has the end of its error output.
        """
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BenchmarkError(f"{' '.join(command)} failed:\n{done.stderr[-1000:]}")
        return done.stdout

    def ids(self) -> list[str]:
        """Return the ids of the service's containers."""
        return self.run(*self.compose, "ps", "--quiet", "bn-lenet").split()

    def scale(self, count: int, *options: str) -> None:
        """Run `count` containers, and wait until all are healthy.

        Raises:
            BenchmarkError: they are not healthy in time.
        """
        self.run(*self.compose, "up", "--detach", *options, "--scale", f"bn-lenet={count}")
        deadline = time.monotonic() + HEALTHY_SECONDS
        while not all(self.healthy(one) for one in self.ids()):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{count} containers are not healthy")
            time.sleep(0.5)

    def healthy(self, container: str) -> bool:
        """Return whether the image's health check succeeds."""
        status = self.run("docker", "inspect", "--format", "{{.State.Health.Status}}", container)
        return status.strip() == "healthy"

    def change_model(self, content: bytes) -> None:
        """Start the same number of containers with another model, then stop the old ones."""
        old = self.ids()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "bn_lenet.onnx").write_bytes(content)
            recipe = "FROM bn-lenet\nCOPY bn_lenet.onnx /app/models/bn_lenet.onnx\n"
            (Path(folder) / "Dockerfile").write_text(recipe)
            self.run("docker", "build", "--tag", "bn-lenet", folder)
        self.scale(2 * len(old), "--no-recreate")
        self.run("docker", "stop", "--time", "30", *old)
        self.run("docker", "rm", *old)


def run(options: Options) -> list[Row]:
    """Make all changes under load."""
    reason = "--quick" if options.quick else missing()
    if reason:
        return [Row.not_measured("containers behind HAProxy", reason)]
    with _containers() as containers:
        containers.scale(1)
        port = int(containers.environment["BALANCER_PORT"])
        _wait_for_balancer(port)
        with Load(port, good()["784 bytes"], CLIENTS) as load:
            rows = [
                *step(load, "from 1 container to 3", lambda: containers.scale(3)),
                *step(load, "from 3 containers to 1", lambda: containers.scale(1)),
            ]
            containers.scale(3)
            rows += step(
                load, "a new model, 3 by 3", lambda: containers.change_model(another_model())
            )
            versions = {json.loads(load_one(port))["model"]["version"] for _ in range(20)}
            rows.append(
                Row.holds(
                    "a new model: the version in the answers",
                    ", ".join(versions),
                    "2",
                    versions == {"2"},
                )
            )
            victim = containers.ids()[0]
            rows += step(
                load,
                "kill -9 of one of 3",
                lambda: containers.run("docker", "kill", "--signal", "KILL", victim),
                most=CLIENTS,
            )
    return rows


def missing() -> str:
    """Return the reason why containers cannot run here; empty if they can."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:  # noqa: S607 - found on the path
        return "no docker daemon answers"
    return "" if _compose() else "docker compose is not installed"


def step(load: Load, name: str, change: Callable[[], object], most: int = 0) -> list[Row]:
    """Change something under load, with a quiet time before and after it.

    Args:
        load: the clients.
        name: the name of the change.
        change: makes the change, and returns when it is complete.
        most: how many requests may fail (those in flight).
    """
    begin, refused = time.monotonic(), load.refused
    time.sleep(QUIET_SECONDS)
    changed = time.monotonic()
    change()
    settled = time.monotonic()
    time.sleep(QUIET_SECONDS)
    moments = (begin, changed, settled, time.monotonic())
    return step_rows(name, load.outcomes, moments, load.refused - refused, most)


def step_rows(
    name: str, outcomes: Sequence[Outcome], moments: Sequence[float], refused: int, most: int
) -> list[Row]:
    """Return the failed requests of a step, and p99 before, during and after.

    Args:
        name: the name of the change.
        outcomes: the outcomes of all requests.
        moments: the start of the quiet time, of the change, of the second quiet time, and the end.
        refused: the number of connections that the balancer refused.
        most: how many requests may fail.
    """
    spans = [[o for o in outcomes if first <= o.began < last] for first, last in pairwise(moments)]
    failed = refused + sum(o.status != 200 for span in spans for o in span)
    p99 = [1e3 * percentile([o.seconds for o in span]) for span in spans]
    figure = f"{failed} of {sum(map(len, spans)):,}"
    return [
        Row.holds(f"{name}: failed requests", figure, IN_FLIGHT if most else "0", failed <= most),
        Row(f"{name}: p99 before; during; after", "; ".join(f"{ms:.1f}" for ms in p99) + " ms"),
    ]


def load_one(port: int) -> bytes:
    """Return the answer to one image."""
    headers = {"Content-Type": "application/octet-stream"}
    return httpx.post(
        f"http://127.0.0.1:{port}/predict", content=bytes(784), headers=headers
    ).content


def _compose() -> tuple[str, ...]:
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)  # noqa: S607 - found on the path
    if plugin.returncode == 0:
        return ("docker", "compose", *FILES)
    return ("docker-compose", *FILES) if shutil.which("docker-compose") else ()


@contextmanager
def _containers() -> Iterator[Containers]:
    """Build the image and yield the project; then remove its containers and restore the tag."""
    settings = {
        "COMPOSE_PROJECT_NAME": "bn-lenet-scale",
        "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0"),
        "PORT": PORTS,
        "BALANCER_PORT": str(free_port()),
        "BNLENET_LOG_LEVEL": "warning",
    }
    containers = Containers(os.environ | settings, _compose())
    containers.run(*containers.compose, "build")
    image = containers.run("docker", "image", "inspect", "--format", "{{.Id}}", "bn-lenet").strip()
    try:
        yield containers
    finally:
        containers.run(*containers.compose, "down", "--volumes")
        containers.run("docker", "tag", image, "bn-lenet")


def _wait_for_balancer(port: int) -> None:
    deadline = time.monotonic() + HEALTHY_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz").is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    raise BenchmarkError("the balancer does not answer")
