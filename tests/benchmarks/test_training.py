"""The training benchmark, on little data."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from rich.progress import Progress

import benchmarks.training as bench
from training.dataset import FashionMNIST, Split
from training.fitting.recipes import RECIPES


@pytest.fixture
def few(fashion_mnist: FashionMNIST, monkeypatch: pytest.MonkeyPatch) -> FashionMNIST:
    torch.set_num_threads(1)
    few = replace(fashion_mnist, train=bench.first(fashion_mnist.train, 25))
    few = replace(few, test=bench.first(fashion_mnist.test, 25))
    monkeypatch.setattr(bench, "load", lambda: few)
    return few


def test_all_loops_train_the_same_network_alike(few: FashionMNIST) -> None:
    """A batch is the whole set, so that the order of the images in a loop does not matter."""
    small = replace(few, train=Split(few.train.images[:600], few.train.labels[:600]))
    ours, plain, chapter = (make(small, 600, "cpu") for make in bench.LOOPS.values())
    for _ in range(3):
        for loop in (ours, plain, chapter):
            loop.train()
    assert isinstance(ours, bench.Ours)
    for other in (plain, chapter):
        assert isinstance(other, bench.Plain | bench.Chapter)
        pairs = zip(
            ours.fitting.model.named_parameters(), other.model.named_parameters(), strict=True
        )
        for (name, a), (_, b) in pairs:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
        assert other.evaluate() == pytest.approx(ours.evaluate(), abs=0.01)


@pytest.mark.usefixtures("few")
def test_a_quick_run_ends_with_one_line_of_json() -> None:
    result = CliRunner().invoke(bench.main, ["--quick"])
    assert result.exit_code == 0, result.output
    *_, line = result.stdout.splitlines()
    document = json.loads(line)
    assert json.loads(CliRunner().invoke(bench.main, ["--quick", "--json"]).stdout)
    measured = {(row["loop"], row["batch_size"]) for row in document["rows"]}
    assert measured == {(name, size) for name in bench.LOOPS for size in (128, 512)}
    plain = {row["batch_size"]: row for row in document["rows"] if row["loop"] == bench.PLAIN}
    for row in document["rows"]:
        assert row["training_images_per_second"] >= row["images_per_second"] > 0
        ratio = row["images_per_second"] / plain[row["batch_size"]]["images_per_second"]
        assert row["of_plain"] == pytest.approx(ratio, rel=0.02)  # of one round, both rounded
    assert document["machine"]["torch"] == torch.__version__


def test_the_time_to_an_accuracy_ends_with_the_epoch_that_reaches_it(few: FashionMNIST) -> None:
    recipe = replace(RECIPES["chapter"], epochs=8)
    with Progress(disable=True) as progress:
        low, high = bench.time_to_accuracy(few, recipe, (0.2, 0.3), progress)
        (missed,) = bench.time_to_accuracy(few, replace(recipe, epochs=1), (0.99,), progress)
    assert 1 <= low["epochs"] <= high["epochs"] < 8
    assert 0 < low["seconds"] <= high["seconds"]
    assert missed["seconds"] is None
