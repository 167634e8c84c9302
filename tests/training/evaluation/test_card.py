"""The model card shows the measured figures of the right runs."""

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from training.dataset import FashionMNIST
from training.evaluation.card import model_card
from training.evaluation.confidence import Answered, CalibrationFloor
from training.evaluation.fits import Fits
from training.evaluation.measures import Evaluation
from training.evaluation.robustness import UNSEEN, perturbations
from training.export import ExportReport, Provenance
from training.fitting.fit import fit
from training.fitting.recipes import RECIPES
from training.fitting.run import Config, Run

ROBUSTNESS = dict.fromkeys(perturbations(), 0.9) | dict.fromkeys(UNSEEN, 0.88)
FLOOR = CalibrationFloor(0, 0, 0)
ANY_EVALUATION = Evaluation(1, 1, 0, 0, FLOOR, [], [1] * 10, [1] * 10, [[0] * 10] * 10, ROBUSTNESS)


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
        ece_floor=CalibrationFloor(0.0055, 0.0031, 0.0079),
        answered=[Answered(0.5, 0.98, 0.94), Answered(0.99, 0.0, None)],
        precision=[0.111 + i / 100 for i in range(10)],
        recall=[0.555 + i / 100 for i in range(10)],
        confusion=[[0] * 10] * 10,
        robustness=ROBUSTNESS | {"blur 0.7": 0.9123, "scale 0.9": 0.8001},
    )
    exported = ExportReport(
        Path("x/m.onnx"), "f" * 64, 186_855, 10_000, 0.9277, 7.2e-6, (3,), (), 2e-7
    )
    source = Provenance("chapter", 0, "d" * 64, "population", {"torch": "9.9"})
    card = model_card(exported, source, 0.93, runs[0], Fits.of(runs), evaluation)
    scores = [run.results()["scores"] for run in runs]
    first, second = (score["moving"]["accuracy"] for score in scores)
    # Student's t for one degree of freedom is 12.7062; two values' standard error is |a - b| / 2.
    interval = f"{12.7062047 * abs(first - second) / 2:.4f}"
    mean = np.mean([score["population"]["accuracy"] for score in scores])
    deviation = np.std([score["population"]["accuracy"] for score in scores], ddof=1)
    moving = np.mean([score["moving"]["accuracy"] for score in scores])
    for text in (
        "| 10,000 | 0.9277 | 0.2011 | 0.0066 | 0.8858 | 0.8001 (scale 0.9) |",
        "is 0.0026.",
        "Recipe `chapter`, seed 0. The chapter's own hyper-parameters",
        "python -m training fit --recipe chapter --seed 0 --epochs 1 --device cpu --threads 1",
        f"| 1 | {scores[1]['moving']['accuracy']:.4f} | ",
        f"| mean | {moving:.4f} ± {interval} | {mean:.4f} ± ",
        "an ECE of 0.0055 on\naverage, and 0.0031 to 0.0079 in 90 %",
        "| 0.5 | 0.9800 | 0.9400 |",
        "| 0.99 | 0.0000 |  |",
        "| mean of the eight unseen | 0.8700 |",
        "| mean of the other eight | 0.9015 |",
        f" {deviation:.4f} |\n",
        "**This file carries: population.**",
        "| Ankle boot | 0.201 | 0.645 |",
        "![Confusion matrix](confusion.png)",
        "| scale 0.9, unseen | 0.8001 |",
        "| blur 0.7 | 0.9123 |",
        "Temperature 0.93",
        f"`{'f' * 64}`",
        "186,855 bytes",
        "7.2e-06",
        "closer than the limit of this check | 1 |",
        "that the file classifies differently | 0 |",
        "error of its self-test | 2.0e-07 |",
        f"fitting took | {runs[0].results()['seconds']['fit']:.0f} s on cpu |",
        "export runs/again --statistics population --temperature 0.93 --out m.onnx",
        "torch 9.9",
    ):
        assert text in card
    assert card.count("\n| --- |") == 7
    assert "It was not chosen on held-out images." in card


def test_the_card_says_how_the_temperature_was_chosen(
    runs: list[Run], few: FashionMNIST, tmp_path: Path
) -> None:
    recipe = runs[0].config().recipe
    held = Run.create(tmp_path / "h", replace(runs[0].config(), holdout=150))
    fit(few, recipe, run=held, holdout=150)
    exported = ExportReport(Path("m.onnx"), "f", 1, 1, 1, 0, (), (), 0)
    source = Provenance("chapter", 0, "d", "moving", {})
    card = model_card(exported, source, 1.0, runs[0], Fits.of(runs[:1], held), ANY_EVALUATION)
    results = held.results()
    assert "on 150 images held out" in card
    assert f"population {results['scores']['population']['accuracy']:.4f}." in card


def test_the_command_has_the_options_that_the_run_had(runs: list[Run], tmp_path: Path) -> None:
    run = Run(shutil.copytree(runs[0].folder, tmp_path / "run"))
    config = run.config()
    recipe = replace(config.recipe, learning_rate=0.05, batch_size=64)
    other = replace(config, recipe=recipe, batch_norm="scratch", seed=7, threads=3)
    run.write_json("config.json", asdict(other))
    exported = ExportReport(Path("m.onnx"), "f", 1, 1, 1, 0, (), (), 0)
    source = Provenance("chapter", 7, "d", "moving", {})
    card = model_card(exported, source, 1.0, run, Fits.of([run]), ANY_EVALUATION)
    assert (
        "fit --recipe chapter --seed 7 --epochs 1 --batch-size 64 --learning-rate 0.05"
        " --batch-norm scratch --device cpu --threads 3 --out runs/again\n"
    ) in card


def test_a_card_of_one_run_has_no_mean(runs: list[Run]) -> None:
    exported = ExportReport(Path("m.onnx"), "f", 1, 1, 1, 0, (), (), 0)
    source = Provenance("chapter", 0, "d", "moving", {})
    card = model_card(exported, source, 1.0, runs[0], Fits.of(runs[:1]), ANY_EVALUATION)
    assert "standard deviation |" not in card
