"""Scores of a model, compared with numpy."""

import numpy as np
import pytest
import torch

from training.dataset import FashionMNIST
from training.fitting.images import on_device
from training.fitting.scoring import best_temperature, confusion_matrix, evaluate, predict
from training.model import BNLeNet, initialise


def test_evaluation_agrees_with_a_single_pass_and_restores_the_mode(few: FashionMNIST) -> None:
    model = BNLeNet()
    initialise(model, 0)
    images, labels = on_device(few.train, "cpu")
    model.eval()
    with torch.no_grad():
        logits = model(images / 255).double().numpy()
    model.train()
    score = evaluate(model, images, labels)
    assert model.training
    np.testing.assert_allclose(predict(model, images), logits, rtol=1e-4, atol=1e-5)
    target = logits[np.arange(400), few.train.labels]
    expected = np.mean(np.log(np.exp(logits).sum(1)) - target)
    assert score.accuracy == (logits.argmax(1) == few.train.labels).mean()
    assert score.loss == pytest.approx(expected, rel=1e-6)


def test_confusion_has_true_classes_in_rows() -> None:
    matrix = confusion_matrix(np.array([1, 1, 2]), np.array([0, 0, 2], np.uint8))
    assert matrix[0, 1] == 2
    assert matrix[2, 2] == 1
    assert matrix.sum() == 3


def test_the_temperature_undoes_a_known_scaling(few: FashionMNIST) -> None:
    model = BNLeNet().eval().requires_grad_(False)
    initialise(model, 0)
    images, _ = on_device(few.test, "cpu")
    # Labels drawn by the model's own probabilities, so that its best temperature is near 1.
    probabilities = torch.softmax(4 * predict(model, images).double(), 1)
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    found = []
    for factor in (4.0, 1.5):
        for tensor in (model.linear3.weight, model.linear3.bias):
            tensor.mul_(factor)
        found.append(best_temperature(model, images, labels))
    assert found[1] == pytest.approx(1.5 * found[0], abs=0.011)
    assert 0.7 < found[0] < 1.4


def test_the_temperature_is_between_0_40_and_2_50(few: FashionMNIST) -> None:
    """Answers that are all right want the lowest, and answers that are all wrong the highest."""
    model = BNLeNet().eval()
    initialise(model, 0)
    images, _ = on_device(few.test, "cpu")
    logits = predict(model, images)
    for labels, temperature in ((logits.argmax(1), 0.40), (logits.argmin(1), 2.50)):
        assert best_temperature(model, images, labels) == temperature


def test_the_temperature_has_the_least_cross_entropy_of_all_hundredths(few: FashionMNIST) -> None:
    model = BNLeNet().eval()
    initialise(model, 2)
    images, labels = on_device(few.test, "cpu")
    logits = predict(model, images).double().numpy()
    losses = {}
    for hundredths in range(40, 251):
        scaled = logits / (hundredths / 100)
        right = scaled[np.arange(200), few.test.labels]
        losses[hundredths / 100] = np.mean(np.log(np.exp(scaled).sum(1)) - right)
    assert best_temperature(model, images, labels) == min(losses, key=losses.__getitem__)
