"""The contract of a model file: digest, graph, metadata. Any package of the service may import it.

The whole file is checked here before ONNX Runtime parses it: first the digest over its bytes, then
that it has the exported graph and nothing else. So a damaged or foreign file is refused with one
sentence, in bounded time. This module imports nothing heavy.
"""

import base64
import hashlib
import json
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from service.model.onnx_format import GRAPH, FormatError, Message, parse

INPUT = ("pixels", "UINT8", [1, 28, 28])
OUTPUT = ("probabilities", "FP32", [10])
"""Name, datatype as in the Open Inference Protocol, shape without the batch."""

IMAGE_SIZE = prod(INPUT[2])
CLASSES = OUTPUT[2][0]

MAX_CLASS_NAME = 64  # characters
MAX_BYTES = 2**20  # five times the committed file
MAX_SELF_TEST_TOLERANCE = 1e-5  # the exporter's
DIGEST_ENTRY = b"\x72\x4a\x0a\x06digest\x12\x40"  # the metadata entry up to its 64 characters
NO_DIGEST = b"0" * 64  # stands in for the digest while it is computed
MODEL_SETTING, PICTURE_SETTING = "BNLENET_MODEL_PATH", "BNLENET_PICTURE_MODEL_PATH"
REMEDY = f"put a file written by `python -m training export` there, or set {MODEL_SETTING}"

FLOAT, UINT8 = 1, 2  # TensorProto.DataType
INT, INTS = 2, 7  # AttributeProto.AttributeType
IR_VERSION, OPSET = 10, 20
CONVOLUTION = ("Conv", {"kernel_shape": [5, 5]})
POOLING = ("AveragePool", {"kernel_shape": [2, 2], "strides": [2, 2]})
LINEAR = ("Gemm", {"transB": 1})
SIGMOID: tuple[str, dict[str, Any]] = ("Sigmoid", {})
NODES: tuple[tuple[str, Mapping[str, int | list[int]]], ...] = (
    *(("Cast", {"to": FLOAT}), ("Div", {})),
    *(CONVOLUTION, SIGMOID, POOLING),
    *(CONVOLUTION, SIGMOID, POOLING),
    ("Flatten", {"axis": 1}),
    *(LINEAR, SIGMOID, LINEAR, SIGMOID, LINEAR),
    ("Softmax", {"axis": 1}),
)
"""Operators and attributes. A node reads the output of the node before it, then its weights."""

WEIGHT_COUNTS = {"Div": 1, "Conv": 2, "Gemm": 2}
"""The number of weights that an operator reads; the others read none."""

WEIGHT_SHAPES: tuple[list[int], ...] = (
    [],
    *([6, 1, 5, 5], [6], [16, 6, 5, 5], [16]),
    *([120, 256], [120], [84, 120], [84], [CLASSES, 84], [CLASSES]),
)
"""In the order in which the nodes read the weights."""

is_path_segment = re.compile(r"(?!stats\Z)[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}").fullmatch
"""Whether a name fits into the Open Inference Protocol's paths; `/v2/models/stats` is taken."""

NAME_FORM = "64 letters, digits, dots, hyphens and underscores"


class ModelError(Exception):
    """The model cannot be served; the message is one sentence that says why."""


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model's description.

    Attributes:
        name: the model's name.
        version: the model's version, as in the Open Inference Protocol's paths.
        revision: the first 12 hexadecimal digits of the file's SHA-256.
        classes: the ten class names, by class id.
        provider: the execution provider that the session has got.
        metadata: all metadata entries of the file.
    """

    name: str
    version: str
    revision: str
    classes: tuple[str, ...]
    provider: str
    metadata: Mapping[str, str] = field(repr=False)


@dataclass(frozen=True)
class SelfTest:
    """Images, and the probabilities of the unfolded model in float64 for them.

    Attributes:
        pixels: n images of 784 bytes.
        probabilities: n rows of 10.
        tolerance: the largest difference of a probability that is allowed.
    """

    pixels: bytes
    probabilities: list[list[float]]
    tolerance: float


@dataclass(frozen=True)
class Artefact:
    """A model file whose digest, graph and metadata have been checked.

    Attributes:
        path: the file's path, also when a folder was given.
        data: the file's bytes.
        name, version, revision, classes, metadata: as in `ModelInfo`.
        self_test: must pass before the model is served.
    """

    path: Path
    data: bytes = field(repr=False)
    name: str
    version: str
    revision: str
    classes: tuple[str, ...]
    metadata: Mapping[str, str] = field(repr=False)
    self_test: SelfTest = field(repr=False)


def read_artefact(path: Path, name: str | None = None) -> Artefact:
    """Read a model file and check it, without running the model.

    Args:
        path: an ONNX file as `training` exports it, or a folder with one such file.
        name: replaces the model's name in the file.

    Raises:
        ModelError: the file is missing or damaged, or differs from what `training` exports.
    """
    return check_artefact(*read_file(path), name)


def read_files(paths: Sequence[Path]) -> list[bytes]:
    """Return the model files' bytes, unchecked: for pixels, then for pictures if it is another.

    Raises:
        ModelError: as `read_file` does.
    """
    first, *others = paths
    _, data = read_file(first)
    with for_pictures():
        return [data, *(read_file(other)[1] for other in others)]


@contextmanager
def for_pictures() -> Iterator[None]:
    """Let model errors name the setting of the model for pictures."""
    try:
        yield
    except ModelError as exc:
        raise ModelError(str(exc).replace(MODEL_SETTING, PICTURE_SETTING)) from exc


def read_file(path: Path) -> tuple[Path, bytes]:
    """Return a model file's path and its bytes, unchecked. A folder must have one such file.

    Raises:
        ModelError: the file is missing, unreadable or too large.
    """
    try:
        if path.is_dir():
            files = [file for file in path.iterdir() if file.suffix == ".onnx" and file.is_file()]
            if len(files) != 1:
                raise ModelError(
                    f"The folder {path} has {len(files) or 'no'} .onnx file{'s' * bool(files)}:"
                    f" leave one there, or set {MODEL_SETTING} to the file."
                )
            path = files[0]
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for its writer
            raise ModelError(f"{path} is not a regular file: {REMEDY}.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as exc:
        reason = exc.strerror or type(exc).__name__
        raise ModelError(f"The model file {path} cannot be read ({reason}): {REMEDY}.") from exc
    if len(data) > MAX_BYTES:
        raise ModelError(f"The model file {path} has more than {MAX_BYTES:,} bytes: {REMEDY}.")
    return path, data


def check_artefact(path: Path, data: bytes, name: str | None = None) -> Artefact:
    """Check the bytes of a model file.

    Args:
        path: the file's path, for error messages.
        data: the file's bytes.
        name: replaces the model's name in the file.

    Raises:
        ModelError: the file is damaged, or differs from what `training` exports.
    """
    _check_digest(data, path)
    try:
        model = parse(data)
        _check_graph(model)
    except FormatError as exc:
        raise ModelError(
            f"The model file {path} is not a BN-LeNet of this project ({exc}): {REMEDY}."
        ) from exc
    try:
        metadata = _metadata(model)
        artefact = Artefact(
            path=path,
            data=data,
            name=name or metadata["name"],
            version=metadata["version"],
            revision=hashlib.sha256(data).hexdigest()[:12],
            classes=_class_names(metadata["classes"]),
            metadata=MappingProxyType(metadata),
            self_test=_self_test(metadata["self_test"]),
        )
    except KeyError as exc:
        raise ModelError(
            f"The model file {path} lacks the metadata entry {exc}: {REMEDY}."
        ) from exc
    except (ValueError, TypeError, RecursionError) as exc:  # RecursionError: JSON nested too deep
        raise ModelError(f"The metadata of the model file {path} is damaged: {REMEDY}.") from exc
    for what, text in (("name", artefact.name), ("version", artefact.version)):
        if not is_path_segment(text):
            raise ModelError(
                f"The model file {path} has the {what} {text[:80]!r}, which does not fit into a"
                f" URL: use up to {NAME_FORM}."
            )
    return artefact


def _check_digest(data: bytes, path: Path) -> None:
    """Check that the file ends with its SHA-256, computed with zeros in place of the digest."""
    body, digest = data[: -len(NO_DIGEST)], data[-len(NO_DIGEST) :]
    if not body.endswith(DIGEST_ENTRY):
        raise ModelError(
            f"The model file {path} is damaged, cut short, or not exported by this project (it does"
            f" not end with a digest): {REMEDY}."
        )
    if hashlib.sha256(body + NO_DIGEST).hexdigest().encode() != digest:
        raise ModelError(f"The model file {path} is damaged (its digest does not match): {REMEDY}.")


def _check_graph(model: Message) -> None:
    """Check that the model has the exported graph. The weights may have any values.

    Raises:
        FormatError: it differs, or has anything else.
    """
    opsets = [{"domain": "", "version": OPSET}]
    if model["ir_version"] != IR_VERSION or model["opset_import"] != opsets:
        raise FormatError(f"not IR version {IR_VERSION} and opset {OPSET}")
    graph = model["graph"] or parse(b"", GRAPH)
    if graph["input"] != [_value_info(INPUT[0], UINT8, INPUT[2])]:
        raise FormatError("its input is not `pixels`, uint8 [batch, 1, 28, 28]")
    if graph["output"] != [_value_info(OUTPUT[0], FLOAT, OUTPUT[2])]:
        raise FormatError("its output is not `probabilities`, float32 [batch, 10]")
    weights = graph["initializer"]
    if [tensor["dims"] for tensor in weights] != [*WEIGHT_SHAPES] or any(
        tensor["data_type"] != FLOAT or len(tensor["raw_data"] or b"") != 4 * prod(tensor["dims"])
        for tensor in weights
    ):
        raise FormatError("its weights are not LeNet's, in float32")
    expected, values, unread = [], [INPUT[0]], [tensor["name"] for tensor in weights]
    for node, (operator, attributes) in zip(graph["node"], NODES, strict=False):
        inputs = [values[-1], *unread[: WEIGHT_COUNTS.get(operator, 0)]]
        del unread[: len(inputs) - 1]
        values += node["output"][:1]
        expected.append(
            {
                "input": inputs,
                "output": values[-1:],
                "name": node["name"],
                "op_type": operator,
                "attribute": [_attribute(*item) for item in attributes.items()],
            }
        )
    distinct = {*values, *(tensor["name"] for tensor in weights)}
    if (
        graph["node"] != expected
        or values[-1] != OUTPUT[0]
        or len(distinct) != 1 + len(NODES) + len(WEIGHT_SHAPES)
    ):
        raise FormatError("its nodes are not those of the export")


def _value_info(name: str, elem_type: int, shape: list[int]) -> Message:
    dims: list[Message] = [{"dim_value": None, "dim_param": "batch"}]
    dims += [{"dim_value": size, "dim_param": None} for size in shape]
    return {"name": name, "type": {"tensor_type": {"elem_type": elem_type, "shape": {"dim": dims}}}}


def _attribute(name: str, value: int | list[int]) -> Message:
    if isinstance(value, int):
        return {"name": name, "i": value, "ints": [], "type": INT}
    return {"name": name, "i": None, "ints": value, "type": INTS}


def _metadata(model: Message) -> dict[str, str]:
    entries = model["metadata_props"]
    metadata: dict[str, str] = {entry["key"]: entry["value"] for entry in entries}
    if len(metadata) < len(entries) or None in {*metadata, *metadata.values()}:
        raise ValueError("an entry occurs twice, or lacks its key or value")
    return metadata


def _class_names(text: str) -> tuple[str, ...]:
    names = json.loads(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("the classes are not a list of strings")
    # This excludes surrogates, control characters, and those that change the writing direction.
    if not all(name.isprintable() and 0 < len(name) <= MAX_CLASS_NAME for name in names):
        raise ValueError("a class name is empty, too long or not printable")
    if not len(set(names)) == len(names) == CLASSES:
        raise ValueError("the class names are not ten different ones")
    return tuple(names)


def _self_test(text: str) -> SelfTest:
    entry = json.loads(text)
    pixels = base64.b64decode(entry["pixels"], validate=True)
    rows, tolerance = entry["probabilities"], entry["tolerance"]
    if not rows or len(pixels) != len(rows) * IMAGE_SIZE:
        raise ValueError("the probabilities are not one row for each image")
    if any(len(row) != CLASSES or set(map(type, row)) != {float} for row in rows):
        raise ValueError("a row does not have ten probabilities")
    if not 0 < tolerance <= MAX_SELF_TEST_TOLERANCE:  # also when it is NaN
        raise ValueError("the tolerance is not between 0 and the exporter's")
    return SelfTest(pixels, rows, tolerance)
