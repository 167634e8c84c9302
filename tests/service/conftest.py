"""Model files made with onnx alone, and an application reached without a network."""

import asyncio
import base64
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from uvicorn.server import ServerState

from service.app import create_app
from service.http import framework
from service.http.connection import Connection
from service.http.exchange import Answer, Exchange
from service.http.gate import Gate
from service.model.classifier import Classifier
from service.settings import Settings

Weights = dict[str, NDArray[np.float32]]

SHAPES = {
    "conv1": (6, 1, 5, 5),
    "conv2": (16, 6, 5, 5),
    "linear1": (120, 256),
    "linear2": (84, 120),
    "linear3": (10, 84),
}
CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def make_weights(seed: int = 0) -> Weights:
    """Random weights, large enough that different images get clearly different answers."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in SHAPES.items():
        inputs = tuple(range(1, len(shape)))
        scale = (20 if name == "linear3" else 6) / np.sqrt(np.prod(shape[1:]))
        weight = random.normal(0, scale, shape)
        weight -= weight.mean(axis=inputs, keepdims=True)  # sigmoids are all positive
        weights[f"{name}.weight"] = weight.astype(np.float32)
        weights[f"{name}.bias"] = random.normal(0, 0.1, shape[0]).astype(np.float32)
    return weights


def forward(weights: Weights, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Compute the network in float64 NumPy: the oracle for ONNX Runtime's answers.

    Args:
        weights: as made by `make_weights`.
        pixels: uint8 [n, 1, 28, 28].

    Returns:
        probabilities, float64 [n, 10].
    """
    x = pixels / 255.0
    for name in ("conv1", "conv2"):
        windows = sliding_window_view(x, (5, 5), axis=(2, 3))
        x = np.einsum("nihwkl,oikl->nohw", windows, weights[f"{name}.weight"].astype(np.float64))
        x = 1 / (1 + np.exp(-(x + weights[f"{name}.bias"][:, None, None])))
        n, channels, height, width = x.shape
        x = x.reshape(n, channels, height // 2, 2, width // 2, 2).mean(axis=(3, 5))
    x = x.reshape(len(x), -1)
    for name in ("linear1", "linear2", "linear3"):
        x = x @ weights[f"{name}.weight"].astype(np.float64).T + weights[f"{name}.bias"]
        if name != "linear3":
            x = 1 / (1 + np.exp(-x))
    x = np.exp(x - x.max(axis=1, keepdims=True))
    return x / x.sum(axis=1, keepdims=True)  # type: ignore[no-any-return] # einsum is untyped


def seal(model: onnx.ModelProto) -> bytes:
    """Return a model file's bytes, with the digest that the service checks."""
    sealed = onnx.ModelProto()
    sealed.CopyFrom(model)
    others = [entry for entry in model.metadata_props if entry.key != "digest"]
    sealed.ClearField("metadata_props")
    sealed.metadata_props.extend(others)
    sealed.metadata_props.add(key="digest", value="0" * 64)
    data: bytes = sealed.SerializeToString(deterministic=True)
    return data[:-64] + hashlib.sha256(data).hexdigest().encode()


def make_artefact(
    weights: Weights, *, batch: int | str = "batch", input_name: str = "pixels", **metadata: Any
) -> onnx.ModelProto:
    """Make a model file that keeps the contract, unless an argument breaks it.

    Args:
        weights: as made by `make_weights`.
        batch: the input's first dimension.
        input_name: what the graph calls its input.
        metadata: entries that replace the contract's; None leaves one out.
    """
    nodes = [
        helper.make_node("Cast", [input_name], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["float", "scale"], ["x0"]),
    ]
    last = "x0"
    for name in ("conv1", "conv2"):
        nodes += [
            helper.make_node(
                "Conv", [last, f"{name}.weight", f"{name}.bias"], [name], kernel_shape=[5, 5]
            ),
            helper.make_node("Sigmoid", [name], [f"{name}.sigmoid"]),
            helper.make_node(
                "AveragePool",
                [f"{name}.sigmoid"],
                [f"{name}.pool"],
                kernel_shape=[2, 2],
                strides=[2, 2],
            ),
        ]
        last = f"{name}.pool"
    nodes.append(helper.make_node("Flatten", [last], ["flat"], axis=1))
    last = "flat"
    for name in ("linear1", "linear2", "linear3"):
        inputs = [last, f"{name}.weight", f"{name}.bias"]
        nodes.append(helper.make_node("Gemm", inputs, [name], transB=1))
        last = name
        if name != "linear3":
            nodes.append(helper.make_node("Sigmoid", [name], [f"{name}.sigmoid"]))
            last = f"{name}.sigmoid"
    nodes.append(helper.make_node("Softmax", [last], ["probabilities"], axis=1))
    constants = {"scale": np.float32(255.0), **weights}
    graph = helper.make_graph(
        nodes,
        "bn-lenet",
        [helper.make_tensor_value_info(input_name, TensorProto.UINT8, [batch, 1, 28, 28])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [batch, 10])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    formula = "pixels[n, i, j] = (n * 64 + i * j) mod 256"
    n, i, j = np.ogrid[:4, :28, :28]
    pixels = ((n * 64 + i * j) % 256).astype(np.uint8)
    contract: dict[str, Any] = {
        "name": "bn-lenet",
        "version": "1",
        "classes": json.dumps(CLASSES),
        "recipe": "random",
        "seed": "0",
        "test_accuracy": "0.1000",
        "dataset_sha256": "0" * 64,
        "fold_error": "0.0e+00",
        "statistics": "population",
        "temperature": "1.0",
        "versions": "{}",
        "self_test": json.dumps(
            {
                "formula": formula,
                "pixels": base64.b64encode(pixels.tobytes()).decode(),
                "probabilities": forward(weights, pixels[:, None]).tolist(),
                "tolerance": 1e-5,
            }
        ),
    }
    entries = {k: v for k, v in {**contract, **metadata}.items() if v is not None}
    helper.set_model_props(model, entries)
    return model


@pytest.fixture(scope="session")
def weights() -> Weights:
    return make_weights()


@pytest.fixture(scope="session")
def artefact(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a valid model file with random weights."""
    path = tmp_path_factory.mktemp("artefact") / "model.onnx"
    path.write_bytes(seal(make_artefact(weights)))
    return path


@pytest.fixture
def broken_artefact(weights: Weights, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes files which break the contract, as `make_artefact` allows."""

    def make(**changes: Any) -> Path:
        path = tmp_path / "broken.onnx"
        path.write_bytes(seal(make_artefact(weights, **changes)))
        return path

    return make


@pytest.fixture(scope="session")
def reference(weights: Weights) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """Return the float64 oracle of `artefact`: uint8 [n, 1, 28, 28] -> float64 [n, 10]."""
    return lambda pixels: forward(weights, pixels)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("BNLENET_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def classifier(artefact: Path) -> Classifier:
    return Classifier.load(artefact)


@pytest.fixture
def make_app(classifier: Classifier) -> Callable[..., Gate]:
    """Return a function that makes an application from settings, by their field names."""
    return lambda **settings: create_app(Settings(**settings), classifier)


class Transport(asyncio.Transport):
    """A connection's transport, in memory.

    Attributes:
        sent: the bytes of each write.
        reading: reading is not paused.
        closed, ended: `close` or `write_eof` was called.
        unread: the number of bytes that the client has not read; set by the test.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.reading = True
        self.closed = False
        self.ended = False
        self.unread = 0
        self.protocol: Connection | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.closed
        assert not self.ended
        self.sent.append(bytes(data))

    def write_eof(self) -> None:
        self.ended = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            connection, self.protocol = self.protocol, None
            assert connection is not None
            asyncio.get_running_loop().call_soon(connection.connection_lost, None)

    abort = close

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return self.unread

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ARG002 - asyncio's signature
        if name == "peername":
            return "192.0.2.1", 4711
        return SimpleNamespace(getsockopt=lambda *_: 0)


def connect(app: Gate, state: ServerState | None = None) -> tuple[Connection, Transport]:
    """Open a connection to the application, in memory."""
    config: Any = SimpleNamespace(loaded_app=app)
    connection = Connection(config, state or ServerState(), {})
    transport = Transport()
    transport.protocol = connection
    connection.connection_made(transport)
    return connection, transport


@dataclass
class Conversation:
    """One request on its own connection, in memory; the test sends its body in pieces."""

    app: Gate
    method: str = "POST"
    target: str = "/predict"
    send_headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._connection, self.transport = connect(self.app)
        fields = {"Host": "test", **self.send_headers}
        head = f"{self.method} {self.target} HTTP/1.1\r\n".encode()
        for name, value in fields.items():
            head += name.encode() + b": " + value.encode("latin-1") + b"\r\n"
        self._connection.data_received(head + b"\r\n")

    @property
    def _answer(self) -> tuple[bytes, bytes]:
        text = b"".join(self.transport.sent).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        head, _, body = text.partition(b"\r\n\r\n")
        return head, body

    @property
    def status(self) -> int:
        """The status of the answer, or 0 while there is none."""
        head, _ = self._answer
        return int(head[9:12]) if head else 0

    @property
    def headers(self) -> dict[str, str]:
        lines = self._answer[0].decode("latin-1").split("\r\n")[1:]
        return dict(line.split(": ", 1) for line in lines)

    @property
    def body(self) -> bytes:
        return self._answer[1]

    @property
    def closed(self) -> bool:
        """The answer is complete."""
        return bool(self.status)

    def send(self, body: bytes) -> None:
        if body:
            self._connection.data_received(body)

    def leave(self) -> None:
        self.transport.close()

    async def answer(self) -> Any:
        """Wait for the answer, and return its JSON, if it is JSON."""
        async with asyncio.timeout(10):
            while not (self.closed or self.transport.closed):  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0)
        is_json = self.headers.get("content-type") == "application/json" and self.body
        return json.loads(self.body) if is_json and "content-encoding" not in self.headers else None


BYTES = {"Content-Type": "application/octet-stream", "Content-Length": "784"}


async def ask(
    app: Gate,
    body: bytes = bytes(784),
    *,
    method: str = "POST",
    target: str = "/predict",
    headers: dict[str, str] | None = None,
) -> Conversation:
    """Send a complete request at once and wait for its answer."""
    length = {"Content-Length": str(len(body))}
    conversation = Conversation(app, method, target, {**BYTES, **length, **(headers or {})})
    conversation.send(body)
    await conversation.answer()
    conversation.leave()
    return conversation


def through_framework(app: Gate) -> Gate:
    """Send the requests of hot paths to FastAPI, whose routes have the same handlers."""

    async def handler(exchange: Exchange) -> Answer:
        return await framework.call(app.application, exchange)

    for key, hot_path in app.hot_paths.items():
        app.hot_paths[key] = hot_path._replace(handler=handler)
    return app


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
