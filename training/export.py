"""Exports a folded model as one ONNX file that describes itself; verifies it before writing.

The graph is built node by node, so that its bytes depend on the weights and metadata only.
"""

import base64
import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from training.atomic import write_whole
from training.dataset import CLASS_NAMES, Split
from training.fitting.run import Config
from training.folding import fold_batch_norm

OPSET, IR_VERSION = 20, 10  # every ONNX Runtime in the range of pyproject.toml reads these

LOGIT_TOLERANCE = 1e-4
"""The largest allowed difference of a logit between the file and the unfolded float64 model."""

SELF_TEST_TOLERANCE = 1e-5
"""The largest difference of a probability that the self-test at a server's start allows."""

NO_DIGEST = "0" * 64  # the placeholder while the digest is computed

SELF_TEST_FORMULA = "pixels[k][i][j] = |(16 i + 4 k j) mod 511 - 255|, k = 0..5, i, j = 0..27"


class ExportError(Exception):
    """The file would differ from the model, or cannot be written; no file was changed."""


@dataclass(frozen=True)
class Provenance:
    """Where the weights come from.

    Attributes:
        recipe: the recipe's name.
        seed: the run's seed.
        dataset_sha256: `FashionMNIST.sha256`.
        statistics: the batch-norm statistics of the model: "population" (of the training set,
            computed after fitting) or "moving" (the moving averages of fitting).
        versions: the versions of python, torch and numpy that fitted the model.
    """

    recipe: str
    seed: int
    dataset_sha256: str
    statistics: Literal["population", "moving"]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, config: Config, statistics: Literal["population", "moving"]) -> "Provenance":
        """Return the provenance of a run's model with these statistics."""
        return cls(
            config.recipe.name, config.seed, config.dataset_sha256, statistics, config.versions
        )


@dataclass(frozen=True)
class ExportReport:
    """The written file, and its differences from the unfolded model in float64.

    Attributes:
        path: the file.
        sha256: the SHA-256 of its bytes.
        size_bytes: its size.
        test_images: the number of real images behind the next four figures.
        test_accuracy: the file's accuracy under ONNX Runtime, 0 to 1.
        fold_error: largest |logit difference| between folded file (float32) and unfolded model
            (float64).
        ties: indices of images whose two best float64 logits are closer than `LOGIT_TOLERANCE`.
        disagreements: the ties for which the file names the other class.
        self_test_error: largest |probability difference| on the file's own self-test.
    """

    path: Path
    sha256: str
    size_bytes: int
    test_images: int
    test_accuracy: float
    fold_error: float
    ties: tuple[int, ...]
    disagreements: tuple[int, ...]
    self_test_error: float


def export(
    model: nn.Sequential,
    provenance: Provenance,
    test: Split,
    out: Path,
    *,
    temperature: float = 1.0,
) -> ExportReport:
    """Fold, build, verify and write the ONNX file of a model in evaluation mode.

    ONNX Runtime on the CPU classifies every image of `test`. Its classes and logits are compared
    with those of the unfolded model in float64. The file is written completely or not at all.

    Args:
        model: a BN-LeNet on the CPU, with the statistics that `provenance` names.
        provenance: where the weights come from, for the metadata.
        test: the real test images.
        out: the file to write; a missing folder is made.
        temperature: all logits are divided by it, in the last layer's weights and bias.

    Raises:
        ExportError: the file disagrees with the model, or cannot be written; `out` is unchanged.
        ValueError: the model is in training mode, or the temperature is not a positive number.
    """
    folded = divide_logits(fold_batch_norm(model), temperature)
    parity = verify(folded, reference_logits(model, test.images, temperature), test)
    expected = softmax(reference_logits(model, self_test_pixels(), temperature))
    metadata = describe(provenance, parity, temperature, expected)
    # The digest is the last entry, so it ends the file.
    proto = build_model(folded, metadata | {"digest": NO_DIGEST})
    self_test_error = verify_self_test(proto, expected)
    data = with_digest(proto.SerializeToString(deterministic=True))
    _write(out, data)
    return ExportReport(
        path=out,
        sha256=hashlib.sha256(data).hexdigest(),
        size_bytes=len(data),
        test_images=len(test.images),
        test_accuracy=parity.accuracy,
        fold_error=parity.fold_error,
        ties=parity.ties,
        disagreements=parity.disagreements,
        self_test_error=self_test_error,
    )


@dataclass(frozen=True)
class Parity:
    """A folded model under ONNX Runtime, compared with the unfolded model in float64.

    `ExportReport` explains the fields.
    """

    accuracy: float
    fold_error: float
    ties: tuple[int, ...]
    disagreements: tuple[int, ...]


def verify(folded: nn.Sequential, expected: NDArray[np.float64], test: Split) -> Parity:
    """Compare classes and logits of a folded model with the `expected` logits [n, 10].

    Raises:
        ExportError: a logit differs by more than `LOGIT_TOLERANCE`, or the class of an image
            differs although its two best logits are not a tie.
    """
    probabilities, logits = _run(_with_logits(build_model(folded, {})), test.images)
    fold_error = float(np.abs(logits - expected).max())
    if not fold_error <= LOGIT_TOLERANCE:  # also when it is NaN
        raise ExportError(
            f"a logit of the folded model differs from the unfolded model's by {fold_error:.1e}; "
            f"at most {LOGIT_TOLERANCE:.0e} is allowed: nothing was written."
        )
    second, best = np.partition(expected, -2, axis=1)[:, -2:].T
    ties = np.flatnonzero(best - second < LOGIT_TOLERANCE)
    answers = probabilities.argmax(axis=1)
    disagreements = np.flatnonzero(answers != expected.argmax(axis=1))
    if wrong := sorted(set(disagreements.tolist()) - set(ties.tolist())):
        raise ExportError(
            f"the file and the unfolded model name different classes for {len(wrong)} test "
            f"image(s), first for image {wrong[0]}: nothing was written."
        )
    return Parity(
        accuracy=float((answers == test.labels).mean()),
        fold_error=fold_error,
        ties=tuple(ties.tolist()),
        disagreements=tuple(disagreements.tolist()),
    )


def verify_self_test(proto: onnx.ModelProto, expected: NDArray[np.float64]) -> float:
    """Return the largest error on the self-test; it must give the probabilities `expected` [6, 10].

    Raises:
        ExportError: the error is larger than `SELF_TEST_TOLERANCE`.
    """
    error = float(np.abs(_run(proto, self_test_pixels())[0] - expected).max())
    if not error <= SELF_TEST_TOLERANCE:
        raise ExportError(
            f"the file fails its own self-test (error {error:.1e}): nothing was written."
        )
    return error


def describe(
    provenance: Provenance,
    parity: Parity,
    temperature: float,
    self_test: NDArray[np.float64],
) -> dict[str, str]:
    """Return the metadata of a model; `self_test` is its self-test's probabilities [6, 10]."""
    runtimes = {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    return {
        "name": "bn-lenet",
        "version": "1",
        "classes": json.dumps(CLASS_NAMES),
        "recipe": provenance.recipe,
        "seed": str(provenance.seed),
        "test_accuracy": f"{parity.accuracy:.4f}",
        "dataset_sha256": provenance.dataset_sha256,
        "fold_error": f"{parity.fold_error:.1e}",
        "statistics": provenance.statistics,
        "temperature": repr(float(temperature)),
        "versions": json.dumps({**provenance.versions, **runtimes}),
        "self_test": json.dumps(
            {
                "formula": SELF_TEST_FORMULA,
                "pixels": base64.b64encode(self_test_pixels().tobytes()).decode(),
                # Processors differ in the last digits; rounded, they give the same bytes.
                "probabilities": self_test.round(12).tolist(),
                "tolerance": SELF_TEST_TOLERANCE,
            }
        ),
    }


def build_model(folded: nn.Sequential, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """Return the ONNX model of a folded network, after `onnx.checker`'s full check.

    Input `pixels`, uint8 [batch, 1, 28, 28]; output `probabilities`, float32 [batch, 10]. Division
    by 255 and softmax are in the graph. Nodes and weights are named after the layers.

    Args:
        folded: convolutions, linear layers, sigmoids, average pooling and flattening, in float32.
        metadata: the entries of `metadata_props`, in this order.

    Raises:
        ValueError: the network has a layer of another kind, such as batch norm.
    """
    nodes = [
        helper.make_node("Cast", ["pixels"], ["cast"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Div", ["cast", "white"], ["scaled"], "scale"),
    ]
    weights = [numpy_helper.from_array(np.array(255, np.float32), "white")]
    value, (*_, (last, _)) = "scaled", folded.named_children()
    for name, layer in folded.named_children():
        operator, attributes = _operator(layer)
        inputs = [value]
        for parameter, tensor in layer.named_parameters():
            inputs.append(f"{name}.{parameter}")
            weights.append(numpy_helper.from_array(tensor.detach().cpu().numpy(), inputs[-1]))
        value = "logits" if name == last else name
        nodes.append(helper.make_node(operator, inputs, [value], name, **attributes))
    nodes.append(helper.make_node("Softmax", [value], ["probabilities"], "softmax", axis=1))
    graph = helper.make_graph(
        nodes,
        "bn-lenet",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", 1, 28, 28])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    proto = helper.make_model(
        graph,
        producer_name="bn-lenet",
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid("", OPSET)],
    )
    helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def with_digest(data: bytes) -> bytes:
    """Return a model file's bytes with the digest in place of the 64 zeros at their end.

    The digest is the SHA-256, in hexadecimal, of the file with these 64 zeros. So it covers every
    byte, and a reader can check it before parsing anything.

    Args:
        data: a model whose last metadata entry is `digest`, with the value `NO_DIGEST`.

    Raises:
        ValueError: the bytes do not end with that value.
    """
    if not data.endswith(NO_DIGEST.encode()):
        raise ValueError("the digest must be the last metadata entry")
    return data[: -len(NO_DIGEST)] + hashlib.sha256(data).hexdigest().encode()


def divide_logits(folded: nn.Sequential, temperature: float) -> nn.Sequential:
    """Return a new model whose logits are divided by `temperature` (Guo et al., 2017).

    The last layer's weights and bias are divided, in float64, and cast back once.

    Raises:
        ValueError: the temperature is not a positive finite number.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"the temperature must be a positive number, not {temperature}")
    divided = copy.deepcopy(folded)
    for parameter in divided[-1].parameters():
        parameter.data = (parameter.data.double() / temperature).to(parameter.dtype)
    return divided


@torch.no_grad()
def reference_logits(
    model: nn.Sequential, images: NDArray[np.uint8], temperature: float = 1.0
) -> NDArray[np.float64]:
    """Return the logits [n, 10] of the unfolded model in float64, divided by `temperature`.

    Args:
        model: in evaluation mode; it is not changed.
        images: uint8 [n, 28, 28].
        temperature: see `divide_logits`.
    """
    double = copy.deepcopy(model).double()
    batches = torch.split(torch.from_numpy(images).unsqueeze(1), 1000)
    logits: NDArray[np.float64] = torch.cat([double(x.double() / 255) for x in batches]).numpy()
    return logits / temperature


def self_test_pixels() -> NDArray[np.uint8]:
    """Return the self-test's six images, uint8 [6, 28, 28], by `SELF_TEST_FORMULA`.

    They are slanted stripes of all grey levels. They excite several classes at once, and differ
    from their own mirror image and transpose.
    """
    k, i, j = np.ogrid[:6, :28, :28]
    pixels: NDArray[np.uint8] = np.abs((16 * i + 4 * k * j) % 511 - 255).astype(np.uint8)
    return pixels


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probabilities [n, 10] of logits [n, 10]."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return probabilities


def _operator(layer: nn.Module) -> tuple[str, dict[str, Any]]:
    match layer:
        case nn.Conv2d(
            stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, kernel_size=kernel
        ):
            return "Conv", {"kernel_shape": kernel}
        case nn.Linear():
            return "Gemm", {"transB": 1}
        case nn.Sigmoid():
            return "Sigmoid", {}
        case nn.AvgPool2d(
            kernel_size=int(kernel),
            stride=int(stride),
            padding=0,
            ceil_mode=False,
            divisor_override=None,
        ):
            return "AveragePool", {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
        case nn.Flatten(start_dim=1, end_dim=-1):
            return "Flatten", {"axis": 1}
    raise ValueError(f"cannot export {layer}")


def _with_logits(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of the model with `logits` as a second output, for the parity check only."""
    variant = onnx.ModelProto()
    variant.CopyFrom(proto)
    variant.graph.output.append(
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])
    )
    return variant


def _run(proto: onnx.ModelProto, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Run ONNX Runtime on one CPU thread over images [n, 28, 28]; return each output in whole."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    batches = [
        session.run(None, {"pixels": images[start : start + 100, np.newaxis]})
        for start in range(0, len(images), 100)
    ]
    return [np.concatenate(output) for output in zip(*batches, strict=True)]


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as exc:
        raise ExportError(f"cannot write {path} ({exc.strerror}): nothing was written.") from exc
