"""One step: the optimisers' work, the moving average, and tensors that keep their addresses."""

import copy
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor

from training.dataset import FashionMNIST
from training.fitting.augmentation import Augmentation
from training.fitting.images import on_device
from training.fitting.muon import Muon
from training.fitting.recipes import Recipe
from training.fitting.step import Fitting, unchanged
from training.model import BNLeNet, initialise, norm_layers

EVERY_128 = [torch.arange(128), torch.arange(128, 256), torch.arange(256, 384)]


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_steps_are_those_of_the_optimisers_called_by_hand(
    few: FashionMNIST, best: Recipe, optimizer: Literal["sgd", "muon"]
) -> None:
    """From the first step on, with decay, schedule, betas and AdamW's count of steps."""
    recipe = replace(best, optimizer=optimizer, augmentation=Augmentation(), weight_decay=5.0)
    images, labels = on_device(few.train, "cpu")
    fitting = Fitting(recipe, images, labels, 7)
    fitting.forward = fitting.model  # so that both round alike, and the comparison can be strict
    model = BNLeNet()
    initialise(model, 7)
    last = [model.linear3.weight]
    hidden = [p for p in model.parameters() if p.ndim > 1 and p is not last[0]]
    norms = [p for layer in norm_layers(model).values() for p in layer.parameters()]
    rate, other_rate = torch.zeros(()), torch.zeros(())
    others = [*norms, model.linear3.bias]
    by_hand: list[torch.optim.Optimizer]
    if optimizer == "muon":
        adamw = torch.optim.AdamW([*last, *others], other_rate, (0.9, 0.99), weight_decay=0)
        by_hand = [Muon(hidden, rate, 5.0), adamw]
    else:
        sgd = torch.optim.SGD([*hidden, *last], rate, weight_decay=5.0)
        by_hand = [sgd, torch.optim.SGD(others, rate)]
    for step, rows in enumerate(2 * EVERY_128):
        fitting.step(rows)
        rate.fill_(0.02 * recipe.rate(step / 8))
        other_rate.fill_(0.01 * recipe.rate(step / 8))
        model.zero_grad()
        torch.autograd.backward([F.cross_entropy(model(images[rows] / 255), labels[rows])])
        for each in by_hand:
            each.step()
    for name, parameter in model.named_parameters():
        ours = fitting.model.get_parameter(name)
        if ours.requires_grad:
            torch.testing.assert_close(ours, parameter, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_captured_step_would_read_and_write_the_same_memory_at_every_replay(
    few: FashionMNIST, best: Recipe, optimizer: Literal["sgd", "muon"]
) -> None:
    """A CUDA graph replays addresses, so no tensor of the fit may move with any optimiser."""
    fitting = Fitting(replace(best, optimizer=optimizer), *on_device(few.train, "cpu"))

    def addresses() -> dict[str, int]:
        sums = dict(zip(("loss", "correct", "finite_steps"), fitting.sums(), strict=True))
        tensors = fitting.tensors() | sums | {"learning rates": fitting.learning_rates}
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    before = addresses()
    assert any(name.startswith("optimizer.") for name in before) == (optimizer != "sgd")
    for rows in EVERY_128:
        fitting.step(rows)
    fitting.result()
    fitting.begin(2)
    assert addresses() == before
    assert int(fitting.steps_done) == 3


def test_an_epoch_starts_the_same_way_after_any_history(few: FashionMNIST, best: Recipe) -> None:
    """So that a resumed fit continues like one that was never interrupted."""
    images = on_device(few.train, "cpu")
    used, new = (Fitting(best, *images, 3) for _ in range(2))
    used.begin(1)
    used.step(torch.arange(128))
    used.model.eval()  # as a caller's evaluation may leave it
    orders = [fitting.begin(2) for fitting in (used, new)]
    assert torch.equal(*orders)
    assert not torch.equal(orders[0], new.begin(1))
    for epoch in (1, 2):
        assert not torch.equal(orders[0], Fitting(best, *images, 4).begin(epoch))
    assert orders[0].sort().values.tolist() == list(range(400))
    assert not any(tensor.any() for tensor in used.sums())
    assert used.augmentation == best.finish_augmentation
    assert used.model.training


def test_sums_are_those_of_the_epochs_images(few: FashionMNIST, best: Recipe) -> None:
    images, labels = on_device(few.train, "cpu")
    fitting = Fitting(replace(best, augmentation=Augmentation()), images, labels)
    loss, correct = 0.0, 0
    for rows in (torch.arange(128), torch.arange(128, 144)):
        before = copy.deepcopy(fitting.model)
        fitting.step(rows)
        logits = before(images[rows] / 255)
        loss += F.cross_entropy(logits, labels[rows], reduction="sum").item()
        correct += int((logits.argmax(1) == labels[rows]).sum())
    assert fitting.loss.item() == pytest.approx(loss, rel=1e-5)
    assert fitting.correct.item() == correct
    assert fitting.finite_steps.item() == 2


def test_warming_up_after_the_last_step_reads_no_further_than_the_schedule(
    few: FashionMNIST, best: Recipe
) -> None:
    """On a GPU, an index beyond the schedule would end the process."""
    fitting = Fitting(best, *on_device(few.train, "cpu"))
    fitting.steps_done.fill_(fitting.schedule.shape[1])
    fitting.step(torch.arange(128))
    assert torch.equal(fitting.learning_rates, fitting.schedule[:2, -1])


@pytest.mark.parametrize("error", [None, KeyError])
def test_steps_that_are_undone_leave_no_trace(
    few: FashionMNIST, best: Recipe, error: type[Exception] | None
) -> None:
    images = on_device(few.train, "cpu")
    warmed, plain = (Fitting(best, *images) for _ in range(2))
    for fitting in (warmed, plain):
        fitting.generator.manual_seed(1)
        fitting.step(torch.arange(128))
    rate = warmed.learning_rates.clone()
    try:
        with unchanged(warmed):
            for _ in range(3):
                warmed.step(torch.arange(128, 256))
            if error:
                raise error
    except KeyError:
        pass
    assert torch.equal(warmed.learning_rates, rate)
    for fitting in (warmed, plain):
        fitting.step(torch.arange(256, 384))
    for (name, a), b in zip(warmed.tensors().items(), plain.tensors().values(), strict=True):
        assert torch.equal(a, b), name
    assert all(map(torch.equal, warmed.sums(), plain.sums()))


def test_biases_before_batch_norm_never_change(few: FashionMNIST, best: Recipe) -> None:
    """Their gradient is only rounding error; AdamW would turn it into steps of full length."""
    fast, plain = (Fitting(best, *on_device(few.train, "cpu")) for _ in range(2))
    assert fast.forward is not fast.model
    plain.forward = plain.model  # as on a GPU
    before = copy.deepcopy(plain.model)
    for fitting in (fast, plain):
        for rows in 2 * EVERY_128:
            fitting.step(rows)
    for name in ("conv1.bias", "conv2.bias", "linear1.bias", "linear2.bias"):
        assert torch.equal(plain.model.get_parameter(name), before.get_parameter(name))
    assert not torch.equal(plain.model.linear3.bias, before.linear3.bias)
    pairs = zip(fast.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def steps_by_name(fitting: Fitting) -> list[dict[str, Tensor]]:
    """Take three steps; return weights and statistics after each, float64."""
    seen = []
    for rows in EVERY_128:
        fitting.step(rows)
        state = fitting.model.state_dict().items()
        seen.append({name: t.double().clone() for name, t in state if t.is_floating_point()})
    return seen


@pytest.mark.parametrize(
    ("averaging", "shares"),
    [
        (1e-9, [1, 1, 1]),  # goes back no further than the last step
        (1.0, [1, 1 / 2, 1 / 3]),  # the plain mean of the steps so far
        (0.25, [1, 1 / 2, 1 / 2]),  # over a quarter of the recipe's eight steps
    ],
)
def test_the_average_moves_by_the_recipes_share(
    few: FashionMNIST, best: Recipe, averaging: float, shares: list[float]
) -> None:
    fitting = Fitting(replace(best, averaging=averaging), *on_device(few.train, "cpu"))
    expected: dict[str, Tensor] = {}
    for share, state in zip(shares, steps_by_name(fitting), strict=True):
        for name, new in state.items():
            old = expected.get(name, new)
            expected[name] = (1 - share) * old + share * new
    result = fitting.result()
    assert result is not fitting.model
    assert not result.training
    for name, tensor in expected.items():
        found = result.state_dict()[name].double()
        torch.testing.assert_close(found, tensor, rtol=1e-5, atol=1e-6, msg=name)
    drift = (result.linear2.weight - fitting.model.linear2.weight).abs().max()
    assert (drift > 1e-4) == (averaging > 1e-9)


def test_without_averaging_the_last_weights_are_the_result(
    few: FashionMNIST, chapter: Recipe
) -> None:
    fitting = Fitting(chapter, *on_device(few.train, "cpu"))
    assert fitting.result() is fitting.model
    assert "average" not in fitting.tensors()


@pytest.mark.parametrize("name", ["conv2.weight", "norm3.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_detected(
    few: FashionMNIST, chapter: Recipe, name: str, value: float
) -> None:
    fitting = Fitting(chapter, *on_device(few.train, "cpu"))
    assert fitting.finite()
    fitting.model.state_dict()[name].view(-1)[0] = value
    assert not fitting.finite()
    fitting = Fitting(chapter, *on_device(few.train, "cpu"))
    fitting.loss.fill_(value)
    assert not fitting.finite()


def test_the_same_number_of_threads_gives_the_same_bits(few: FashionMNIST, best: Recipe) -> None:
    images, found = on_device(few.train, "cpu"), []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        fitting = Fitting(best, *images)
        for rows in torch.split(fitting.begin(1)[:256], 128):
            fitting.step(rows)
        found.append({name: tensor.detach() for name, tensor in fitting.tensors().items()})
    first, second, one = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in first:  # additions in another order
        torch.testing.assert_close(first[name], one[name], rtol=1e-2, atol=1e-3, msg=name)
