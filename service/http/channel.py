"""What a supervisor and a worker say to each other over a pair of sockets.

The supervisor first sends the model file's bytes, with their length before them. Then both send
lines. A worker sends a number and its totals: 0 is a routine report, which also shows that it is
alive; another number answers the supervisor's question of that number; `ASK` asks for the totals
of all workers. The supervisor sends the number of a question, or those totals.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable

from service.errors import NotReady
from service.telemetry.tallies import Totals

ROUTINE, ASK = 0, -1
REPORT_SECONDS = 0.2  # a worker that is killed takes so many seconds of counts with it
ANSWER_SECONDS = 3.0  # longer than the supervisor waits for the workers
MAX_LINE_BYTES = 2**20
LENGTH = struct.Struct("!Q")


class SupervisorError(Exception):
    """Workers cannot be run; the message is one sentence that says why."""


def with_length(data: bytes) -> bytes:
    """Return the first message: the length of data, then data."""
    return LENGTH.pack(len(data)) + data


class Channel:
    """A worker's end.

    Args:
        line: its inherited socket.
    """

    def __init__(self, line: socket.socket) -> None:
        self._socket = line
        self._answers: deque[asyncio.Future[Totals]] = deque()

    def receive_model(self) -> bytes:
        """Wait for the model file's bytes; to be called once, before anything else.

        Raises:
            SupervisorError: the supervisor has ended.
        """
        self._socket.setblocking(True)
        with self._socket.makefile("rb") as stream:
            head = stream.read(LENGTH.size)
            if len(head) == LENGTH.size:
                (length,) = LENGTH.unpack(head)
                data = stream.read(length)
                if len(data) == length:
                    return data
        raise SupervisorError("The supervisor has ended: start the service again.")

    def report(self, totals: Callable[[], Totals]) -> None:
        """Set what to report: a function that returns what this worker has counted."""
        self._totals = totals

    async def open(self) -> None:
        """Begin to report."""
        self._socket.setblocking(False)
        self._reader, self._writer = await asyncio.open_unix_connection(
            sock=self._socket, limit=MAX_LINE_BYTES
        )
        self._send(ROUTINE)  # at once: until the first report, it counts as still starting
        self._tasks = [asyncio.create_task(self._report_on()), asyncio.create_task(self._listen())]

    async def close(self) -> None:
        """Report for the last time."""
        for task in self._tasks:
            task.cancel()
        self._send(ROUTINE)
        self._writer.close()
        with contextlib.suppress(OSError):  # the supervisor has ended
            await self._writer.wait_closed()

    async def totals(self) -> Totals:
        """Return what all workers have counted.

        Raises:
            NotReady: the supervisor does not answer.
        """
        answer: asyncio.Future[Totals] = asyncio.get_running_loop().create_future()
        self._answers.append(answer)
        self._send(ASK)
        try:
            return await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise NotReady("The supervisor does not answer; try again later.") from None

    async def _report_on(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            if not self._writer.transport.get_write_buffer_size():  # else the supervisor hangs
                self._send(ROUTINE)

    async def _listen(self) -> None:
        with contextlib.suppress(ConnectionError):  # the supervisor has ended
            async for line in self._reader:
                if not line.startswith(b"["):
                    self._send(int(line))
                elif not (answer := self._answers.popleft()).done():
                    answer.set_result(Totals.from_json(line))

    def _send(self, number: int) -> None:
        self._writer.write(b"%d %b\n" % (number, self._totals().to_json()))
