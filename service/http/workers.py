"""Several worker processes behind one socket, each replaced when it dies."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from asyncio.subprocess import Process

from prometheus_client.multiprocess import mark_process_dead

from service.telemetry.metrics import MULTIPROCESS

START_FAILED = 1  # a worker's exit status when it cannot start, for instance for want of a model
RESTART_AFTER_SECONDS = 1.0

logger = logging.getLogger("service")


class SupervisorError(Exception):
    """No workers can be started; the message is one sentence that says why."""


def supervise(count: int, listener: socket.socket) -> int:
    """Run workers until a signal ends them, and return the exit status.

    Args:
        count: how many.
        listener: a bound socket; the workers share it.

    Raises:
        SupervisorError: there is nowhere to keep their metrics.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="bnlenet-metrics-")
    except OSError as exc:
        raise SupervisorError(
            f"There is nowhere to keep the workers' metrics ({exc.strerror}): set TMPDIR to a"
            " directory that can be written, or BNLENET_WORKERS to 1."
        ) from exc
    with folder as directory:
        return asyncio.run(Supervisor(listener, directory).run(count))


class Supervisor:
    """Starts the workers, replaces those that die, and passes signals on.

    Args:
        listener: a bound socket.
        directory: where the workers keep the metrics that they sum.
    """

    def __init__(self, listener: socket.socket, directory: str) -> None:
        self._listener = listener
        self._directory = directory
        self._workers: set[Process] = set()
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self, count: int) -> int:
        """Run the workers to their end and return the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        await asyncio.gather(*(self._keep() for _ in range(count)))
        return self._status

    async def _keep(self) -> None:
        """Keep one worker running."""
        first = True
        while not self._stopping.is_set():
            try:
                worker = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "service", "worker"),
                    *(str(self._listener.fileno()), str(os.getpid())),
                    env=os.environ | {MULTIPROCESS: self._directory},
                    pass_fds=[self._listener.fileno()],
                    start_new_session=True,  # a terminal's Ctrl-C comes to us, and we pass it on
                )
            except OSError as exc:  # no memory, or no process more: the other workers go on
                fields = {"reason": exc.strerror}
                logger.error("a worker cannot be started", extra={"fields": fields})
                await self._pause()
                continue
            self._workers.add(worker)
            if self._stopping.is_set():  # told while it was being started
                self._send(worker, signal.SIGTERM)
            status = await worker.wait()
            self._workers.discard(worker)
            mark_process_dead(worker.pid, self._directory)  # type: ignore[no-untyped-call] # untyped there
            if self._stopping.is_set():
                if status not in (0, -signal.SIGTERM, -signal.SIGINT):  # negative: still starting
                    self._status = self._status or START_FAILED
            elif first and status == START_FAILED:
                self._status = START_FAILED
                self._stop(signal.SIGTERM)
            else:
                died = {"pid": worker.pid, "status": status}
                logger.error("a worker died and is replaced", extra={"fields": died})
                await self._pause()
            first = False

    async def _pause(self) -> None:
        """Wait a moment, so that workers that cannot live do not keep the machine busy."""
        try:
            await asyncio.wait_for(self._stopping.wait(), RESTART_AFTER_SECONDS)
        except TimeoutError:
            return

    def _stop(self, number: int) -> None:
        self._stopping.set()
        for worker in self._workers:
            self._send(worker, number)

    def _send(self, worker: Process, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
            worker.send_signal(number)
