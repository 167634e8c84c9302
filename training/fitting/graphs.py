"""The training step as CUDA graphs, used only if a replay gives the result of the eager step."""

import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from training.fitting.augmentation import Augmentation
from training.fitting.recipes import NO_AUGMENTATION
from training.fitting.step import Fitting, unchanged

TOLERANCE = 0.05
"""The largest allowed difference between a replay's change of a tensor and the eager step's,
relative to that change.

A GPU adds in no fixed order, and AdamW's first steps magnify rounding, so a few thousandths are
normal. A graph with stale rows, frozen random numbers or a lost update differs by about 1.
"""

log = logging.getLogger(__name__)

Step = Callable[[Tensor], None]


class Captured:  # pragma: no cover - needs a GPU
    """`Fitting.step` as CUDA graphs, one for each shape of step and kind of augmentation.

    The time of a network this small is mostly kernel launches; a replay launches all kernels of a
    step at once. All graphs share one memory pool, because no value in it outlives a replay.
    """

    def __init__(self, fitting: Fitting) -> None:
        self.fitting = fitting
        self.graphs: dict[tuple[int, Augmentation], tuple[Tensor, torch.cuda.CUDAGraph]] = {}
        self.pool = torch.cuda.graph_pool_handle()
        for augmentation, size in kinds_of_step(fitting):
            fitting.augmentation = augmentation
            self.graphs[size, augmentation] = self._capture(size)

    def __call__(self, rows: Tensor) -> None:
        """Replay `Fitting.step` on these rows."""
        static, graph = self.graphs[len(rows), self.fitting.augmentation]
        static.copy_(rows)
        graph.replay()

    def _capture(self, size: int) -> tuple[Tensor, torch.cuda.CUDAGraph]:
        static = torch.arange(size, device=self.fitting.labels.device)
        now = torch.cuda.current_stream()
        with unchanged(self.fitting):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call] # torch forgot
            stream.wait_stream(now)
            with torch.cuda.stream(stream):  # the libraries choose their algorithms in these steps
                for _ in range(3):
                    self.fitting.step(static)
            now.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            if self.fitting.augmentation != NO_AUGMENTATION:  # otherwise nothing is drawn
                with warnings.catch_warnings():  # torch after 2.13 registers it by itself
                    warnings.simplefilter("ignore")
                    graph.register_generator_state(self.fitting.generator)
            try:
                with torch.cuda.graph(graph, pool=self.pool):
                    self.fitting.step(static)
            finally:  # after a failed capture, its own stream is still current
                torch.cuda.set_stream(now)
        return static, graph


def kinds_of_step(fitting: Fitting) -> list[tuple[Augmentation, int]]:
    """Return every kind of step that the fit takes: its augmentation and number of images."""
    recipe = fitting.recipe
    sizes = dict.fromkeys(len(rows) for rows in torch.split(fitting.labels, recipe.batch_size))
    augmentations = dict.fromkeys(recipe.augmentation_in(epoch) for epoch in (1, recipe.epochs))
    return [(augmentation, size) for augmentation in augmentations for size in sizes]


def difference(fitting: Fitting, step: Step, rows: Tensor) -> float:
    """Return how much `step` differs from `Fitting.step` on these rows; `fitting` is unchanged.

    For every tensor that a step changes, this is the distance between the two results, divided by
    the length of the eager step's change. The result is the largest of them.
    """

    def state() -> list[Tensor]:
        tensors = [*fitting.tensors().values(), *fitting.sums(), fitting.learning_rates]
        return [tensor.detach().double().clone() for tensor in tensors]

    before, after = state(), []
    for take in (fitting.step, step):
        with unchanged(fitting):
            take(rows)
            after.append(state())
    distances = [
        (replayed - eager).norm() / (eager - old).norm().clamp_min(1e-20)
        for old, eager, replayed in zip(before, *after, strict=True)
    ]
    return torch.stack(distances).nan_to_num(torch.inf).max().item()


def fastest_step(fitting: Fitting, capture: Callable[[Fitting], Step] = Captured) -> Step:
    """Return the captured step, or `Fitting.step` if the capture fails or a replay differs.

    The reason is logged as a warning.
    """
    now = fitting.augmentation
    # Not the rows of the capture: otherwise a graph that ignores its input would pass.
    rows = torch.arange(len(fitting.labels), device=fitting.labels.device).flip(0)
    try:
        captured = capture(fitting)
        worst = 0.0
        for augmentation, size in kinds_of_step(fitting):
            fitting.augmentation = augmentation
            worst = max(worst, difference(fitting, captured, rows[:size]))
        if worst <= TOLERANCE:
            return captured
        reason = f"a replayed step differs from an eager one by {worst:.0%}"
    except Exception as error:  # a mistake of ours is raised again by the first eager step
        reason = f"a step could not be captured ({_cause(error)})"
    finally:
        fitting.augmentation = now
    log.warning("Training without CUDA graphs, more slowly: %s.", reason)
    fitting.generator = torch.Generator(fitting.labels.device)  # the old one may be in a graph
    return fitting.step


def _cause(error: BaseException) -> str:
    """Return the first line of the first error; torch raises a second one when the capture ends."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return (str(error) or type(error).__name__).splitlines()[0]
