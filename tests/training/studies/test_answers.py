"""The studies' answers to planted measurements; and their small fits."""

import math
from itertools import product
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from training.batch_norm import statistics as norm_statistics
from training.dataset import FashionMNIST
from training.model import BNLeNet, initialise, norm_layers
from training.studies import (
    batch_size,
    covariate_shift,
    dropout,
    learning_rate,
    order,
    other_norms,
    parts,
    places,
    prediction_batch,
    statistics,
    transforms,
)
from training.studies.fits import (
    Sample,
    accuracy,
    batch_norm,
    batches,
    fitted,
    lenet,
    recalibrated,
    samples,
    steps_per_epoch,
    train,
)
from training.studies.learning_rate import _median
from training.studies.study import Line, Scale


def test_effects_of_a_planted_factorial_are_found() -> None:
    """Accuracy = 0.5 + 0.2 a + 0.1 b + 0.05 a b, with a, b = 0 or 1, and seeds apart."""
    lines: list[Line] = []
    for seed in range(3):
        for subset in places.SUBSETS:
            a, b = int(subset[0]), int(subset[1])
            value = 0.5 + 0.2 * a + 0.1 * b + 0.05 * a * b + 0.01 * seed
            lines.append({"seed": seed, "places": subset, "held_out": value, "test": value})
    assert places.effect(lines, [0]).mean == pytest.approx(0.2 + 0.05 / 2)
    assert places.effect(lines, [1]).mean == pytest.approx(0.1 + 0.05 / 2)
    assert places.effect(lines, [2]).mean == pytest.approx(0, abs=1e-12)
    assert places.effect(lines, [0, 1]).mean == pytest.approx(0.05 / 2)
    answer = places.report(lines).answer
    assert answer.startswith("No: one batch norm, after conv1, gives 57% of the gain of all four")


@pytest.mark.parametrize(
    ("spread", "interval"), [(1.0, "10 to 10"), (2.0, "1.8 to 56")], ids=["same", "different"]
)
def test_the_ratio_of_the_largest_rates_has_a_paired_interval(spread: float, interval: str) -> None:
    """The ratios of three seeds are 10 / spread, 10 and 10 * spread; t is 4.303."""
    common = {"cap": 2000, "images": 20000}
    lines: list[Line] = []
    for seed, norm, optimizer in product(range(3), ("with", "without"), ("sgd", "adam")):
        arm = common | {"seed": seed, "norm": norm, "optimizer": optimizer}
        largest = 0.1 * 3**seed * (10 * spread ** (seed - 1) if norm == "with" else 1)
        lines += [arm | {"halvings": 7, "largest": largest}, arm | {"rate": 0.1, "steps": 40}]
    low, high = (10 * spread ** (sign * 4.303 / 3**0.5) for sign in (-1, 1))
    assert interval == f"{low:.2g} to {high:.0f}"
    answer = learning_rate.report(lines).answer
    assert f"is 10 times (95 % interval {interval}) that without it for plain SGD" in answer


def test_a_single_place_with_a_small_gain_is_not_enough() -> None:
    lines = [
        {"seed": s, "places": p, "held_out": 0.1 * p.count("1"), "test": 0.0}
        for s in range(2)
        for p in places.SUBSETS
    ]
    assert places.report(lines).answer.startswith("One is not enough")


@pytest.mark.parametrize(
    ("study", "arm", "effect", "beginning"),
    [
        (dropout, {"norm": "batch norm"}, 0.03, "Yes, here:"),
        (dropout, {"norm": "batch norm"}, 0.0, "The figures show no difference:"),
        (dropout, {"norm": "batch norm"}, -0.03, "No:"),
        (other_norms, {"norm": "batch"}, -0.03, "They do better:"),
        (other_norms, {"norm": "batch"}, 0.0, "Yes, here:"),
        (other_norms, {"norm": "batch"}, 0.03, "No:"),
        (other_norms, {"norm": "batch", "seed": 2}, 0.2, "These figures do not decide it:"),
        (parts, {"norm": "mean only"}, -0.03, "The division matters most:"),
        (parts, {"norm": "variance only"}, -0.03, "The subtraction matters most:"),
        (parts, {"norm": "mean only"}, 0.03, "The figures do not show which part"),
        (batch_size, {"sweep": "ghost", "size": 64}, 0.03, "Yes: with batches of 256,"),
        (batch_size, {"sweep": "ghost", "size": 8}, 0.03, "Noise helps, but the best size is 8:"),
        (batch_size, {"sweep": "ghost", "size": 256}, 0.03, "No: with batches of 256,"),
        # One comparison alone would show it; the best of several does not.
        (batch_size, {"sweep": "ghost", "size": 64}, 0.0024, "Not measurably:"),
        (places, {"places": "1111"}, -0.03, "No: batch norm in all four places does not"),
        (order, {"position": "after"}, 0.03, "After: it is more accurate"),
        (order, {"position": "after"}, 0.0, "Either: the accuracies are not measurably different"),
        (order, {"position": "after"}, -0.03, "Before: it is more accurate"),
        (transforms, {"transform": "whitening"}, 0.03, "Whitening is more accurate"),
        (transforms, {"transform": "whitening"}, 0.0, "Whitening is not measurably different"),
        (transforms, {"transform": "whitening"}, -0.03, "Whitening is less accurate"),
    ],
)
def test_an_answer_fits_the_sign_of_its_figures(
    study: ModuleType, arm: dict[str, Any], effect: float, beginning: str
) -> None:
    """Every fit has an accuracy of about 0.8; the fits of one arm differ from it by `effect`."""
    lines = []
    for index, task in enumerate(study.tasks(Scale())):
        value = 0.8 + effect * (arm.items() <= task.items()) + 0.002 * math.sin(index**2)
        measured = {"train": 0.9, "held_out": value, "test": value}
        lines.append(task | measured | {"fold_error": 1e-6, "ms_per_step": 10.0})
    assert study.report(lines).answer.startswith(beginning)


@pytest.mark.parametrize(
    ("drift", "beginning", "then"),
    [
        (9.0, "No: with noise", "compared with no batch norm. The name"),
        (2.0, "These figures do not decide it: with noise", "be the reason. The name"),
    ],
)
def test_noise_must_drift_more_than_no_batch_norm(drift: float, beginning: str, then: str) -> None:
    """Otherwise less drift can still be the reason why batch norm helps."""
    drifts = {"batch norm": 0.0, "batch norm, then noise": drift, "none": 5.0}
    accuracies = {"batch norm": 0.9, "batch norm, then noise": 0.85, "none": 0.7}
    lines = [
        task
        | {"drift": drifts[task["norm"]] + 0.1 * task["seed"], "steps_to_70": None, "range": 1.0}
        | {"accuracy": accuracies[task["norm"]] + 0.001 * task["seed"] ** 2}
        for task in covariate_shift.tasks(Scale())
    ]
    answer = covariate_shift.report(lines).answer
    assert answer.startswith(beginning)
    assert then in answer


@pytest.mark.parametrize(
    ("effects", "beginning"),
    [
        ({}, "The figures do not show which part matters most:"),
        ({"mean only": -0.1}, "The division is needed, but the figures do not"),
        ({"mean only": -0.1, "variance only": -0.101}, "The division and the subtraction are"),
    ],
)
def test_a_part_is_needed_if_accuracy_falls_without_it(
    effects: dict[str, float], beginning: str
) -> None:
    """Without the subtraction, one fit of five fails: the figures do not separate the two."""
    lines: list[Line] = []
    for task in parts.tasks(Scale()):
        value = 0.8 + effects.get(task["norm"], 0.0) + 0.002 * math.sin(task["seed"])
        if task["norm"] == "variance only":
            value += 0.03 * math.cos(3 * task["seed"]) - (task["seed"] == 4) * 0.2
        lines.append(task | {"held_out": value, "test": value})
    assert parts.report(lines).answer.startswith(beginning)


@pytest.mark.parametrize(
    ("gain", "beginning"),
    [
        (0.05, "Statistics of the whole training set are better"),
        (0.0, "Neither is measurably better"),
        (-0.05, "Moving averages are better"),
    ],
)
def test_statistics_are_compared_by_the_mean_of_the_last_epochs(
    gain: float, beginning: str
) -> None:
    def curve(offset: float, seed: int) -> list[float]:
        return [0.8 + offset + 0.002 * math.sin(7 * seed + epoch**2) for epoch in range(6)]

    lines = [
        task
        | {kind: curve(gain * (kind == "all"), 10 * task["seed"] + index) for index, kind in names}
        for task in statistics.tasks(Scale())
        for names in [list(enumerate(statistics.KINDS))]
    ]
    answer = statistics.report(lines).answer
    assert answer.startswith(beginning)
    assert "Another momentum does not measurably help" in answer


def test_a_linear_trend_is_not_counted_as_spread() -> None:
    assert statistics.spread_between_epochs([0.1, 0.2, 0.7, 0.71, 0.72, 0.73, 0.74]) < 1e-9
    noise = np.array([0.01, -0.02, 0.03, -0.01, -0.01])
    trend = 0.8 + 0.01 * np.arange(5)
    x = np.arange(5) - 2
    residuals = noise - noise.mean() - x * (x @ noise) / (x @ x)
    assert statistics.spread_between_epochs(list(trend + noise)) == pytest.approx(
        math.sqrt((residuals**2).sum() / 3)
    )


def test_the_ratio_of_spreads_is_a_geometric_mean_with_its_interval() -> None:
    def curve(size: float) -> list[float]:
        return [0.8 + size * s for s in (0.01, -0.02, 0.03, -0.01, -0.01)]

    lines = [{"momentum 0.9": curve(f), "all": curve(1)} for f in (2.0, 8.0)]
    middle, low, high = statistics.ratio(lines, "momentum 0.9")
    assert middle == pytest.approx(4)
    assert math.log(high / middle) == pytest.approx(math.log(middle / low))
    assert math.log(high / middle) == pytest.approx(12.706 * math.log(2), rel=1e-3)


def test_moving_averages_of_many_momenta_are_those_of_torchs_layer(few: FashionMNIST) -> None:
    sample = samples(few, 256).train
    network = lenet([batch_norm] * 4)
    initialise(network, 0)
    averages = statistics.MovingAverages(network)
    train(network, sample, seed=0, steps=3)
    ours = norm_layers(averages.applied(statistics.MOMENTA.index(0.9)))
    for name, layer in norm_layers(network).items():  # torch's momentum 0.1
        (mean, _), (expected, _) = norm_statistics(ours[name]), norm_statistics(layer)
        assert torch.allclose(mean, expected, atol=1e-6)


@pytest.mark.parametrize("among", ["any", "same"])
def test_batches_have_every_image_once_and_more_than_one_image(among: str) -> None:
    labels = torch.arange(101) % 3
    for size in (2, 4, 50, 1000):
        drawn = prediction_batch.draw_batches(labels, size, among, seed=1)
        assert sorted(torch.cat(drawn).tolist()) == list(range(101))
        assert min(map(len, drawn)) > 1
        assert max(map(len, drawn)) <= size + 1
        if among == "same":
            assert all(len(set(labels[rows].tolist())) == 1 for rows in drawn)


def test_batch_answers_are_those_of_the_layer_in_training_mode(few: FashionMNIST) -> None:
    model = BNLeNet("scratch")
    initialise(model, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = samples(few, 128).train.pixels[:30]
    parts = [torch.arange(10), torch.arange(10, 30)]
    found = prediction_batch.answers(model, images, parts)
    with torch.no_grad():
        expected = [model.train()(images[rows].float() / 255).argmax(1) for rows in parts]
    assert torch.equal(found, torch.cat(expected))
    model.load_state_dict(before)


class TestFits:
    def test_equal_seeds_see_equal_images_with_any_network(self, few: FashionMNIST) -> None:
        sample = samples(few, 128).train
        first, second = (batches(sample, 32, seed=3) for _ in range(2))
        for _ in range(9):
            (a, x), (b, y) = next(first), next(second)
            assert torch.equal(a, b)
            assert torch.equal(x, y)

    def test_an_epoch_has_every_image_once(self, few: FashionMNIST) -> None:
        sample = samples(few, 100).train
        count = steps_per_epoch(sample, 33)
        assert count == 3  # the hundredth image would be alone
        feed = batches(sample, 33, seed=0)
        seen = torch.cat([next(feed)[0] for _ in range(count)])
        assert len({image.numpy().tobytes() for image in seen}) == 99
        assert steps_per_epoch(sample, 1) == 100
        assert steps_per_epoch(sample, 50) == 2

    def test_a_fit_learns_and_repeats_itself(self, few: FashionMNIST) -> None:
        parts = samples(few, 256)
        networks = [
            fitted(lenet([batch_norm] * 4), parts.train, seed=1, epochs=30) for _ in range(2)
        ]
        assert accuracy(networks[0], parts.train) > 0.6
        first, second = (network.state_dict() for network in networks)
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_recalibrated_statistics_are_those_of_all_images(self, few: FashionMNIST) -> None:
        sample = samples(few, 200).train
        network = lenet([batch_norm] * 4)
        initialise(network, 0)
        layer = norm_layers(recalibrated(network, sample))["norm1"]
        with torch.no_grad():
            x = network.get_submodule("conv1").double()(sample.pixels.double() / 255)
        mean, variance = norm_statistics(layer)
        assert torch.allclose(mean.double(), x.mean((0, 2, 3)), atol=1e-6)
        assert torch.allclose(variance.double(), x.var((0, 2, 3), correction=0), rtol=1e-5)

    def test_held_out_images_are_never_fitted(self, few: FashionMNIST) -> None:
        parts = samples(few, 300)
        assert len(parts.train.labels) == 300
        assert len(parts.held_out.labels) == 100
        assert torch.equal(parts.held_out.pixels[:, 0], torch.from_numpy(few.train.images[300:]))

    def test_a_fit_stops_when_after_step_returns_true(self, few: FashionMNIST) -> None:
        seen: list[int] = []

        def look(step: int, loss: float) -> bool:
            assert math.isfinite(loss)
            seen.append(step)
            return step == 2

        network = lenet([batch_norm] * 4)
        train(network, samples(few, 128).train, seed=0, steps=9, batch_size=32, after_step=look)
        assert seen == [1, 2]


def test_a_median_counts_fits_that_never_reach_the_goal() -> None:
    def line(seed: int, steps: int | None) -> dict[str, Any]:
        return {"seed": seed, "norm": "with", "optimizer": "sgd", "rate": 1.0, "steps": steps}

    assert _median([line(0, 20), line(1, 40), line(2, None)], "with", "sgd", 1.0) == 40
    assert _median([line(0, 20), line(1, None), line(2, None)], "with", "sgd", 1.0) is None


def test_accuracy_is_the_share_of_right_answers() -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.full((len(x),), 3), 10)

    labels = torch.tensor([3, 3, 1, 3])
    sample = Sample(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), labels)
    assert accuracy(Constant(), sample) == 0.75
