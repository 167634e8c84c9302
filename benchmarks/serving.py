"""Requests a second and latency of the service, of a floor, and of other model servers.

    python -m benchmarks.serving            about nine minutes
    python -m benchmarks.serving --quick    half a minute, without the peers
    python -m benchmarks.serving --write docs/performance.md

All servers serve the same file with the same session options on one core. From another core, `wrk`
sends them the same 1,000 test images in turn. A round measures every row once, so that a change of
the machine's speed affects all rows. Ratios are computed within a round; the tables have the
medians of the rounds. The last column compares with a bound: the time of an ASGI application that
does nothing, plus the model's time in batches. The classes that the servers answer are checked
before. The other servers get virtual environments in `.cache/bench`. The last line of the output is
JSON. Needs: apt-get install wrk
"""

import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.load import (
    BenchmarkError,
    Cores,
    Requests,
    Sample,
    Server,
    free_port,
    measure,
    serving,
)
from benchmarks.page import with_section
from benchmarks.peers import PEERS
from service.model.artefact import ModelError
from service.model.classifier import Classifier
from service.settings import Settings
from training.dataset import DatasetError, load

CACHE = Path(".cache") / "bench"
IMAGES = 1000
CHECKED = 50
STARTS = 5
NOOP, FLOOR, BYTES, JSON, PNG = "no-op", "floor: 784 bytes", "784 bytes", "JSON", "PNG"
FRAMEWORK, BATCHES = "784 bytes, FastAPI's routes", "OIP binary, 256 images"
CONNECTIONS = (1, 16, 256)
FEW_CONNECTIONS = (1, 16)  # for peers, and for bodies of 200 KB
BATCH = 256
RECORD = Path("docs") / "serving.json"
BEGIN, END = (
    "<!-- serving: written by python -m benchmarks.serving --write -->\n",
    "<!-- serving: end -->",
)
OCTETS = {"Content-Type": "application/octet-stream"}
AS_JSON = {"Content-Type": "application/json"}

Read = Callable[[httpx.Response], int]


@dataclass
class Row:
    """One row of the table: a server, the requests to it, and the measurements."""

    name: str
    server: Server
    requests: Requests
    read: Read | None
    is_peer: bool = False
    connections: tuple[int, ...] = CONNECTIONS
    samples: dict[int, list[Sample]] = field(default_factory=dict)

    def check(self, classes: Sequence[int]) -> None:
        """Compare the first answers' classes with ONNX Runtime's own.

        Raises:
            BenchmarkError: the server fails, or answers another class.
        """
        if self.read is None:
            return
        url = f"http://127.0.0.1:{self.server.port}{self.requests.path}"
        for body, expected in zip(self.requests.bodies, classes, strict=False):
            answer = httpx.post(url, content=body, headers=dict(self.requests.headers))
            if not answer.is_success or self.read(answer) != expected:
                raise BenchmarkError(f"{self.name} answered {answer.status_code}: {answer.text}")

    def median(self, connections: int, figure: str) -> float:
        """Return the median of a figure ("rate", "p50" or "p99") over the rounds."""
        values: list[float] = [getattr(sample, figure) for sample in self.samples[connections]]
        return median(values)


@click.command()
@click.option(
    "--rounds", default=3, show_default=True, help="The number of measurements of every row."
)
@click.option("--seconds", default=3, show_default=True, help="The length of a measurement.")
@click.option("--peers/--no-peers", default=True, help="Measure the other model servers as well.")
@click.option("--quick", is_flag=True, help="One round of one second, without the peers.")
@click.option(
    "--write",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Write the tables into this page, and the figures into {RECORD}.",
)
def main(rounds: int, seconds: int, peers: bool, quick: bool, write: Path | None) -> None:
    """Measure the service, the floor, and other model servers."""
    if quick:
        rounds, seconds, peers = 1, 1, False
    try:
        document = run(rounds, seconds, peers)
    except (BenchmarkError, DatasetError, ModelError) as exc:
        raise click.ClickException(str(exc)) from exc
    print(json.dumps(document))
    if write:
        text = with_section(write.read_text(encoding="utf-8"), markdown(document), BEGIN, END)
        write.write_text(text, encoding="utf-8")
        RECORD.write_text(json.dumps(document, indent=1) + "\n")


def run(rounds: int, seconds: int, peers: bool) -> dict[str, Any]:
    """Measure everything, print the tables, and return the figures as one document.

    Raises:
        BenchmarkError: a program is missing, or a server gave a wrong answer.
    """
    cores = Cores.choose()
    load_before = os.getloadavg()[0]
    console = Console(stderr=True)
    images = load().test.images[:IMAGES]
    model = Settings().model_path
    classifier = Classifier.load(model, "cpu")
    classes = [int(classifier.probabilities(i[None, None]).argmax()) for i in images[:CHECKED]]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        starts, ours = start_ours(stack, cores)
        rows = our_rows(ours, images)
        rows[BYTES].check(classes)
        size = len(_post(rows[BYTES]).content)
        references = (
            (NOOP, ("noop", "0" * size), "/", None),
            (FLOOR, ("floor", "0" * size), "/", None),
            (FRAMEWORK, ("framework",), "/readyz", rows[BYTES].read),
        )
        service_rows, rows = rows, {}
        for name, arguments, ready, read in references:
            server = stack.enter_context(
                serve_module("benchmarks.servers", *arguments, cores=cores, ready=ready)
            )
            rows[name] = Row(name, server, service_rows[BYTES].requests, read)
        rows |= service_rows
        if peers:
            for row in peer_rows(stack, console, cores, folder, model, images):
                rows[row.name] = row
        for row in rows.values():
            row.check(classes)
            if row.is_peer:
                row.server.pause()

        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(
                "", total=rounds * sum(len(row.connections) for row in rows.values())
            )
            for turn in range(rounds):
                for row in rows.values():
                    if row.is_peer:
                        row.server.resume()
                    for connections in row.connections:
                        text = f"round {turn + 1}: {row.name}, {connections} connections"
                        progress.update(task, description=text)
                        if turn == 0 and rounds > 1:  # warm up
                            measure(row.server, row.requests, connections, 1, cores)
                        sample = measure(row.server, row.requests, connections, seconds, cores)
                        row.samples.setdefault(connections, []).append(sample)
                        progress.advance(task)
                    if row.is_peer:
                        row.server.pause()
        memory = {row.name: row.server.megabytes() for row in rows.values() if row.is_peer}
        memory |= {"BN-LeNet": ours.megabytes()}
    step = model_step(rows[BYTES].requests, images, cores, seconds)

    findings = Findings.of(rows, starts, memory["BN-LeNet"], step)
    document = {
        "benchmark": "serving",
        "rounds": rounds,
        "seconds": seconds,
        "machine": machine(cores, load_before),
        "rows": {
            row.name: {
                str(c): {w: round(row.median(c, w), 4) for w in ("rate", "p50", "p99")}
                for c in row.samples
            }
            for row in rows.values()
        },
        "memory_megabytes": memory,
        "start_seconds": starts,
        "model_step": step,
        "findings": asdict(findings),
    }
    show(rows, memory, findings, document)
    return document


def start_ours(stack: ExitStack, cores: Cores) -> tuple[list[float], Server]:
    """Start the service several times; return the seconds until ready, and a running service."""
    starts = []
    for _ in range(STARTS):
        with serve_module("service", cores=cores, ready="/readyz") as server:
            starts.append(server.seconds_to_ready)
    return starts, stack.enter_context(serve_module("service", cores=cores, ready="/readyz"))


def serve_module(module: str, *arguments: str, cores: Cores, ready: str) -> Any:
    """Run one of our modules as a server, without access log."""
    port = free_port()
    settings = {"PORT": str(port), "LOG_LEVEL": "warning", "DRAIN_SECONDS": "0", "DEVICE": "cpu"}
    return serving(
        [sys.executable, "-m", module, *arguments],
        cores=cores,
        port=port,
        ready=ready,
        environment={f"BNLENET_{name}": value for name, value in settings.items()},
    )


def our_rows(server: Server, images: NDArray[np.uint8]) -> dict[str, Row]:
    """Return the service's rows: one for every form of body."""

    def row(name: str, path: str, headers: dict[str, str], body: Any, read: Read) -> Row:
        return Row(name, server, Requests(path, headers, [body(i) for i in images]), read)

    def by_id(answer: httpx.Response) -> int:
        return int(answer.json()["class_id"])

    rows = [
        row(BYTES, "/predict", OCTETS, np.ndarray.tobytes, by_id),
        row(JSON, "/predict", AS_JSON, plain_json, by_id),
        row(PNG, "/predict", {"Content-Type": "image/png"}, png, by_id),
    ]
    infer = "/v2/models/bn-lenet/infer"
    if httpx.get(f"http://127.0.0.1:{server.port}/v2").is_success:
        head = len(binary_head())
        binary = OCTETS | {"Inference-Header-Content-Length": str(head)}
        rows += [
            row("OIP JSON", infer, AS_JSON, open_inference_json, open_inference_class),
            row("OIP binary", infer, binary, lambda i: binary_head() + i.tobytes(), binary_class),
        ]
        head = len(binary_head(BATCH))
        batches = OCTETS | {"Inference-Header-Content-Length": str(head)}
        bodies = [binary_head(BATCH) + images[i : i + BATCH].tobytes() for i in range(8)]
        requests = Requests(infer, batches, bodies)
        rows.append(Row(BATCHES, server, requests, binary_class, connections=FEW_CONNECTIONS))
    return {row.name: row for row in rows}


def peer_rows(
    stack: ExitStack,
    console: Console,
    cores: Cores,
    folder: Path,
    model: Path,
    images: NDArray[np.uint8],
) -> list[Row]:
    """Install and start the other servers; print the name of those that cannot run here."""
    rows = []
    for peer in PEERS:
        try:
            with console.status(f"{peer.requirement}: installing and starting"):
                programs = peer.install(CACHE)
                server = stack.enter_context(peer.serving(programs, model, folder, cores))
        except BenchmarkError as exc:
            console.print(f"{peer.name} is not measured: {exc}")
            continue
        body = open_inference_json if peer.open_inference else plain_json
        requests = Requests(peer.path, AS_JSON, [body(image) for image in images])
        find = peer.probabilities

        def read(answer: httpx.Response, find: Callable[[Any], list[float]] = find) -> int:
            return int(np.argmax(find(answer.json())))

        rows.append(Row(peer.name, server, requests, read, True, FEW_CONNECTIONS))
    return rows


def model_step(
    requests: Requests, images: NDArray[np.uint8], cores: Cores, seconds: int
) -> dict[str, dict[str, float]]:
    """Time the model's runs in the service, and in a tight loop of the same process.

    Returns:
        by the number of connections, the report of `benchmarks.servers.timed`, in nanoseconds.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "images.npy", images[:, None])
        report = Path(folder) / "report.json"
        for connections in (1, 16):
            arguments = ("timed", f"{folder}/images.npy", str(report))
            with serve_module(
                "benchmarks.servers", *arguments, cores=cores, ready="/readyz"
            ) as server:
                measure(server, requests, connections, max(2, seconds), cores)
            found[str(connections)] = json.loads(report.read_text())
    return found


@dataclass(frozen=True)
class Findings:
    """The figures that have goals, and the bound; None means not measured."""

    bound_16: float
    bytes_of_bound_16: float
    framework_of_bytes_16: float
    bytes_of_floor_1: float
    bytes_of_floor_16: float
    json_of_mlserver_16: float | None
    png_of_bytes_16: float
    p99_of_p50_16: float
    rate_256_of_16: float
    batches_of_tight_loop_16: float | None
    model_step_of_tight_loop_1: float
    model_step_of_tight_loop_16: float
    start_seconds: float
    megabytes: float

    @classmethod
    def of(
        cls,
        rows: Mapping[str, Row],
        starts: Sequence[float],
        megabytes: float,
        step: Mapping[str, Mapping[str, float]],
    ) -> "Findings":
        """Compute the findings: ratios within a round, then their median.

        The bound is a rate that no Python server with this model can exceed. Its time for a request
        is that of an ASGI application that does nothing, plus the model's for one image of a batch.
        """
        model_seconds = step["16"]["batched"] / 1e9
        bounds = [1 / (1 / sample.rate + model_seconds) for sample in rows[NOOP].samples[16]]

        def ratio(above: str, below: str, c: int = 16, d: int = 16) -> float:
            pairs = zip(rows[above].samples[c], rows[below].samples[d], strict=True)
            return median(a.rate / b.rate for a, b in pairs)

        return cls(
            bound_16=median(bounds),
            bytes_of_bound_16=median(
                sample.rate / bound
                for sample, bound in zip(rows[BYTES].samples[16], bounds, strict=True)
            ),
            framework_of_bytes_16=ratio(FRAMEWORK, BYTES),
            bytes_of_floor_1=ratio(BYTES, FLOOR, 1, 1),
            bytes_of_floor_16=ratio(BYTES, FLOOR),
            json_of_mlserver_16=ratio(JSON, "MLServer") if "MLServer" in rows else None,
            png_of_bytes_16=ratio(PNG, BYTES),
            p99_of_p50_16=median(sample.p99 / sample.p50 for sample in rows[BYTES].samples[16]),
            rate_256_of_16=ratio(BYTES, BYTES, 256, 16),
            batches_of_tight_loop_16=(
                rows[BATCHES].median(16, "rate") * BATCH * step["16"]["batched_256"] / 1e9
                if BATCHES in rows
                else None
            ),
            model_step_of_tight_loop_1=step["1"]["alone"] / step["1"]["tight_loop"],
            model_step_of_tight_loop_16=step["16"]["an_image"] / step["16"]["tight_loop"],
            start_seconds=median(starts),
            megabytes=megabytes,
        )


GOALS = {
    "bytes_of_bound_16": ("784 bytes / bound, 16 connections", ">=", 0.6),
    "bytes_of_floor_16": ("784 bytes / floor, 16 connections", ">=", 0.85),
    "json_of_mlserver_16": ("JSON / MLServer, 16 connections", ">=", 3.0),
    "png_of_bytes_16": ("PNG / 784 bytes, 16 connections", ">=", 0.65),
    "p99_of_p50_16": ("p99 / p50, 784 bytes, 16 connections", "<=", 4.0),
    "rate_256_of_16": ("256 / 16 connections, 784 bytes", ">=", 0.9),
    "batches_of_tight_loop_16": ("OIP, 256 images a request / model's tight loop", ">=", 0.85),
    "model_step_of_tight_loop_1": ("model step / tight loop, 1 connection", "<=", 1.3),
    "model_step_of_tight_loop_16": ("model step an image / tight loop, 16 connections", "<=", 1.3),
    "start_seconds": ("seconds from start to ready", "<=", 1.0),
    "megabytes": ("resident megabytes after the load", "<=", 150.0),
}


def show(
    rows: Mapping[str, Row],
    memory: Mapping[str, float],
    findings: Findings,
    document: Mapping[str, Any],
) -> None:
    """Print the tables."""
    console = Console(width=150, highlight=False)
    console.print(" · ".join(f"{name} {value}" for name, value in document["machine"].items()))
    table = Table(title="one core: requests a second, p50 and p99 in milliseconds, by connections")
    table.add_column(no_wrap=True)
    for connections in CONNECTIONS:
        for name in (f"{connections}: req/s", "p50", "p99"):
            table.add_column(name, justify="right")
    table.add_column("16: of bound", justify="right")
    for row in rows.values():
        cells = []
        for connections in CONNECTIONS:
            if connections in row.samples:
                rate, p50, p99 = (row.median(connections, what) for what in ("rate", "p50", "p99"))
                cells += [f"{rate:,.0f}", f"{p50:.2f}", f"{p99:.2f}"]
            else:
                cells += ["", "", ""]
        table.add_row(row.name, *cells, f"{row.median(16, 'rate') / findings.bound_16:.2f}")
    console.print(table)

    goals = Table("", "measured", "goal")
    for words in goal_rows(asdict(findings)):
        goals.add_row(*words)
    console.print(goals)
    for connections, step in document["model_step"].items():
        console.print(
            f"the model in the service, {connections} connection(s):"
            f" {step['an_image'] / 1000:.1f} µs an image in batches of {step['batch']:.1f},"
            f" median alone {step['alone'] / 1000:.1f} µs;"
            f" tight loop in the same process {step['tight_loop'] / 1000:.1f} µs"
        )
    resident = ", ".join(f"{name} {value:.0f} MB" for name, value in memory.items())
    console.print(f"resident memory, all processes of a server: {resident}")


def goal_rows(findings: Mapping[str, float | None]) -> list[tuple[str, str, str]]:
    """Return each goal's words, the figure, and the goal with `met` or `missed`."""
    rows = []
    for name, (words, sign, goal) in GOALS.items():
        value = findings[name]
        if value is None:
            rows.append((words, "not measured", f"{sign} {goal:g}"))
        else:
            met = value >= goal if sign == ">=" else value <= goal
            rows.append((words, f"{value:.2f}", f"{sign} {goal:g} {'met' if met else 'missed'}"))
    return rows


def markdown(document: Mapping[str, Any]) -> str:
    """Return the tables for the page, from the document that a run prints."""
    bound = document["findings"]["bound_16"]
    columns = [f"{c} | p50 | p99" for c in CONNECTIONS]
    lines = ["| | " + " | ".join(columns) + " | 16: of the bound |", "|---" * 11 + "|"]
    for name, figures in document["rows"].items():
        cells = [name]
        for connections in map(str, CONNECTIONS):
            sample = figures.get(connections)
            cells += (
                [f"{sample['rate']:,.0f}", f"{sample['p50']:.2f}", f"{sample['p99']:.2f}"]
                if sample
                else ["", "", ""]
            )
        share = "" if name == BATCHES else f"{figures['16']['rate'] / bound:.2f}"  # of one image
        lines.append("| " + " | ".join([*cells, share]) + " |")
    lines += ["", "| | measured | goal |", "|---|---|---|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in goal_rows(document["findings"])]
    machine = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    resident = ", ".join(f"{n} {v:.0f}" for n, v in document["memory_megabytes"].items())
    length = f"{document['rounds']} rounds of {document['seconds']} seconds"
    return "\n".join([*lines, "", f"{length}; {machine}. Resident memory in MB: {resident}."])


def machine(cores: Cores, load_before: float) -> dict[str, str]:
    """Return machine, versions, and the load average before: above 0.5, do not use the figures."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": f"{os.cpu_count()} (server {cores.server}, load {cores.load})",
        "load average": f"{load_before:.1f}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("fastapi", "uvicorn", "onnxruntime", "numpy")},
        **{peer.name: peer.requirement.partition("==")[2] for peer in PEERS},
    }


def plain_json(image: NDArray[np.uint8]) -> bytes:
    """Return the image as `{"pixels": 28 rows}`."""
    return json.dumps({"pixels": image.tolist()}, separators=(",", ":")).encode()


def png(image: NDArray[np.uint8]) -> bytes:
    """Return the image as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def open_inference_json(image: NDArray[np.uint8]) -> bytes:
    """Return the image as a request of the Open Inference Protocol."""
    tensor = {"name": "pixels", "shape": [1, 1, 28, 28], "datatype": "UINT8"}
    tensor["data"] = image.ravel().tolist()
    return json.dumps({"inputs": [tensor]}, separators=(",", ":")).encode()


def binary_head(images: int = 1) -> bytes:
    """Return the JSON before the images' bytes; it also asks for a binary answer."""
    parameters = {"binary_data_size": 784 * images}
    tensor = {"name": "pixels", "shape": [images, 1, 28, 28], "datatype": "UINT8"}
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    document = {"inputs": [tensor | {"parameters": parameters}], "outputs": [wanted]}
    return json.dumps(document, separators=(",", ":")).encode()


def open_inference_class(answer: httpx.Response) -> int:
    """Read the most probable class from a JSON answer of the Open Inference Protocol."""
    return int(np.argmax(answer.json()["outputs"][0]["data"]))


def binary_class(answer: httpx.Response) -> int:
    """Read the first image's class from a binary answer of the Open Inference Protocol."""
    head = int(answer.headers["Inference-Header-Content-Length"])
    return int(np.frombuffer(answer.content[head:], "<f4")[:10].argmax())


def _post(row: Row) -> httpx.Response:
    url = f"http://127.0.0.1:{row.server.port}{row.requests.path}"
    return httpx.post(url, content=row.requests.bodies[0], headers=dict(row.requests.headers))


if __name__ == "__main__":
    main()
