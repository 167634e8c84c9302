"""Slow pictures are read in a thread, one at a time; abandoned ones are skipped."""

import asyncio
import io
import threading
from typing import cast

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from service.errors import Overloaded
from service.pictures.conversion import ModelInput, Pixels, Preprocessing
from service.pictures.thread import PictureThread

pytestmark = pytest.mark.anyio


@pytest.fixture
def photo() -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def turn(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[bytes]]:
    """Make the decoder wait for the event; list the files it gets."""
    event, decoded = threading.Event(), list[bytes]()

    def decode(data: bytes, _: str) -> ModelInput:
        decoded.append(data)
        event.wait(10)
        return ModelInput(np.zeros((28, 28), np.uint8), "dataset")

    monkeypatch.setattr("service.pictures.thread.read_picture", decode)
    return event, decoded


async def test_abandoned_pictures_are_not_decoded(
    photo: bytes, turn: tuple[threading.Event, list[bytes]]
) -> None:
    event, decoded = turn
    pictures = PictureThread()
    tasks = [asyncio.create_task(pictures.read(photo + bytes([i]), "auto")) for i in range(3)]
    await asyncio.sleep(0.01)
    tasks[1].cancel()
    await asyncio.sleep(0.01)
    event.set()
    await asyncio.gather(tasks[0], tasks[2])
    assert decoded == [photo + b"\0", photo + b"\2"]


async def test_only_so_many_pictures_may_wait(
    photo: bytes, turn: tuple[threading.Event, list[bytes]]
) -> None:
    """The others' places are for requests that take microseconds."""
    event, decoded = turn
    pictures = PictureThread(max_pictures=2)
    tasks = [asyncio.create_task(pictures.read(photo, "auto")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await pictures.read(photo, "auto")
    assert refused.value.headers == {"Retry-After": "1"}
    tasks.pop().cancel()
    await asyncio.sleep(0.01)
    tasks.append(asyncio.create_task(pictures.read(photo, "auto")))  # the place is free again
    event.set()
    await asyncio.gather(*tasks)
    await asyncio.gather(*(pictures.read(photo, "auto") for _ in range(2)))
    assert len(decoded) == 4


async def test_a_picture_that_waited_for_too_long_is_refused_and_not_decoded(
    photo: bytes, turn: tuple[threading.Event, list[bytes]]
) -> None:
    """Otherwise, with too many of them, each would reach its deadline while it is decoded."""
    event, decoded = turn
    pictures = PictureThread(max_wait=0.05)
    tasks = [asyncio.create_task(pictures.read(photo, "auto")) for _ in range(3)]
    await asyncio.sleep(0.1)
    event.set()
    first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, ModelInput)
    assert {type(other) for other in others} == {Overloaded}
    await pictures.read(photo, "auto")
    assert len(decoded) == 2


async def test_only_a_raw_28_by_28_png_is_decoded_on_the_event_loop(
    photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture thread parses all metadata, even in small files."""
    threads: list[int] = []
    decoded = ModelInput(np.zeros((28, 28), np.uint8), "none")

    def read(*_: object) -> ModelInput:
        threads.append(threading.get_ident())
        return decoded

    def raw_pixels(*_: object) -> Pixels:
        return read().pixels

    monkeypatch.setattr("service.pictures.thread.read_picture", read)
    monkeypatch.setattr("service.pictures.thread.raw_pixels", raw_pixels)
    raw, commented, comment = io.BytesIO(), io.BytesIO(), PngInfo()
    comment.add_text("Comment", "short")
    Image.new("L", (28, 28)).save(raw, "PNG")
    Image.new("L", (28, 28)).save(commented, "PNG", pnginfo=comment)
    pictures = PictureThread()
    for data, preprocessing in (
        (raw.getvalue(), "auto"),
        (raw.getvalue(), "none"),
        (raw.getvalue(), "dataset"),
        (commented.getvalue(), "auto"),
        (photo, "auto"),
    ):
        await pictures.read(data, cast(Preprocessing, preprocessing))
    loop = threading.get_ident()
    assert [thread == loop for thread in threads] == [True, True, False, False, False]
