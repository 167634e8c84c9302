import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name the whole field uses
from torch import Tensor

from training.dataset import FashionMNIST
from training.fitting.augmentation import Augmentation
from training.fitting.fit import on_device
from training.fitting.muon import Muon
from training.fitting.recipes import Recipe
from training.fitting.step import Captured, Fitting, unchanged
from training.model import BNLeNet, initialise, norm_layers


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_steps_are_those_of_the_optimisers_called_by_hand(
    few: FashionMNIST, best: Recipe, optimizer: Literal["sgd", "muon"]
) -> None:
    """Decay, schedule and AdamW's count of steps included, from the first step on."""
    recipe = replace(best, optimizer=optimizer, augmentation=Augmentation(), weight_decay=5.0)
    images, labels = on_device(few.train, "cpu")
    fitting = Fitting(recipe, images, labels, [7])
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
    for step in range(6):
        rows = torch.arange(step * 128, step * 128 + 128)
        fitting.step(rows)
        rate.fill_(0.02 * recipe.rate(step / 36))
        other_rate.fill_(0.01 * recipe.rate(step / 36))
        model.zero_grad()
        torch.autograd.backward([F.cross_entropy(model(images[rows] / 255), labels[rows])])
        for each in by_hand:
            each.step()
    for name, parameter in model.named_parameters():
        ours = fitting.model.get_parameter(name)
        torch.testing.assert_close(ours, parameter, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "muon"])
def test_a_captured_step_would_read_and_write_the_same_memory_at_every_replay(
    few: FashionMNIST,
    best: Recipe,
    optimizer: Literal["sgd", "muon"],
) -> None:
    """A CUDA graph replays addresses, so no tensor of the fit may move, whatever the optimiser."""
    recipe = replace(best, optimizer=optimizer)
    fitting = Fitting(recipe, *on_device(few.train, "cpu"))
    before = {name: tensor.data_ptr() for name, tensor in fitting.tensors().items()}
    assert any(name.startswith("optimizer.") for name in before) == (optimizer != "sgd")
    for _ in range(3):
        fitting.step(torch.arange(128))
    assert {name: tensor.data_ptr() for name, tensor in fitting.tensors().items()} == before
    assert int(fitting.done) == 3


def test_an_epoch_begins_alike_whatever_was_before(few: FashionMNIST, best: Recipe) -> None:
    """So that a resumed fit goes on as one that was never interrupted."""
    images = on_device(few.train, "cpu")
    used, new = (Fitting(best, *images, [3, 4]) for _ in range(2))
    used.begin(1)
    used.step(torch.arange(128).repeat(2, 1))
    orders = [fitting.begin(3) for fitting in (used, new)]
    assert torch.equal(*orders)
    assert not torch.equal(orders[0][0], orders[0][1])  # each seed has its own
    assert not torch.equal(orders[0], new.begin(4))
    assert orders[0].sort().values.tolist() == [list(range(1100))] * 2
    for sums in (used.loss, used.correct, used.finite_steps):
        assert not sums.any()
    assert used.augmentation == best.finish_augmentation


def test_warming_up_after_the_last_step_reads_no_further_than_the_schedule(
    few: FashionMNIST, best: Recipe
) -> None:
    """On a GPU an index beyond the table would end the process."""
    fitting = Fitting(best, *on_device(few.train, "cpu"))
    fitting.done.fill_(fitting.schedule.shape[1])
    with unchanged(fitting):
        fitting.step(torch.arange(128))
        assert torch.equal(fitting.learning_rates, fitting.schedule[:2, -1])


def test_warming_up_for_a_capture_leaves_no_trace(few: FashionMNIST, best: Recipe) -> None:
    images = on_device(few.train, "cpu")
    warmed, plain = (Fitting(best, *images) for _ in range(2))
    for fitting in (warmed, plain):
        fitting.generators[0].manual_seed(1)
        fitting.step(torch.arange(128))
    with unchanged(warmed):
        for _ in range(3):
            warmed.step(torch.arange(128, 256))
    for fitting in (warmed, plain):
        fitting.step(torch.arange(256, 384))
    for (name, a), b in zip(warmed.tensors().items(), plain.tensors().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(warmed.loss, plain.loss)


class Recorded:
    """Stands in for a CUDA graph: a step in its context is noted, and replayed on the CPU."""

    capturing: "Recorded | None" = None
    step = Fitting.step

    def __init__(self) -> None:
        self.calls: list[tuple[Fitting, Augmentation, Tensor]] = []
        self.generators: list[torch.Generator] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def replay(self) -> None:
        for fitting, augmentation, rows in self.calls:
            draws = augmentation != Augmentation()
            assert self.generators == (fitting.generators if draws else [])
            wanted, fitting.augmentation = fitting.augmentation, augmentation  # as captured
            Recorded.step(fitting, rows)
            fitting.augmentation = wanted


@contextmanager
def recording(graph: Recorded) -> Iterator[None]:
    Recorded.capturing = graph
    yield
    Recorded.capturing = None


def recorded_step(fitting: Fitting, rows: Tensor) -> None:
    if Recorded.capturing:
        Recorded.capturing.calls.append((fitting, fitting.augmentation, rows))
    else:
        Recorded.step(fitting, rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "seeds"), [("chapter", [0]), ("best", [0]), ("best", [0, 1])])
def test_on_a_gpu_captured_steps_train_as_eager_steps_do_without_waiting(
    few: FashionMNIST, name: str, seeds: list[int], request: pytest.FixtureRequest
) -> None:
    recipe = request.getfixturevalue(name)
    images = on_device(few.train, "cuda")
    replayed, eager = (Fitting(recipe, *images, seeds) for _ in range(2))
    captured = Captured(replayed)
    for epoch in range(1, recipe.epochs + 1):
        for step, fitting in ((captured, replayed), (eager.step, eager)):
            order = fitting.begin(epoch)
            torch.cuda.set_sync_debug_mode("error")
            for rows in torch.split(order, recipe.batch_size, dim=1):
                step(rows)
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(replayed.loss, eager.loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("name", "seeds"), [("chapter", [0, 1]), ("best", [0])])
def test_replays_in_the_shape_of_cuda_graphs_train_as_eager_steps_do(
    few: FashionMNIST,
    name: str,
    seeds: list[int],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """All of the fast path but the device: static batches, the last batch, the finish, warm-up."""
    recipe = request.getfixturevalue(name)
    images = on_device(few.train, "cpu")
    replayed, eager = (Fitting(recipe, *images, seeds) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock)
    monkeypatch.setattr(torch.cuda, "stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock)
    monkeypatch.setattr(Fitting, "step", recorded_step)
    captured = Captured(replayed)
    epochs = (1, recipe.epochs)
    assert replayed.augmentation == recipe.augmentation
    assert set(captured.graphs) == {
        (n, recipe.augmentation_in(e)) for n in (128, 76) for e in epochs
    }
    generator = torch.Generator().manual_seed(1)
    order = torch.split(
        torch.stack([torch.randperm(1100, generator=generator) for _ in seeds]), 128, dim=1
    )
    for step, fitting in ((captured, replayed), (eager.step, eager)):
        for own in fitting.generators:
            own.manual_seed(2)
        for epoch in epochs:
            fitting.augmentation = recipe.augmentation_in(epoch)
            for rows in order:
                step(rows)
    assert torch.equal(replayed.loss, eager.loss)
    for place in range(len(seeds)):
        pairs = zip(replayed.tensors(place).items(), eager.tensors(place).values(), strict=True)
        for (name, a), b in pairs:
            assert torch.equal(a, b), name


def test_biases_before_batch_norm_rest_by_every_path(few: FashionMNIST, best: Recipe) -> None:
    """Their gradient is rounding alone, which AdamW would turn into steps of full length."""
    fast, plain = (Fitting(best, *on_device(few.train, "cpu")) for _ in range(2))
    plain.forward = plain.model  # as on a GPU
    before = copy.deepcopy(plain.model)
    for fitting in (fast, plain):
        for start in range(0, 1024, 128):
            fitting.step(torch.arange(start, start + 128))
    for name in ("conv1.bias", "conv2.bias", "linear1.bias", "linear2.bias"):
        assert torch.equal(plain.model.get_parameter(name), before.get_parameter(name))
    assert not torch.equal(plain.model.linear3.bias, before.linear3.bias)
    pairs = zip(fast.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_average_follows_weights_and_statistics(few: FashionMNIST, best: Recipe) -> None:
    recipe = replace(best, averaging=1e-9)  # reaches back no further than the last step
    fitting = Fitting(recipe, *on_device(few.train, "cpu"))
    for _ in range(3):
        fitting.step(torch.arange(128))
    pairs = zip(
        fitting.average.state_dict().items(), fitting.model.state_dict().values(), strict=True
    )
    for (name, average), last in pairs:
        assert "num_batches" in name or torch.equal(average, last), name


def test_the_average_begins_as_the_plain_mean_of_the_steps(few: FashionMNIST, best: Recipe) -> None:
    recipe = replace(best, averaging=1.0)
    fitting = Fitting(recipe, *on_device(few.train, "cpu"))
    seen = []
    for _ in range(3):
        fitting.step(torch.arange(128))
        seen.append(fitting.model.linear2.weight.detach().clone())
    torch.testing.assert_close(fitting.average.linear2.weight, torch.stack(seen).mean(0))
