"""Measures of a model's probabilities: accuracy, precision and recall, calibration, robustness."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from training.dataset import Split
from training.evaluation.confidence import (
    Answered,
    CalibrationFloor,
    Probabilities,
    answered,
    calibration_error,
    calibration_floor,
)
from training.evaluation.robustness import UNSEEN, perturbed
from training.fitting.scoring import confusion_matrix

Classifier = Callable[[NDArray[np.uint8]], Probabilities]
"""From uint8 images [n, 28, 28] to probabilities [n, 10]."""

INTERFACE = [
    ("pixels", "tensor(uint8)", [1, 28, 28]),
    ("probabilities", "tensor(float)", [10]),
]
"""Name, type and shape (without the batch) of the input and the output of a model file."""


class EvaluationError(Exception):
    """The model file cannot be evaluated; the message is one sentence that says why."""


@dataclass(frozen=True)
class Evaluation:
    """The measures of a classifier: shares from 0 to 1, except `nll` and `confusion`.

    Attributes:
        images: the number of images classified.
        accuracy: share of right answers.
        nll: mean negative log-likelihood of the right class, in nats.
        ece: expected calibration error over 15 equal bins of confidence.
        ece_floor: the error that a perfectly calibrated model with these confidences has by chance.
        answered: how many answers have at least a confidence, and their accuracy.
        precision: for every class, the share of right answers among the answers with this class;
            zero if there are none.
        recall: for every class, the share of its images with the right answer.
        confusion: numbers of images; rows are the true classes, columns the answers.
        robustness: accuracy on each changed test set, by the name of the change.
    """

    images: int
    accuracy: float
    nll: float
    ece: float
    ece_floor: CalibrationFloor
    answered: list[Answered]
    precision: list[float]
    recall: list[float]
    confusion: list[list[int]]
    robustness: dict[str, float]

    @property
    def robust_mean(self) -> float:
        """The mean accuracy over the changed test sets."""
        return fmean(self.robustness.values())

    @property
    def robust_mean_seen(self) -> float:
        """The mean over the changes that a choice of recipe may look at."""
        return fmean(a for name, a in self.robustness.items() if name not in UNSEEN)

    @property
    def robust_mean_unseen(self) -> float:
        """The mean over the changes of `UNSEEN`."""
        return fmean(self.robustness[name] for name in UNSEEN)

    @property
    def robust_worst(self) -> tuple[str, float]:
        """The change with the lowest accuracy, and that accuracy."""
        return min(self.robustness.items(), key=lambda entry: entry[1])


def evaluate(
    classify: Classifier, split: Split, on_change: Callable[[str], None] = lambda _: None
) -> Evaluation:
    """Evaluate a classifier on a split and on its changed versions.

    `on_change` is called with the name of each change, before its images are classified.
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
        ece_floor=calibration_floor(probabilities),
        answered=answered(probabilities, split.labels),
        precision=(right / np.maximum(confusion.sum(0), 1)).tolist(),
        recall=(right / np.maximum(confusion.sum(1), 1)).tolist(),
        confusion=confusion.tolist(),
        robustness=robustness,
    )


def accuracy(probabilities: Probabilities, labels: NDArray[np.uint8]) -> float:
    """Return the share of rows [n, 10] that are largest at the label."""
    return float((probabilities.argmax(1) == labels).mean())


def onnx_classifier(path: Path) -> Classifier:
    """Return the exported file as a classifier, run by ONNX Runtime on the CPU.

    Raises:
        EvaluationError: the file is missing or has another interface. The classifier raises it if
            a probability is not finite.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # this model is too small for more; see docs/performance.md
    options.log_severity_level = 4
    if not path.is_file():
        raise EvaluationError(f"there is no model file {path}: make one with `export`.")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        raise EvaluationError(f"ONNX Runtime cannot load {path}: is it an ONNX model?") from error
    ends = (*session.get_inputs(), *session.get_outputs())
    if [(end.name, end.type, end.shape[1:]) for end in ends] != INTERFACE:
        raise EvaluationError(
            f"{path} is not a BN-LeNet file: it must take `pixels`, uint8 [batch, 1, 28, 28], "
            "and give `probabilities`, float32 [batch, 10]."
        )

    def classify(images: NDArray[np.uint8]) -> Probabilities:
        parts = [images[i : i + 500, None] for i in range(0, len(images), 500)]
        found = np.concatenate([session.run(None, {"pixels": part})[0] for part in parts])
        if not np.isfinite(found).all():
            raise EvaluationError(f"{path} gives probabilities that are not finite.")
        return found

    return classify
