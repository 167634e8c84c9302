"""The loop, compared with one written by hand; its run folder, divergence, and resuming."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor

from training.batch_norm import statistics
from training.dataset import FashionMNIST
from training.fitting import batch_last
from training.fitting.augmentation import Augmentation
from training.fitting.fit import fit
from training.fitting.images import on_device
from training.fitting.plan import FitError
from training.fitting.population import population_statistics, with_statistics
from training.fitting.recipes import Recipe, Statistics
from training.fitting.run import Config, Epoch, Run
from training.fitting.scoring import best_temperature, evaluate
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
    losses, accuracies = [], []
    for epoch in (1, 2, 3, 4):
        generator = torch.Generator().manual_seed((5 << 20) + epoch)
        total, right = 0.0, 0
        for rows in torch.split(torch.randperm(400, generator=generator), 128):
            logits = model(images[rows] / 255)
            right += int((logits.argmax(1) == labels[rows]).sum())
            loss = F.cross_entropy(logits, labels[rows])
            model.zero_grad()
            torch.autograd.backward([loss])
            with torch.no_grad():
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.1 * parameter.grad)
            total += loss.item() * len(rows)
        losses.append(total / 400)
        accuracies.append(right / 400)
    fitted = fit(few, replace(chapter, epochs=4), seed=5)
    assert [epoch.loss for epoch in fitted.epochs] == pytest.approx(losses, rel=1e-4)
    found = [epoch.train_accuracy for epoch in fitted.epochs]
    assert found == pytest.approx(accuracies, abs=2 / 400)  # a near tie may round either way
    assert losses[3] < 0.9 * losses[0]
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
    longer = replace(best, epochs=24, batch_size=100)
    fitted = fit(few, longer)
    assert fitted.scores["moving"].accuracy > 0.6
    last_rate = longer.learning_rate * longer.rate(1 - 1 / (24 * 4))
    assert fitted.epochs[-1].learning_rate == pytest.approx(last_rate)
    assert set(fitted.scores) == {"moving", "population", "clean"}


def test_the_last_epochs_change_the_images_less(few: FashionMNIST, best: Recipe) -> None:
    """The images of an epoch are those of its augmentation with its own seed."""
    recipe = replace(best, epochs=5, finish=0.4, batch_size=400)
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
        order = torch.randperm(400, generator=generator)
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
def test_confusion_and_temperature_use_the_recipes_statistics(
    few: FashionMNIST, chapter: Recipe, kind: Statistics
) -> None:
    recipe = replace(chapter, epochs=6, batch_size=32, statistics=kind)
    fitted = fit(few, recipe, holdout=100)
    images, labels = (tensor[300:] for tensor in on_device(few.train, "cpu"))
    models = {
        "moving": fitted.model,
        "population": with_statistics(fitted.model, fitted.population),
    }
    assert fitted.temperature == best_temperature(models[kind], images, labels)
    confusion = np.array(fitted.confusion)
    assert confusion.trace() / 100 == pytest.approx(fitted.scores[kind].accuracy)
    assert fitted.scores["population"] != fitted.scores["moving"]
    assert confusion.sum(1).tolist() == np.bincount(few.train.labels[300:]).tolist()


def test_held_out_images_are_not_trained_on(few: FashionMNIST, chapter: Recipe) -> None:
    spoilt = few.train.images.copy()
    spoilt[200:] = 255
    other = replace(few, train=replace(few.train, images=spoilt))
    a, b = (fit(data, chapter, holdout=200) for data in (few, other))
    assert weights(a.model) == weights(b.model)
    assert a.scores != b.scores
    hidden_test = replace(few, test=replace(few.test, images=spoilt[200:]))
    assert fit(hidden_test, chapter, holdout=200).scores == a.scores


def test_an_impossible_fit_is_refused_before_it_starts(few: FashionMNIST, chapter: Recipe) -> None:
    with pytest.raises(FitError, match="a batch size of 133 leaves a last batch of one image"):
        fit(few, replace(chapter, batch_size=133))
    fit(few, replace(chapter, batch_size=133, epochs=1), holdout=1)


@pytest.mark.parametrize(("seen_before", "step"), [(2 * 128, 3), (400, 4)])
def test_a_loss_that_becomes_nan_stops_the_fit_and_keeps_the_last_checkpoint(
    few: FashionMNIST, chapter: Recipe, tmp_path: Path, seen_before: int, step: int
) -> None:
    run = new_run(tmp_path / "run", chapter)
    before, calls = {}, []

    def poison(fitting: Fitting, epoch: int, seen: int) -> None:
        calls.append((epoch, seen))
        if calls[-1] == (2, seen_before):
            before.update(run.checkpoint())
            with torch.no_grad():
                fitting.model.linear3.bias.fill_(math.nan)

    message = (
        rf"became infinite or NaN in epoch 2, step {step} of 4: .* Epoch 1 was the last good one\."
    )
    with pytest.raises(FitError, match=message):
        fit(few, chapter, run=run, on_batch=poison)
    assert calls[-1] == (2, seen_before)  # it stopped in the next step, or when there was none
    after = run.checkpoint()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [line.epoch for line in run.metrics()] == [1]
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_a_learning_rate_far_too_high_is_an_error(few: FashionMNIST, chapter: Recipe) -> None:
    with pytest.raises(
        FitError, match=r"became infinite or NaN in epoch 1, .* No epoch was complete"
    ):
        fit(few, replace(chapter, learning_rate=1e38))


def test_an_infinite_variance_is_an_error_even_with_a_finite_loss(
    few: FashionMNIST, chapter: Recipe
) -> None:
    """Weights of 1e29 are finite, but the variance of their outputs is not."""
    with pytest.raises(FitError, match=r"became infinite or NaN in epoch 1, step 4 of 4"):
        fit(few, replace(chapter, learning_rate=1e30))


# What is saved


@pytest.mark.parametrize("averaging", [0.0, 0.4])
def test_every_checkpoint_and_the_model_are_the_average_of_the_steps_so_far(
    few: FashionMNIST, best: Recipe, averaging: float, tmp_path: Path
) -> None:
    """Recomputed step by step from the weights after every step."""
    recipe = replace(best, averaging=averaging)
    run = new_run(tmp_path / "run", recipe)
    expected: dict[str, Tensor] = {}
    raw: dict[str, Tensor] = {}
    saved: list[int] = []

    def on_batch(fitting: Fitting, _: int, __: int) -> None:
        share = max(1 / (averaging * 8), 1 / int(fitting.steps_done)) if averaging else 1.0
        for name, tensor in fitting.model.state_dict().items():
            if tensor.is_floating_point():
                raw[name] = tensor.double().clone()
                old = expected.get(name, raw[name])
                expected[name] = (1 - share) * old + share * raw[name]

    def compare(found: dict[str, Tensor]) -> None:
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-5, atol=1e-6)
        apart = (expected["linear1.weight"] - raw["linear1.weight"]).abs().max() > 1e-4
        assert apart == (averaging > 0)

    def on_epoch(line: Epoch) -> None:
        assert run.metrics()[-1] == line  # the folder holds the epoch already
        assert (run.folder / "state.safetensors").exists()
        compare(run.checkpoint())
        saved.append(line.epoch)
        images, labels = on_device(few.test, "cpu")
        assert line.accuracy == evaluate(run.model(), images, labels).accuracy

    fitted = fit(few, recipe, run=run, on_batch=on_batch, on_epoch=on_epoch)
    assert saved == [1, 2]
    compare(fitted.model.state_dict())
    compare(run.checkpoint())


def test_the_clean_statistics_are_of_images_without_augmentation(
    few: FashionMNIST, best: Recipe
) -> None:
    fitted = fit(few, best)
    images, _ = on_device(few.train, "cpu")
    clean = with_statistics(fitted.model, population_statistics(fitted.model, images))
    assert fitted.scores["clean"] == evaluate(clean, *on_device(few.test, "cpu"))
    assert len({score.loss for score in fitted.scores.values()}) == 3


def test_a_run_killed_while_its_results_are_written_can_be_finished(
    few: FashionMNIST, chapter: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path / "run", chapter)
    write = Run.write_json

    def killed(self: Run, name: str, value: Any) -> None:
        if name == "results.json":
            raise KeyboardInterrupt
        write(self, name, value)

    monkeypatch.setattr(Run, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(few, chapter, run=run)
    assert not run.complete
    monkeypatch.undo()
    epochs: list[Epoch] = []
    fitted = fit(few, chapter, run=run, on_epoch=epochs.append)
    assert epochs == []  # no epoch was fitted again
    assert run.complete
    again = fit(few, chapter)
    assert weights(fitted.model) == weights(again.model)
    assert json.loads((run.folder / "results.json").read_text())["confusion"] == again.confusion


def test_the_times_are_those_of_the_parts(few: FashionMNIST, chapter: Recipe) -> None:
    begin = time.perf_counter()
    fitted = fit(few, chapter)
    whole = time.perf_counter() - begin
    assert fitted.seconds.keys() == {"setup", "fit", "statistics"}
    assert 0 < min(fitted.seconds.values()) < sum(fitted.seconds.values()) <= whole
    assert sum(line.seconds for line in fitted.epochs) <= fitted.seconds["fit"]
    for line in fitted.epochs:
        assert line.images_per_second == pytest.approx(400 / line.seconds)


def test_a_fit_without_graphs_is_the_same_on_a_cpu(few: FashionMNIST, chapter: Recipe) -> None:
    fitted = [fit(few, chapter, graphs=graphs).model for graphs in (True, False)]
    assert weights(fitted[0]) == weights(fitted[1])


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
        if epoch == 2 and seen > 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(few, recipe, run=broken, on_batch=interrupt)
    assert len(broken.metrics()) == 1
    fit(few, recipe, run=broken)
    checkpoints = [(run.folder / "checkpoint.safetensors").read_bytes() for run in (whole, broken)]
    assert checkpoints[0] == checkpoints[1]
    losses = [[(line.epoch, line.loss) for line in run.metrics()] for run in (whole, broken)]
    assert losses[0] == losses[1]


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from training.dataset import FashionMNIST, Split, load
from training.fitting.fit import fit
from training.fitting.run import Run

torch.set_num_threads(1)
data, run = load(download=False), Run(Path(sys.argv[1]))
train = Split(data.train.images[:400], data.train.labels[:400])
test = Split(data.test.images[:200], data.test.labels[:200])
fit(FashionMNIST(train, test, data.sha256), run.config().recipe, run=run)
"""


def test_a_killed_fit_resumes_bit_for_bit(few: FashionMNIST, best: Recipe, tmp_path: Path) -> None:
    recipe = replace(best, epochs=8)
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
    assert 1 < resumed_from[0] <= 8
    fit(few, recipe, run=whole)
    checkpoints = [(run.folder / "checkpoint.safetensors").read_bytes() for run in (whole, killed)]
    assert checkpoints[0] == checkpoints[1]
