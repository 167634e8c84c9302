"""How many bytes are held in memory for clients, over all connections."""

import asyncio
from collections.abc import Callable

from service.errors import Overloaded

BODIES_IN_MEMORY = 4  # of the largest size


class BodyBudget:
    """Counts what is held for clients: bodies as sent and unpacked, and what waits on connections.

    Args:
        max_bytes: of one body.
        evict_slowest: sends away the client that has been sending its request for longest, if that
            is long; returns whether there was one.

    Attributes:
        max_bytes: as given.
        bytes_left: how many more bytes may be held.
        unpacking: held by the one body that is being unpacked in a thread.
    """

    __slots__ = ("_evict_slowest", "bytes_left", "max_bytes", "unpacking")

    def __init__(self, max_bytes: int, evict_slowest: Callable[[], bool]) -> None:
        self.max_bytes = max_bytes
        self.bytes_left = BODIES_IN_MEMORY * max_bytes
        self.unpacking = asyncio.Lock()
        self._evict_slowest = evict_slowest

    def take(self, count: int) -> None:
        """Count bytes as held, whether or not there is room; the caller gives them back.

        Raises:
            Overloaded: there is no room.
        """
        self.bytes_left -= count
        while self.bytes_left < 0 < count:
            if not self._evict_slowest():
                raise Overloaded(
                    "The server is receiving too much at once; try again in a second.",
                    headers={"Retry-After": "1"},
                )

    def give_back(self, count: int) -> None:
        """Count bytes as held no longer."""
        self.bytes_left += count
