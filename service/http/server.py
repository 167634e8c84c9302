"""Binds the port, runs uvicorn on it, and drains the server before it stops."""

import asyncio
import contextlib
import ctypes
import gc
import logging
import math
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Sequence
from time import monotonic
from types import FrameType

import uvicorn

from service import __version__
from service.http.channel import Channel
from service.http.connection import Connection
from service.http.gate import Gate
from service.settings import Settings

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # Linux's socket options; Python does not name them
# A program for Linux's packet filter (networking/filter.rst in the kernel's documentation). It
# drops TCP packets with the flag SYN and without ACK: those that open a connection.
DROP_SYN = (
    (0x30, 0, 0, 13),  # load the byte with the flags
    (0x54, 0, 0, 0x12),  # keep SYN and ACK
    (0x15, 0, 1, 0x02),  # is it SYN alone?
    (0x06, 0, 0, 0),  # yes: drop the packet
    (0x06, 0, 0, 0xFFFFFFFF),  # no: accept all of it
)

logger = logging.getLogger("service")


class StartError(Exception):
    """The server cannot start; the message is one sentence that says why."""


def bind(settings: Settings) -> socket.socket:
    """Bind a socket to the address in the settings, without listening yet.

    The host `::` means IPv6 and IPv4, or IPv4 alone where the kernel has no IPv6.

    Raises:
        StartError: the address is in use, or does not belong to this machine.
    """
    address = f"{settings.host}:{settings.port}"
    any_address = settings.host == "::"
    host = "0.0.0.0" if any_address and not _has_ipv6() else settings.host  # noqa: S104 - as asked
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host,
            settings.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if any_address and family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(where)
    except (OSError, UnicodeError) as exc:  # Python raises the latter for a host such as `a..b`
        raise _cannot_listen(address, exc) from exc
    return listener


def _has_ipv6() -> bool:
    """Return whether the kernel has IPv6. `socket.has_ipv6` is about the interpreter alone."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def url(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def page(listener: socket.socket) -> str:
    """Return the URL of the page, for a browser on this machine."""
    return f"{url(listener)}/".replace("//0.0.0.0:", "//localhost:").replace("[::]", "localhost")


def refuse_new_connections(listener: socket.socket) -> None:
    """Make the kernel drop the packets that open a connection to this listener (Linux only).

    Otherwise a client that connects between the last `accept` and the closing of the listener gets
    a reset. A client whose packet is dropped tries again, and then finds another listener or none.
    Connections that are being opened are not affected.
    """
    if sys.platform != "linux":
        return
    filters = b"".join(struct.pack("@HBBI", *step) for step in DROP_SYN)
    program = ctypes.create_string_buffer(filters, len(filters))
    with contextlib.suppress(OSError):  # some sandboxes do not allow filters
        listener.setsockopt(
            socket.SOL_SOCKET,
            SO_ATTACH_FILTER,
            struct.pack("@HP", len(DROP_SYN), ctypes.addressof(program)),
        )


def _cannot_listen(address: str, exc: Exception) -> StartError:
    reason = getattr(exc, "strerror", None) or "no such host"
    return StartError(
        f"Cannot listen on {address} ({reason}): free the port, or choose another with --host and"
        " --port (or BNLENET_HOST and BNLENET_PORT)."
    )


def run(
    gate: Gate,
    settings: Settings,
    listener: socket.socket,
    supervisor: int | None = None,
    channel: Channel | None = None,
    others: Sequence[socket.socket] = (),
) -> None:
    """Serve until a signal stops the server.

    Args:
        gate: answers the requests.
        settings: read from the environment.
        listener: a bound socket.
        supervisor: the supervisor's process id; the server stops when it has another parent.
            None if there is no supervisor.
        channel: connects to the supervisor.
        others: the other workers' listeners.

    Raises:
        StartError: another process took the port while the model was loaded.
    """
    for sock in (listener, *others):  # before listening: other workers may accept from it at once
        sock.setblocking(False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # there is one only if the worker before has stopped
            listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    try:
        listener.listen()  # here and not in uvicorn, so that a failure becomes one sentence
    except OSError as exc:
        raise _cannot_listen(url(listener), exc) from exc
    gc.collect()
    gc.freeze()  # what has been loaded stays for good: the collector need not look through it
    # By default the collector looks through all requests in flight after 700 new objects; with 500
    # clients this cost a tenth of the answers.
    gc.set_threshold(10_000, 20, 50)
    with contextlib.suppress(ValueError, OSError):  # the system may refuse: then the limit stays
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    server = Server(gate, settings, supervisor, channel, others)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # under nohup it is ignored
        signal.signal(signal.SIGHUP, lambda *_: server.handle_exit(signal.SIGTERM, None))
    server.run([listener])


class Server(uvicorn.Server):
    """Drains before it stops: `/readyz` answers 503, and requests are still served for a while.

    Args:
        gate: answers the requests.
        settings: read from the environment.
        supervisor: the supervisor's process id; the server stops when it has another parent.
            None if there is no supervisor.
        channel: connects to the supervisor.
        others: the other workers' listeners.
    """

    def __init__(
        self,
        gate: Gate,
        settings: Settings,
        supervisor: int | None = None,
        channel: Channel | None = None,
        others: Sequence[socket.socket] = (),
    ) -> None:
        super().__init__(
            uvicorn.Config(
                gate,  # type: ignore[arg-type] # uvicorn only passes it on to `Connection`
                http=Connection,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=math.ceil(settings.request_timeout_seconds) + 1,
            )
        )
        self._admission = gate.admission
        self._drain_seconds = settings.drain_seconds
        self._stop_at = math.inf
        self._supervisor = supervisor
        self._channel = channel
        self._others = others
        self._waiting: list[socket.socket] = []  # others with connections at the last tick

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve, and log it. With several workers, the supervisor logs the page's URL."""
        await super().startup(sockets)
        if self._channel is not None:
            await self._channel.open()
            logger.info("a worker is ready", extra={"fields": {"pid": os.getpid()}})
            return
        for listener in sockets or []:
            fields = {"page": page(listener), "version": __version__, "workers": 1}
            logger.info("ready", extra={"fields": fields})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept the connections that wait at the listeners, serve them, then stop.

        The kernel resets connections that are not accepted before their listener closes, though
        their clients may have sent a request.
        """
        self._admission.draining = True
        for listener in sockets or []:
            refuse_new_connections(listener)
            with listener.dup() as copy:  # uvicorn's servers close the listener itself
                copy.setblocking(False)
                for server in self.servers:
                    server.close()
                await self._accept_waiting(copy)
        for listener in self._others:
            await self._accept_waiting(listener)
            listener.close()
        await super().shutdown(sockets)
        if self._channel is not None:
            await self._channel.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Drain on the first SIGTERM; stop without draining on SIGINT or a second signal."""
        if sig == signal.SIGTERM and not self._admission.draining:
            self._admission.draining = True
            self._stop_at = monotonic() + self._drain_seconds
        else:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Check whether it is time to stop; uvicorn calls this ten times a second."""
        orphaned = self._supervisor is not None and os.getppid() != self._supervisor
        if monotonic() >= self._stop_at or orphaned:
            self._admission.draining = True
            self.should_exit = True
        await self._help_others()
        return await super().on_tick(counter)

    async def _help_others(self) -> None:
        """Accept connections that have waited at another worker's listener since the last tick.

        That worker is dead, hangs, or is overloaded.
        """
        waiting, _, _ = select.select(self._others, [], [], 0)
        for listener in waiting:
            if listener in self._waiting:
                await self._accept_waiting(listener)
        self._waiting = waiting

    async def _accept_waiting(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # none is left, or no file descriptor is free
            while True:
                connection, _ = listener.accept()
                await loop.connect_accepted_socket(self._make_connection, connection)

    def _make_connection(self) -> Connection:
        return Connection(self.config, self.server_state, {})
