"""A worker and its supervisor exchange messages, and neither waits long for the other."""

import asyncio
import gc
import socket
import threading
from collections.abc import AsyncIterator

import pytest

from service.errors import NotReady
from service.http import channel as channel_module
from service.http.channel import Channel, SupervisorError, models_message
from service.telemetry.tallies import Totals

pytestmark = pytest.mark.anyio

OWN = Totals({("requests",): [2]}, {("in_flight",): [1]})
SUM = Totals({("requests",): [42]}, {("in_flight",): [3]})
Ends = tuple[Channel, asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
async def ends(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ends]:
    """Yield an open channel, and the supervisor's end of it."""
    monkeypatch.setattr(channel_module, "REPORT_SECONDS", 0.01)
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    channel.report(lambda: OWN)
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    await channel.open()
    yield channel, reader, writer
    writer.close()
    await channel.close()


async def message(reader: asyncio.StreamReader) -> tuple[int, Totals]:
    number, _, totals = (await asyncio.wait_for(reader.readline(), 10)).partition(b" ")
    return int(number), Totals.from_json(totals)


async def message_but_reports(reader: asyncio.StreamReader) -> tuple[int, Totals]:
    while True:
        number, totals = await message(reader)
        if number != 0:
            return number, totals


@pytest.mark.parametrize("size", [0, 1, 2**20])
@pytest.mark.parametrize("count", [1, 2])
def test_the_models_arrive_complete(size: int, count: int) -> None:
    ours, theirs = socket.socketpair()
    models = [
        b"%d" % i + bytes(range(256)) * (size // 256) + b"x" * (size % 256) for i in range(count)
    ]
    with ours, theirs:
        sender = threading.Thread(target=ours.sendall, args=[models_message(models) + b"7\n"])
        sender.start()
        channel = Channel(theirs)
        assert channel.receive_models() == models
        sender.join()


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0", models_message([b"model"])[:-1], models_message([b"a", b"b"])[:-9]]
)
def test_a_supervisor_that_ends_before_the_model_is_complete_is_one_sentence(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        ours.sendall(sent)
        ours.close()
        with pytest.raises(SupervisorError, match="start the service again"):
            Channel(theirs).receive_models()


async def test_a_worker_reports_regularly(ends: Ends) -> None:
    _, reader, _ = ends
    assert [await message(reader) for _ in range(5)] == [(0, OWN)] * 5


async def test_a_worker_reports_when_it_is_ready_and_again_when_it_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two routine reports too. Afterwards nothing of the channel runs."""
    monkeypatch.setattr(channel_module, "REPORT_SECONDS", 3600)
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    channel.report(lambda: OWN)
    reader, writer = await asyncio.open_unix_connection(sock=ours)
    before = asyncio.all_tasks()
    await channel.open()
    assert await message(reader) == (0, OWN)
    channel.report(lambda: SUM)
    await channel.close()
    assert (await asyncio.wait_for(reader.read(), 10)) == b"0 " + SUM.to_json() + b"\n"
    assert asyncio.all_tasks() == before
    writer.close()


@pytest.mark.parametrize("seconds", [0, 0.05, 0.5])
async def test_a_supervisor_that_is_killed_ends_the_channel_without_an_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """A socket that closes with unread bytes resets its peer; uvloop then refuses to write."""
    monkeypatch.setattr(channel_module, "REPORT_SECONDS", 0.01)
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    channel.report(lambda: OWN)
    await channel.open()
    await asyncio.sleep(0.05)  # for the report, which is not read
    ours.close()
    await asyncio.sleep(seconds)
    await channel.close()
    del channel
    gc.collect()
    assert caplog.text == ""


async def test_a_sum_may_be_long(ends: Ends) -> None:
    channel, _, writer = ends
    asking = asyncio.ensure_future(channel.totals())
    long = Totals({("a" * 200_000,): [1]})
    writer.write(long.to_json() + b"\n")
    assert await asyncio.wait_for(asking, 10) == long


async def test_a_worker_answers_a_question(ends: Ends) -> None:
    _, reader, writer = ends
    writer.write(b"7\n8\n")
    assert [await message_but_reports(reader) for _ in range(2)] == [(7, OWN), (8, OWN)]


async def test_a_worker_asks_for_the_sum_of_all(ends: Ends) -> None:
    channel, reader, writer = ends
    asking = asyncio.ensure_future(channel.totals())
    assert await message_but_reports(reader) == (-1, OWN)
    writer.write(SUM.to_json() + b"\n")
    assert await asyncio.wait_for(asking, 10) == SUM


async def test_calls_at_once_share_a_question_that_is_asked_after_them(ends: Ends) -> None:
    """An answer to a question before the call may lack what was counted since."""
    channel, reader, writer = ends
    first = asyncio.ensure_future(channel.totals())
    assert await message_but_reports(reader) == (-1, OWN)
    others = [asyncio.ensure_future(channel.totals()) for _ in range(100)]
    others.pop().cancel()  # its client left
    await asyncio.sleep(0)
    channel.report(lambda: SUM)
    writer.write(OWN.to_json() + b"\n")
    assert await asyncio.wait_for(first, 10) == OWN
    assert await message_but_reports(reader) == (-1, SUM)
    assert not any(one.done() for one in others)
    writer.write(SUM.to_json() + b"\n7\n")
    assert await asyncio.wait_for(asyncio.gather(*others), 10) == [SUM] * 99
    assert await message_but_reports(reader) == (7, SUM)  # there was no further question


async def test_questions_do_not_pile_up_for_a_supervisor_that_hangs(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, reader, writer = ends
    monkeypatch.setattr(channel_module, "ANSWER_SECONDS", 0.05)
    asking = [asyncio.ensure_future(channel.totals()) for _ in range(100)]
    failed = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(error) for error in failed} == {NotReady}
    writer.write(b"7\n")
    numbers = [(await message_but_reports(reader))[0]]
    while numbers[-1] != 7:
        numbers.append((await message_but_reports(reader))[0])
    assert numbers == [-1, 7]


async def test_a_supervisor_that_does_not_answer_is_a_503(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, _, writer = ends
    monkeypatch.setattr(channel_module, "ANSWER_SECONDS", 0.05)
    with pytest.raises(NotReady):
        await channel.totals()
    asking = asyncio.ensure_future(channel.totals())
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # for the question
    writer.write(
        OWN.to_json() + b"\n" + SUM.to_json() + b"\n"
    )  # the first answers the question before
    assert await asking == SUM


async def test_reports_do_not_pile_up_for_a_supervisor_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "REPORT_SECONDS", 0.01)
    sent = 0

    def totals() -> Totals:
        nonlocal sent
        sent += 1
        return Totals({("a" * 100_000,): [1]})

    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    channel.report(totals)
    await channel.open()
    await asyncio.sleep(0.5)  # long enough to fill the sockets' buffers
    before = sent
    await asyncio.sleep(0.2)
    assert 0 < sent == before
    ours.close()
    await channel.close()


async def test_a_worker_that_ends_sends_a_last_report(ends: Ends) -> None:
    channel, reader, _ = ends
    channel.report(lambda: SUM)
    await channel.close()
    lines = (await asyncio.wait_for(reader.read(), 10)).splitlines()
    assert lines[-1] == b"0 " + SUM.to_json()
