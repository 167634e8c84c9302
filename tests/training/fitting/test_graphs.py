"""CUDA graphs are used only if they train like eager steps; a CPU suffices to test this check."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.dataset import FashionMNIST
from training.fitting.augmentation import Augmentation
from training.fitting.fit import fit
from training.fitting.graphs import (
    TOLERANCE,
    Captured,
    Step,
    difference,
    fastest_step,
    kinds_of_step,
)
from training.fitting.images import on_device
from training.fitting.population import population_statistics
from training.fitting.precision import full_precision
from training.fitting.recipes import Recipe
from training.fitting.run import Config, Run
from training.fitting.scoring import evaluate, predict
from training.fitting.step import Fitting
from training.model import BNLeNet, initialise

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture
def fitting(few: FashionMNIST, best: Recipe) -> Fitting:
    return Fitting(best, *on_device(few.train, "cpu"))


def test_every_shape_and_augmentation_of_a_fit_is_a_kind_of_step(
    fitting: Fitting, few: FashionMNIST, chapter: Recipe
) -> None:
    changes = fitting.recipe.augmentation, fitting.recipe.finish_augmentation
    assert set(kinds_of_step(fitting)) == {(kind, n) for kind in changes for n in (128, 16)}
    whole = Fitting(replace(chapter, batch_size=200), *on_device(few.train, "cpu"))
    assert kinds_of_step(whole) == [(Augmentation(), 200)]


def nothing(_: Fitting) -> Step:
    return lambda _: None


def stale(fitting: Fitting) -> Step:
    """Train on the rows of the capture, like a graph that ignores its input."""
    return lambda rows: fitting.step(torch.arange(len(rows)))


def frozen(fitting: Fitting) -> Step:
    """Draw the same numbers at every step, like a graph without its generator."""

    def step(rows: Tensor) -> None:
        fitting.generator.manual_seed(0)
        fitting.step(rows)

    return step


def unaveraged(fitting: Fitting) -> Step:
    def step(rows: Tensor) -> None:
        before = fitting.average.clone()
        fitting.step(rows)
        fitting.average.copy_(before)

    return step


def exploding(fitting: Fitting) -> Step:
    def step(rows: Tensor) -> None:
        fitting.step(rows)
        fitting.model.linear1.weight.detach()[0, 0] = torch.nan

    return step


WRONG = [nothing, stale, frozen, unaveraged, exploding]


@pytest.mark.parametrize("capture", WRONG)
def test_a_step_that_does_something_else_is_far_from_the_eager_one(
    fitting: Fitting, capture: Callable[[Fitting], Step]
) -> None:
    fitting.generator.manual_seed(1)
    rows = torch.arange(200, 328)
    assert difference(fitting, capture(fitting), rows) > 3 * TOLERANCE
    before = {name: tensor.clone() for name, tensor in fitting.tensors().items()}
    assert difference(fitting, fitting.step, rows) == 0
    assert all(torch.equal(before[name], t) for name, t in fitting.tensors().items())


def test_differences_of_rounding_are_tolerated(fitting: Fitting) -> None:
    """As on a GPU: the plain and the batch-last forward pass round differently."""

    def step(rows: Tensor) -> None:
        forward, fitting.forward = fitting.forward, fitting.model
        fitting.step(rows)
        fitting.forward = forward

    rows = torch.arange(128)
    assert 0 < difference(fitting, step, rows) < TOLERANCE
    for _ in range(3):
        fitting.step(rows)
    assert 0 < difference(fitting, step, rows) < TOLERANCE


@pytest.mark.parametrize("capture", WRONG)
def test_a_replay_that_differs_is_not_used(
    fitting: Fitting,
    capture: Callable[[Fitting], Step],
    caplog: pytest.LogCaptureFixture,
) -> None:
    augmentation = fitting.augmentation
    with caplog.at_level(logging.WARNING):
        assert fastest_step(fitting, capture) == fitting.step
    assert "without CUDA graphs, more slowly: a replayed step differs" in caplog.text
    assert fitting.augmentation == augmentation


@pytest.mark.parametrize("kind", range(4))
def test_one_kind_of_step_that_differs_is_enough(fitting: Fitting, kind: int) -> None:
    wrong = kinds_of_step(fitting)[kind]

    def step(rows: Tensor) -> None:
        if (fitting.augmentation, len(rows)) != wrong:
            fitting.step(rows)

    assert fastest_step(fitting, lambda _: step) == fitting.step


def refused(fitting: Fitting) -> Step:
    """Fail as torch does: an operation is refused, then the capture cannot end."""
    fitting.augmentation = Augmentation(flip=True)
    try:
        raise RuntimeError("CUDA error: operation not permitted\nMore lines of no use.")
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def changed(fitting: Fitting) -> Step:
    """Fail as if another version of torch took other arguments."""
    fitting.augmentation = Augmentation(flip=True)
    raise TypeError


@pytest.mark.parametrize(
    ("capture", "reason"),
    [(refused, "CUDA error: operation not permitted"), (changed, "TypeError")],
)
def test_after_a_failed_capture_the_fit_warns_and_runs_eagerly(
    fitting: Fitting,
    capture: Callable[[Fitting], Step],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    augmentation, before = fitting.augmentation, fitting.model.linear1.weight.clone()
    generator = fitting.generator
    step = fastest_step(fitting, capture)
    assert step == fitting.step
    assert fitting.augmentation == augmentation
    assert fitting.generator is not generator  # that one may be part of a graph
    (record,) = caplog.records
    assert record.getMessage() == (
        f"Training without CUDA graphs, more slowly: a step could not be captured ({reason})."
    )
    step(fitting.begin(1)[:128])
    assert not torch.equal(before, fitting.model.linear1.weight)


def test_a_replay_that_agrees_is_used(fitting: Fitting, caplog: pytest.LogCaptureFixture) -> None:
    def captured(rows: Tensor) -> None:
        fitting.step(rows)

    assert fastest_step(fitting, lambda _: captured) is captured
    assert not caplog.records


# What only a GPU can show


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Fail if the host waits for the device; restore the mode in any case."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("name", ["chapter", "best"])
@full_precision()
def test_on_a_gpu_captured_steps_train_as_eager_steps_do(
    few: FashionMNIST, name: str, request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(name)
    images = on_device(few.train, "cuda")
    replayed, eager = (Fitting(recipe, *images) for _ in range(2))
    captured = Captured(replayed)
    for epoch in range(1, recipe.epochs + 1):
        for step, fitting in ((captured, replayed), (eager.step, eager)):
            for rows in torch.split(fitting.begin(epoch), recipe.batch_size):
                step(rows)
        torch.testing.assert_close(replayed.loss, eager.loss, rtol=1e-3, atol=0)
    assert replayed.steps_done.item() == 8
    torch.testing.assert_close(replayed.average, eager.average, rtol=1e-2, atol=1e-3)


@needs_gpu
@pytest.mark.parametrize("name", ["chapter", "best"])
def test_on_a_gpu_captured_steps_train_as_the_cpu_does(
    few: FashionMNIST, name: str, request: pytest.FixtureRequest
) -> None:
    """Without augmentation, because every device has its own random numbers."""
    recipe = request.getfixturevalue(name)
    recipe = replace(recipe, augmentation=Augmentation(), finish=0.0)
    on_cpu, on_gpu = (Fitting(recipe, *on_device(few.train, d)) for d in ("cpu", "cuda"))
    order = on_cpu.begin(1)
    on_gpu.begin(1)
    with full_precision():
        captured = fastest_step(on_gpu)
        assert isinstance(captured, Captured)
        for rows in torch.split(order, recipe.batch_size):
            on_cpu.step(rows)
            captured(rows.to("cuda"))
    torch.testing.assert_close(on_gpu.loss.cpu(), on_cpu.loss, rtol=1e-4, atol=0)
    assert abs(on_gpu.correct.item() - on_cpu.correct.item()) <= 2
    for (name, theirs), ours in zip(
        on_gpu.tensors().items(), on_cpu.tensors().values(), strict=True
    ):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-2, atol=1e-3, msg=name)


@needs_gpu
def test_on_a_gpu_seeding_the_generator_reaches_the_replays(
    few: FashionMNIST, best: Recipe
) -> None:
    fitting = Fitting(best, *on_device(few.train, "cuda"))
    captured = Captured(fitting)
    rows, found = torch.arange(128, device="cuda"), []
    state = {name: tensor.clone() for name, tensor in fitting.tensors().items()}
    for seed in (1, 1, 2, 3, 4):
        for name, tensor in fitting.tensors().items():
            tensor.detach().copy_(state[name])
        fitting.loss.zero_()
        fitting.generator.manual_seed(seed)
        captured(rows)
        captured(rows)
        found.append(fitting.loss.item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert max(abs(other - found[0]) for other in found[2:]) > 1e-4 * found[0]


@needs_gpu
def test_on_a_gpu_an_epochs_steps_never_wait_for_the_device(
    few: FashionMNIST, best: Recipe, request: pytest.FixtureRequest
) -> None:
    fitting = Fitting(best, *on_device(few.train, "cuda"))
    steps: list[Step] = [fitting.step, Captured(fitting)]
    order = fitting.begin(1)
    request.getfixturevalue("no_waiting")
    for step in steps:
        for rows in torch.split(order, best.batch_size):
            step(rows)


@needs_gpu
@pytest.mark.parametrize("name", ["chapter", "best"])
def test_on_a_gpu_a_fit_is_the_same_with_and_without_graphs(
    few: FashionMNIST, name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """From end to end: the loop, the statistics, the run folder and its model on the CPU."""
    recipe = request.getfixturevalue(name)
    fits = []
    for graphs in (True, False):
        config = Config(recipe, 0, "cuda", "torch", 0, 1, few.sha256, {})
        run = Run.create(tmp_path / str(graphs), config)
        fits.append((run, fit(few, recipe, device="cuda", graphs=graphs, run=run)))
    (run, replayed), (_, eager) = fits
    losses = [[epoch.loss for epoch in fitted.epochs] for fitted in (replayed, eager)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    images, labels = on_device(few.test, "cpu")
    score = evaluate(run.model(), images, labels)
    assert score.loss == pytest.approx(replayed.scores["moving"].loss, rel=1e-4)


@needs_gpu
def test_on_a_gpu_a_fit_has_no_reason_to_run_eagerly(
    few: FashionMNIST, best: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    """A second fit, too, in the same process: torch's state must not outlive the first."""
    for _ in range(2):
        fit(few, best, device="cuda")
    assert not caplog.records


@needs_gpu
def test_on_a_gpu_scores_and_statistics_are_the_cpus(few: FashionMNIST) -> None:
    model = BNLeNet().eval()
    initialise(model, 0)
    found = []
    for device in ("cpu", "cuda"):
        images, _ = on_device(few.train, device)
        model.to(device)
        moments = population_statistics(model, images)
        found.append([predict(model, images).cpu()])
        found[-1] += [tensor.cpu() for pair in moments.values() for tensor in pair]
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-4, atol=1e-4)  # TF32 is off by 1e-3
