"""The options of a fit: defaults of this machine, refusals, new and resumed run folders."""

import json
import os
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from training.fitting import plan
from training.fitting.plan import (
    FitError,
    check,
    create_runs,
    new_config,
    resumed_run,
    threads_for,
    versions,
)
from training.fitting.recipes import RECIPES, Recipe
from training.fitting.run import Run, RunError


def test_impossible_fits_are_refused(chapter: Recipe) -> None:
    check(chapter, 60_000)
    with pytest.raises(FitError, match="a batch size of 157 leaves a last batch of one image"):
        check(replace(chapter, batch_size=157), 1100)
    check(replace(chapter, batch_size=157), 1100, holdout=1)
    with pytest.raises(FitError, match="at least two images a batch"):
        check(replace(chapter, batch_size=1), 1100)
    for holdout in (1099, 1100, -1):
        with pytest.raises(FitError, match=rf"use 0 to 1,098, not {holdout:,}"):
            check(chapter, 1100, holdout)
    check(chapter, 1100, 1098)
    with pytest.raises(FitError, match="9,000,000 steps are more than 5,000,000: lower --epochs"):
        check(replace(chapter, epochs=1_000_000), 1100)
    check(replace(chapter, batch_size=110, epochs=500_000), 1100)  # exactly 5,000,000


@pytest.mark.parametrize(
    ("cores", "batch_size", "processes", "threads"),
    [
        (1, 512, 1, 1),
        (2, 128, 1, 2),
        (16, 128, 1, 2),  # 64 images each
        (16, 512, 1, 8),
        (16, 512, 4, 4),
        (2, 512, 5, 1),
        (8, 32, 1, 1),
    ],
)
def test_threads_share_the_cores_and_have_enough_to_do(
    cores: int,
    batch_size: int,
    processes: int,
    threads: int,
    chapter: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "cores", lambda: cores)
    recipe = replace(chapter, batch_size=batch_size)
    assert threads_for(recipe, "cpu", processes) == threads
    assert threads_for(recipe, "cuda", processes) == 1
    config = new_config(recipe, "", device="cpu", processes=processes)
    assert config.threads == threads
    assert new_config(recipe, "", device="cpu", threads=3).threads == 3


def test_cores_are_those_that_the_process_may_use() -> None:
    assert 1 <= plan.cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize("there", [True, False])
def test_auto_takes_a_gpu_and_cuda_fails_without_one(
    there: bool, chapter: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(plan, "cores", lambda: 2)
    found = new_config(chapter, "")
    assert (found.device, found.threads) == (("cuda", 1) if there else ("cpu", 2))
    assert new_config(chapter, "", device="cpu").device == "cpu"
    if there:
        assert new_config(chapter, "", device="cuda").device == "cuda"
    else:
        with pytest.raises(FitError, match="torch finds no CUDA device here: use --device cpu"):
            new_config(chapter, "", device="cuda")


def test_a_new_configuration_has_all_options(chapter: Recipe) -> None:
    config = new_config(
        chapter, "abc", seed=3, device="cpu", batch_norm="scratch", holdout=7, threads=5
    )
    assert asdict(config) == {
        "recipe": asdict(chapter),
        "seed": 3,
        "device": "cpu",
        "batch_norm": "scratch",
        "holdout": 7,
        "threads": 5,
        "dataset_sha256": "abc",
        "versions": versions(),
    }
    assert versions() == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "numpy": version("numpy"),
    }


def test_each_seed_gets_a_folder_with_its_configuration(chapter: Recipe, tmp_path: Path) -> None:
    config = new_config(chapter, "", device="cpu")
    (run,) = create_runs(tmp_path / "one", config, [7], 1000)
    assert run.folder == tmp_path / "one"
    assert run.config() == replace(config, seed=7)
    runs = create_runs(tmp_path / "many", config, [4, 6], 1000)
    assert [run.folder.name for run in runs] == ["many-4", "many-6"]
    assert [run.config().seed for run in runs] == [4, 6]


def test_no_folder_is_made_where_one_is_in_use_or_the_fit_impossible(
    chapter: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "many-5").mkdir()
    (tmp_path / "many-5" / "notes.txt").write_text("mine")
    config = new_config(chapter, "", device="cpu")
    with pytest.raises(RunError, match="many-5 already exists"):
        create_runs(tmp_path / "many", config, [4, 5], 1000)
    with pytest.raises(FitError, match="--holdout must leave"):
        create_runs(tmp_path / "other", replace(config, holdout=1000), [4], 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["many-5"]


@pytest.fixture
def run(chapter: Recipe, tmp_path: Path) -> Run:
    config = new_config(chapter, "abc", seed=5, device="cpu", threads=1)
    return Run.create(tmp_path / "run", config)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"seed": 6}, "was started with seed 5, not 6: resume it with its own settings"),
        ({"epochs": 3}, "epochs 2, not 3"),
        ({"recipe": "best"}, "recipe chapter, not best"),
        ({"batch_norm": "scratch"}, "batch norm torch, not scratch"),
        ({"threads": 2}, "threads 1, not 2"),
        ({"seed": 5, "dataset_sha256": "other"}, "dataset sha256 abc, not other"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(
    run: Run, wanted: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        resumed_run(run.folder, wanted)


def test_a_run_is_resumed_with_its_own_settings(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"seed": 5, "epochs": 2, "recipe": "chapter", "device": "auto", "learning_rate": 0.1}
    assert resumed_run(run.folder, own).config() == run.config()
    fields = json.loads((run.folder / "config.json").read_text()) | {"device": "cuda"}
    run.write_json("config.json", fields)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FitError, match="torch finds no CUDA device"):
        resumed_run(run.folder, {})


def test_a_complete_run_is_not_resumed(run: Run, tmp_path: Path) -> None:
    run.write_json("results.json", {})
    with pytest.raises(RunError, match="is complete: there is nothing to resume"):
        resumed_run(run.folder, {})
    with pytest.raises(RunError, match="is not a run folder"):
        resumed_run(tmp_path / "none", {})


def test_the_best_recipe_is_that_of_the_committed_run() -> None:
    committed = Run(Path(__file__).parents[3] / "models" / "run").config()
    assert committed.recipe == RECIPES["best"]
    assert committed.threads == 1
