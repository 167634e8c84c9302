"""Which requests may be inside, for how long, and with how many bytes."""

import asyncio
from time import perf_counter
from typing import Protocol

from service.errors import Overloaded, ServiceError, SlowRequest
from service.http.budget import BodyBudget
from service.http.exchange import Exchange

SLOW_AFTER_SECONDS = 2.0
SWEEP_SECONDS = 0.1


class Sender(Protocol):
    """What admission needs of a connection whose request has begun to arrive: an end to it."""

    def evict(self, error: ServiceError) -> None:
        """Refuse the request; give back what it holds."""


class Gauge(Protocol):
    """What admission needs of the metrics: a place for the number of requests in flight."""

    def set(self, value: float) -> None:
        """Set the number."""


class Admission:
    """Counts requests, ends those past their deadline, and makes room by ending the slowest.

    A request is in flight when all of it has arrived and it has no answer yet. Those that still
    arrive take no place; the budget bounds their bytes, and the deadline their time.

    Args:
        max_in_flight: how many requests may be in flight.
        timeout: the seconds that a request may take, its arrival included.
        max_body_bytes: the most bytes of one body.
        gauge: shows how many requests are in flight.

    Attributes:
        in_flight: how many requests are.
        draining: the server is about to stop, and wants no new traffic.
        timeout: as given.
        budget: counts the bytes held for clients.
    """

    def __init__(
        self, max_in_flight: int, timeout: float, max_body_bytes: int, gauge: Gauge
    ) -> None:
        self.in_flight = 0
        self.draining = False
        self.timeout = timeout
        self.budget = BodyBudget(max_body_bytes, self._evict_slowest)
        self._max_in_flight = max_in_flight
        self._gauge = gauge
        self._senders: dict[Sender, float] = {}  # and since when, the longest first
        self._working: set[Exchange] = set()
        self._sweep_timer: asyncio.TimerHandle | None = None

    def enter(self, exchange: Exchange) -> None:
        """Count a whole request as in flight, until it leaves.

        Raises:
            Overloaded: too many are; this one is not counted.
        """
        if self.in_flight >= self._max_in_flight:
            raise Overloaded(
                "The server is at its limit; try again in a second.", headers={"Retry-After": "1"}
            )
        self.in_flight += 1
        self._working.add(exchange)
        if self._sweep_timer is None:
            self._sweep_later()

    def leave(self, exchange: Exchange) -> None:
        """Count a request as in flight no longer."""
        self.in_flight -= 1
        self._working.discard(exchange)

    def receive(self, sender: Sender) -> None:
        """Give a request that has begun to arrive its deadline, unless it has one."""
        self._senders.setdefault(sender, perf_counter())
        if self._sweep_timer is None:
            self._sweep_later()

    def received(self, sender: Sender) -> None:
        """Take the deadline back: the request is whole, or refused, or its client left."""
        self._senders.pop(sender, None)

    def _evict_slowest(self) -> bool:
        return self._evict_first(SLOW_AFTER_SECONDS)

    def _evict_first(self, seconds: float) -> bool:
        """Send the first sender away if it has taken this long; return whether it had."""
        for sender, since in self._senders.items():
            if perf_counter() - since < seconds:
                break
            del self._senders[sender]
            sender.evict(SlowRequest("The request came too slowly; send all of it at once."))
            return True
        return False

    def _sweep(self) -> None:
        """End requests past their deadline. One timer for all costs less than one for each."""
        while self._evict_first(self.timeout):
            pass
        now = perf_counter()
        for exchange in self._working:
            if now - exchange.started >= self.timeout:
                exchange.cancel()
        self._gauge.set(self.in_flight)
        self._sweep_timer = None
        if self._working or self._senders:
            self._sweep_later()

    def _sweep_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep_timer = loop.call_later(SWEEP_SECONDS, self._sweep)
