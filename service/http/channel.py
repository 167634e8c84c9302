"""The messages between the supervisor and a worker, and the worker's end of their socket pair.

The supervisor first sends the model files: their number, then each one's length and bytes. After
that both send lines.

- worker: `NUMBER TOTALS`. The number is `REPORT` in a routine report, which also shows that the
  worker is alive; the supervisor's number in an answer; or `ASK` in a request for the sum of all
  workers' totals.
- supervisor: `NUMBER` asks the worker for its totals; `TOTALS`, a JSON array, answers `ASK`.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from service.errors import NotReady
from service.telemetry.tallies import Totals

REPORT, ASK = 0, -1
REPORT_SECONDS = 0.2  # between two reports: what a killed worker counted since the last is lost
ANSWER_SECONDS = 3.0  # longer than two of the supervisor's collections: one may be running
MAX_LINE_BYTES = 2**20
LENGTH = struct.Struct("!Q")


class SupervisorError(Exception):
    """A worker cannot run without its supervisor; the message says what to do."""


def models_message(files: Sequence[bytes]) -> bytes:
    """Return the supervisor's first message: the number of files, then their lengths and bytes."""
    return LENGTH.pack(len(files)) + b"".join(LENGTH.pack(len(data)) + data for data in files)


class Channel:
    """A worker's connection to the supervisor.

    Args:
        end: the worker's socket of the pair.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._answers: deque[asyncio.Future[Totals]] = deque()
        self._asking = asyncio.Lock()
        self._next: asyncio.Task[Totals] | None = None  # the question that is still to be sent

    def receive_models(self) -> list[bytes]:
        """Wait for the model files, and return their bytes. Call this once, before all else.

        Raises:
            SupervisorError: the supervisor has ended.
        """
        self._socket.setblocking(True)
        with self._socket.makefile("rb") as stream:

            def number() -> int:
                (value,) = LENGTH.unpack(exactly(LENGTH.size))
                return int(value)

            def exactly(length: int) -> bytes:
                data = stream.read(length)
                if len(data) < length:
                    raise SupervisorError("The supervisor has ended: start the service again.")
                return data

            return [exactly(number()) for _ in range(number())]

    def report(self, totals: Callable[[], Totals]) -> None:
        """Set the function that returns this worker's totals; call this before `open`."""
        self._totals = totals

    async def open(self) -> None:
        """Start to send reports and to answer the supervisor."""
        self._socket.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(
            sock=self._socket, limit=MAX_LINE_BYTES
        )
        self._send(REPORT)  # the first one makes the worker ready
        self._tasks = [
            asyncio.create_task(self._report_regularly()),
            asyncio.create_task(self._listen()),
        ]

    async def close(self) -> None:
        """Send the last report, and close the socket."""
        for task in self._tasks:
            task.cancel()
        self._send(REPORT)
        self._writer.close()
        with contextlib.suppress(OSError):  # the supervisor has ended
            await self._writer.wait_closed()

    async def totals(self) -> Totals:
        """Return the sum of all workers' totals, none of them older than this call.

        One question at a time is open; all calls meanwhile share the next one. So many calls at
        once take no more of the other workers' time than two.

        Raises:
            NotReady: the supervisor does not answer.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._ask())
        return await asyncio.shield(self._next)  # a client that leaves ends its own wait only

    async def _ask(self) -> Totals:
        async with self._asking:
            self._next = None  # from here on, this worker's own counts are in the question
            answer: asyncio.Future[Totals] = asyncio.get_running_loop().create_future()
            self._answers.append(answer)
            self._send(ASK)
            try:
                return await asyncio.wait_for(answer, ANSWER_SECONDS)
            except TimeoutError:
                raise NotReady("The supervisor does not answer; try again later.") from None

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            # While the supervisor hangs, reports would pile up in the buffer.
            if not self._writer.transport.get_write_buffer_size():
                self._send(REPORT)

    async def _listen(self) -> None:
        with contextlib.suppress(ConnectionError):  # the supervisor has ended
            async for line in self._reader:
                if not line.startswith(b"["):
                    self._send(int(line))
                elif not (answer := self._answers.popleft()).done():
                    answer.set_result(Totals.from_json(line))

    def _send(self, number: int) -> None:
        if not self._writer.is_closing():  # it closes when the supervisor ends
            self._writer.write(b"%d %b\n" % (number, self._totals().to_json()))
