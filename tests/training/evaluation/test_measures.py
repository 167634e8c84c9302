from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.training.evaluation.conftest import rows
from training.dataset import FashionMNIST, Split
from training.evaluation.confidence import CalibrationFloor, Probabilities
from training.evaluation.measures import (
    Evaluation,
    EvaluationError,
    evaluate,
    onnx_classifier,
)
from training.evaluation.robustness import UNSEEN, perturbations
from training.export import build_model
from training.folding import fold_batch_norm
from training.model import BNLeNet, initialise


def test_an_evaluation_counts_what_the_classifier_says(fashion_mnist: FashionMNIST) -> None:
    """The classifier knows the unchanged images, and answers 0 to all others."""
    split = Split(fashion_mnist.test.images[:100], fashion_mnist.test.labels[:100])
    answers = split.labels.copy()
    answers[answers == 6] = 0

    def classify(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Probabilities:
        known = np.array_equal(images, split.images)
        return rows(*[(int(answer) if known else 0, 0.91) for answer in answers])

    changes: list[str] = []
    result = evaluate(classify, split, changes.append)
    assert changes == list(result.robustness)
    shirts, shirts_t = int((split.labels == 6).sum()), int((split.labels == 0).sum())
    assert result.images == 100
    assert result.accuracy == pytest.approx(1 - shirts / 100)
    assert result.recall[6] == 0
    assert result.precision[6] == 0
    assert result.recall[0] == 1
    assert result.precision[0] == pytest.approx(shirts_t / (shirts_t + shirts))
    assert result.confusion[6][0] == shirts
    right, wrong = -np.log(0.91), -np.log(0.01)
    assert result.nll == pytest.approx(right * (1 - shirts / 100) + wrong * shirts / 100, rel=1e-5)
    assert result.ece == pytest.approx(abs(0.91 - result.accuracy), abs=1e-6)
    assert 0 < result.ece_floor.low < result.ece_floor.mean < result.ece_floor.high
    shares = {one.threshold: (one.share, one.accuracy) for one in result.answered}
    assert shares[0.9] == (1, result.accuracy)
    assert shares[0.95] == (0, None)
    assert set(result.robustness.values()) == {shirts_t / 100}
    assert result.robust_mean == pytest.approx(shirts_t / 100)
    assert result.robust_worst[1] == shirts_t / 100


def test_a_right_class_with_probability_zero_has_a_finite_cost() -> None:
    split = Split(np.zeros((2, 28, 28), np.uint8), np.array([0, 1], np.uint8))
    result = evaluate(lambda _: rows((0, 1.0), (0, 1.0)), split)
    assert result.nll == pytest.approx(-np.log(np.finfo(np.float32).tiny) / 2)


def test_the_worst_change_has_the_lowest_accuracy() -> None:
    changes = {"blur": 0.9, "shift": 0.7, "scale": 0.8}
    floor = CalibrationFloor(0, 0, 0)
    result = Evaluation(1, 1.0, 0.0, 0.0, floor, [], [], [], [], changes)
    assert result.robust_worst == ("shift", 0.7)
    assert result.robust_mean == pytest.approx(0.8)


def test_the_changes_have_a_seen_and_an_unseen_half() -> None:
    changes = dict.fromkeys(perturbations(), 0.5) | dict.fromkeys(UNSEEN, 0.9)
    floor = CalibrationFloor(0, 0, 0)
    result = Evaluation(1, 1.0, 0.0, 0.0, floor, [], [], [], [], changes)
    assert result.robust_mean_seen == pytest.approx(0.5)
    assert result.robust_mean_unseen == pytest.approx(0.9)
    assert result.robust_mean == pytest.approx(0.7)


def test_files_that_are_not_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no model file"):
        onnx_classifier(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(EvaluationError, match=r"cannot load .*is it an ONNX model"):
        onnx_classifier(tmp_path / "text.onnx")


def model_file(
    folder: Path, kind: int, shape: list[str | int | None], node: onnx.NodeProto
) -> Path:
    """Write a model of one node from `pixels` to `probabilities`, float32 [batch, 10]."""
    graph = helper.make_graph(
        [node],
        "foreign",
        [helper.make_tensor_value_info("pixels", kind, shape)],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
    )
    opset = [helper.make_opsetid("", 20)]
    path = folder / "foreign.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=opset), path)
    return path


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(TensorProto.FLOAT, ["batch", 1, 28, 28]), (TensorProto.UINT8, ["batch", 3, 32, 32])],
)
def test_models_for_other_images_are_refused(
    kind: int, shape: list[str | int | None], tmp_path: Path
) -> None:
    ten = helper.make_tensor("ten", TensorProto.FLOAT, [1, 10], [0.1] * 10)
    node = helper.make_node("Constant", [], ["probabilities"], value=ten)
    with pytest.raises(EvaluationError, match=r"not a BN-LeNet file: it must take `pixels`, uint8"):
        onnx_classifier(model_file(tmp_path, kind, shape, node))


def test_models_with_other_outputs_are_refused(tmp_path: Path) -> None:
    node = helper.make_node("Cast", ["pixels"], ["probabilities"], to=TensorProto.FLOAT)
    path = model_file(tmp_path, TensorProto.UINT8, ["batch", 1, 28, 28], node)
    model = onnx.load(path)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    model.graph.node[0].output[0] = "other"
    onnx.save(model, path)
    with pytest.raises(EvaluationError, match="and give `probabilities`, float32"):
        onnx_classifier(path)


def test_a_model_file_classifies_any_number_of_images(tmp_path: Path) -> None:
    """It answers like the network that it was made from."""
    network = BNLeNet().eval()
    initialise(network, seed=0)
    path = tmp_path / "model.onnx"
    path.write_bytes(build_model(fold_batch_norm(network), {}).SerializeToString())
    images = np.random.default_rng(0).integers(0, 256, (1001, 28, 28), np.uint8)
    found = onnx_classifier(path)(images)
    with torch.no_grad():
        expected = network(torch.from_numpy(images)[:, None] / 255).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_probabilities_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    ten = helper.make_tensor("ten", TensorProto.FLOAT, [1, 10], [float("nan")] * 10)
    node = helper.make_node("Constant", [], ["probabilities"], value=ten)
    path = model_file(tmp_path, TensorProto.UINT8, ["batch", 1, 28, 28], node)
    with pytest.raises(EvaluationError, match="are not finite"):
        onnx_classifier(path)(np.zeros((1, 28, 28), np.uint8))
