"""Several seeds in several processes: every fit gives what it gives alone."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training.dataset import FashionMNIST, Split
from training.fitting import processes
from training.fitting.fit import fit
from training.fitting.plan import FitError, create_runs, new_config
from training.fitting.processes import fit_run, fit_runs, processes_for
from training.fitting.recipes import Recipe
from training.fitting.run import Epoch, Run


def note(run: Run, line: Epoch) -> None:
    """Leave a trace that the test can see from another process."""
    with (run.folder / "seen.txt").open("a") as file:
        file.write(f"{line.epoch}\n")


def runs_of(recipe: Recipe, folder: Path, threads: int = 1) -> list[Run]:
    config = new_config(recipe, "", device="cpu", threads=threads)
    return create_runs(folder / "a", config, [3, 0], 400)


def test_every_seed_fits_as_it_would_alone_to_the_last_bit(
    fashion_mnist: FashionMNIST,
    few: FashionMNIST,
    best: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With more than a megabyte of images, which the processes share."""
    monkeypatch.setattr(processes, "cores", lambda: 2)
    few = replace(
        few, train=Split(fashion_mnist.train.images[:1500], fashion_mnist.train.labels[:1500])
    )
    assert few.train.images.nbytes > 2**20
    best = replace(best, batch_size=500)
    runs = runs_of(best, tmp_path)
    found = {run.folder: fitted for run, fitted in fit_runs(few, runs, on_epoch=note)}
    assert capfd.readouterr().err == ""  # torch would warn of arrays that are read-only
    assert found.keys() == {run.folder for run in runs}
    for run, seed in zip(runs, (3, 0), strict=True):
        alone = fit(few, best, seed=seed)
        for name, tensor in alone.model.state_dict().items():
            assert torch.equal(run.model().state_dict()[name], tensor)
            assert torch.equal(found[run.folder].model.state_dict()[name], tensor)
        assert [line.loss for line in run.metrics()] == [line.loss for line in alone.epochs]
        assert run.complete
        assert found[run.folder].scores == alone.scores
        assert (run.folder / "seen.txt").read_text() == "1\n2\n"


def test_a_seed_that_fails_ends_them_all_with_its_error(
    few: FashionMNIST, chapter: Recipe, tmp_path: Path
) -> None:
    runs = runs_of(replace(chapter, learning_rate=1e38), tmp_path)
    with pytest.raises(FitError, match="became infinite or NaN in epoch 1"):
        list(fit_runs(few, runs))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_is_fitted_with_its_own_number_of_threads(
    few: FashionMNIST, chapter: Recipe, tmp_path: Path, threads: int
) -> None:
    seen = []
    run, _ = runs_of(replace(chapter, epochs=1, batch_size=400), tmp_path, threads)
    torch.set_num_threads(3 - threads)
    fit_run(few, run, on_batch=lambda *_: seen.append(torch.get_num_threads()))
    assert seen == [threads]


@pytest.mark.parametrize(
    ("runs", "device", "threads", "expected"),
    [(5, "cpu", 1, 4), (2, "cpu", 1, 2), (5, "cpu", 3, 1), (5, "cpu", 8, 1), (5, "cuda", 1, 1)],
)
def test_processes_share_the_cores_and_a_gpu_gets_one(
    runs: int, device: str, threads: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 4)
    assert processes_for(runs, device, threads) == expected


def test_errors_can_be_sent_between_processes() -> None:
    error = pickle.loads(pickle.dumps(FitError("the loss is no longer finite.")))  # noqa: S301 - our own bytes
    assert str(error) == "the loss is no longer finite."
