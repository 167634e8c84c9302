"""The classifier agrees with float64 in any batch, and refuses other models and devices."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from service.model.artefact import ModelError
from service.model.classifier import BUCKETS, Classifier
from tests.service.conftest import CLASSES, seal

Oracle = Callable[[NDArray[np.uint8]], NDArray[np.float64]]


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (256, 1, 28, 28), dtype=np.uint8)


def test_it_agrees_with_the_network_in_float64(
    classifier: Classifier, images: NDArray[np.uint8], reference: Oracle
) -> None:
    probabilities = classifier.probabilities(images)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities, reference(images), rtol=0, atol=1e-5)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=0, atol=1e-6)


def test_an_image_gets_the_same_bits_in_every_batch_from_1_to_256(
    classifier: Classifier, images: NDArray[np.uint8]
) -> None:
    alone = np.concatenate([classifier.probabilities(image[None]) for image in images])
    for size in range(1, 257):
        batch = classifier.probabilities(images[-size:])
        assert np.array_equal(batch, alone[-size:]), f"batch of {size}"


@pytest.mark.parametrize("sizes", [{2}, {9}, {16}, {31}, {32}, {*range(8, 33)}])
def test_images_run_one_by_one_if_the_runtime_depends_on_the_batch(
    artefact: Path,
    images: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
    sizes: set[int],
) -> None:
    """Here the runtime sums in another order in such batches; the answers do not show it."""
    honest = onnxruntime.InferenceSession.run

    def dishonest(session: Any, names: Any, feed: Any) -> Any:
        (out,) = honest(session, names, feed)
        if len(out) in sizes:
            out[-1] = np.nextafter(out[-1], 1, dtype=np.float32)
        return [out]

    honest_one = Classifier.load(artefact)
    alone = [honest_one.probabilities(image[None])[0] for image in images[:32]]
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", dishonest)
    one_by_one = Classifier.load(artefact)
    for size in sizes:
        assert np.array_equal(one_by_one.probabilities(images[:size]), alone[:size])


def test_a_gpu_gets_few_batch_sizes_and_each_is_run_at_the_start(
    artefact: Path,
    classifier: Classifier,
    images: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the CPU: the sessions here only claim to have CUDA."""
    sizes: list[int] = []
    sessions: dict[int, set[int]] = {}
    run = onnxruntime.InferenceSession.run

    def recorded(session: Any, names: Any, feed: Any) -> Any:
        sizes.append(len(feed["pixels"]))
        sessions.setdefault(sizes[-1], set()).add(id(session))
        return run(session, names, feed)

    many = np.concatenate([images, images[::-1], images[:100]])
    expected = classifier.probabilities(many)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", recorded)
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "get_providers", lambda _: ["CUDAExecutionProvider"]
    )
    bucketed = Classifier.load(artefact)
    assert tuple(sizes[: len(BUCKETS)]) == BUCKETS == tuple(4**i for i in range(5))

    for count in (*range(1, 257), 257, 300, 512, 612):
        sizes.clear()
        assert np.array_equal(bucketed.probabilities(many[:count]), expected[:count]), count
        assert set(sizes) <= set(BUCKETS)
        assert len(sizes) == -(-count // 256)
        assert sizes[-1] < 4 * ((count - 1) % 256 + 1)  # padded to the next size only
    assert all(len(of_one_size) == 1 for of_one_size in sessions.values())
    assert len(set.union(*sessions.values())) == len(BUCKETS)  # none runs two sizes


def test_its_description_is_the_files(classifier: Classifier) -> None:
    info = classifier.info
    assert (info.name, info.version, info.classes) == ("bn-lenet", "1", tuple(CLASSES))
    assert info.provider == "CPUExecutionProvider"
    assert len(info.revision) == 12
    assert info.metadata["test_accuracy"] == "0.1000"


def refuse(model: onnx.ModelProto, path: Path, expected: str) -> None:
    path.write_bytes(seal(model))
    with pytest.raises(ModelError) as caught:
        Classifier.load(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def set_bias(model: onnx.ModelProto, values: NDArray[np.float32]) -> None:
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name == "linear3.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))


@pytest.mark.parametrize("step", [0.001, np.nan])
def test_weights_that_fail_the_self_test_are_refused(
    weights: dict[str, NDArray[np.float32]], artefact: Path, tmp_path: Path, step: float
) -> None:
    """The digest is right, but the self-test was made with other weights."""
    model = onnx.load(artefact)
    slope = np.linspace(-step, step, 10, dtype=np.float32)
    set_bias(model, weights["linear3.bias"] + slope)
    refuse(model, tmp_path / "changed.onnx", "fails its self-test on CPUExecutionProvider")


@pytest.mark.parametrize("place", [(0, 0), (3, 9)])
@pytest.mark.parametrize("off", [2e-5, -2e-5])
def test_every_probability_of_the_self_test_counts(
    artefact: Path,
    broken_artefact: Callable[..., Path],
    place: tuple[int, int],
    off: float,
) -> None:
    """One is off by twice the tolerance, which is then raised to three times the difference."""
    metadata = {entry.key: entry.value for entry in onnx.load(artefact).metadata_props}
    self_test = json.loads(metadata["self_test"])
    row, column = place
    self_test["probabilities"][row][column] += off
    self_test["probabilities"][row][(column + 1) % 10] -= off  # each row sums to 1
    with pytest.raises(ModelError, match=r"off by 2\.\de-05 where 1e-05 is allowed"):
        Classifier.load(broken_artefact(self_test=json.dumps(self_test)))


def test_the_runtime_uses_one_thread_and_prints_nothing(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image is too little work to share, and a worker has one core."""
    asked: list[onnxruntime.SessionOptions] = []
    session = onnxruntime.InferenceSession

    def recorded(data: bytes, options: onnxruntime.SessionOptions, **others: Any) -> Any:
        asked.append(options)
        return session(data, options, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", recorded)
    Classifier.load(artefact)
    (options,) = asked
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    assert options.log_severity_level == 4


def test_a_model_that_the_runtime_cannot_open_is_refused(artefact: Path, tmp_path: Path) -> None:
    model = onnx.load(artefact)
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = ""
    refuse(model, tmp_path / "nameless.onnx", "ONNX Runtime cannot open the model file")


def test_a_model_that_the_runtime_cannot_run_is_refused(
    artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the file is good, so the message says why, and what to do."""

    def failing(*_: Any) -> Any:
        raise RuntimeError("out of memory\nand a page more")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", failing)
    model, path = onnx.load(artefact), tmp_path / "model.onnx"
    refuse(model, path, "cannot be run on CPUExecutionProvider: put a file written by")
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "get_providers", lambda _: ["CUDAExecutionProvider"]
    )
    remedy = "out of memory; set BNLENET_DEVICE to auto."
    refuse(model, path, f"cannot be run on CUDAExecutionProvider: {remedy}")


def test_a_gpu_that_computes_wrongly_is_refused(
    artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is good, so to export it again would not help."""
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "run", lambda *call: [run(*call)[0] + np.float32(1e-4)]
    )
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "get_providers", lambda _: ["CUDAExecutionProvider"]
    )
    remedy = "where 1e-05 is allowed; set BNLENET_DEVICE to auto"
    with pytest.raises(ModelError, match=f"self-test on CUDAExecutionProvider: off by .* {remedy}"):
        Classifier.load(artefact)


def test_the_name_can_be_replaced(artefact: Path, classifier: Classifier) -> None:
    info = Classifier.load(artefact, name="garments").info
    assert info == replace(classifier.info, name="garments")


def test_cuda_is_refused_where_there_is_none(artefact: Path) -> None:
    """In a process without access to any GPU."""
    settings = {"BNLENET_DEVICE": "cuda", "BNLENET_MODEL_PATH": str(artefact), "BNLENET_PORT": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "service"],
        env=os.environ | settings | {"CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert "BNLENET_DEVICE is cuda, but ONNX Runtime got no CUDA device" in result.stderr
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert result.stderr.count("\n") == 1  # the GPU build prints messages of its own


def test_given_bytes_are_not_read_again(artefact: Path, classifier: Classifier) -> None:
    """A supervisor reads the file once, so that all its workers serve the same revision."""
    data = artefact.read_bytes()
    assert Classifier.load(Path("/gone.onnx"), data=data).info == classifier.info
    with pytest.raises(ModelError, match=r"The model file /gone\.onnx is damaged"):
        Classifier.load(Path("/gone.onnx"), data=data[:-1])


@pytest.mark.parametrize("raises", [False, True])
def test_a_missing_gpu_is_never_replaced_by_the_cpu(
    artefact: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raises: bool,
) -> None:
    """If CUDA fails, ONNX Runtime raises or silently opens a session on the CPU."""
    asked: list[Any] = []
    session = onnxruntime.InferenceSession
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)

    def on_the_cpu(data: bytes, options: Any, providers: list[Any], **others: Any) -> Any:
        asked.append((*providers[0], others) if len(providers) == 2 else providers)
        if raises and len(providers) == 2:
            raise RuntimeError("cuda_call.cc:154 [with T = int] CUDA failure 35: too old ; GPU=0\n")
        return session(data, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)

    def preload() -> None:
        asked.append("libraries")
        print("Failed to load libcublas.so.13")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(
        onnxruntime,
        "get_available_providers",
        lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )
    reason = r" \(CUDA failure 35: too old\)" if raises else ""
    with pytest.raises(ModelError, match=f"ONNX Runtime got no CUDA device{reason}: install the"):
        Classifier.load(artefact, "cuda")
    cuda = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    # Without the fallback, a session also stays on the GPU when a run fails there later.
    assert asked[-2:] == ["libraries", ("CUDAExecutionProvider", cuda, {"enable_fallback": 0})]
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    assert capsys.readouterr() == ("", "Failed to load libcublas.so.13\n")  # stdout is for answers
    assert Classifier.load(artefact, "auto").info.provider == "CPUExecutionProvider"
