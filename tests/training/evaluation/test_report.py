from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.dataset import FashionMNIST
from training.evaluation import report
from training.evaluation.measures import Evaluation
from training.export import ExportReport, Provenance
from training.fitting.fit import fit
from training.fitting.recipes import RECIPES
from training.fitting.run import Config, Run


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


def colours(path: Path) -> int:
    with Image.open(path) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


def test_pictures_are_drawn_the_same_each_time(runs: list[Run]) -> None:
    names = ("curves.png", "confusion.png", "norms.png")
    drawn = []
    for _ in range(2):
        report.draw_run(runs[0])
        drawn.append([(runs[0].folder / name).read_bytes() for name in names])
    assert drawn[0] == drawn[1]
    assert all(colours(runs[0].folder / name) > 20 for name in names)


@pytest.mark.parametrize("name", ["a.txt", "a.svg", "a"])
def test_a_picture_is_a_png_whatever_its_name(name: str, tmp_path: Path) -> None:
    report.draw_confusion([[1] * 10] * 10, tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert image.format == "PNG"


def test_the_card_says_what_was_measured(runs: list[Run]) -> None:
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
    card = report.model_card(exported, source, 0.93, runs[0], runs, evaluation)
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
    assert "No image was held out" in card


def test_the_card_tells_what_was_chosen_on_held_out_images(
    runs: list[Run], few: FashionMNIST, tmp_path: Path
) -> None:
    recipe = runs[0].config().recipe
    held = Run.create(tmp_path / "h", replace(runs[0].config(), holdout=300))
    fit(few, recipe, run=held, holdout=300)
    evaluation = Evaluation(1, 1, 0, 0, [1] * 10, [1] * 10, [[0] * 10] * 10, {"a": 1})
    exported = ExportReport(Path("m.onnx"), "f", 1, 1, 1, 0, (), (), 0)
    source = Provenance("chapter", 0, "d", "moving", {})
    card = report.model_card(exported, source, 1.0, runs[0], runs[:1], evaluation, held)
    results = held.results()
    assert "Of 300 images" in card
    assert f"{results['temperature']:g}; the" in card
    assert f"population {results['scores']['population']['accuracy']:.4f}." in card


def test_a_card_of_one_run_has_no_mean(runs: list[Run]) -> None:
    evaluation = Evaluation(1, 1, 0, 0, [1] * 10, [1] * 10, [[0] * 10] * 10, {"a": 1})
    exported = ExportReport(Path("m.onnx"), "f", 1, 1, 1, 0, (), (), 0)
    source = Provenance("chapter", 0, "d", "moving", {})
    card = report.model_card(exported, source, 1.0, runs[0], runs[:1], evaluation)
    assert "standard deviation |" not in card
