"""The memory that clients may fill: one count of bytes for all connections."""

import asyncio
from collections.abc import Callable

from service.errors import Overloaded

BODIES_IN_MEMORY = 4  # of the largest size


class BodyBudget:
    """Counts the bytes held for clients: bodies, compressed and plain, and what connections queue.

    Args:
        max_bytes: the most bytes of one body.
        evict_slowest: refuses the request that has been arriving for longest, if that is long;
            returns whether there was one.

    Attributes:
        max_bytes: as given.
        bytes_left: how many more bytes may be held.
        decompressing: locked while a thread decompresses a body, so that one at a time does.
    """

    __slots__ = ("_evict_slowest", "bytes_left", "decompressing", "max_bytes")

    def __init__(self, max_bytes: int, evict_slowest: Callable[[], bool]) -> None:
        self.max_bytes = max_bytes
        self.bytes_left = BODIES_IN_MEMORY * max_bytes
        self.decompressing = asyncio.Lock()
        self._evict_slowest = evict_slowest

    def take(self, count: int) -> None:
        """Count bytes as held. The caller gives them back, even after `Overloaded`.

        Raises:
            Overloaded: the budget is full, and no slow request is left to evict.
        """
        self.bytes_left -= count
        while self.bytes_left < 0 < count:
            if not self._evict_slowest():
                raise Overloaded(
                    "The server is receiving too much at once; try again in a second.",
                    headers={"Retry-After": "1"},
                )

    def give_back(self, count: int) -> None:
        """Stop counting bytes as held."""
        self.bytes_left += count
