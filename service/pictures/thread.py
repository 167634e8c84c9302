"""Reads pictures in a thread, so that slow ones do not delay other requests."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from service.errors import Overloaded
from service.pictures.conversion import ModelInput, Preprocessing, read_picture
from service.pictures.cutout import cut_out
from service.pictures.decoding import is_raw_28x28, raw_pixels


class PictureThread:
    """Reads one picture at a time.

    Two limits hold when more pictures arrive than the thread can read. Without the first, they
    would take all places in flight, and small requests would get none. Without the second, each
    picture would reach its deadline at its turn or while it is decoded; none would be answered.

    Args:
        max_pictures: the most that may wait or be read.
        max_wait: the seconds after which a picture is refused at its turn.
    """

    def __init__(self, max_pictures: int = 256, max_wait: float = 5.0) -> None:
        self._max_pictures = max_pictures
        self._max_wait = max_wait
        self._pictures = 0
        # At its first product, OpenBLAS reserves memory; if there is none, it ends the process.
        cut_out(np.zeros((160, 160, 3), np.uint8))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    async def read(self, data: bytes, preprocessing: Preprocessing) -> ModelInput:
        """Read a picture's file; skip it if the request ends before its turn.

        Raises:
            ServiceError: as `service.pictures.conversion.read_picture` does.
            Overloaded: too many pictures wait, or this one has waited for too long.
        """
        if preprocessing != "dataset" and is_raw_28x28(data):
            return ModelInput(raw_pixels(data), "none")
        if self._pictures >= self._max_pictures:
            raise _too_many()
        self._pictures += 1
        loop, latest = asyncio.get_running_loop(), perf_counter() + self._max_wait
        try:
            return await loop.run_in_executor(
                self._thread, _read_until, latest, data, preprocessing
            )
        finally:
            self._pictures -= 1


def _read_until(latest: float, data: bytes, preprocessing: Preprocessing) -> ModelInput:
    if perf_counter() > latest:
        raise _too_many()
    return read_picture(data, preprocessing)


def _too_many() -> Overloaded:
    return Overloaded(
        "The server has too many pictures to read; try again in a second.",
        headers={"Retry-After": "1"},
    )
