"""Binds the port, runs uvicorn on it, and drains before it stops."""

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

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # Linux; Python has no names for them
# A program for the kernel's packet filter (Linux, networking/filter.rst) that drops what has SYN
# set in the flags of its TCP header, and not ACK.
DROP_SYN = (
    (0x30, 0, 0, 13),  # load the flags
    (0x54, 0, 0, 0x12),  # of them, SYN and ACK
    (0x15, 0, 1, 0x02),  # SYN alone?
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # accept
)

logger = logging.getLogger("service")


class StartError(Exception):
    """The server cannot start; the message is one sentence that says why."""


def bind(settings: Settings) -> socket.socket:
    """Take the port, without listening yet: at `::` of both IP families, or of the one there is.

    Raises:
        StartError: the address is in use or not ours.
    """
    address = f"{settings.host}:{settings.port}"
    every = settings.host == "::"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            "0.0.0.0" if every and not _has_ipv6() else settings.host,  # noqa: S104 - as asked
            settings.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if every and family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(where)
    except (OSError, UnicodeError) as exc:  # a name with an empty label is no Unicode to Python
        raise _cannot_listen(address, exc) from exc
    return listener


def _has_ipv6() -> bool:
    """Tell whether the kernel has IPv6: `socket.has_ipv6` speaks only of the interpreter."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def url(listener: socket.socket) -> str:
    """Return where a bound socket listens."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def page(listener: socket.socket) -> str:
    """Return the page's address, for a browser on this machine."""
    return f"{url(listener)}/".replace("//0.0.0.0:", "//localhost:").replace("[::]", "localhost")


def refuse_new_connections(listener: socket.socket) -> None:
    """Let the kernel drop what opens a connection to a listening socket, where it can (Linux).

    Else a client that connects between the last look at the listener and its end would be reset.
    This one tries again, and finds another listener or none. Connections half open go on.
    """
    if sys.platform != "linux":
        return
    filters = b"".join(struct.pack("@HBBI", *step) for step in DROP_SYN)
    program = ctypes.create_string_buffer(filters, len(filters))
    with contextlib.suppress(OSError):  # a sandbox
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
    """Serve until a signal ends it.

    Args:
        gate: answers the requests.
        settings: what the environment decided.
        listener: a bound socket.
        supervisor: stop when this is no longer the parent process; None for none.
        channel: leads to the supervisor.
        others: the other workers' listeners.

    Raises:
        StartError: another process took the port while the model was loaded.
    """
    for shared in (listener, *others):  # before it listens: others may accept from it at once
        shared.setblocking(False)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # it has none, unless another worker stopped with it
            listener.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    try:
        listener.listen()  # here, where a failure can still be told in a sentence
    except OSError as exc:
        raise _cannot_listen(url(listener), exc) from exc
    gc.collect()
    gc.freeze()  # what lives as long as the process need not be looked through again and again
    # As many connections as we are allowed; where even that is refused, as many as we have.
    with contextlib.suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    server = Server(gate, settings, supervisor, channel, others)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else it is ignored, as under nohup
        signal.signal(signal.SIGHUP, lambda *_: server.handle_exit(signal.SIGTERM, None))
    server.run([listener])


class Server(uvicorn.Server):
    """A server that, told to stop, first says so at `/readyz` and goes on answering for a while.

    Args:
        gate: answers the requests.
        settings: what the environment decided.
        supervisor: stop when this is no longer the parent process; None for none.
        channel: leads to the supervisor.
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
                gate,  # type: ignore[arg-type] # uvicorn hands it on to `Connection`, uncalled
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
        self._waited: list[socket.socket] = []  # at the last tick

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start answering, and log that; with several workers, the supervisor logs the page."""
        await super().startup(sockets)
        if self._channel is not None:
            await self._channel.open()
            logger.info("a worker is ready", extra={"fields": {"pid": os.getpid()}})
            return
        for listener in sockets or []:
            fields = {"page": page(listener), "version": __version__, "workers": 1}
            logger.info("ready", extra={"fields": fields})

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept the connections that are waiting, then stop.

        Closing a listener resets the connections that nobody has accepted yet, and their clients
        may have sent a request.
        """
        self._admission.draining = True
        for listener in sockets or []:
            refuse_new_connections(listener)
            with listener.dup() as last:
                last.setblocking(False)
                for server in self.servers:
                    server.close()
                await self._accept_waiting(last)
        for listener in self._others:
            await self._accept_waiting(listener)
            listener.close()
        await super().shutdown(sockets)
        if self._channel is not None:
            await self._channel.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """Drain at the first SIGTERM; stop at once at SIGINT or a second signal."""
        if sig == signal.SIGTERM and not self._admission.draining:
            self._admission.draining = True
            self._stop_at = monotonic() + self._drain_seconds
        else:
            self.force_exit = self.should_exit and sig == signal.SIGINT
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look ten times a second whether it is time to stop."""
        orphaned = self._supervisor is not None and os.getppid() != self._supervisor
        if monotonic() >= self._stop_at or orphaned:
            self._admission.draining = True
            self.should_exit = True
        await self._help_others()
        return await super().on_tick(counter)

    async def _help_others(self) -> None:
        """Accept the connections that have waited for another worker since the last tick.

        It is dead, hangs, or has too much to do.
        """
        waiting, _, _ = select.select(self._others, [], [], 0)
        for listener in waiting:
            if listener in self._waited:
                await self._accept_waiting(listener)
        self._waited = waiting

    async def _accept_waiting(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):  # no more are waiting, or no descriptor is free
            while True:
                connection, _ = listener.accept()
                await loop.connect_accepted_socket(self._connection, connection)

    def _connection(self) -> Connection:
        return Connection(self.config, self.server_state, {})
