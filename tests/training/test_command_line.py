"""The command line as people use it: its output, its refusals, its files."""

import json
import platform
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor

import training.__main__ as command_line
from training.dataset import DatasetError, FashionMNIST
from training.evaluation import pictures
from training.export import ExportReport, export
from training.fitting import plan, processes
from training.fitting.recipes import RECIPES, Recipe
from training.fitting.run import Run
from training.fitting.step import Fitting

FIT = ("fit", "--epochs", "2", "--device", "cpu", "--threads", "1")


@pytest.fixture(autouse=True)
def few_images(few: FashionMNIST, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the commands see the first images only."""
    monkeypatch.setattr(command_line, "load", lambda _: few)


@pytest.fixture(autouse=True)
def empty_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save empty files: a picture takes a third of a second, and test_pictures.py draws them."""
    monkeypatch.setattr(pictures, "save_figure", lambda _figure, out: out.touch())


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


@pytest.fixture(scope="module")
def finished(few: FashionMNIST, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fit the chapter's recipe, seed 5, by the command line; tests must not change the folder."""
    folder = tmp_path_factory.mktemp("finished") / "a"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "load", lambda _: few)
        succeed(*FIT, "--seed", 5, "--out", folder, "--quiet")
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "a")


@pytest.fixture
def unfinished(copied: Path) -> Path:
    """Return a copy of the finished run as it was before its results were written."""
    (copied / "results.json").unlink()
    return copied


def follow(printed: str, beginning: str) -> Result:
    """Run the command that the output has after `beginning`."""
    (line,) = (line for line in printed.splitlines() if line.startswith(beginning))
    return succeed(*shlex.split(line.removeprefix(beginning).removeprefix("python -m training")))


def test_fit_export_evaluate_by_the_commands_that_each_prints_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "chapter-0"
    fitted = succeed(*FIT, "--recipe", "chapter")
    assert re.search(r"epoch 2/2  loss \d\.\d{4}  training 0\.\d{4}  test 0\.\d{4}", fitted.stderr)
    assert "population" in fitted.stdout
    exported = follow(fitted.stdout, "Next: ")
    assert "bn_lenet.onnx: " in exported.stdout
    assert "[]" not in exported.stdout  # no list of images without any
    evaluated = follow(exported.stdout, "Next: ")
    scores = json.loads((folder / "results.json").read_text())["scores"]
    assert f"accuracy {scores['population']['accuracy']:.4f}" in evaluated.stdout
    serve = "Serve it: BNLENET_MODEL_PATH=runs/chapter-0/bn_lenet.onnx python -m service\n"
    assert evaluated.stdout.endswith(serve)
    assert "rotation -10" in evaluated.stdout
    assert re.search(r"calibrated model with these confidences: ECE 0\.\d{4}\n", evaluated.stdout)
    assert re.search(r"│ 0\.99 +│ 0\.\d{4}", evaluated.stdout)
    assert "\n 9 Ankle boot" in evaluated.stdout  # not cut, though the screen's width is unknown
    assert max(map(len, evaluated.stdout.splitlines()[:-1])) <= 80


def test_the_same_fit_gives_the_same_file(finished: Path, tmp_path: Path) -> None:
    succeed(*FIT, "--seed", 5, "--out", tmp_path / "b", "--quiet")
    hashes = []
    for folder in (finished, tmp_path / "b"):
        out = tmp_path / "model" / "m.onnx"
        exported = json.loads(succeed("export", folder, "--out", out, "--json").stdout)
        hashes.append(exported["sha256"])
    assert hashes[0] == hashes[1]
    folder = tmp_path / "b"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.safetensors",
        "config.json",
        "confusion.png",
        "curves.png",
        "metrics.jsonl",
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
    halves = judged["robust_mean_seen"], judged["robust_mean_unseen"]
    assert judged["robust_mean"] == pytest.approx(sum(halves) / 2)
    assert judged["ece_floor"]["low"] < judged["ece_floor"]["mean"] < judged["ece_floor"]["high"]
    assert [one["threshold"] for one in judged["answered"]][::6] == [0.5, 0.99]


def test_the_metrics_have_a_line_an_epoch(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert 0 < line["accuracy"] < 1
        assert 0 < line["train_accuracy"] < 1
        assert line["images_per_second"] > 0
        assert line["learning_rate"] == pytest.approx(0.1)


def test_quiet_prints_nothing_and_json_one_line(tmp_path: Path) -> None:
    assert succeed(*FIT, "--out", tmp_path / "a", "--quiet").output == ""
    result = succeed(*FIT, "--out", tmp_path / "b", "--json", "--holdout", 100)
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""
    assert json.loads(result.stdout)["scores"]["moving"]["accuracy"] > 0
    judged = [Run(tmp_path / name).results()["judged_on"] for name in ("a", "b")]
    assert judged == ["test set", "held-out images"]


def test_options_override_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")  # metadata has no build
    options = ("--batch-size", 50, "--learning-rate", 0.05, "--seed", 7, "--batch-norm", "scratch")
    result = succeed(*FIT, *options, "--holdout", 100, "--out", tmp_path / "a")
    config = Run(tmp_path / "a").config()
    assert (config.recipe.batch_size, config.recipe.learning_rate) == (50, 0.05)
    assert (config.seed, config.batch_norm, config.holdout) == (7, "scratch", 100)
    assert config.versions["torch"] == "2.13.0+cu130"
    assert "accuracy on the 100 held-out images" in result.stdout
    assert f"then export that run with --held-out {tmp_path / 'a'}" in result.stdout


@pytest.mark.parametrize("options", [("--threads", "2"), ()])
def test_the_fit_computes_with_the_threads_that_its_folder_records(
    options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "cores", lambda: 2)
    seen = []
    step = Fitting.step

    def noted(self: Fitting, rows: Tensor) -> None:
        seen.append(torch.get_num_threads())
        torch.set_num_threads(1)  # faster, where the cores are busy
        step(self, rows)

    monkeypatch.setattr(Fitting, "step", noted)
    arguments = ("--epochs", "1", "--device", "cpu", "--batch-size", 400)
    succeed("fit", *arguments, *options, "--out", tmp_path / "a", "--quiet")
    assert seen == [2]
    assert Run(tmp_path / "a").config().threads == 2


def test_gamma_and_beta_are_printed(finished: Path) -> None:
    parameters = json.loads(succeed("norms", finished, "--json").stdout)
    checkpoint = Run(finished).checkpoint()
    assert list(parameters) == ["norm1", "norm2", "norm3", "norm4"]
    assert parameters["norm1"]["gamma"] == checkpoint["norm1.weight"].tolist()
    assert parameters["norm4"]["beta"] == checkpoint["norm4.bias"].tolist()
    first = f"  gamma {parameters['norm1']['gamma'][0]:+.3f}"
    assert first in succeed("norms", finished).stdout


def test_ctrl_c_leaves_a_run_and_says_how_to_continue(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Fitting.step

    def interrupted(self: Fitting, *arguments: Any, **options: Any) -> None:
        if int(self.steps_done) == 6:
            raise KeyboardInterrupt
        step(self, *arguments, **options)

    monkeypatch.setattr(Fitting, "step", interrupted)
    result = run(*FIT, "--seed", 5, "--out", tmp_path / "a b")
    assert result.exit_code == 130
    assert "Interrupted after 1 of 2 epochs" in result.stderr
    monkeypatch.setattr(Fitting, "step", step)
    follow(result.stderr, "Continue with: ")
    files = [(f / "checkpoint.safetensors").read_bytes() for f in (finished, tmp_path / "a b")]
    assert files[0] == files[1]


def test_resuming_with_other_versions_prints_a_notice(unfinished: Path) -> None:
    """The weights may differ from those of an uninterrupted fit."""
    resume = ("fit", "--resume", "--out", unfinished)
    assert "Resumed" not in succeed(*resume).stderr
    (unfinished / "results.json").unlink()
    settings = json.loads((unfinished / "config.json").read_text())
    settings["versions"]["torch"] = "1.0"
    (unfinished / "config.json").write_text(json.dumps(settings))
    said = succeed(*resume).stderr
    assert f"Resumed with python {platform.python_version()}, torch {torch.__version__}" in said


def test_several_seeds_get_a_run_folder_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other here, as on a single core or a GPU."""
    monkeypatch.setattr(processes, "cores", lambda: 1)
    out = tmp_path / "many"
    result = succeed(*FIT, "--seeds", "4,6", "--out", out)
    lines = re.findall(r"^seed (\d)  epoch (\d)/2  loss", result.stderr, re.MULTILINE)
    assert lines == [(seed, epoch) for seed in "46" for epoch in "12"]
    (shown,) = re.findall(
        r"^moving +(0\.\d{4} ± \d\.\d{4}) \(mean, 95 % t-interval\), standard deviation 0",
        result.stdout,
        re.MULTILINE,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many-4", "many-6"]
    runs = [Run(tmp_path / f"many-{seed}") for seed in (4, 6)]
    assert [run.config().seed for run in runs] == [4, 6]
    scores = [run.results()["scores"]["moving"] for run in runs]
    assert len({score["loss"] for score in scores}) == 2
    first, second = (score["accuracy"] for score in scores)
    # Student's t for one degree of freedom is 12.7062; two values' standard error is |a - b| / 2.
    assert shown == f"{(first + second) / 2:.4f} ± {12.7062047 * abs(first - second) / 2:.4f}"
    assert (runs[1].folder / "curves.png").exists()
    assert "many-4 already exists" in fail(*FIT, "--seeds", "4-5", "--out", out)
    assert "leave out --seed and" in fail(*FIT, "--seeds", "0-1", "--seed", 1, "--out", out)
    follow(result.stdout, "Next: ")
    card = (runs[0].folder / "MODEL_CARD.md").read_text()
    for run in runs:
        accuracy = run.results()["scores"]["moving"]["accuracy"]
        assert f"| {run.config().seed} | {accuracy:.4f} |" in card


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("", "'' is not a list of seeds such as 0-4 or 0,3,7"),
        ("²-5", "is not a list of seeds"),
        ("5-3", "is not a list of seeds"),
        ("-1-2", "is not a list of seeds"),
        ("3-3", "name at least two seeds"),
        ("0-1000", "'0-1000' is too much: at most 1,000 seeds, none above 2147483648"),
        ("0,2147483649", "is too much: at most 1,000 seeds"),
        ("9" * 5000, "is not a list of seeds"),
    ],
)
def test_wrong_lists_of_seeds_are_refused(seeds: str, message: str, tmp_path: Path) -> None:
    assert message in fail(*FIT, "--seeds", seeds, "--out", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_other_settings_is_refused(copied: Path) -> None:
    resume = ("fit", "--resume", "--out", copied)
    assert "is complete: there is nothing to resume" in fail(*resume)
    (copied / "results.json").unlink()
    assert "was started with seed 5, not 6: resume it with its own" in fail(*resume, "--seed", 6)
    assert "epochs 2, not 3" in fail(*resume, "--epochs", 3)
    assert "recipe chapter, not best" in fail(*resume, "--recipe", "best")
    assert "threads 1, not 2" in fail(*resume, "--threads", 2)
    succeed(*resume, "--seed", 5, "--epochs", 2, "--recipe", "chapter", "--quiet")


def test_resuming_on_another_data_set_is_refused(
    unfinished: Path, few: FashionMNIST, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "load", lambda _: replace(few, sha256="other"))
    assert "dataset sha256" in fail("fit", "--resume", "--out", unfinished)


def test_the_card_lists_the_settings_of_the_finish(
    best: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "best", best)
    succeed("fit", "--recipe", "best", "--threads", 1, "--out", tmp_path / "a", "--quiet")
    succeed("export", tmp_path / "a", "--out", tmp_path / "model" / "m.onnx")
    card = (tmp_path / "model" / "MODEL_CARD.md").read_text()
    for row in ("| rotation | 6.0 |", "| finish | 0.5 |", "| shift in the finish | 1.0 |"):
        assert row in card
    assert "rotation in the finish" not in card
    assert "fit --recipe best --seed 0 --device cpu --threads 1 --out" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipe", "none"), "'none' is not one of 'chapter', 'best'"),
        (("--batch-size", 1), "1 is not in the range x>=2"),
        (("--batch-size", 133), "leaves a last batch of one image"),
        (("--learning-rate", "nan"), "nan is not a number above zero"),
        (("--learning-rate", "1e38"), "became infinite or NaN in epoch 1, step"),
        (("--holdout", 400), "--holdout must leave images"),
        (("--resume",), "is not a run folder"),
    ],
)
def test_bad_input_is_an_error_of_one_sentence(
    arguments: tuple[object, ...], message: str, tmp_path: Path
) -> None:
    assert message in fail(*FIT, "--out", tmp_path / "a", *arguments)


def test_cuda_without_a_gpu_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch finds no CUDA device" in fail("fit", "--device", "cuda", "--out", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", [torch.AcceleratorError, torch.OutOfMemoryError])
def test_a_gpu_that_fails_is_an_error(
    kind: type[RuntimeError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a fit; the epochs so far are saved."""

    def lost(*_: object, **__: object) -> None:
        raise kind("CUDA error: unspecified launch failure.\nMore lines of no use.")

    monkeypatch.setattr(command_line, "fit_run", lost)
    message = "the GPU failed (CUDA error: unspecified launch failure): free it, or use --device"
    assert message in fail(*FIT, "--out", tmp_path / "a")


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "already exists" in fail(*FIT, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_an_error_and_leaves_no_incomplete_file(
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
    message = f"Error: No space left on device: {file}.\n"
    assert fail(*FIT, "--out", tmp_path / "a", "--quiet") == message
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["config.json", "metrics.jsonl"]


def test_a_damaged_data_set_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(_: Path | None) -> FashionMNIST:
        raise DatasetError("x.gz is damaged: fetch it again.")

    monkeypatch.setattr(command_line, "load", damaged)
    assert fail(*FIT, "--out", tmp_path / "a") == "Error: x.gz is damaged: fetch it again.\n"


def test_an_unfinished_run_is_not_exported(unfinished: Path, tmp_path: Path) -> None:
    assert "is not complete" in fail("export", unfinished, "--out", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_the_temperature_comes_from_held_out_images(copied: Path, tmp_path: Path) -> None:
    succeed(*FIT, "--seed", 5, "--out", tmp_path / "held", "--quiet", "--holdout", 150)
    export = ("export", copied, "--out", tmp_path / "m.onnx")
    assert "held no images out" in fail(*export, "--held-out", copied)
    assert "held images out: fit it without --holdout" in fail(
        "export", tmp_path / "held", "--out", tmp_path / "m.onnx"
    )
    assert "have the same seed" in fail(*export, "--seeds-from", copied / ".." / copied.name)
    assert not (tmp_path / "m.onnx").exists()
    succeed(*export, "--held-out", tmp_path / "held")
    temperature = Run(tmp_path / "held").results()["temperature"]
    assert metadata(tmp_path / "m.onnx")["temperature"] == str(temperature)
    assert temperature != 1


def metadata(file: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def test_a_run_of_another_recipe_is_refused_for_the_card(copied: Path, tmp_path: Path) -> None:
    other = shutil.copytree(copied, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["recipe"]["batch_size"] = 100
    (other / "config.json").write_text(json.dumps(config))
    export = ("export", copied, "--out", tmp_path / "m.onnx")
    assert "by another recipe" in fail(*export, "--seeds-from", other)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("kind", ["moving", "population"])
def test_the_file_carries_the_statistics_asked_for(
    finished: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "m.onnx"
    succeed("export", finished, "--out", out, "--statistics", kind, "--temperature", 1.5)
    assert (metadata(out)["statistics"], metadata(out)["temperature"]) == (kind, "1.5")
    judged = json.loads(succeed("evaluate", out, "--json").stdout)
    scores = Run(finished).results()["scores"]
    assert judged["accuracy"] == pytest.approx(scores[kind]["accuracy"])
    assert f"**This file carries: {kind}.**" in (tmp_path / "MODEL_CARD.md").read_text()


def test_images_with_two_equally_good_classes_are_listed(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tied(*arguments: Any, **options: Any) -> ExportReport:
        return replace(export(*arguments, **options), ties=(3, 7), disagreements=(7,))

    monkeypatch.setattr("training.__main__.export", tied)
    printed = succeed("export", finished, "--out", tmp_path / "m.onnx").stdout
    assert "equally good classes: [3, 7]; of these" in printed
    assert "differ on [7]" in printed
