"""The supervisor: runs worker processes on one port, and replaces those that die or hang."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from service import __version__
from service.http.channel import ASK, MAX_LINE_BYTES, models_message
from service.telemetry.tallies import Totals

START_FAILED = 1  # a worker's exit status when it cannot start, for instance without a model
RESTART_AFTER_SECONDS = 1.0
COLLECT_SECONDS = 1.0  # for all workers to answer; of a late one, the last report counts
# Time is counted in ticks of the supervisor: if the whole machine stops for a while, the ticks stop
# too, and no worker is killed for it.
TICK_SECONDS = 1.0
HANGS_AFTER_TICKS = 5  # without a report
START_TICKS = 60  # for a worker to load the model, also on a slow machine
GIVE_UP_TICKS = 60  # without any ready worker

COMMAND = (sys.executable, "-P", "-m", "service", "worker")

logger = logging.getLogger("service")


def supervise(workers: int, listener: socket.socket, models: Sequence[bytes], page: str) -> int:
    """Run workers until a signal stops them, and return the exit status.

    Args:
        workers: how many.
        listener: a bound socket.
        models: the model files' bytes, the same for all workers.
        page: the page's URL, for the log.
    """
    return asyncio.run(Supervisor(listeners(listener, workers), models, page).run())


def listeners(first: socket.socket, count: int) -> list[socket.socket]:
    """Return a listener for each worker, all bound to one address.

    The kernel spreads new connections over the listeners. From a single shared listener, the first
    worker to wake would take a whole burst. The supervisor holds the listeners open, so that
    waiting connections survive the death of their worker.

    Args:
        first: a socket that was bound without SO_REUSEPORT, so no other program has the address.
        count: how many.
    """
    if sys.platform != "linux":  # elsewhere one of them would get all connections
        return [first] * count
    first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made = [first]
    for _ in range(count - 1):
        listener = socket.socket(first.family, first.type, first.proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if first.family == socket.AF_INET6:
            only = first.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
        listener.bind(first.getsockname())
        made.append(listener)
    return made


class Worker:
    """What the supervisor knows of a worker process.

    Attributes:
        process: the process.
        writer: sends to the worker.
        ready: the worker has reported.
        silent_ticks: ticks since its last report, or since its start.
        totals: its counts as last reported.
        questions: by number, those it has not answered yet.
    """

    def __init__(self, process: Process, writer: asyncio.StreamWriter) -> None:
        self.process = process
        self.writer = writer
        self.ready = False
        self.silent_ticks = 0
        self.totals = Totals()
        self.questions: dict[int, asyncio.Future[None]] = {}

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        # `process.send_signal` polls the process, and may so take the exit status from asyncio.
        with contextlib.suppress(ProcessLookupError):
            if self.process.returncode is None:
                os.kill(self.process.pid, number)

    def ask(self, number: int) -> "asyncio.Future[None]":
        """Ask the worker for its totals; the future is done when they are in `totals`."""
        self.writer.write(b"%d\n" % number)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.questions[number] = answer
        return answer

    def resolve(self, number: int) -> None:
        """Mark a question as answered, if it is one."""
        if answer := self.questions.pop(number, None):
            answer.set_result(None)


class Supervisor:
    """Starts and replaces workers, sums their counts, and passes signals on to them.

    Args:
        listeners: a bound socket for each worker, or the same for all.
        models: the model files' bytes.
        page: the page's URL, which is logged when the first worker is ready.
        command: starts a worker. Its further arguments are the supervisor's process id and the
            file descriptors of the worker's channel, its listener and the other listeners.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        models: Sequence[bytes],
        page: str,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._listeners = listeners
        self._models = models_message(models)
        self._page: str | None = page
        self._path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        self._command = command
        self._workers: set[Worker] = set()
        self._ended = Totals()  # of workers that have ended
        self._numbers = count(1)
        self._asking: asyncio.Queue[Worker] = asyncio.Queue()  # workers that wait for the sum
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Run the workers until they have ended, and return the exit status."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop, signal.SIGTERM)
        loop.add_signal_handler(signal.SIGINT, self._stop, signal.SIGINT)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it is ignored
            loop.add_signal_handler(signal.SIGHUP, self._stop, signal.SIGTERM)
        tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._send_sums())]
        await asyncio.gather(*map(self._keep_running, self._listeners))
        for task in tasks:
            task.cancel()
        return self._status

    async def _keep_running(self, listener: socket.socket) -> None:
        """Run a worker on a listener, and replace it whenever it ends."""
        first = True
        while not self._stopping.is_set():
            try:
                worker = await self._run_worker(listener)
            except OSError as exc:  # no memory or no process is free: the other workers go on
                fields = {"reason": exc.strerror}
                logger.error("a worker cannot be started", extra={"fields": fields})
                await self._pause()
                continue
            status = worker.process.returncode
            if self._stopping.is_set():
                # A worker that is still starting dies by the signal: its status is negative.
                if status not in (0, -signal.SIGTERM, -signal.SIGINT):
                    self._status = self._status or START_FAILED
            elif first and not worker.ready and status == START_FAILED:
                self._status = START_FAILED
                self._stop(signal.SIGTERM)
            else:
                died = {"pid": worker.process.pid, "status": status}
                logger.error("a worker died and is replaced", extra={"fields": died})
                await self._pause()
            first = False

    async def _run_worker(self, listener: socket.socket) -> Worker:
        """Run one worker until it has ended, and return it."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await self._start(theirs, listener)
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE_BYTES)
        worker = Worker(process, writer)
        self._workers.add(worker)
        writer.write(self._models)
        if self._stopping.is_set():  # the signal came while the process was starting
            worker.send_signal(signal.SIGTERM)
        listening = asyncio.create_task(self._listen(worker, reader))
        await process.wait()
        await listening  # for its last report
        self._workers.discard(worker)
        self._ended.add_ended(worker.totals)
        for number in [*worker.questions]:
            worker.resolve(number)
        writer.close()
        return worker

    async def _start(self, channel: socket.socket, listener: socket.socket) -> Process:
        """Start a worker process that imports this same code, from any current folder."""
        others = {*self._listeners} - {listener}
        descriptors = [end.fileno() for end in (channel, listener, *others)]
        return await asyncio.create_subprocess_exec(
            *self._command,
            *map(str, (os.getpid(), *descriptors)),
            env=os.environ | {"PYTHONPATH": self._path},
            pass_fds=descriptors,
            start_new_session=True,  # a terminal sends Ctrl-C to us alone, and we pass it on
        )

    async def _listen(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        """Take a worker's messages until it ends."""
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                if not line.endswith(b"\n"):  # the worker was killed while it wrote
                    break
                number, _, totals = line.partition(b" ")
                worker.totals = Totals.from_json(totals)
                worker.ready = True
                self._announce()
                worker.silent_ticks = 0
                worker.resolve(int(number))
                if int(number) == ASK:
                    self._asking.put_nowait(worker)

    def _announce(self) -> None:
        """Log once that the service is ready."""
        if self._page is not None:
            count = len(self._listeners)
            fields = {"page": self._page, "version": __version__, "workers": count}
            logger.info("ready", extra={"fields": fields})
            self._page = None

    async def _send_sums(self) -> None:
        """Send the sum to the workers that ask for it: one collection at a time, for all of them.

        The question of a worker has its own totals, so only the others are asked.
        """
        while True:
            asking = [await self._asking.get()]
            while not self._asking.empty():
                asking.append(self._asking.get_nowait())
            number = next(self._numbers)
            others = [one for one in self._workers if one.ready and one not in asking]
            if answers := [one.ask(number) for one in others]:
                await asyncio.wait(answers, timeout=COLLECT_SECONDS)
            total = Totals()
            total.add(self._ended)
            for one in self._workers:
                total.add(one.totals)
            for one in asking:
                one.writer.write(total.to_json() + b"\n")

    async def _watch(self) -> None:
        """Kill workers that hang; stop the service if no worker is ready for too long."""
        down_ticks = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for worker in self._workers:
                worker.silent_ticks += 1
                starting = not worker.ready and not self._stopping.is_set()
                if worker.silent_ticks > (START_TICKS if starting else HANGS_AFTER_TICKS):
                    fields = {"pid": worker.process.pid}
                    logger.error("a worker hangs and is killed", extra={"fields": fields})
                    worker.send_signal(signal.SIGKILL)
            down_ticks = 0 if any(worker.ready for worker in self._workers) else down_ticks + 1
            if down_ticks > GIVE_UP_TICKS and not self._stopping.is_set():
                logger.error("no worker can be started: the service ends")
                self._status = START_FAILED
                self._stop(signal.SIGTERM)

    async def _pause(self) -> None:
        """Wait before a restart, so that workers that die at once do not keep the CPU busy."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), RESTART_AFTER_SECONDS)

    def _stop(self, number: int) -> None:
        self._stopping.set()
        for listener in self._listeners:  # an open copy would keep the port open
            listener.close()
        for worker in self._workers:
            # Python and click answer SIGINT before the server does, with a message and status 1.
            worker.send_signal(number if worker.ready else signal.SIGTERM)
