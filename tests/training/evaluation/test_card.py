"""The model card shows the measured figures of the right runs."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from training.dataset import FashionMNIST
from training.evaluation.card import Runs, model_card
from training.evaluation.measures import Evaluation
from training.export import ExportReport, Provenance
from training.fitting.fit import fit
from training.fitting.recipes import RECIPES
from training.fitting.run import Config, Run, RunError


@pytest.fixture(scope="module")
def runs(few: FashionMNIST, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    made = []
    for seed in (0, 1):
        recipe = replace(RECIPES["chapter"], epochs=1)
        config = Config(recipe, seed, "cpu", "torch", 0, 1, few.sha256, {"torch": "9.9"})
        run = Run.create(tmp_path_factory.mktemp("runs") / str(seed), config)
        fit(few, recipe, seed=seed, run=run)
        made.append(run)
    return made


def test_the_card_shows_the_measured_figures(runs: list[Run]) -> None:
    evaluation = Evaluation(
        images=10_000,
        accuracy=0.9277,
        nll=0.2011,
        ece=0.0066,
        precision=[0.111 + i / 100 for i in range(10)],
        recall=[0.555 + i / 100 for i in range(10)],
        confusion=[[0] * 10] * 10,
        robustness={"blur 0.7": 0.9123, "scale 0.9": 0.8001},
    )
    exported = ExportReport(
        Path("x/m.onnx"), "f" * 64, 186_855, 10_000, 0.9277, 7.2e-6, (3,), (), 2e-7
    )
    source = Provenance("chapter", 0, "d" * 64, "population", {"torch": "9.9"})
    card = model_card(exported, source, 0.93, Runs(runs[0], runs), evaluation)
    scores = [run.results()["scores"] for run in runs]
    mean = np.mean([score["population"]["accuracy"] for score in scores])
    deviation = np.std([score["population"]["accuracy"] for score in scores], ddof=1)
    moving = np.mean([score["moving"]["accuracy"] for score in scores])
    for text in (
        "| 10,000 | 0.9277 | 0.2011 | 0.0066 | 0.8562 | 0.8001 (scale 0.9) |",
        "is 0.0026.",
        "Recipe `chapter`, seed 0. The chapter's own hyper-parameters",
        "python -m training fit --recipe chapter --seed 0 --epochs 1 --device cpu --threads 1",
        f"| 1 | {scores[1]['moving']['accuracy']:.4f} | ",
        f"| mean | {moving:.4f} | {mean:.4f} |",
        f" {deviation:.4f} |\n",
        "**This file carries: population.**",
        "| Ankle boot | 0.201 | 0.645 |",
        "![Confusion matrix](confusion.png)",
        "| scale 0.9 | 0.8001 |",
        "Temperature 0.93",
        f"`{'f' * 64}`",
        "186,855 bytes",
        "7.2e-06",
        "torch 9.9",
    ):
        assert text in card
    assert card.count("\n| --- |") == 6
    assert "It was not chosen on held-out images." in card


def test_the_card_says_how_the_temperature_was_chosen(
    runs: list[Run], few: FashionMNIST, tmp_path: Path
) -> None:
    recipe = runs[0].config().recipe
    held = Run.create(tmp_path / "h", replace(runs[0].config(), holdout=150))
    fit(few, recipe, run=held, holdout=150)
    evaluation = Evaluation(1, 1, 0, 0, [1] * 10, [1] * 10, [[0] * 10] * 10, {"a": 1})
    exported = ExportReport(Path("m.onnx"), "f", 1, 1, 1, 0, (), (), 0)
    source = Provenance("chapter", 0, "d", "moving", {})
    card = model_card(exported, source, 1.0, Runs(runs[0], runs[:1], held), evaluation)
    results = held.results()
    assert "on 150 images held out" in card
    assert f"population {results['scores']['population']['accuracy']:.4f}." in card


def test_a_card_of_one_run_has_no_mean(runs: list[Run]) -> None:
    evaluation = Evaluation(1, 1, 0, 0, [1] * 10, [1] * 10, [[0] * 10] * 10, {"a": 1})
    exported = ExportReport(Path("m.onnx"), "f", 1, 1, 1, 0, (), (), 0)
    source = Provenance("chapter", 0, "d", "moving", {})
    card = model_card(exported, source, 1.0, Runs(runs[0], runs[:1]), evaluation)
    assert "standard deviation |" not in card


def test_a_card_takes_only_runs_of_one_recipe_with_different_seeds(
    runs: list[Run], few: FashionMNIST, tmp_path: Path
) -> None:
    config = runs[0].config()
    held = Run.create(tmp_path / "held", replace(config, holdout=150))
    fit(few, config.recipe, run=held, holdout=150)
    Runs(runs[0], runs, held).check()
    assert Runs(runs[0], runs, held).temperature() == held.results()["temperature"] != 1
    assert Runs(runs[0], runs).temperature() == 1
    other = Run(shutil.copytree(runs[1].folder, tmp_path / "other"))
    changed = replace(config, recipe=replace(config.recipe, learning_rate=0.2), seed=9)
    other.write_json("config.json", asdict(changed))
    unfinished = Run.create(tmp_path / "unfinished", replace(config, seed=8))
    cases = [
        (Runs(runs[0], [*runs, other]), "other was fitted by another recipe"),
        (Runs(runs[0], [*runs, unfinished]), "unfinished is not complete"),
        (Runs(runs[0], [*runs, runs[0]]), "two of the runs have the same seed"),
        (Runs(held, [held]), "held held images out: fit it without --holdout"),
        (Runs(runs[0], runs, runs[1]), "held no images out"),
    ]
    for case, message in cases:
        with pytest.raises(RunError, match=message):
            case.check()
