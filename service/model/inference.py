"""How requests get to the model: together, when several are there, and never on a timer."""

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.model.classifier import Classifier
from service.telemetry.tallies import Runs, Stages

Pixels = NDArray[np.uint8]
Probabilities = NDArray[np.float32]
Waiting = tuple[Pixels, asyncio.Future[Probabilities], Stages, float]  # and since when


class Load(Protocol):
    """What inference needs of admission: a request that is alone does not wait for others."""

    @property
    def in_flight(self) -> int:
        """How many requests have arrived and are not answered."""


class Inference:
    """Runs the model on the event loop, for all requests that came in the same turn of it.

    A thread would cost more than the model does. Running several images at once costs less than
    each on its own, by the price of a call and of caches that went cold in between. Nobody waits
    for company: the model runs when the loop has seen what had already arrived, and for a request
    that is alone it runs at once.

    Args:
        classifier: the model.
        runs: is told of every run, and of every wait for one.
        load: how many requests are in flight.
        max_batch: the most images to run together; a single request may bring more.

    Attributes:
        runs: as given.
    """

    def __init__(
        self,
        classifier: Classifier,
        runs: Runs,
        load: Load,
        max_batch: int = 32,
    ) -> None:
        self._classify = classifier.probabilities
        self.runs = runs
        self._load = load
        self._max_batch = max_batch
        self._waiting: deque[Waiting] = deque()

    async def __call__(self, pixels: Pixels, stages: Stages | None = None) -> Probabilities:
        """Classify uint8 [n, 1, 28, 28]; return float32 [n, 10].

        Args:
            pixels: the images.
            stages: gets the request's wait and the seconds and images of its run.
        """
        stages = stages or Stages()
        if self._load.in_flight == 1:
            probabilities, stages.run = self._run(pixels)
            stages.wait = 0.0
            stages.images = len(pixels)
            self.runs.queue.observe(0.0)
            self.runs.ran(len(pixels), stages.run)
            return probabilities
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_soon(self._turn)
        future: asyncio.Future[Probabilities] = loop.create_future()
        self._waiting.append((pixels, future, stages, perf_counter()))
        return await future

    def _turn(self) -> None:
        """Run the model for those who wait; leave what is too much to the loop's next turn."""
        batch, images = self._take()
        if images is not None:
            try:
                probabilities, seconds = self._run(images)
            except Exception as exc:  # raised again in each request that waits for it
                self._fail(batch, exc)
            else:
                self._deliver(batch, probabilities, seconds)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._turn)

    def _take(self) -> tuple[list[Waiting], Pixels | None]:
        """Take the longest-waiting requests that fit one batch, without those given up since."""
        waiting = self._waiting
        batch: list[Waiting] = []
        size = 0
        now = perf_counter()
        while waiting and (not batch or size + len(waiting[0][0]) <= self._max_batch):
            one = waiting.popleft()
            if not one[1].done():
                batch.append(one)
                size += len(one[0])
                one[2].wait = now - one[3]
                self.runs.queue.observe(one[2].wait)
        if len(batch) < 2:
            return batch, batch[0][0] if batch else None
        return batch, np.concatenate([one[0] for one in batch])

    def _run(self, images: Pixels) -> tuple[Probabilities, float]:
        begin = perf_counter()
        probabilities = self._classify(images)
        return probabilities, perf_counter() - begin

    def _deliver(self, batch: list[Waiting], probabilities: Probabilities, seconds: float) -> None:
        self.runs.ran(len(probabilities), seconds)
        first = 0
        for pixels, future, stages, _ in batch:
            stages.run = seconds
            stages.images = len(probabilities)
            end = first + len(pixels)
            if not future.done():
                future.set_result(probabilities[first:end])
            first = end

    def _fail(self, batch: list[Waiting], error: BaseException) -> None:
        for _, future, *_ in batch:
            if not future.done():
                future.set_exception(error)


class ThreadedInference(Inference):
    """Runs the model in a thread of its own, for a device that works while Python goes on.

    A request that finds the device idle goes at once; those that come meanwhile go together, as
    soon as it is free.
    """

    def __init__(
        self,
        classifier: Classifier,
        runs: Runs,
        load: Load,
        max_batch: int = 256,
    ) -> None:
        super().__init__(classifier, runs, load, max_batch)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inference")
        self._busy = False

    async def __call__(self, pixels: Pixels, stages: Stages | None = None) -> Probabilities:
        """Classify uint8 [n, 1, 28, 28]; return float32 [n, 10]; see `Inference`."""
        future: asyncio.Future[Probabilities] = asyncio.get_running_loop().create_future()
        self._waiting.append((pixels, future, stages or Stages(), perf_counter()))
        if not self._busy:
            self._start()
        return await future

    def _start(self) -> None:
        batch, images = self._take()
        self._busy = images is not None
        if images is not None:
            running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, images)
            running.add_done_callback(lambda done: self._finish(batch, done))

    def _finish(
        self, batch: list[Waiting], done: asyncio.Future[tuple[Probabilities, float]]
    ) -> None:
        self._start()  # the device works while the answers go out
        error = done.exception()
        if error is not None:
            self._fail(batch, error)
            return
        probabilities, seconds = done.result()
        self._deliver(batch, probabilities, seconds)
