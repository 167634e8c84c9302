"""Batches requests for the model: those that have arrived run together, and none waits for more."""

import asyncio
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.model.artefact import ModelInfo
from service.model.classifier import Classifier
from service.telemetry.tallies import Runs, Stages

Pixels = NDArray[np.uint8]
Probabilities = NDArray[np.float32]
IMAGES_AT_ONCE = 512  # the default limit of requests in flight; some 10 ms of the event loop
Waiting = tuple[Pixels, asyncio.Future[Probabilities], Stages, float]  # the last: since when


class Load(Protocol):
    """What inference needs of admission: whether a request is alone."""

    @property
    def in_flight(self) -> int:
        """The number of requests that have arrived and are not answered."""


class Inference:
    """Runs the model on the event loop, in batches of the requests that have arrived.

    A thread would take longer than the model itself. One run of several images takes less time than
    several runs: it saves calls, and the CPU's caches stay warm. Requests never wait for a batch to
    fill: the model runs after the loop has handled what had already arrived. A request that is
    alone runs at once.

    Args:
        classifier: the model.
        runs: counts the runs, and the waits for them.
        load: the number of requests in flight.
        max_batch: the most images in a run; a single request may have more.

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
            stages: its `wait`, `run` and `images` are set.
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
            loop.call_soon(self._run_batches)
        future: asyncio.Future[Probabilities] = loop.create_future()
        self._waiting.append((pixels, future, stages, perf_counter()))
        return await future

    def _run_batches(self) -> None:
        """Run the model for the requests that wait, up to a limit; the rest waits for the loop.

        A single batch for each iteration of the loop is too little under overload: the loop then
        refuses hundreds of requests for every batch, and answers a fifth of what it could.
        """
        left = IMAGES_AT_ONCE
        while self._waiting and left > 0:
            batch, images = self._take_batch()
            if images is None:
                continue
            left -= len(images)
            try:
                probabilities, seconds = self._run(images)
            except Exception as exc:  # raised again in every request of the batch
                self._fail(batch, exc)
            else:
                self._deliver(batch, probabilities, seconds)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._run_batches)

    def _take_batch(self) -> tuple[list[Waiting], Pixels | None]:
        """Take the oldest requests that fit into one batch, without those that were cancelled."""
        waiting = self._waiting
        batch: list[Waiting] = []
        size = 0
        now = perf_counter()
        while waiting and (not batch or size + len(waiting[0][0]) <= self._max_batch):
            request = waiting.popleft()
            pixels, future, stages, since = request
            if not future.done():
                batch.append(request)
                size += len(pixels)
                stages.wait = now - since
                self.runs.queue.observe(stages.wait)
        if len(batch) < 2:
            return batch, batch[0][0] if batch else None
        return batch, np.concatenate([request[0] for request in batch])

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


class Served(NamedTuple):
    """A served model, and what runs it."""

    model: ModelInfo
    infer: Inference


# By what was done to a picture: one model may serve pixels as sent, another converted pictures.
Models = Mapping[Literal["none", "dataset"], Served]


class ThreadedInference(Inference):
    """Runs the model in a thread, for a device that works while the event loop goes on.

    A request runs at once if the device is idle. Those that arrive while it is busy run together as
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
            self._start_run()
        return await future

    def _start_run(self) -> None:
        batch, images = self._take_batch()
        self._busy = images is not None
        if images is not None:
            running = asyncio.get_running_loop().run_in_executor(self._thread, self._run, images)
            running.add_done_callback(lambda done: self._finish_run(batch, done))

    def _finish_run(
        self, batch: list[Waiting], done: asyncio.Future[tuple[Probabilities, float]]
    ) -> None:
        self._start_run()  # first: the device works while the answers are sent
        error = done.exception()
        if error is not None:
            self._fail(batch, error)
            return
        probabilities, seconds = done.result()
        self._deliver(batch, probabilities, seconds)
