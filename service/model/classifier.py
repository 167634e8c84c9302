"""The model file, checked and loaded: pixels in, probabilities out. Knows arrays only."""

import base64
import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Device = Literal["auto", "cpu", "cuda"]
Run = Callable[[list[str], dict[str, NDArray[np.uint8]]], list[NDArray[np.float32]]]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
INPUT = ("pixels", "tensor(uint8)", [1, 28, 28])
OUTPUT = ("probabilities", "tensor(float)", [10])
OUTPUTS = [OUTPUT[0]]
MAX_BATCH = 32  # larger ones gain nothing on a CPU, and what memory they take is never given back
BATCHES_CHECKED = (*range(2, 17), 31, 32)
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # the only batches that a GPU gets
REMEDY = "put a file written by `python -m training export` there, or set BNLENET_MODEL_PATH"


class ModelError(Exception):
    """The model cannot be served; the message is one sentence that says why."""


@dataclass(frozen=True)
class ModelInfo:
    """What the model file says of itself, and where it runs.

    Attributes:
        name: the model's name.
        version: the model's version, as in the Open Inference Protocol's paths.
        revision: the first 12 hexadecimal digits of the file's SHA-256.
        classes: the ten class names, by class id.
        provider: the execution provider that the session really has.
        metadata: all the file's metadata entries.
    """

    name: str
    version: str
    revision: str
    classes: tuple[str, ...]
    provider: str
    metadata: Mapping[str, str] = field(repr=False)


class Classifier:
    """A loaded model that agreed with its own self-test.

    Args:
        session: an ONNX Runtime session that keeps the contract.
        info: what to tell about the model.
    """

    def __init__(self, session: onnxruntime.InferenceSession, info: ModelInfo) -> None:
        self.info = info
        self._session_run: Run = session.run
        self._max_batch = MAX_BATCH
        if info.provider != CPU:
            self._session_run, self._max_batch = _in_buckets(session.run), BUCKETS[-1]
        elif not self._rows_are_independent():
            self._max_batch = 1

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Classify images. On a CPU the answer for an image is the same bits in any batch.

        Args:
            pixels: uint8 [n, 1, 28, 28], C-contiguous, 0 = background.

        Returns:
            float32 [n, 10]; each row sums to 1.
        """
        most = self._max_batch
        if len(pixels) <= most:
            return self._run(pixels)
        return np.concatenate(
            [self._run(pixels[i : i + most]) for i in range(0, len(pixels), most)]
        )

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._session_run(OUTPUTS, {"pixels": pixels})[0]

    def _rows_are_independent(self) -> bool:
        """Tell whether an image gets the same bits alone and in a batch.

        ONNX Runtime does not promise it: its kernels may add up in another order for another
        number of rows. Where that happens, images are run one by one.
        """
        size = MAX_BATCH * 28 * 28
        noise = (np.arange(size, dtype=np.uint32) * np.uint32(2_654_435_761)) >> 24
        images = noise.astype(np.uint8).reshape(MAX_BATCH, 1, 28, 28)
        alone = np.concatenate([self._run(images[i : i + 1]) for i in range(MAX_BATCH)])
        return all(np.array_equal(self._run(images[:n]), alone[:n]) for n in BATCHES_CHECKED)

    @classmethod
    def load(cls, path: Path, device: Device = "auto") -> Self:
        """Load a model file, check that it keeps the contract, and run its self-test.

        Args:
            path: an ONNX file as `training` exports it.
            device: "cuda" insists on a GPU; "auto" is "cpu", the faster for single images.

        Raises:
            ModelError: the file is missing, damaged, not ours, fails its self-test, or the device
                is not to be had.
        """
        try:
            data = path.read_bytes()
        except OSError as exc:
            reason = exc.strerror or type(exc).__name__
            raise ModelError(f"The model file {path} cannot be read ({reason}): {REMEDY}.") from exc
        session = _open_session(data, path, device)
        _check_signature(session, path)
        metadata: dict[str, str] = session.get_modelmeta().custom_metadata_map
        try:
            classes = tuple(json.loads(metadata["classes"]))
            info = ModelInfo(
                name=metadata["name"],
                version=metadata["version"],
                revision=hashlib.sha256(data).hexdigest()[:12],
                classes=classes,
                provider=session.get_providers()[0],
                metadata=MappingProxyType(metadata),
            )
            self_test = _SelfTest.parse(metadata["self_test"])
        except KeyError as exc:
            raise ModelError(
                f"The model file {path} lacks the metadata entry {exc}: {REMEDY}."
            ) from exc
        except (ValueError, TypeError) as exc:
            raise ModelError(
                f"The metadata of the model file {path} is damaged: {REMEDY}."
            ) from exc
        strings = all(isinstance(name, str) for name in classes)
        if not strings or not len(set(classes)) == len(classes) == OUTPUT[2][0]:
            raise ModelError(f"The model file {path} does not name ten classes: {REMEDY}.")
        try:
            classifier = cls(session, info)
            error = self_test.error(classifier)
        except Exception as exc:  # as in _open_session
            raise ModelError(
                f"The model file {path} cannot be run on {info.provider}: {REMEDY}."
            ) from exc
        if not error <= self_test.tolerance:  # also when it is NaN
            raise ModelError(
                f"The model file {path} fails its self-test on {info.provider}: off by {error:.1e}"
                f" where {self_test.tolerance:.0e} is allowed; export it again."
            )
        return classifier


@dataclass(frozen=True)
class _SelfTest:
    """Images with the probabilities that the unfolded model gives for them in float64."""

    pixels: NDArray[np.uint8]  # [n, 1, 28, 28]
    probabilities: NDArray[np.float64]  # [n, 10]
    tolerance: float

    @classmethod
    def parse(cls, text: str) -> Self:
        entry: dict[str, Any] = json.loads(text)
        pixels = np.frombuffer(base64.b64decode(entry["pixels"], validate=True), np.uint8)
        probabilities = np.array(entry["probabilities"], np.float64)
        tolerance = float(entry["tolerance"])
        if probabilities.shape[1:] != (10,) or len(probabilities) == 0:
            raise ValueError("no expected probabilities")
        if not 0 < tolerance <= 1e-3:
            raise ValueError("a tolerance that proves nothing")
        return cls(pixels.reshape(len(probabilities), 1, 28, 28), probabilities, tolerance)

    def error(self, classifier: Classifier) -> float:
        return float(np.abs(classifier.probabilities(self.pixels) - self.probabilities).max())


def _in_buckets(run: Run) -> Run:
    """Return a way to run batches padded up to one of the `BUCKETS`; run each of these once now.

    CUDA searches for its algorithms at every new shape, and what memory a shape takes is never
    given back. IO binding and CUDA graphs are not used: neither has been measured on a GPU here.
    """

    def run_padded(
        outputs: list[str], feed: dict[str, NDArray[np.uint8]]
    ) -> list[NDArray[np.float32]]:
        pixels = feed["pixels"]
        count = len(pixels)
        padded = np.zeros((BUCKETS[bisect_left(BUCKETS, count)], *pixels.shape[1:]), np.uint8)
        padded[:count] = pixels
        return [output[:count] for output in run(outputs, {"pixels": padded})]

    for size in BUCKETS:
        run(OUTPUTS, {"pixels": np.zeros((size, 1, 28, 28), np.uint8)})
    return run_padded


def _open_session(data: bytes, path: Path, device: Device) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # no pool, no spinning; one image is too little to share
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong becomes our one sentence
    # All else is ONNX Runtime's default, full optimisation included: measured inside the server,
    # the alternatives (less optimisation, no arena, denormals as zero) were no faster.
    try:
        session = onnxruntime.InferenceSession(data, options, providers=[CPU])
    except Exception as exc:  # ONNX Runtime's own classes share no public base
        raise ModelError(
            f"The model file {path} is damaged, cut short or no ONNX model: {REMEDY}."
        ) from exc
    return _open_on_cuda(data, options) if device == "cuda" else session


def _open_on_cuda(data: bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Open a session on the GPU, or fail: ONNX Runtime would go on with the CPU in silence."""
    cause: Exception | None = None
    if CUDA in onnxruntime.get_available_providers():  # else ONNX Runtime prints a warning
        onnxruntime.preload_dlls()
        cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        providers = [(CUDA, cuda), CPU]
        try:
            session = onnxruntime.InferenceSession(data, options, providers=providers)
            if session.get_providers()[0] == CUDA:
                return session
        except Exception as exc:  # as above; the file itself is sound, a session has been opened
            cause = exc
    raise ModelError(
        "BNLENET_DEVICE is cuda, but ONNX Runtime got no CUDA device: install the `gpu` extra and"
        " a driver, or set BNLENET_DEVICE to auto."
    ) from cause


def _check_signature(session: onnxruntime.InferenceSession, path: Path) -> None:
    inputs = [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()]
    outputs = [(o.name, o.type, o.shape[1:]) for o in session.get_outputs()]
    if inputs != [INPUT] or outputs != [OUTPUT]:
        raise ModelError(
            f"The model file {path} is not a BN-LeNet of this project (its input and output are"
            f" not `pixels` uint8 [n, 1, 28, 28] and `probabilities` float32 [n, 10]): {REMEDY}."
        )
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise ModelError(f"The model file {path} takes only a fixed batch: {REMEDY}.")
