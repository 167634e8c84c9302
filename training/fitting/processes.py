"""Fits several seeds: in several processes on a CPU, one after the other on a GPU."""

from collections.abc import Callable, Iterator, Sequence

import torch
from joblib import Parallel, delayed

from training.dataset import FashionMNIST
from training.fitting.fit import Fitted, fit
from training.fitting.plan import cores
from training.fitting.run import Epoch, Run
from training.fitting.step import Fitting


def fit_run(
    data: FashionMNIST,
    run: Run,
    *,
    graphs: bool = True,
    on_batch: Callable[[Fitting, int, int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> Fitted:
    """Start or continue the fit of a run, with the run's own configuration and threads.

    Raises:
        FitError, RunError: see `fit`.
    """
    config = run.config()
    torch.set_num_threads(config.threads)
    return fit(
        data,
        config.recipe,
        seed=config.seed,
        device=config.device,
        batch_norm=config.batch_norm,
        holdout=config.holdout,
        graphs=graphs,
        run=run,
        on_batch=on_batch,
        on_epoch=on_epoch,
    )


def processes_for(runs: int, device: str, threads: int) -> int:
    """Return how many of these runs to fit at once: as many as have cores for their threads."""
    return min(runs, max(1, cores() // threads)) if device == "cpu" else 1


def fit_runs(
    data: FashionMNIST,
    runs: Sequence[Run],
    *,
    graphs: bool = True,
    on_epoch: Callable[[Run, Epoch], None] | None = None,
) -> Iterator[tuple[Run, Fitted]]:
    """Fit runs, and yield each one when its fit is complete.

    Args:
        data: the data set; the processes share its memory.
        runs: new or unfinished runs, all with the same device and number of threads.
        graphs: see `fit`.
        on_epoch: called in the process of the fit, so it must be a module's function.

    Raises:
        FitError, RunError: from the first run that fails; the other runs are stopped.
    """
    config = runs[0].config()
    parallel = Parallel(
        n_jobs=processes_for(len(runs), config.device, config.threads),
        return_as="generator_unordered",
        mmap_mode="c",  # torch takes no read-only arrays
    )
    yield from parallel(delayed(_one)(data, run, graphs, on_epoch) for run in runs)


def _one(
    data: FashionMNIST,
    run: Run,
    graphs: bool,
    on_epoch: Callable[[Run, Epoch], None] | None,
) -> tuple[Run, Fitted]:
    def report(epoch: Epoch) -> None:
        if on_epoch:
            on_epoch(run, epoch)

    return run, fit_run(data, run, graphs=graphs, on_epoch=report)
