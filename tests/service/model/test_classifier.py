"""The classifier agrees with the mathematics in any batch, and refuses what is not its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from service.model.classifier import BUCKETS, Classifier, ModelError
from tests.service.conftest import CLASSES

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


def test_rows_are_run_one_by_one_where_a_runtime_mixes_them(
    artefact: Path, images: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that adds up in another order for larger batches must not be noticed."""
    honest = onnxruntime.InferenceSession.run

    def dishonest(session: Any, names: Any, feed: Any) -> Any:
        (out,) = honest(session, names, feed)
        return [np.nextafter(out, 1, dtype=np.float32) if len(out) > 7 else out]

    alone = [Classifier.load(artefact).probabilities(image[None])[0] for image in images[:20]]
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", dishonest)
    assert np.array_equal(Classifier.load(artefact).probabilities(images[:20]), alone)


def test_a_gpu_gets_batches_of_few_sizes_each_run_before_the_service_is_ready(
    artefact: Path,
    classifier: Classifier,
    images: NDArray[np.uint8],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shown on the CPU, whose session here says that it has CUDA."""
    sizes: list[int] = []
    run = onnxruntime.InferenceSession.run

    def recorded(session: Any, names: Any, feed: Any) -> Any:
        sizes.append(len(feed["pixels"]))
        return run(session, names, feed)

    many = np.concatenate([images, images[::-1], images[:100]])
    expected = classifier.probabilities(many)
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", recorded)
    monkeypatch.setattr(
        onnxruntime.InferenceSession, "get_providers", lambda _: ["CUDAExecutionProvider"]
    )
    bucketed = Classifier.load(artefact)
    assert tuple(sizes[: len(BUCKETS)]) == BUCKETS == tuple(2**i for i in range(9))

    for count in (*range(1, 257), 257, 300, 512, 612):
        sizes.clear()
        assert np.array_equal(bucketed.probabilities(many[:count]), expected[:count]), count
        assert set(sizes) <= set(BUCKETS)
        assert len(sizes) == -(-count // 256)
        assert sizes[-1] < 2 * ((count - 1) % 256 + 1)  # never padded further than need be


def test_it_tells_what_the_file_says(classifier: Classifier) -> None:
    info = classifier.info
    assert (info.name, info.version, info.classes) == ("bn-lenet", "1", tuple(CLASSES))
    assert info.provider == "CPUExecutionProvider"
    assert len(info.revision) == 12
    assert info.metadata["test_accuracy"] == "0.1000"


def refuse(path: Path, expected: str) -> None:
    with pytest.raises(ModelError) as caught:
        Classifier.load(path)
    sentence = str(caught.value)
    assert expected in sentence
    assert str(path) in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "none.onnx", "cannot be read (No such file or directory)")
    refuse(tmp_path, "cannot be read (Is a directory)")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(artefact: Path, tmp_path: Path, share: float) -> None:
    data = artefact.read_bytes()
    path = tmp_path / "cut.onnx"
    path.write_bytes(data[: int(len(data) * share)])
    refuse(path, "model file")


def test_other_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("This is no model.")
    refuse(path, "is damaged, cut short or no ONNX model")


def test_changed_weights_are_refused_by_the_self_test(
    weights: dict[str, NDArray[np.float32]], artefact: Path, tmp_path: Path
) -> None:
    """The file is sound ONNX; only the numbers are not those that the self-test was made with."""
    data = artefact.read_bytes()
    before = weights["linear3.bias"].tobytes()
    after = (weights["linear3.bias"] + np.linspace(0, 0.001, 10, dtype=np.float32)).tobytes()
    assert data.count(before) == 1
    path = tmp_path / "changed.onnx"
    path.write_bytes(data.replace(before, after))
    refuse(path, "fails its self-test on CPUExecutionProvider")


def test_another_model_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path / "foreign.onnx"
    onnx.save(model, path)
    refuse(path, "is not a BN-LeNet of this project")


SELF_TEST = {"pixels": "", "probabilities": [], "tolerance": 1e-5}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "other input name": ({"input_name": "image"}, "is not a BN-LeNet of this project"),
    "fixed batch": ({"batch": 1}, "takes only a fixed batch"),
    **{
        f"no {entry}": ({entry: None}, f"lacks the metadata entry '{entry}'")
        for entry in ("name", "version", "classes", "self_test")
    },
    "classes no JSON": ({"classes": "Shirt, Bag"}, "metadata"),
    "nine classes": ({"classes": json.dumps(CLASSES[:9])}, "does not name ten classes"),
    "a class twice": (
        {"classes": json.dumps([*CLASSES[:9], CLASSES[0]])},
        "does not name ten classes",
    ),
    "eleven classes": (
        {"classes": json.dumps([*CLASSES, CLASSES[0]])},
        "does not name ten classes",
    ),
    "classes no strings": (
        {"classes": json.dumps([[name] for name in CLASSES])},
        "does not name ten classes",
    ),
    "self-test no JSON": ({"self_test": "yes"}, "metadata"),
    "self-test without images": ({"self_test": json.dumps(SELF_TEST)}, "metadata"),
    "self-test without tolerance": ({"self_test": "{}"}, "lacks the metadata entry"),
    "self-test that proves nothing": (
        {"self_test": json.dumps({**SELF_TEST, "probabilities": [[0.1] * 10], "tolerance": 1.0})},
        "metadata",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_breaks_the_contract_is_refused(
    broken_artefact: Callable[..., Path], name: str
) -> None:
    changes, expected = BROKEN[name]
    refuse(broken_artefact(**changes), expected)


def test_a_graph_that_cannot_be_run_is_refused(broken_artefact: Callable[..., Path]) -> None:
    """It says that it takes any batch, but inside it is made for one image."""
    path = broken_artefact()
    model = onnx.load(path)
    (flatten,) = (node for node in model.graph.node if node.op_type == "Flatten")
    flatten.op_type = "Reshape"
    flatten.input.append("shape")
    shape = onnx.numpy_helper.from_array(np.array([1, 256], np.int64), "shape")
    model.graph.initializer.append(shape)
    onnx.save(model, path)
    refuse(path, "cannot be run")


def test_a_self_test_that_gives_nan_is_refused(broken_artefact: Callable[..., Path]) -> None:
    path = broken_artefact()
    model = onnx.load(path)
    (bias,) = (t for t in model.graph.initializer if t.name == "linear3.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(model, path)
    refuse(path, "fails its self-test")


def test_cuda_is_refused_where_there_is_none(artefact: Path) -> None:
    """In a process of its own, from which any GPU is hidden."""
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
        assert result.stderr.count("\n") == 1  # the other build has words of its own to say
