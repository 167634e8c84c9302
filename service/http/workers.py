"""Several worker processes on one port: started, watched, and replaced when they die or hang."""

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
from service.http.channel import ASK, MAX_LINE_BYTES, with_length
from service.telemetry.tallies import Totals

START_FAILED = 1  # a worker's exit status when it cannot start, for instance without a model
RESTART_AFTER_SECONDS = 1.0
COLLECT_SECONDS = 1.0  # for the answers of all workers; those that are late count as reported last
# Time is counted in ticks of the supervisor's own clock: when the machine, or all processes
# together, stand still for a while, no worker is blamed for it.
TICK_SECONDS = 1.0
HANGS_AFTER_TICKS = 5
START_TICKS = 60  # for loading the model, on any machine
GIVE_UP_TICKS = 60  # without any worker that is ready

COMMAND = (sys.executable, "-P", "-m", "service", "worker")

logger = logging.getLogger("service")


def supervise(workers: int, listener: socket.socket, model: bytes, page: str) -> int:
    """Run workers until a signal ends them, and return the exit status.

    Args:
        workers: how many.
        listener: a bound socket.
        model: the model file's bytes, the same for all workers.
        page: the page's address, for the log.
    """
    return asyncio.run(Supervisor(listeners(listener, workers), model, page).run())


def listeners(first: socket.socket, count: int) -> list[socket.socket]:
    """Return a listener for each worker, all bound to one address.

    The kernel spreads connections over them; of one that is shared, the first worker to wake takes
    a whole burst. They belong to the supervisor, so the connections that wait at one are not lost
    with its worker.

    Args:
        first: a bound socket. It was bound alone, so nobody else has the address.
        count: how many.
    """
    if sys.platform != "linux":  # others send all connections to one of them
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
    """A worker process, as its supervisor knows it.

    Attributes:
        process: the process.
        writer: the supervisor's end of the channel to it.
        ready: it has reported.
        silent: how many ticks ago it last reported, or was started.
        totals: what it has counted, as last reported.
        questions: its answers that others wait for, by number.
    """

    def __init__(self, process: Process, writer: asyncio.StreamWriter) -> None:
        self.process = process
        self.writer = writer
        self.ready = False
        self.silent = 0
        self.totals = Totals()
        self.questions: dict[int, asyncio.Future[None]] = {}

    def send(self, number: int) -> None:
        """Send a signal, if the process has not just ended by itself."""
        # Not `process.send_signal`: it may take the exit status from asyncio, which waits for it.
        with contextlib.suppress(ProcessLookupError):
            if self.process.returncode is None:
                os.kill(self.process.pid, number)

    def ask(self, number: int) -> "asyncio.Future[None]":
        """Ask for its totals; return what is done when they have come."""
        self.writer.write(b"%d\n" % number)
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.questions[number] = answer
        return answer

    def answered(self, number: int) -> None:
        """Tell those who asked that the totals have come."""
        if answer := self.questions.pop(number, None):
            answer.set_result(None)


class Supervisor:
    """Starts the workers, replaces those that die or hang, sums their counts, passes signals on.

    Args:
        listeners: a bound socket for each worker, or the same for all.
        model: the model file's bytes.
        page: the page's address; logged once, when the first worker is ready.
        command: starts a worker, given our process id and the descriptors of its channel, its
            listener and those of the others.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        model: bytes,
        page: str,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._listeners = listeners
        self._model = with_length(model)
        self._page: str | None = page
        self._path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        self._command = command
        self._workers: set[Worker] = set()
        self._ended = Totals()  # of workers that are no more
        self._numbers = count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._status = 0

    async def run(self) -> int:
        """Run the workers to their end and return the exit status."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop, signal.SIGTERM)
        loop.add_signal_handler(signal.SIGINT, self._stop, signal.SIGINT)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            loop.add_signal_handler(signal.SIGHUP, self._stop, signal.SIGTERM)
        watch = asyncio.create_task(self._watch())
        await asyncio.gather(*map(self._keep, self._listeners))
        watch.cancel()
        return self._status

    async def _keep(self, listener: socket.socket) -> None:
        """Keep one worker running."""
        first = True
        while not self._stopping.is_set():
            try:
                worker = await self._run_worker(listener)
            except OSError as exc:  # no memory, or no process more: the other workers go on
                fields = {"reason": exc.strerror}
                logger.error("a worker cannot be started", extra={"fields": fields})
                await self._pause()
                continue
            status = worker.process.returncode
            if self._stopping.is_set():
                if status not in (0, -signal.SIGTERM, -signal.SIGINT):  # negative: still starting
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
        """Run one worker to its end, and return it."""
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
        writer.write(self._model)
        if self._stopping.is_set():  # a signal came while it was being started
            worker.send(signal.SIGTERM)
        listening = asyncio.create_task(self._listen(worker, reader))
        await process.wait()
        await listening  # to the end of what it has sent
        self._workers.discard(worker)
        self._ended.add_ended(worker.totals)
        for number in [*worker.questions]:
            worker.answered(number)
        writer.close()
        return worker

    async def _start(self, channel: socket.socket, listener: socket.socket) -> Process:
        """Start a worker that runs the very code that runs here, whatever the current folder."""
        others = {*self._listeners} - {listener}
        descriptors = [end.fileno() for end in (channel, listener, *others)]
        return await asyncio.create_subprocess_exec(
            *self._command,
            *map(str, (os.getpid(), *descriptors)),
            env=os.environ | {"PYTHONPATH": self._path},
            pass_fds=descriptors,
            start_new_session=True,  # a terminal's Ctrl-C comes to us, and we pass it on
        )

    async def _listen(self, worker: Worker, reader: asyncio.StreamReader) -> None:
        """Note a worker's reports, until it ends."""
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                if not line.endswith(b"\n"):  # it was killed while it wrote
                    break
                number, _, totals = line.partition(b" ")
                worker.totals = Totals.from_json(totals)
                worker.ready = True
                self._announce()
                worker.silent = 0
                worker.answered(int(number))
                if int(number) == ASK:
                    task = asyncio.create_task(self._tell(worker))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    def _announce(self) -> None:
        """Log the page's address, the first time."""
        if self._page is not None:
            count = len(self._listeners)
            fields = {"page": self._page, "version": __version__, "workers": count}
            logger.info("ready", extra={"fields": fields})
            self._page = None

    async def _tell(self, worker: Worker) -> None:
        """Ask all other workers for their totals, and tell one worker the sum."""
        number = next(self._numbers)
        others = [other for other in self._workers if other.ready and other is not worker]
        if answers := [other.ask(number) for other in others]:
            await asyncio.wait(answers, timeout=COLLECT_SECONDS)
        total = Totals()
        total.add(self._ended)
        for one in self._workers:
            total.add(one.totals)
        worker.writer.write(total.to_json() + b"\n")

    async def _watch(self) -> None:
        """Kill workers that hang; give up when none has been ready for too long."""
        down = 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            for worker in self._workers:
                worker.silent += 1
                starting = not worker.ready and not self._stopping.is_set()
                if worker.silent > (START_TICKS if starting else HANGS_AFTER_TICKS):
                    fields = {"pid": worker.process.pid}
                    logger.error("a worker hangs and is killed", extra={"fields": fields})
                    worker.send(signal.SIGKILL)
            down = 0 if any(worker.ready for worker in self._workers) else down + 1
            if down > GIVE_UP_TICKS and not self._stopping.is_set():
                logger.error("no worker can be started: the service ends")
                self._status = START_FAILED
                self._stop(signal.SIGTERM)

    async def _pause(self) -> None:
        """Wait a moment, so that workers that cannot live do not keep the machine busy."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), RESTART_AFTER_SECONDS)

    def _stop(self, number: int) -> None:
        self._stopping.set()
        for listener in self._listeners:  # so that it closes when the workers close it
            listener.close()
        for worker in self._workers:
            worker.send(number)
