"""The file of fits: read, written, extended; and the fits that do not belong into it."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from training.dataset import FashionMNIST
from training.evaluation.fits import Fit, Fits
from training.fitting.fit import fit
from training.fitting.recipes import RECIPES
from training.fitting.run import Config, Run, RunError

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def runs(few: FashionMNIST, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Return runs of seeds 0 and 1, and one of seed 0 with held-out images."""
    recipe = replace(RECIPES["chapter"], epochs=1)
    made = []
    for name, seed, holdout in (("0", 0, 0), ("1", 1, 0), ("held", 0, 150)):
        config = Config(recipe, seed, "cpu", "torch", holdout, 1, few.sha256, {"torch": "9.9"})
        run = Run.create(tmp_path_factory.mktemp("runs") / name, config)
        fit(few, recipe, seed=seed, run=run, holdout=holdout)
        made.append(run)
    return made


def test_fits_have_what_their_run_folders_have(runs: list[Run]) -> None:
    *seeds, held = runs
    fits = Fits.of(seeds[::-1], held)
    assert [one.seed for one in fits.fits] == [0, 1]
    results = seeds[1].results()
    assert asdict(fits.fits[1])["scores"] == results["scores"]
    assert fits.fits[1].seconds == results["seconds"]["fit"]
    assert fits.accuracies("moving")[1] == results["scores"]["moving"]["accuracy"]
    assert fits.held_out is not None
    assert fits.held_out.holdout == 150
    assert fits.temperature == held.results()["temperature"] != 1
    assert Fits.of(seeds).temperature == 1


def test_a_file_of_fits_gives_back_what_was_written(runs: list[Run], tmp_path: Path) -> None:
    fits = Fits.of(runs[:2], runs[2])
    fits.write(tmp_path / "fits.json")
    assert Fits.read(tmp_path / "fits.json") == fits
    assert json.loads((tmp_path / "fits.json").read_text())["fits"][1]["seed"] == 1


def test_runs_that_do_not_belong_together_are_refused(runs: list[Run], tmp_path: Path) -> None:
    first, second, held = runs
    config = first.config()
    other = Run(shutil.copytree(second.folder, tmp_path / "other"))
    changed = replace(config, recipe=replace(config.recipe, learning_rate=0.2), seed=9)
    other.write_json("config.json", asdict(changed))
    unfinished = Run.create(tmp_path / "unfinished", replace(config, seed=8))
    cases: list[tuple[Sequence[Run], Run | None, str]] = [
        ([first, other], None, "other was fitted by another recipe"),
        ([first, unfinished], None, "unfinished is not complete"),
        ([first, second, first], None, "with seed 0 already: two of the runs have the same seed"),
        ([first, held], None, "held held images out: fit it without --holdout"),
        ([first], second, "1 held no images out"),
        ([other], held, "held was fitted by another recipe"),
    ]
    for seeds, held_out, message in cases:
        with pytest.raises(RunError, match=message):
            Fits.of(seeds, held_out)


def test_a_damaged_file_of_fits_is_refused_in_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "fits.json"
    with pytest.raises(RunError, match="no file of fits"):
        Fits.read(file)
    file.write_text('{"fits": [}')
    with pytest.raises(RunError, match=r"fits.json is damaged \(.*JSON"):
        Fits.read(file)
    content = json.loads((ROOT / "docs" / "fits.json").read_text())
    content["fits"][0]["seed"] = "zero"
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"damaged \(fits\.0\.seed: "):
        Fits.read(file)


def test_the_committed_run_is_in_the_committed_file() -> None:
    """Of the other seeds only the published table is left, and the file says so."""
    fits = Fits.read(ROOT / "docs" / "fits.json")
    run = Run(ROOT / "models" / "run")
    assert fits.recipe == run.config().recipe
    found = Fit.of(run, fits.fits[0].hardware, "models/run/results.json")
    assert replace(fits.fits[0], file=None) == found
    assert {one.source for one in fits.fits if one.seed in range(1, 5)} == {
        "published table; run folders not kept"
    }
