"""How good a model's probabilities are: accuracy, classes, calibration, robustness."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from training.dataset import Split
from training.evaluation.robustness import perturbed
from training.fitting.scoring import confusion_matrix

Probabilities = NDArray[np.float32]
Classifier = Callable[[NDArray[np.uint8]], Probabilities]
"""From uint8 images [n, 28, 28] to probabilities [n, 10]."""

INTERFACE = [
    ("pixels", "tensor(uint8)", [1, 28, 28]),
    ("probabilities", "tensor(float)", [10]),
]
"""Name, type and shape, without the batch, of the one input and the one output of a model file."""


class EvaluationError(Exception):
    """The model file cannot be evaluated; the message is one sentence that says why."""


@dataclass(frozen=True)
class Evaluation:
    """All figures are shares from 0 to 1, but `nll` (nats) and `confusion` (images).

    Attributes:
        images: how many were classified.
        accuracy: share of right answers.
        nll: mean negative logarithm of the probability given to the right class.
        ece: expected calibration error over 15 equal bins of confidence.
        precision: of every class, the share of its answers that are right; zero without any.
        recall: of every class, the share of its images that are recognised.
        confusion: rows are the true classes, columns the answers.
        robustness: accuracy on every entry of the fixed set of changed images.
    """

    images: int
    accuracy: float
    nll: float
    ece: float
    precision: list[float]
    recall: list[float]
    confusion: list[list[int]]
    robustness: dict[str, float]

    @property
    def robust_mean(self) -> float:
        """The mean accuracy over the changed images."""
        return sum(self.robustness.values()) / len(self.robustness)

    @property
    def robust_worst(self) -> tuple[str, float]:
        """The entry with the least accuracy."""
        return min(self.robustness.items(), key=lambda entry: entry[1])


def evaluate(
    classify: Classifier, split: Split, on_change: Callable[[str], None] = lambda _: None
) -> Evaluation:
    """Judge a classifier on a split and on its changed versions.

    `on_change` is called with the name of each change when its images are about to be classified.
    """
    probabilities = classify(split.images)
    confusion = confusion_matrix(probabilities.argmax(1), split.labels)
    right = confusion.diagonal()
    likelihood = probabilities[np.arange(len(split.labels)), split.labels].astype(np.float64)
    robustness = {}
    for name, images in perturbed(split.images):
        on_change(name)
        robustness[name] = accuracy(classify(images), split.labels)
    return Evaluation(
        images=len(split.labels),
        accuracy=accuracy(probabilities, split.labels),
        nll=float(-np.log(np.maximum(likelihood, np.finfo(np.float32).tiny)).mean()),
        ece=calibration_error(probabilities, split.labels),
        precision=(right / np.maximum(confusion.sum(0), 1)).tolist(),
        recall=(right / np.maximum(confusion.sum(1), 1)).tolist(),
        confusion=confusion.tolist(),
        robustness=robustness,
    )


def accuracy(probabilities: Probabilities, labels: NDArray[np.uint8]) -> float:
    """Return the share of rows [n, 10] whose largest entry is the label's."""
    return float((probabilities.argmax(1) == labels).mean())


def calibration_error(
    probabilities: Probabilities, labels: NDArray[np.uint8], bins: int = 15
) -> float:
    """Return the expected calibration error.

    The answers are sorted by confidence into equal bins ((i - 1)/bins, i/bins]; the error is the
    mean over all images of |accuracy - mean confidence| of their bin (Guo et al., "On
    Calibration of Modern Neural Networks", 2017, equation 3).
    """
    confidence = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(which, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def onnx_classifier(path: Path) -> Classifier:
    """Return the exported file as a classifier, run by ONNX Runtime on the CPU.

    Raises:
        EvaluationError: the file is missing or another kind of model; of the classifier: a
            probability is not finite.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # this model is too small for more; see docs/performance.md
    options.log_severity_level = 4
    if not path.is_file():
        raise EvaluationError(f"there is no model file {path}: make one with `export`.")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common type of their own
        raise EvaluationError(f"ONNX Runtime cannot load {path}: is it an ONNX model?") from error
    ends = (*session.get_inputs(), *session.get_outputs())
    if [(end.name, end.type, end.shape[1:]) for end in ends] != INTERFACE:
        raise EvaluationError(
            f"{path} is not one of ours: it does not take `pixels`, uint8 [batch, 1, 28, 28], "
            "and give `probabilities`, float32 [batch, 10]."
        )

    def classify(images: NDArray[np.uint8]) -> Probabilities:
        parts = [images[i : i + 500, None] for i in range(0, len(images), 500)]
        found = np.concatenate([session.run(None, {"pixels": part})[0] for part in parts])
        if not np.isfinite(found).all():
            raise EvaluationError(f"{path} gives probabilities that are not finite.")
        return found

    return classify
