import json
import platform
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result

import training.__main__ as command_line
from training.dataset import DatasetError, FashionMNIST
from training.fitting.recipes import RECIPES, Recipe
from training.fitting.run import Run
from training.fitting.step import Fitting

FIT = ("fit", "--epochs", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def few_images(few: FashionMNIST, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands see the first images only."""
    monkeypatch.setattr(command_line, "load", lambda _: few)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command_line.main, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def fail(*arguments: object) -> str:
    """Return the one sentence that a failing command prints."""
    result = run(*arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit)
    return result.stderr


def test_fit_export_evaluate_from_end_to_end_and_again(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        folder = tmp_path / name
        result = succeed(*FIT, "--recipe", "chapter", "--out", folder)
        assert re.search(
            r"epoch 2/2  loss 1\.\d{4}  training 0\.\d{4}  test 0\.\d{4}", result.stderr
        )
        assert "population" in result.stdout
        out = folder / "model" / "m.onnx"
        exported = json.loads(succeed("export", folder, "--out", out, "--json").stdout)
        hashes.append(exported["sha256"])
    assert hashes[0] == hashes[1]
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.safetensors",
        "config.json",
        "confusion.png",
        "curves.png",
        "metrics.jsonl",
        "model",
        "norms.png",
        "results.json",
    }
    assert {path.name for path in out.parent.iterdir()} == {
        "MODEL_CARD.md",
        "confusion.png",
        "m.onnx",
    }
    judged = json.loads(succeed("evaluate", out, "--json").stdout)
    scores = json.loads((folder / "results.json").read_text())["scores"]
    assert judged["accuracy"] == pytest.approx(scores["population"]["accuracy"], abs=1e-9)
    assert judged["accuracy"] == pytest.approx(exported["test_accuracy"])
    assert judged["robust_mean"] == pytest.approx(sum(judged["robustness"].values()) / 16)
    printed = succeed("evaluate", out).stdout
    assert f"accuracy {judged['accuracy']:.4f}" in printed
    assert "rotation -10" in printed
    assert "\n 9 Ankle boot" in printed  # whole, though nobody said how wide the screen is
    assert max(map(len, printed.splitlines())) <= 80


def test_the_metrics_have_a_line_an_epoch(tmp_path: Path) -> None:
    succeed(*FIT, "--out", tmp_path / "a", "--quiet")
    lines = [
        json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert 0 < line["accuracy"] < 1
        assert 0 < line["train_accuracy"] < 1
        assert line["images_per_second"] > 0
        assert line["learning_rate"] == pytest.approx(0.1)


def test_quiet_prints_nothing_and_json_one_line(tmp_path: Path) -> None:
    assert succeed(*FIT, "--out", tmp_path / "a", "--quiet").output == ""
    result = succeed(*FIT, "--out", tmp_path / "b", "--json", "--holdout", 100)
    assert result.stderr == ""
    assert json.loads(result.stdout)["scores"]["moving"]["accuracy"] > 0
    judged = [Run(tmp_path / name).results()["judged_on"] for name in ("a", "b")]
    assert judged == ["test set", "held-out images"]


def test_options_override_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")  # metadata has no build
    options = ("--batch-size", 50, "--learning-rate", 0.05, "--seed", 7, "--batch-norm", "scratch")
    succeed(*FIT, *options, "--holdout", 100, "--out", tmp_path / "a", "--quiet")
    config = Run(tmp_path / "a").config()
    assert (config.recipe.batch_size, config.recipe.learning_rate) == (50, 0.05)
    assert (config.seed, config.batch_norm, config.holdout) == (7, "scratch", 100)
    assert config.versions["torch"] == "2.13.0+cu130"


def test_gamma_and_beta_are_printed(tmp_path: Path) -> None:
    succeed(*FIT, "--out", tmp_path / "a", "--quiet")
    parameters = json.loads(succeed("norms", tmp_path / "a", "--json").stdout)
    checkpoint = Run(tmp_path / "a").checkpoint()
    assert list(parameters) == ["norm1", "norm2", "norm3", "norm4"]
    assert parameters["norm1"]["gamma"] == checkpoint["norm1.weight"].tolist()
    assert parameters["norm4"]["beta"] == checkpoint["norm4.bias"].tolist()
    first = f"  gamma {parameters['norm1']['gamma'][0]:+.3f}"
    assert first in succeed("norms", tmp_path / "a").stdout


def test_ctrl_c_leaves_a_run_that_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed(*FIT, "--out", tmp_path / "whole", "--quiet")
    step = Fitting.step

    def interrupted(self: Fitting, *arguments: Any, **options: Any) -> None:
        if int(self.done) == 12:
            raise KeyboardInterrupt
        step(self, *arguments, **options)

    monkeypatch.setattr(Fitting, "step", interrupted)
    result = run(*FIT, "--out", tmp_path / "a")
    assert result.exit_code == 130
    assert "Interrupted after 1 of 2 epochs" in result.stderr
    command = shlex.split(result.stderr.split("python -m training ")[1])
    monkeypatch.setattr(Fitting, "step", step)
    succeed(*command, "--quiet")
    files = [(tmp_path / name / "checkpoint.safetensors").read_bytes() for name in ("whole", "a")]
    assert files[0] == files[1]


def test_resuming_with_other_versions_is_told(tmp_path: Path) -> None:
    """The weights will not be those of an unbroken fit."""
    succeed(*FIT, "--out", tmp_path / "a", "--quiet")
    (tmp_path / "a" / "results.json").unlink()
    assert "Resumed" not in succeed("fit", "--resume", "--out", tmp_path / "a").stderr
    (tmp_path / "a" / "results.json").unlink()
    settings = json.loads((tmp_path / "a" / "config.json").read_text())
    settings["versions"]["torch"] = "1.0"
    (tmp_path / "a" / "config.json").write_text(json.dumps(settings))
    told = succeed("fit", "--resume", "--out", tmp_path / "a").stderr
    assert f"Resumed with python {platform.python_version()}, torch {torch.__version__}" in told


def test_several_seeds_get_a_run_folder_each(tmp_path: Path) -> None:
    out = tmp_path / "many"
    result = succeed(*FIT, "--seeds", "4-6", "--out", out)
    assert "epoch 2/2  loss 1." in result.stderr
    assert re.search(r"moving +0\.\d{4} mean, standard deviation 0\.\d{4}", result.stdout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many-4", "many-5", "many-6"]
    runs = [Run(tmp_path / f"many-{seed}") for seed in (4, 5, 6)]
    assert [run.config().seed for run in runs] == [4, 5, 6]
    assert len({run.results()["scores"]["moving"]["loss"] for run in runs}) == 3
    assert (runs[1].folder / "curves.png").exists()
    assert "many-4 already exists" in fail(*FIT, "--seeds", "4-5", "--out", out)
    assert "leave out --seed and" in fail(*FIT, "--seeds", "0-1", "--seed", 1, "--out", out)


@pytest.mark.parametrize(
    ("seeds", "told"),
    [
        ("", "'' is no list of seeds such as 0-4 or 0,3,7"),
        ("²-5", "is no list of seeds"),
        ("5-3", "is no list of seeds"),
        ("-1-2", "is no list of seeds"),
        ("3-3", "at least two of them"),
        ("0-1000", "'0-1000' is beyond 1,000 seeds up to 2147483648"),
        ("0,2147483649", "is beyond 1,000 seeds"),
        ("9" * 5000, "is no list of seeds"),
    ],
)
def test_lists_of_seeds_that_are_none_are_refused(seeds: str, told: str, tmp_path: Path) -> None:
    assert told in fail(*FIT, "--seeds", seeds, "--out", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_other_settings_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    succeed(*FIT, "--seed", 5, "--out", folder, "--quiet")
    resume = ("fit", "--resume", "--out", folder)
    assert "is complete: there is nothing to resume" in fail(*resume)
    (folder / "results.json").unlink()
    assert "was started with seed 5, not 6: resume it with its own" in fail(*resume, "--seed", 6)
    assert "epochs 2, not 3" in fail(*resume, "--epochs", 3)
    assert "recipe chapter, not best" in fail(*resume, "--recipe", "best")
    succeed(*resume, "--seed", 5, "--epochs", 2, "--recipe", "chapter", "--quiet")


def test_resuming_on_another_data_set_is_refused(
    tmp_path: Path, few: FashionMNIST, monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed(*FIT, "--out", tmp_path / "a", "--quiet")
    (tmp_path / "a" / "results.json").unlink()
    monkeypatch.setattr(command_line, "load", lambda _: replace(few, sha256="other"))
    assert "dataset sha256" in fail("fit", "--resume", "--out", tmp_path / "a")


def test_the_card_tells_what_the_finish_changes(
    best: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "best", best)
    succeed("fit", "--recipe", "best", "--out", tmp_path / "a", "--quiet")
    succeed("export", tmp_path / "a", "--out", tmp_path / "model" / "m.onnx")
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text()
    for row in ("| rotation | 6.0 |", "| finish | 0.5 |", "| shift in the finish | 1.0 |"):
        assert row in card
    assert "rotation in the finish" not in card
    assert "fit --recipe best --seed 0" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "none"), "'none' is not one of 'chapter', 'best'"),
        (("--batch-size", 1), "1 is not in the range x>=2"),
        (("--batch-size", 157), "leaves a last batch of one image"),
        (("--learning-rate", "nan"), "nan is not a number above zero"),
        (("--learning-rate", "1e38"), "no longer finite in epoch 1, step"),
        (("--holdout", 1100), "--holdout must leave images"),
        (("--resume",), "is no run folder"),
    ],
)
def test_bad_input_gets_a_sentence(
    arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    assert message in fail(*FIT, "--out", tmp_path / "a", *arguments)


def test_cuda_is_not_replaced_in_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no CUDA device" in fail("fit", "--device", "cuda", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "already exists" in fail(*FIT, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_disk_that_fills_up_is_told_and_nothing_half_written_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "checkpoint" in path.name:
            write(path, data[:1000])
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    file = tmp_path / "a" / "checkpoint.safetensors"
    told = f"Error: No space left on device: {file}.\n"
    assert fail(*FIT, "--out", tmp_path / "a", "--quiet") == told
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "metrics.jsonl"]


def test_a_damaged_data_set_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(_: Path | None) -> FashionMNIST:
        raise DatasetError("x.gz is damaged: fetch it again.")

    monkeypatch.setattr(command_line, "load", damaged)
    assert fail(*FIT, "--out", tmp_path / "a") == "Error: x.gz is damaged: fetch it again.\n"


def test_an_unfinished_run_is_not_exported(tmp_path: Path) -> None:
    succeed(*FIT, "--out", tmp_path / "a", "--quiet")
    (tmp_path / "a" / "results.json").unlink()
    assert "is not complete" in fail("export", tmp_path / "a", "--out", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_the_temperature_comes_from_held_out_images(tmp_path: Path) -> None:
    for name, options in (
        ("a", ()),
        ("held", ("--holdout", 300)),
        ("other", ("--batch-size", 100)),
    ):
        succeed(*FIT, "--out", tmp_path / name, "--quiet", *options)
    export = ("export", tmp_path / "a", "--out", tmp_path / "m.onnx")
    assert "held no images out" in fail(*export, "--held-out", tmp_path / "a")
    assert "by another recipe" in fail(*export, "--seeds-from", tmp_path / "other")
    assert "held some out" in fail("export", tmp_path / "held", "--out", tmp_path / "m.onnx")
    assert "have the same seed" in fail(*export, "--seeds-from", tmp_path / "." / "a" / ".." / "a")
    assert not (tmp_path / "m.onnx").exists()
    succeed(*export, "--held-out", tmp_path / "held")
    temperature = Run(tmp_path / "held").results()["temperature"]
    metadata = onnx.load(tmp_path / "m.onnx").metadata_props
    assert float({entry.key: entry.value for entry in metadata}["temperature"]) == temperature
    assert temperature != 1
