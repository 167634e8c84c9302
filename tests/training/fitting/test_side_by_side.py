from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from training.dataset import FashionMNIST
from training.fitting.fit import FitError, evaluate, fit, fit_side_by_side, on_device
from training.fitting.recipes import Recipe
from training.fitting.run import Config, Run
from training.fitting.side_by_side import forward, stack
from training.fitting.step import Fitting
from training.model import BNLeNet, initialise

SEEDS = [3, 0]


def networks() -> list[BNLeNet]:
    made = [BNLeNet().double() for _ in SEEDS]
    for network, seed in zip(made, SEEDS, strict=True):
        initialise(network, seed)
    return made


@pytest.mark.parametrize("training", [True, False])
def test_the_whole_computes_what_its_networks_compute(training: bool) -> None:
    """Logits, gradients and moving statistics, in float64, against a call of each network."""
    images = torch.rand(len(SEEDS) * 8, 1, 28, 28, dtype=torch.float64)
    alone, joined = networks(), networks()
    whole = stack(joined).train(training)
    for _ in range(2):
        logits = forward(whole, images)
        torch.autograd.backward([logits.square().sum()])
        for place, network in enumerate(alone):
            network.train(training).zero_grad()
            own = network(images[place * 8 : place * 8 + 8])
            torch.autograd.backward([own.square().sum()])
            torch.testing.assert_close(logits[place * 8 : place * 8 + 8], own)
            for name, parameter in network.named_parameters():
                gradient = whole.get_parameter(name).grad
                assert gradient is not None
                torch.testing.assert_close(gradient[place], parameter.grad, rtol=1e-6, atol=1e-9)
            for name, tensor in network.state_dict().items():
                torch.testing.assert_close(joined[place].state_dict()[name], tensor)
        whole.zero_grad()


def test_what_changes_the_whole_changes_its_networks() -> None:
    joined = networks()
    whole = stack(joined)
    with torch.no_grad():
        for tensor in whole.state_dict().values():
            tensor.zero_()
    assert not any(tensor.any() for net in joined for tensor in net.state_dict().values())


@pytest.mark.parametrize(("name", "optimizer"), [("chapter", "sgd"), ("best", "muon")])
def test_every_seed_fits_as_it_would_alone(
    few: FashionMNIST,
    name: str,
    optimizer: str,
    request: pytest.FixtureRequest,
) -> None:
    recipe = replace(request.getfixturevalue(name), epochs=2)
    assert recipe.optimizer == optimizer
    for seed, joined in zip(SEEDS, fit_side_by_side(few, recipe, SEEDS), strict=True):
        alone = fit(few, recipe, seed=seed)
        for a, b in zip(joined.epochs, alone.epochs, strict=True):
            assert a.loss == pytest.approx(b.loss, rel=1e-5)
            assert a.train_accuracy == pytest.approx(b.train_accuracy, abs=2 / 1100)
            assert a.learning_rate == b.learning_rate
            assert a.images_per_second * a.seconds >= len(SEEDS) * 1100  # those of all seeds
        for kind, score in joined.scores.items():
            assert score.loss == pytest.approx(alone.scores[kind].loss, rel=1e-3)
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(
                joined.model.get_parameter(name), parameter, rtol=1e-2, atol=1e-3
            )


def test_an_interrupted_seed_is_continued_alone(
    few: FashionMNIST, best: Recipe, tmp_path: Path
) -> None:
    runs = []
    for seed in SEEDS:
        config = Config(best, seed, "cpu", "torch", 0, 1, dataset_sha256="", versions={})
        runs.append(Run.create(tmp_path / str(seed), config))

    def interrupt(_: Fitting, epoch: int, __: int) -> None:
        if epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_side_by_side(few, best, SEEDS, runs=runs, on_batch=interrupt)
    assert [len(run.metrics()) for run in runs] == [2, 2]
    continued = fit(few, best, seed=SEEDS[1], run=runs[1])
    whole = fit(few, best, seed=SEEDS[1])
    losses = [[epoch.loss for epoch in fitted.epochs] for fitted in (continued, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs[1].complete
    images, labels = on_device(few.test, "cpu")
    again = evaluate(runs[1].model(), images, labels)
    assert asdict(again) == asdict(continued.scores["moving"])


def test_our_own_batch_norm_is_refused(few: FashionMNIST, chapter: Recipe) -> None:
    with pytest.raises(FitError, match="several seeds at once need torch's batch norm"):
        fit_side_by_side(few, chapter, [0, 1], batch_norm="scratch")
    whole = stack([BNLeNet("scratch"), BNLeNet("scratch")])
    with pytest.raises(ValueError, match="torch's batch norm"):
        forward(whole, torch.rand(4, 1, 28, 28))
