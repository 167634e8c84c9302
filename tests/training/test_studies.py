"""The studies on few images, and their committed pages against the committed measurements."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import training.__main__ as command_line
from training.dataset import FashionMNIST, Split
from training.fitting.fit import fit
from training.fitting.images import on_device
from training.fitting.recipes import RECIPES, Recipe
from training.fitting.run import RunError
from training.fitting.scoring import evaluate, predict
from training.model import BNLeNet, initialise
from training.studies import batch_size, statistics
from training.studies.records import Records

PAGES = Path(__file__).parents[2] / "docs" / "studies"
CONDITIONS = {"epochs": 3}


@pytest.fixture
def chapter() -> Recipe:
    return replace(RECIPES["chapter"], epochs=3)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command_line.main, ["study", *map(str, arguments)])


def test_each_epoch_is_scored_as_fitting_scores_it(
    few: FashionMNIST, chapter: Recipe, tmp_path: Path
) -> None:
    records = Records(tmp_path / "a.jsonl", CONDITIONS)
    statistics.measure(few, chapter, 4, records)
    fitted = fit(few, chapter, seed=4)
    (moving,) = statistics.accuracies(records.lines, [4], "moving")
    assert moving == [epoch.accuracy for epoch in fitted.epochs]
    last = records.lines[-1]
    for kind in ("moving", "population"):
        assert last[kind]["accuracy"] == fitted.scores[kind].accuracy
        assert last[kind]["loss"] == pytest.approx(fitted.scores[kind].loss, rel=1e-6)
    # There are fewer training images than it would draw, so it draws them all.
    assert last["few"]["loss"] == pytest.approx(last["population"]["loss"], rel=1e-5)
    assert last["moving"]["loss"] != pytest.approx(last["population"]["loss"], rel=1e-2)


def test_a_killed_study_goes_on_and_measures_nothing_twice(
    few: FashionMNIST, chapter: Recipe, tmp_path: Path
) -> None:
    def kill_at(count: int) -> Callable[[dict[str, Any]], None]:
        def on_line(_: dict[str, Any]) -> None:
            seen.append(1)
            if len(seen) == count:
                raise KeyboardInterrupt

        seen: list[int] = []
        return on_line

    whole = Records(tmp_path / "whole.jsonl", CONDITIONS)
    statistics.measure(few, chapter, 0, whole)
    with pytest.raises(KeyboardInterrupt):
        statistics.measure(few, chapter, 0, Records(tmp_path / "a.jsonl", CONDITIONS), kill_at(2))
    statistics.measure(few, chapter, 0, Records(tmp_path / "a.jsonl", CONDITIONS), kill_at(2))
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    statistics.measure(few, chapter, 0, Records(tmp_path / "a.jsonl", CONDITIONS), kill_at(1))


def test_measurements_under_other_conditions_are_not_mixed(tmp_path: Path) -> None:
    Records(tmp_path / "a.jsonl", CONDITIONS).add({"seed": 0})
    with pytest.raises(RunError, match=r"a\.jsonl was begun with epochs 3, not 5: choose another"):
        Records(tmp_path / "a.jsonl", {"epochs": 5})
    assert Records(tmp_path / "a.jsonl", CONDITIONS).lines == [{"seed": 0}]


@pytest.mark.parametrize("text", ["", "{", '{"epochs": 3}\n{"seed"'])
def test_damaged_measurements_are_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(RunError, match=r"a\.jsonl is damaged .*: delete it"):
        Records(tmp_path / "a.jsonl", CONDITIONS)


def test_a_place_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot write .* \(.+\): choose another --out"):
        Records(tmp_path / "file" / "a.jsonl", CONDITIONS).add({"seed": 0})
    with pytest.raises(RunError, match=r"cannot read .* \(.+\): choose another --out"):
        Records(tmp_path, CONDITIONS)


def test_the_spread_is_numpys() -> None:
    curves = np.random.default_rng(0).uniform(0.7, 0.9, (3, 8))
    ends = curves[:, -5:]
    found = statistics.spread(curves.tolist())
    assert found.mean == pytest.approx(ends.mean())
    assert found.between_epochs == pytest.approx(np.sqrt(ends.var(1, ddof=1).mean()))
    assert found.between_seeds == pytest.approx(np.sqrt(ends.var(0, ddof=1).mean()))
    assert found.largest_jump == np.abs(np.diff(ends, axis=1)).max()
    assert found.lowest == ends.min()


def test_the_command_writes_page_figure_and_measurements(
    few: FashionMNIST, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "load", lambda _: few)
    asked = ("statistics", "--seeds", "3,0", "--epochs", 2, "--out", tmp_path)
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "statistics.jsonl").read_text().splitlines()]
    assert [(line["seed"], line["epoch"]) for line in lines[1:]] == [(0, 1), (0, 2), (3, 1), (3, 2)]
    spread = json.loads(result.stdout)
    page = (tmp_path / "statistics.md").read_text()
    assert f"| between seeds | {spread['moving']['between_seeds']:.4f} | " in page
    accuracies = " | ".join(f"{lines[2][kind]['accuracy']:.4f}" for kind in statistics.KINDS)
    assert f"| 0 | {accuracies} |" in page
    assert "--seeds 0,3 --epochs 2" in page
    with Image.open(tmp_path / "statistics.png") as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 20


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("0", "needs at least two"),
        ("0-", "is not a list of seeds"),
        ("4-1", "is not a list of seeds"),
    ],
)
def test_bad_seeds_get_a_sentence(seeds: str, message: str) -> None:
    result = run("statistics", "--seeds", seeds)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("company", batch_size.COMPANY)
def test_every_image_is_in_one_batch(company: str) -> None:
    labels = torch.tensor([3, 1, 3, 1, 1, 2, 2, 3, 1])
    parts = batch_size.batches(labels, 2, company, seed=0)
    assert sorted(torch.cat(parts).tolist()) == list(range(9))
    if company == "same":
        assert [len(labels[part].unique()) for part in parts] == [1] * len(parts)  # type: ignore[no-untyped-call] # torch forgot
    else:
        assert [len(part) for part in parts] == [2, 2, 2, 2, 1]
    again, other = (batch_size.batches(labels, 2, company, seed) for seed in (0, 1))
    assert all(map(torch.equal, parts, again))
    assert not all(map(torch.equal, parts, other))


def test_batch_statistics_are_those_of_the_chapters_layer(few: FashionMNIST) -> None:
    """The answers by torch's layers are those of ours, in training mode, batch by batch."""
    model, ours = BNLeNet().eval(), BNLeNet("scratch")
    initialise(model, 1)
    initialise(ours, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = on_device(few.test, "cpu")
    parts = batch_size.batches(labels, 8, "any", seed=0)
    found = batch_size.answers(model, images, parts)
    with torch.no_grad():
        for part in parts:
            assert torch.equal(found[part], ours(images[part] / 255).argmax(1))
    assert not model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(found, predict(model, images).argmax(1))


def test_shares_are_counted_against_labels_and_fixed_statistics(
    few: FashionMNIST, chapter: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_size, "SIZES", (4, 64))
    model = fit(few, chapter).model
    # As many of each class, as in the whole test set: no batch of one is left over.
    some = np.concatenate([np.flatnonzero(few.test.labels == c)[:12] for c in range(10)])
    test = Split(few.test.images[some], few.test.labels[some])
    records = Records(tmp_path / "a.jsonl", {})
    batch_size.measure(model, test, records)
    assert [(line["company"], line["size"]) for line in records.lines] == [
        ("any", 4),
        ("any", 64),
        ("same", 4),
        ("same", 64),
    ]
    images, labels = on_device(test, "cpu")
    line = records.lines[1]
    deals = [batch_size.batches(labels, 64, "any", seed) for seed in range(batch_size.ORDERS)]
    found = np.stack([batch_size.answers(model, images, deal).numpy() for deal in deals])
    fixed = predict(model, images).argmax(1).numpy()
    assert line["accuracy"] == pytest.approx((found == test.labels).mean(1).tolist())
    assert line["changed"] == pytest.approx((found != fixed).mean(1).tolist())
    unstable = np.mean([len(set(column)) > 1 for column in found.T])
    assert line["unstable"] == pytest.approx(unstable)
    assert line["fixed"] == evaluate(model, images, labels).accuracy
    measured = list(records.lines)
    batch_size.measure(model, test, records)
    assert records.lines == measured


def test_the_committed_pages_are_made_of_the_committed_measurements() -> None:
    records = Records(PAGES / "statistics.jsonl")
    seeds = sorted({line["seed"] for line in records.lines})
    assert (PAGES / "statistics.md").read_text() == statistics.page(records, seeds)
    epochs = range(1, records.conditions["epochs"] + 1)
    measured = {(line["seed"], line["epoch"]) for line in records.lines}
    assert measured == {(seed, epoch) for seed in range(5) for epoch in epochs}
    assert len(epochs) == 10
    records = Records(PAGES / "batch-size.jsonl")
    assert (PAGES / "batch-size.md").read_text() == batch_size.page(records)
