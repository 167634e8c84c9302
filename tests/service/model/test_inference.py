"""Requests that arrive together run together, and each gets its own answer."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter, time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.model.inference import Inference, ThreadedInference
from service.telemetry.tallies import Runs, Stages

BUSY = SimpleNamespace(in_flight=2)

pytestmark = pytest.mark.anyio


class Device:
    """Stands in for the model: a row of its answer repeats the first pixel of the image.

    Attributes:
        batches: the number of images in each run.
        tasks: the requests that `in_one_batch` makes.
    """

    tasks: Sequence[asyncio.Task[Any]] = ()

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.free = threading.Event()
        self.free.set()

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.batches.append(len(pixels))
        assert self.free.wait(10)
        if (pixels == 255).any():
            raise RuntimeError("the device failed")
        return np.repeat(pixels[:, 0, 0, :1], 10, axis=1).astype(np.float32)


def image(value: int, count: int = 1) -> NDArray[np.uint8]:
    return np.full((count, 1, 28, 28), value, np.uint8)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.001)


@pytest.fixture
def device() -> Iterator[Device]:
    device = Device()
    yield device
    device.free.set()


def make_busy(kind: type[Inference], device: Any, **options: int) -> Inference:
    return kind(device, Runs(), BUSY, **options)


KINDS = pytest.mark.parametrize("kind", [Inference, ThreadedInference])


@KINDS
async def test_each_caller_gets_the_answer_for_its_own_images(
    kind: type[Inference], device: Device
) -> None:
    infer = make_busy(kind, device)
    counts = [1 + value % 3 for value in range(200)]
    answers = await asyncio.gather(
        *(infer(image(value, count)) for value, count in enumerate(counts))
    )
    for value, (answer, count) in enumerate(zip(answers, counts, strict=True)):
        assert np.array_equal(answer, np.full((count, 10), value, np.float32))
    assert infer.runs.images == sum(device.batches) == sum(counts)
    assert len(device.batches) < 200


async def test_one_iteration_of_the_loop_is_one_run(device: Device) -> None:
    await asyncio.gather(*(make_alone(device)(image(i)) for i in range(3)))
    infer = make_busy(Inference, device)
    device.batches.clear()
    await asyncio.gather(*(infer(image(i)) for i in range(20)))
    assert device.batches == [20]


def make_alone(device: Any) -> Inference:
    return Inference(device, Runs(), SimpleNamespace(in_flight=1))


async def test_a_request_that_is_alone_runs_at_once(device: Device) -> None:
    coroutine = make_alone(device)(image(7))
    with pytest.raises(StopIteration) as done:
        coroutine.send(None)
    assert done.value.value[0, 0] == 7


async def test_a_request_that_is_alone_is_counted_and_timed_without_a_wait(device: Device) -> None:
    infer, stages = make_alone(device), Stages()
    stages.wait = 9.0
    await infer(image(7, 3), stages)
    assert (stages.wait, stages.images) == (0.0, 3)
    assert (infer.runs.images, sum(infer.runs.counts)) == (3, 1)
    assert infer.runs.seconds == stages.run > 0


@KINDS
async def test_batches_are_limited_and_a_larger_request_runs_alone(
    kind: type[Inference], device: Device
) -> None:
    infer = make_busy(kind, device, max_batch=8)
    await asyncio.gather(*(infer(image(i, count)) for i, count in enumerate([5, 3, 1, 20, 7, 1])))
    allowed = {8, 1, 20}
    assert sum(device.batches) == 37
    assert set(device.batches) <= allowed | {5, 4, 7}
    assert max(b for b in device.batches if b != 20) <= 8


@pytest.mark.parametrize(
    ("count", "size", "batches"), [(100, 1, [32, 32, 32, 4]), (5, 256, [256, 256])]
)
async def test_one_iteration_of_the_loop_serves_all_waiting_requests_up_to_a_limit(
    device: Device, count: int, size: int, batches: list[int]
) -> None:
    """With one batch, an overloaded loop mostly refuses; without a limit it would block."""
    infer = make_busy(Inference, device)
    requests = [asyncio.ensure_future(infer(image(0, size))) for _ in range(count)]
    await asyncio.sleep(0)
    assert device.batches == []
    await asyncio.sleep(0)
    assert device.batches == batches
    await asyncio.gather(*requests)
    assert sum(device.batches) == count * size


async def test_requests_that_wait_for_the_device_run_together_next(device: Device) -> None:
    """The first runs alone and at once; those that arrive meanwhile run together."""
    device.free.clear()
    infer = make_busy(ThreadedInference, device)
    first = asyncio.ensure_future(infer(image(0)))
    await settle()
    assert device.batches == [1]
    rest = [asyncio.ensure_future(infer(image(i))) for i in range(1, 30)]
    await settle()
    assert device.batches == [1]
    device.free.set()
    answers = await asyncio.gather(first, *rest)
    assert device.batches == [1, 29]
    assert [a[0, 0] for a in answers] == list(range(30))


async def test_a_device_takes_256_images_at_once_by_default(device: Device) -> None:
    infer = make_busy(ThreadedInference, device)
    device.free.clear()
    requests = [asyncio.ensure_future(infer(image(0))) for _ in range(300)]
    await settle()
    device.free.set()
    await asyncio.gather(*requests)
    assert device.batches == [1, 256, 43]


@KINDS
async def test_nothing_runs_if_all_waiting_requests_are_cancelled(
    kind: type[Inference], device: Device
) -> None:
    errors: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    infer = make_busy(kind, device)
    device.free.clear()
    first = [asyncio.ensure_future(infer(image(0)))] if kind is ThreadedInference else []
    if first:
        await settle()
    waiting = [asyncio.ensure_future(infer(image(i))) for i in range(3)]
    await asyncio.sleep(0)
    for one in waiting:
        one.cancel()
    device.free.set()
    await asyncio.gather(*first, *waiting, return_exceptions=True)
    await settle()
    assert (device.batches, errors) == ([1] * len(first), [])
    assert (await infer(image(4)))[0, 0] == 4


async def test_requests_cancelled_while_waiting_do_not_run(device: Device) -> None:
    device.free.clear()
    infer = make_busy(ThreadedInference, device)
    first = asyncio.ensure_future(infer(image(0)))
    await settle()
    waiting = [asyncio.ensure_future(infer(image(i))) for i in range(1, 6)]
    await settle()
    first.cancel()
    waiting[1].cancel()
    await settle()
    device.free.set()
    answers = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert device.batches == [1, 4]
    cancelled = [i for i, a in enumerate(answers) if isinstance(a, asyncio.CancelledError)]
    assert cancelled == [0, 2]
    assert [a[0, 0] for a in answers if isinstance(a, np.ndarray)] == [1, 3, 4, 5]


@KINDS
async def test_a_failed_run_fails_the_requests_of_its_batch_alone(
    kind: type[Inference], device: Device
) -> None:
    infer = make_busy(kind, device, max_batch=2)
    answers = await asyncio.gather(
        *(infer(image(i, 2)) for i in (1, 255, 3)), return_exceptions=True
    )
    assert isinstance(answers[1], RuntimeError)
    assert [a[0, 0] for a in (answers[0], answers[2])] == [1, 3]  # type: ignore[index] # arrays
    assert (await infer(image(4)))[0, 0] == 4


@KINDS
async def test_runs_are_counted(kind: type[Inference], device: Device) -> None:
    runs = Runs()
    infer = kind(device, runs, BUSY)  # type: ignore[arg-type] # a stand-in
    begin = perf_counter()
    await infer(image(1))
    await infer(image(2, 3))
    assert (sum(runs.counts), infer.runs.images) == (2, 4)
    assert 0 < runs.seconds <= perf_counter() - begin


def test_both_ways_give_the_real_models_bits(
    classifier: Any, make_images: Callable[[int], NDArray[np.uint8]]
) -> None:
    images = make_images(100)

    async def all_at_once(kind: type[Inference]) -> NDArray[np.float32]:
        infer = kind(classifier, Runs(), BUSY)
        return np.concatenate(await asyncio.gather(*(infer(i[None]) for i in images)))

    alone = np.concatenate([classifier.probabilities(i[None]) for i in images])
    for kind in (Inference, ThreadedInference):
        assert np.array_equal(asyncio.run(all_at_once(kind)), alone)


@pytest.fixture
def make_images() -> Callable[[int], NDArray[np.uint8]]:
    return lambda n: np.random.default_rng(2).integers(0, 256, (n, 1, 28, 28), dtype=np.uint8)


async def in_one_batch(infer: Inference, device: Device, values: list[int]) -> list[Any]:
    """Run requests of one, two, three ... images together; return answers and exceptions."""
    if isinstance(infer, ThreadedInference):  # while one runs, the others wait
        device.free.clear()
        first = asyncio.ensure_future(infer(image(0)))
        await settle()
    tasks = [asyncio.ensure_future(infer(image(value, 1 + i))) for i, value in enumerate(values)]
    device.tasks = tasks
    await settle()
    device.free.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    if isinstance(infer, ThreadedInference):
        await first
    assert device.batches[-1] == sum(range(1, 1 + len(values)))
    return answers


@KINDS
async def test_a_failed_batch_fails_every_request_in_it(
    kind: type[Inference], device: Device
) -> None:
    answers = await asyncio.wait_for(in_one_batch(make_busy(kind, device), device, [1, 255, 3]), 10)
    assert [str(answer) for answer in answers] == ["the device failed"] * 3


class CancellingDevice(Device):
    """Cancels the second request of a batch while the batch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.get_running_loop()

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        if len(pixels) > 1:
            if threading.current_thread() is threading.main_thread():
                self.tasks[1].cancel()
            else:
                asyncio.run_coroutine_threadsafe(self.cancel(), self.loop).result(10)
        return super().probabilities(pixels)

    async def cancel(self) -> None:
        self.tasks[1].cancel()
        await asyncio.sleep(0)


@KINDS
async def test_a_request_cancelled_while_it_runs_leaves_the_others_their_own_rows(
    kind: type[Inference],
) -> None:
    device = CancellingDevice()
    infer = make_busy(kind, device)
    answers = await in_one_batch(infer, device, [1, 2, 3, 4])
    assert isinstance(answers.pop(1), asyncio.CancelledError)
    for answer, (value, count) in zip(answers, [(1, 1), (3, 3), (4, 4)], strict=True):
        assert np.array_equal(answer, np.full((count, 10), value, np.float32))
    assert np.array_equal(await infer(image(9)), np.full((1, 10), 9, np.float32))


class FailingDevice(CancellingDevice):
    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        answers = super().probabilities(pixels)
        if len(pixels) > 1:
            raise RuntimeError("the device failed")
        return answers


@KINDS
async def test_a_failed_batch_fails_the_requests_that_were_not_cancelled(
    kind: type[Inference],
) -> None:
    device = FailingDevice()
    answers = await in_one_batch(make_busy(kind, device), device, [1, 2, 3, 4])
    assert isinstance(answers.pop(1), asyncio.CancelledError)
    assert [str(answer) for answer in answers] == ["the device failed"] * 3


async def test_every_request_has_its_wait_for_the_model_counted(device: Device) -> None:
    """A wait is from the request's pixels to the start of its own run."""
    infer = make_busy(ThreadedInference, device)
    device.free.clear()
    begin = perf_counter()
    tasks = [asyncio.ensure_future(infer(image(i))) for i in range(5)]
    await settle()
    waited = perf_counter()
    await asyncio.sleep(0.05)
    waited = perf_counter() - waited
    device.free.set()
    await asyncio.gather(*tasks)
    queue = infer.runs.queue
    assert (device.batches, sum(queue.counts)) == ([1, 4], 5)
    assert 4 * waited <= queue.seconds <= 5 * (perf_counter() - begin)


async def test_a_wait_of_one_iteration_is_counted(device: Device) -> None:
    infer = make_busy(Inference, device)
    await asyncio.gather(*(infer(image(i)) for i in range(20)))
    assert sum(infer.runs.queue.counts) == 20
    assert infer.runs.queue.seconds > 0
    alone, stages = make_alone(device), Stages()
    before = time()
    await alone(image(1, 3), stages)
    assert (sum(alone.runs.queue.counts), alone.runs.queue.seconds) == (1, 0)
    assert (stages.wait, stages.images, alone.runs.images) == (0, 3, 3)
    assert alone.runs.seconds == stages.run > 0
    assert before <= alone.runs.last <= time()


@KINDS
async def test_requests_of_one_run_get_its_time_and_its_size(
    kind: type[Inference], device: Device
) -> None:
    infer = make_busy(kind, device)
    device.free.clear()
    threading.Timer(0.05, device.free.set).start()
    stages = [Stages() for _ in range(4)]
    await asyncio.gather(*(infer(image(i, 2), stage) for i, stage in enumerate(stages)))
    assert [stage.images for stage in stages] == {
        Inference: [8] * 4,
        ThreadedInference: [2, 6, 6, 6],  # the first finds the device free
    }[kind]
    assert stages[1].run == stages[2].run == stages[3].run
    assert stages[0].run > 0.01
    assert infer.runs.queue.seconds == pytest.approx(sum(stage.wait for stage in stages))
    assert infer.runs.seconds == pytest.approx(sum({stage.run for stage in stages}))
    assert {size: numbers[0] for size, numbers in infer.runs.batches.items()} == dict.fromkeys(
        device.batches, 1
    )
