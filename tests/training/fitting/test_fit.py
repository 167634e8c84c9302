import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor, nn

from training.batch_norm import statistics
from training.dataset import FashionMNIST
from training.fitting import batch_last
from training.fitting.augmentation import Augmentation
from training.fitting.fit import (
    FitError,
    best_temperature,
    evaluate,
    fit,
    on_device,
    population_statistics,
    with_statistics,
)
from training.fitting.recipes import Recipe, Statistics
from training.fitting.run import Config, Epoch, Run
from training.fitting.step import Fitting
from training.model import BNLeNet, initialise, norm_layers


def weights(model: BNLeNet) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def new_run(folder: Path, recipe: Recipe) -> Run:
    config = Config(recipe, 0, "cpu", "torch", 0, 1, dataset_sha256="", versions={})
    return Run.create(folder, config)


# The loop


def test_the_chapter_recipe_is_plain_gradient_descent_as_written_by_hand(
    few: FashionMNIST, chapter: Recipe
) -> None:
    images, labels = on_device(few.train, "cpu")
    model = BNLeNet()
    initialise(model, 5)
    losses = []
    for epoch in (1, 2, 3):
        generator = torch.Generator().manual_seed((5 << 20) + epoch)
        total = 0.0
        for rows in torch.split(torch.randperm(1100, generator=generator), 128):
            loss = F.cross_entropy(model(images[rows] / 255), labels[rows])
            model.zero_grad()
            torch.autograd.backward([loss])
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.1 * parameter.grad)
            total += loss.item() * len(rows)
        losses.append(total / 1100)
    fitted = fit(few, chapter, seed=5)
    assert [epoch.loss for epoch in fitted.epochs] == pytest.approx(losses, rel=1e-4)
    assert losses[2] < 0.8 * losses[0]
    for ours, theirs in zip(*(norm_layers(m).values() for m in (fitted.model, model)), strict=True):
        torch.testing.assert_close(statistics(ours), statistics(theirs), rtol=1e-3, atol=1e-4)


def test_both_batch_norms_give_the_same_loss_curve(few: FashionMNIST, chapter: Recipe) -> None:
    ours = fit(few, chapter, batch_norm="scratch")
    theirs = fit(few, chapter, batch_norm="torch")
    assert [epoch.loss for epoch in ours.epochs] == pytest.approx(
        [epoch.loss for epoch in theirs.epochs], rel=1e-4
    )


@pytest.mark.parametrize("name", ["chapter", "best"])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    few: FashionMNIST, name: str, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(name)
    first, second, other = (fit(few, recipe, seed=s).model for s in (3, 3, 4))
    assert weights(first) == weights(second)
    assert weights(first) != weights(other)


def test_the_best_recipe_learns(few: FashionMNIST, best: Recipe) -> None:
    longer = replace(best, epochs=12)
    fitted = fit(few, longer)
    assert fitted.scores["moving"].accuracy > 0.7
    assert fitted.epochs[-1].accuracy == fitted.scores["moving"].accuracy  # the average's
    last_rate = longer.learning_rate * longer.rate(1 - 1 / (12 * 9))
    assert fitted.epochs[-1].learning_rate == pytest.approx(last_rate)
    assert set(fitted.scores) == {"moving", "population", "clean"}


def test_the_last_epochs_change_the_images_less(few: FashionMNIST, best: Recipe) -> None:
    """What each epoch sees is what its augmentation makes of its images with its own seed."""
    recipe = replace(best, epochs=5, finish=0.4, batch_size=1100)
    seen: list[Tensor] = []
    forward = batch_last.forward

    def spy(model: BNLeNet, images: Tensor) -> Tensor:
        seen.append(images)
        return forward(model, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_last, "forward", spy)
        fit(few, recipe, seed=1)
    images = on_device(few.train, "cpu")[0].float() / 255
    kinds = [recipe.augmentation] * 3 + [recipe.finish_augmentation] * 2
    for epoch, (kind, batch) in enumerate(zip(kinds, seen, strict=True), start=1):
        generator = torch.Generator().manual_seed((1 << 20) + epoch)
        order = torch.randperm(1100, generator=generator)
        assert torch.equal(batch, kind(images[order], generator)), epoch


def test_population_statistics_are_of_images_as_the_last_epochs_change_them(
    few: FashionMNIST, best: Recipe
) -> None:
    fitted = fit(few, best, seed=1)
    images, _ = on_device(few.train, "cpu")
    last, first = (
        population_statistics(fitted.model, images, augmentation, seed=1)
        for augmentation in (best.finish_augmentation, best.augmentation)
    )
    for name, (mean, variance) in fitted.population.items():
        assert torch.equal(mean, last[name][0])
        assert torch.equal(variance, last[name][1])
        assert not torch.equal(mean, first[name][0])
    unchanged_at_last = replace(best, finish_augmentation=Augmentation())
    assert set(fit(few, unchanged_at_last).scores) == {"moving", "population"}


@pytest.mark.parametrize("kind", ["moving", "population"])
def test_what_is_told_of_a_fit_is_by_the_recipes_statistics(
    few: FashionMNIST, chapter: Recipe, kind: Statistics
) -> None:
    recipe = replace(chapter, epochs=6, batch_size=32, statistics=kind)
    fitted = fit(few, recipe, holdout=300)
    images, labels = (tensor[800:] for tensor in on_device(few.train, "cpu"))
    models = {
        "moving": fitted.model,
        "population": with_statistics(fitted.model, fitted.population),
    }
    assert fitted.temperature == best_temperature(models[kind], images, labels)
    confusion = np.array(fitted.confusion)
    assert confusion.trace() / 300 == pytest.approx(fitted.scores[kind].accuracy)
    assert fitted.scores["population"] != fitted.scores["moving"]
    assert confusion.sum(1).tolist() == np.bincount(few.train.labels[800:]).tolist()


def test_held_out_images_are_not_trained_on(few: FashionMNIST, chapter: Recipe) -> None:
    spoilt = few.train.images.copy()
    spoilt[600:] = 255
    other = replace(few, train=replace(few.train, images=spoilt))
    a, b = (fit(data, chapter, holdout=500) for data in (few, other))
    assert weights(a.model) == weights(b.model)
    assert a.scores != b.scores
    hidden_test = replace(few, test=replace(few.test, images=spoilt[600:]))
    assert fit(hidden_test, chapter, holdout=500).scores == a.scores


def test_what_cannot_be_trained_is_refused_before_it_starts(
    few: FashionMNIST, chapter: Recipe
) -> None:
    with pytest.raises(FitError, match="a batch size of 157 leaves a last batch of one image"):
        fit(few, replace(chapter, batch_size=157))
    fit(few, replace(chapter, batch_size=157, epochs=1), holdout=1)
    with pytest.raises(FitError, match="at least two images a batch"):
        fit(few, replace(chapter, batch_size=1))
    with pytest.raises(FitError, match="0 to 1,098: not 1,100"):
        fit(few, chapter, holdout=1100)
    with pytest.raises(FitError, match="9,000,000 steps are more than 5,000,000: lower --epochs"):
        fit(few, replace(chapter, epochs=1_000_000))


@pytest.mark.parametrize(("seen_before", "step"), [(3 * 128, 4), (1100, 9)])
def test_a_loss_that_becomes_nan_stops_the_fit_and_keeps_the_last_checkpoint(
    few: FashionMNIST, chapter: Recipe, tmp_path: Path, seen_before: int, step: int
) -> None:
    run = new_run(tmp_path / "run", chapter)
    before = {}

    def poison(fitting: Fitting, epoch: int, seen: int) -> None:
        if (epoch, seen) == (2, seen_before):
            before.update(run.checkpoint())
            with torch.no_grad():
                fitting.model.linear3.bias.fill_(math.nan)

    message = (
        rf"no longer finite in epoch 2, step {step} of 9: .* The checkpoint of epoch 1 is kept\."
    )
    with pytest.raises(FitError, match=message):
        fit(few, chapter, run=run, on_batch=poison)
    after = run.checkpoint()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [line.epoch for line in run.metrics()] == [1]
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_a_learning_rate_far_too_high_is_told(few: FashionMNIST, chapter: Recipe) -> None:
    with pytest.raises(FitError, match=r"no longer finite in epoch 1, .* No epoch was complete"):
        fit(few, replace(chapter, learning_rate=1e38))


def test_an_endless_variance_is_told_though_the_loss_is_finite(
    few: FashionMNIST, chapter: Recipe
) -> None:
    """Weights of 1e29 are numbers, their outputs' variance is none; normalised they are zero."""
    with pytest.raises(FitError, match=r"no longer finite in epoch 1, step 9 of 9"):
        fit(few, replace(chapter, learning_rate=1e30))


# Resuming


@pytest.mark.parametrize("name", ["chapter", "best"])
def test_a_fit_interrupted_within_an_epoch_resumes_bit_for_bit(
    few: FashionMNIST,
    name: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    recipe = request.getfixturevalue(name)
    whole, broken = (new_run(tmp_path / folder, recipe) for folder in ("whole", "broken"))
    fit(few, recipe, run=whole)

    def interrupt(_: Fitting, epoch: int, seen: int) -> None:
        if epoch == 3 and seen > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(few, recipe, run=broken, on_batch=interrupt)
    assert len(broken.metrics()) == 2
    fit(few, recipe, run=broken)
    checkpoints = [(run.folder / "checkpoint.safetensors").read_bytes() for run in (whole, broken)]
    assert checkpoints[0] == checkpoints[1]
    losses = [[(line.epoch, line.loss) for line in run.metrics()] for run in (whole, broken)]
    assert losses[0] == losses[1]


KILLED = """
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
import torch
from training.dataset import FashionMNIST, Split, load
from training.fitting.fit import fit
from training.fitting.run import Run

torch.set_num_threads(1)
data, run = load(download=False), Run(Path(sys.argv[1]))
train = Split(data.train.images[:1100], data.train.labels[:1100])
test = Split(data.test.images[:500], data.test.labels[:500])
fit(FashionMNIST(train, test, data.sha256), run.config().recipe, run=run)
"""


def test_a_killed_fit_resumes_bit_for_bit(few: FashionMNIST, best: Recipe, tmp_path: Path) -> None:
    recipe = replace(best, epochs=15)
    whole, killed = (new_run(tmp_path / folder, recipe) for folder in ("whole", "killed"))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(killed.folder)])
    try:
        deadline = time.monotonic() + 60
        while not (killed.folder / "state.safetensors").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not killed.complete
    resumed_from = []

    def note(line: Epoch) -> None:
        resumed_from.append(line.epoch)

    fit(few, recipe, run=killed, on_epoch=note)
    assert 1 < resumed_from[0] < 15
    fit(few, recipe, run=whole)
    checkpoints = [(run.folder / "checkpoint.safetensors").read_bytes() for run in (whole, killed)]
    assert checkpoints[0] == checkpoints[1]


# Statistics, evaluation


@torch.no_grad()
def one_shot(model: BNLeNet, images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return each norm's input's mean and variance, all images at once, in float64."""
    x, found = images.double() / 255, {}
    double = BNLeNet().double()
    double.load_state_dict(model.state_dict())
    for name, layer in double.named_children():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            axes = [axis for axis in range(x.ndim) if axis != 1]
            mean, variance = x.mean(axes), x.var(axes, correction=0)
            found[name] = (mean, variance)
            shape = (1, -1) + (1,) * (x.ndim - 2)
            x = (x - mean.view(shape)) / torch.sqrt(variance.view(shape) + layer.eps)
            x = x * layer.weight.view(shape) + layer.bias.view(shape)
        else:
            x = layer(x)
    return found


def test_population_statistics_are_those_of_all_images_at_once(
    few: FashionMNIST, chapter: Recipe
) -> None:
    """1,100 images are no multiple of the batch, so an unweighted mean over batches would fail."""
    model = fit(few, replace(chapter, epochs=1)).model
    before = weights(model)
    images, _ = on_device(few.train, "cpu")
    found = population_statistics(model, images)
    expected = one_shot(model, images)
    assert found.keys() == expected.keys() == norm_layers(model).keys()
    for name in found:
        torch.testing.assert_close(found[name][0], expected[name][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[name][1], expected[name][1], rtol=1e-5, atol=1e-7)
    assert weights(model) == before


def test_population_statistics_can_be_those_of_augmented_images(
    few: FashionMNIST, chapter: Recipe
) -> None:
    model = fit(few, replace(chapter, epochs=1)).model
    images, _ = on_device(few.train, "cpu")
    mirrored = Augmentation(flip=True)
    generator = torch.Generator().manual_seed(9)
    views = [mirrored(part.float() / 255, generator) for part in torch.split(images, 250)]
    expected = one_shot(model, torch.cat(views) * 255)
    found = population_statistics(model, images, mirrored, seed=9)
    for name in found:
        torch.testing.assert_close(found[name][0], expected[name][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_norm", ["scratch", "torch"])
def test_statistics_are_replaced_in_a_copy(batch_norm: str) -> None:
    model = BNLeNet(batch_norm).eval()  # type: ignore[arg-type] # parametrised with its literals
    moments = {
        name: (torch.full_like(mean, 2.0), torch.full_like(variance, 3.0))
        for name, (mean, variance) in (
            (name, statistics(layer)) for name, layer in norm_layers(model).items()
        )
    }
    before = weights(model)
    changed = with_statistics(model, moments)
    for layer in norm_layers(changed).values():
        mean, variance = statistics(layer)
        assert (mean == 2).all()
        assert (variance == 3).all()
    assert weights(model) == before


def test_evaluation_agrees_with_a_single_pass_and_restores_the_mode(few: FashionMNIST) -> None:
    model = BNLeNet()
    initialise(model, 0)
    images, labels = on_device(few.test, "cpu")
    model.eval()
    with torch.no_grad():
        logits = model(images / 255).double().numpy()
    model.train()
    score = evaluate(model, images, labels)
    assert model.training
    target = logits[np.arange(500), few.test.labels]
    expected = np.mean(np.log(np.exp(logits).sum(1)) - target)
    assert score.accuracy == (logits.argmax(1) == few.test.labels).mean()
    assert score.loss == pytest.approx(expected, rel=1e-6)


def test_the_temperature_undoes_a_known_scaling(few: FashionMNIST, chapter: Recipe) -> None:
    model = fit(few, chapter).model
    images, labels = on_device(few.test, "cpu")
    found = []
    for factor in (3.0, 1.5):
        for tensor in (model.linear3.weight, model.linear3.bias):
            tensor.mul_(factor)
        found.append(best_temperature(model, images, labels))
    assert found[1] == pytest.approx(1.5 * found[0], abs=0.011)
    assert 0.41 < found[0] < found[1] < 2.49
