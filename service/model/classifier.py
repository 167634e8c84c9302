"""The loaded model: pixels in, probabilities out. This module knows arrays only."""

import os
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from service.model.artefact import (
    INPUT,
    OUTPUT,
    PICTURE_SETTING,
    REMEDY,
    Artefact,
    ModelError,
    ModelInfo,
    SelfTest,
    check_artefact,
    for_pictures,
    read_file,
)

Device = Literal["auto", "cpu", "cuda"]
Run = Callable[[list[str], dict[str, NDArray[np.uint8]]], list[NDArray[np.float32]]]

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
OUTPUTS = [OUTPUT[0]]
MAX_BATCH = 32  # on a CPU a larger batch is no faster, and ONNX Runtime never frees its memory
BATCHES_CHECKED = (*range(2, 17), 31, 32)
USE_AUTO = "set BNLENET_DEVICE to auto"
BUCKETS = (1, 4, 16, 64, 256)  # the only batch sizes that run on a GPU


class Classifier:
    """A loaded model.

    Args:
        session: an ONNX Runtime session of a checked model file.
        info: the model's description.
        open_another: opens one more such session, for a GPU.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        info: ModelInfo,
        open_another: Callable[[], onnxruntime.InferenceSession],
    ) -> None:
        self.info = info
        self._session_run: Run = session.run
        self._max_batch = MAX_BATCH
        if info.provider != CPU:
            sessions = [session, *(open_another() for _ in BUCKETS[1:])]
            self._session_run, self._max_batch = _in_buckets(sessions), BUCKETS[-1]
        elif not self._rows_are_independent():
            self._max_batch = 1

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Classify images. On a CPU an image gets the same bits in any batch.

        Args:
            pixels: uint8 [n, 1, 28, 28], C-contiguous, 0 = background.

        Returns:
            float32 [n, 10]; each row sums to 1.
        """
        size = self._max_batch
        if len(pixels) <= size:
            return self._run(pixels)
        return np.concatenate(
            [self._run(pixels[i : i + size]) for i in range(0, len(pixels), size)]
        )

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._session_run(OUTPUTS, {"pixels": pixels})[0]

    def _rows_are_independent(self) -> bool:
        """Return whether an image gets the same bits alone and in a batch.

        ONNX Runtime does not promise it: its kernels may sum in another order for another number
        of rows. On such a machine, images are run one by one.
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
        """Check a model file, open it in ONNX Runtime, and run its self-test.

        Args:
            path: an ONNX file as `training` exports it, or a folder with one such file.
            device: "cuda" needs a GPU; "auto" is "cpu", which is faster for single images.
            name: replaces the model's name in the file.
            data: the file's bytes, if they have been read already.

        Raises:
            ModelError: the file is missing, damaged or not exported by `training`; its self-test
                fails; or the device is not available.
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
            classifier = cls(session, info, lambda: _open_session(artefact, device))
            error = _self_test_error(classifier, artefact.self_test)
        except Exception as exc:  # as in `_open_session`
            remedy = REMEDY if info.provider == CPU else f"{_short(exc)}; {USE_AUTO}"
            raise ModelError(
                f"The model file {artefact.path} cannot be run on {info.provider}: {remedy}."
            ) from exc
        tolerance = artefact.self_test.tolerance
        if not error <= tolerance:  # also when it is NaN
            remedy = "export it again" if info.provider == CPU else USE_AUTO
            raise ModelError(
                f"The model file {artefact.path} fails its self-test on {info.provider}: off by"
                f" {error:.1e} where {tolerance:.0e} is allowed; {remedy}."
            )
        return classifier


def load_classifiers(
    paths: Sequence[Path],
    device: Device = "auto",
    name: str | None = None,
    files: Sequence[bytes] | None = None,
) -> tuple[Classifier, Classifier]:
    """Load the classifier of pixels, and that of converted pictures.

    Args:
        paths: one model file for both, or one for each.
        device: as in `Classifier.load`.
        name: of both; the first file's own if it is None.
        files: the files' bytes, if they have been read already.

    Raises:
        ModelError: as `Classifier.load` does, or the two models have different classes.
    """
    first, *others = [None] * len(paths) if files is None else files
    classifier = Classifier.load(paths[0], device, name, first)
    if not others:
        return classifier, classifier
    with for_pictures():
        of_pictures = Classifier.load(paths[1], device, classifier.info.name, others[0])
    if of_pictures.info.classes != classifier.info.classes:
        raise ModelError(
            f"The models {paths[0]} and {paths[1]} have different classes: set"
            f" {PICTURE_SETTING} to a model with the same ones."
        )
    return classifier, of_pictures


def _self_test_error(classifier: Classifier, test: SelfTest) -> float:
    """Return the largest difference of a probability from the expected one."""
    pixels = np.frombuffer(test.pixels, np.uint8).reshape(-1, *INPUT[2])
    return float(np.abs(classifier.probabilities(pixels) - np.array(test.probabilities)).max())


def _in_buckets(sessions: Sequence[onnxruntime.InferenceSession]) -> Run:
    """Return a function that pads batches to one of the `BUCKETS`; first run each size once.

    Each size has its own session: on CUDA, ONNX Runtime plans a convolution again whenever the
    shape differs from the last run's (https://github.com/microsoft/onnxruntime/issues/23006). IO
    binding and CUDA graphs are not used: their gain on a GPU has not been measured.
    """

    def run_padded(
        outputs: list[str], feed: dict[str, NDArray[np.uint8]]
    ) -> list[NDArray[np.float32]]:
        pixels = feed["pixels"]
        count = len(pixels)
        bucket = bisect_left(BUCKETS, count)
        padded = np.zeros((BUCKETS[bucket], *pixels.shape[1:]), np.uint8)
        padded[:count] = pixels
        return [output[:count] for output in sessions[bucket].run(outputs, {"pixels": padded})]

    for size in BUCKETS:
        run_padded(OUTPUTS, {"pixels": np.zeros((size, 1, 28, 28), np.uint8)})
    return run_padded


def _open_session(artefact: Artefact, device: Device) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # one image is too little work to share between threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal only: errors become our one sentence
    # The other options keep ONNX Runtime's defaults. In the server, less optimisation, no arena and
    # denormals as zero were no faster.
    try:
        session = onnxruntime.InferenceSession(artefact.data, options, providers=[CPU])
    except Exception as exc:  # ONNX Runtime's own classes share no public base
        raise ModelError(
            f"ONNX Runtime cannot open the model file {artefact.path}: {REMEDY}."
        ) from exc
    return _open_on_cuda(artefact.data, options) if device == "cuda" else session


def _open_on_cuda(data: bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Open a session on the GPU, or fail; ONNX Runtime alone would silently use the CPU."""
    cause: Exception | None = None
    # Where cuDNN has no plan without TF32, ONNX Runtime takes one with it in spite of `use_tf32`.
    # NVIDIA's libraries obey this variable. Only a GPU can show it.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    with redirect_stdout(sys.stderr):  # it prints what it cannot load
        onnxruntime.preload_dlls()  # first: it also registers CUDA where that is a plug-in
    if CUDA in onnxruntime.get_available_providers():  # else ONNX Runtime prints a warning
        cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        providers = [(CUDA, cuda), CPU]
        try:
            # With the fallback, the first error in a run would move the session to the CPU.
            session = onnxruntime.InferenceSession(
                data, options, providers=providers, enable_fallback=0
            )
            if session.get_providers()[0] == CUDA:
                return session
        except Exception as exc:  # as above; the file is good: a CPU session has opened it
            cause = exc
    reason = f" ({_short(cause)})" if cause else ""
    raise ModelError(
        f"BNLENET_DEVICE is cuda, but ONNX Runtime got no CUDA device{reason}:"
        f" install the `gpu` extra and a driver, or {USE_AUTO}."
    ) from cause


def _short(error: Exception) -> str:
    """Return what failed: an error of ONNX Runtime may be pages long, and begin with C++ types."""
    failure = re.search(r"CU[A-Z_]+ failure [^;\n]*[^;\s]", str(error))
    return failure[0] if failure else str(error).partition("\n")[0][:200]
