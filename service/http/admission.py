"""How many requests may be in flight, how long each may take, and which one is evicted.

A refusal takes time too. Clients that ignore `Retry-After` and ask again at once could take most of
it from the admitted requests. So a connection rests after a refusal: its next request waits in the
kernel, where it costs nothing.
"""

import asyncio
from time import perf_counter
from typing import Protocol

from service.errors import Overloaded, ServiceError, SlowRequest
from service.http.budget import BodyBudget
from service.http.exchange import Exchange

SLOW_AFTER_SECONDS = 2.0  # a request that arrives for longer may be evicted to free memory
SWEEP_SECONDS = 0.1  # between two checks of all deadlines
REST_SECONDS = 0.2  # at least, and until the next sweep


class Sender(Protocol):
    """What admission needs of a connection."""

    def evict(self, error: ServiceError) -> None:
        """Refuse the request that is still arriving, and free its memory."""

    def wake(self) -> None:
        """Read again after a rest."""


class Gauge(Protocol):
    """What admission needs of the metrics."""

    def set(self, value: float) -> None:
        """Set the number of requests in flight."""


class Admission:
    """Limits the requests in flight, enforces deadlines, and evicts slow senders.

    A hot path's request is in flight from its last byte until its answer. While it arrives, it is
    not: the budget limits its bytes, and the read deadline its time.

    Args:
        max_in_flight: the most requests in flight.
        timeout: the seconds that a request may take, its arrival included.
        max_body_bytes: the most bytes of one body.
        gauge: shows the number of requests in flight.

    Attributes:
        in_flight: the number of requests in flight.
        draining: the server is about to stop. `/readyz` says so, and every answer closes its
            connection.
        timeout: as given.
        budget: counts the bytes held for clients.
    """

    def __init__(
        self, max_in_flight: int, timeout: float, max_body_bytes: int, gauge: Gauge
    ) -> None:
        self.in_flight = 0
        self.draining = False
        self.timeout = timeout
        self.budget = BodyBudget(max_body_bytes, self.evict_slowest)
        self._max_in_flight = max_in_flight
        self._gauge = gauge
        self._senders: dict[Sender, float] = {}  # with the time they began, the oldest first
        self._resting: dict[Sender, float] = {}  # since when, the longest first
        self._exchanges: set[Exchange] = set()  # in flight
        self._sweep_timer: asyncio.TimerHandle | None = None

    def admit(self, exchange: Exchange) -> None:
        """Count a complete request as in flight; call `finish` when it has its answer.

        Raises:
            Overloaded: too many are in flight; this one is not counted.
        """
        if self.in_flight >= self._max_in_flight:
            raise Overloaded(
                "The server is at its limit; try again in a second.", headers={"Retry-After": "1"}
            )
        self.in_flight += 1
        self._exchanges.add(exchange)
        if self._sweep_timer is None:
            self._schedule_sweep()

    def finish(self, exchange: Exchange) -> None:
        """Stop counting a request as in flight."""
        self.in_flight -= 1
        self._exchanges.discard(exchange)

    def rest(self, sender: Sender) -> None:
        """Wake a connection after its rest; its last request was refused."""
        self._resting.setdefault(sender, perf_counter())
        if self._sweep_timer is None:
            self._schedule_sweep()

    def start_read_deadline(self, sender: Sender) -> None:
        """Set the deadline for a request that has begun to arrive, unless it has one."""
        self._senders.setdefault(sender, perf_counter())
        if self._sweep_timer is None:
            self._schedule_sweep()

    def stop_read_deadline(self, sender: Sender) -> None:
        """Remove the deadline, if there is one: the request is complete, refused or abandoned."""
        self._senders.pop(sender, None)

    def forget(self, sender: Sender) -> None:
        """Neither evict nor wake a connection any more: it is closing."""
        self._senders.pop(sender, None)
        self._resting.pop(sender, None)

    def evict_slowest(self) -> bool:
        """Evict the client that has been sending for longest, if that is long; return whether."""
        return self._evict_oldest(SLOW_AFTER_SECONDS)

    def _evict_oldest(self, seconds: float) -> bool:
        """Evict the oldest sender if it is at least this old; return whether it was."""
        for sender, since in self._senders.items():
            if perf_counter() - since < seconds:
                break
            del self._senders[sender]
            sender.evict(SlowRequest("The request came too slowly; send all of it at once."))
            return True
        return False

    def _sweep(self) -> None:
        """End requests past their deadline, and rests. One timer for all costs less than many."""
        while self._evict_oldest(self.timeout):
            pass
        now = perf_counter()
        for exchange in self._exchanges:
            if now - exchange.started >= self.timeout:
                exchange.cancel()
        for sender in [one for one, since in self._resting.items() if now - since >= REST_SECONDS]:
            del self._resting[sender]
            sender.wake()
        self._gauge.set(self.in_flight)
        self._sweep_timer = None
        if self._exchanges or self._senders or self._resting:
            self._schedule_sweep()

    def _schedule_sweep(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep_timer = loop.call_later(SWEEP_SECONDS, self._sweep)
