"""How requests get to the model: at once on the CPU; on a GPU in batches that no timer delays."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.classifier import Classifier

Pixels = NDArray[np.uint8]
Probabilities = NDArray[np.float32]


@dataclass
class Statistics:
    """What the model has done since start-up, in this worker.

    Attributes:
        images: images classified.
        executions: runs of the model; fewer than images when it ran on batches.
        nanoseconds: time spent in those runs.
    """

    images: int = 0
    executions: int = 0
    nanoseconds: int = 0


class Inference(Protocol):
    """The way to the model.

    Attributes:
        statistics: what it has done.
    """

    statistics: Statistics

    async def __call__(self, pixels: Pixels) -> Probabilities:
        """Classify uint8 [n, 1, 28, 28]; return float32 [n, 10]."""


class Inline:
    """Runs the model on the event loop: it takes less time than handing it to a thread would.

    Args:
        classifier: the model.
        observe: is told the seconds of every run.
    """

    def __init__(self, classifier: Classifier, observe: Callable[[float], None]) -> None:
        self.statistics = Statistics()
        self._classifier = classifier
        self._observe = observe

    async def __call__(self, pixels: Pixels) -> Probabilities:
        """Classify uint8 [n, 1, 28, 28]; return float32 [n, 10]."""
        begin = perf_counter_ns()
        probabilities = self._classifier.probabilities(pixels)
        elapsed = perf_counter_ns() - begin
        statistics = self.statistics
        statistics.images += len(pixels)
        statistics.executions += 1
        statistics.nanoseconds += elapsed
        self._observe(elapsed * 1e-9)
        return probabilities


class Batched:
    """Runs the model in one thread, on whatever waits when the device becomes free.

    A request that comes to an idle device goes at once and alone; those that come meanwhile go
    together, next. Nothing ever waits for a batch to fill.

    Args:
        classifier: the model.
        observe: is told the seconds of every run.
        max_batch: the most images in a run; a single request may bring more.
    """

    def __init__(
        self, classifier: Classifier, observe: Callable[[float], None], max_batch: int = 256
    ) -> None:
        self.statistics = Statistics()
        self._classifier = classifier
        self._observe = observe
        self._max_batch = max_batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._waiting: list[tuple[Pixels, asyncio.Future[Probabilities]]] = []
        self._busy = False

    async def __call__(self, pixels: Pixels) -> Probabilities:
        """Classify uint8 [n, 1, 28, 28]; return float32 [n, 10]."""
        future: asyncio.Future[Probabilities] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, future))
        if not self._busy:
            self._start()
        return await future

    def _start(self) -> None:
        """Send the longest-waiting requests that fit one batch; the cancelled are left out."""
        batch: list[tuple[Pixels, asyncio.Future[Probabilities]]] = []
        size = 0
        while self._waiting and (not batch or size + len(self._waiting[0][0]) <= self._max_batch):
            pixels, future = self._waiting.pop(0)
            if not future.done():
                batch.append((pixels, future))
                size += len(pixels)
        self._busy = bool(batch)
        if batch:
            images = np.concatenate([pixels for pixels, _ in batch])
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._thread, self._run, images)
            running.add_done_callback(lambda done: self._finish(batch, done))

    def _run(self, images: Pixels) -> tuple[Probabilities, int]:
        begin = perf_counter_ns()
        probabilities = self._classifier.probabilities(images)
        return probabilities, perf_counter_ns() - begin

    def _finish(
        self,
        batch: list[tuple[Pixels, asyncio.Future[Probabilities]]],
        done: asyncio.Future[tuple[Probabilities, int]],
    ) -> None:
        self._start()  # the device works while the answers are sent
        error = done.exception()
        if error is None:
            probabilities, elapsed = done.result()
            self.statistics.images += len(probabilities)
            self.statistics.executions += 1
            self.statistics.nanoseconds += elapsed
            self._observe(elapsed * 1e-9)
        first = 0
        for pixels, future in batch:
            rows = slice(first, first + len(pixels))
            first += len(pixels)
            if future.done():
                continue
            if error is None:
                future.set_result(probabilities[rows])
            else:
                future.set_exception(error)
