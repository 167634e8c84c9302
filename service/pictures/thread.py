"""Reads pictures in a thread, so that slow ones do not delay other requests."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from service.pictures.conversion import ModelInput, Preprocessing, read_picture
from service.pictures.cutout import cut_out
from service.pictures.decoding import is_raw_28x28, raw_pixels


class PictureThread:
    """Reads one picture at a time. The budget for bodies limits how many can wait."""

    def __init__(self) -> None:
        # At its first product, OpenBLAS reserves memory; if there is none, it ends the process.
        cut_out(np.zeros((160, 160, 3), np.uint8))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    async def read(self, data: bytes, preprocessing: Preprocessing) -> ModelInput:
        """Read a picture's file; skip it if the request ends before its turn.

        Raises:
            ServiceError: as `service.pictures.conversion.read_picture` does.
        """
        if preprocessing != "dataset" and is_raw_28x28(data):
            return ModelInput(raw_pixels(data), "none")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, read_picture, data, preprocessing)
