"""Scores of a model during a fit: logits, accuracy, loss, confusion, best temperature."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from numpy.typing import NDArray
from torch import Tensor, nn

from training.fitting.images import batches
from training.fitting.precision import full_precision


@dataclass(frozen=True)
class Score:
    """The score of a model on a split: accuracy (0 to 1) and mean cross-entropy (nats)."""

    accuracy: float
    loss: float


@torch.no_grad()
@full_precision()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits, float32 [n, 10], of uint8 images [n, 1, 28, 28], in prediction mode."""
    training = model.training
    model.eval()
    logits = torch.cat([model(batch) for batch in batches(images)])
    model.train(training)
    return logits


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the share of rows of logits [n, 10] that are largest at the label: float64 [].

    The result stays on the device; the function does not wait for it.
    """
    return (logits.argmax(1) == labels).double().mean()


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> Score:
    """Score a model in prediction mode on uint8 images [n, 1, 28, 28] and labels int64 [n]."""
    logits = predict(model, images)
    loss = F.cross_entropy(logits.double(), labels)
    return Score(accuracy(logits, labels).item(), loss.item())


def confusion_matrix(answers: NDArray[np.int64], labels: NDArray[np.integer]) -> NDArray[np.int64]:
    """Count images [10, 10]: rows are true classes, columns answers."""
    return np.bincount(labels.astype(np.int64) * 10 + answers, minlength=100).reshape(10, 10)


def best_temperature(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the temperature, 0.40 to 2.50, with the least cross-entropy of softmax(logits / T).

    Guo et al., "On Calibration of Modern Neural Networks" (2017), section 4.2. Use images that the
    model was not fitted on.
    """
    logits = predict(model, images).double()
    candidates = [t / 100 for t in range(40, 251)]
    return min(candidates, key=lambda t: F.cross_entropy(logits / t, labels).item())
