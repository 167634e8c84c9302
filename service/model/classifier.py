"""The model file, checked and loaded: pixels in, probabilities out. Knows arrays only."""

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.model.artefact import (
    INPUT,
    OUTPUT,
    REMEDY,
    Artefact,
    ModelError,
    ModelInfo,
    SelfTest,
    check_artefact,
    read_file,
)

Device = Literal["auto", "cpu", "cuda"]
Run = Callable[[list[str], dict[str, NDArray[np.uint8]]], list[NDArray[np.float32]]]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OUTPUTS = [OUTPUT[0]]
MAX_BATCH = 32  # larger ones gain nothing on a CPU, and what memory they take is never given back
BATCHES_CHECKED = (*range(2, 17), 31, 32)
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # the only batches that a GPU gets


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
    def load(
        cls,
        path: Path,
        device: Device = "auto",
        name: str | None = None,
        data: bytes | None = None,
    ) -> Self:
        """Load a model file that keeps its promises, and run its self-test.

        Args:
            path: an ONNX file as `training` exports it, or a folder with one such file.
            device: "cuda" insists on a GPU; "auto" is "cpu", the faster for single images.
            name: replaces the model's name in the file.
            data: the file's bytes, where they have been read already.

        Raises:
            ModelError: the file is missing, damaged, not ours, fails its self-test, or the device
                is not to be had.
        """
        if data is None:
            path, data = read_file(path)
        artefact = check_artefact(path, data, name)
        session = _open_session(artefact, device)
        info = ModelInfo(
            name=artefact.name,
            version=artefact.version,
            revision=artefact.revision,
            classes=artefact.classes,
            provider=session.get_providers()[0],
            metadata=artefact.metadata,
        )
        try:
            classifier = cls(session, info)
            error = _self_test_error(classifier, artefact.self_test)
        except Exception as exc:  # as in _open_session
            raise ModelError(
                f"The model file {artefact.path} cannot be run on {info.provider}: {REMEDY}."
            ) from exc
        tolerance = artefact.self_test.tolerance
        if not error <= tolerance:  # also when it is NaN
            raise ModelError(
                f"The model file {artefact.path} fails its self-test on {info.provider}: off by"
                f" {error:.1e} where {tolerance:.0e} is allowed; export it again."
            )
        return classifier


def _self_test_error(classifier: Classifier, test: SelfTest) -> float:
    """Return the largest difference of a probability from the expected one."""
    pixels = np.frombuffer(test.pixels, np.uint8).reshape(-1, *INPUT[2])
    return float(np.abs(classifier.probabilities(pixels) - np.array(test.probabilities)).max())


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


def _open_session(artefact: Artefact, device: Device) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # no pool, no spinning; one image is too little to share
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what is wrong becomes our one sentence
    # All else is ONNX Runtime's default, full optimisation included: measured inside the server,
    # the alternatives (less optimisation, no arena, denormals as zero) were no faster.
    try:
        session = onnxruntime.InferenceSession(artefact.data, options, providers=[CPU])
    except Exception as exc:  # ONNX Runtime's own classes share no public base
        raise ModelError(
            f"ONNX Runtime cannot open the model file {artefact.path}: {REMEDY}."
        ) from exc
    return _open_on_cuda(artefact.data, options) if device == "cuda" else session


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
