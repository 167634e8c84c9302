"""The request id and the trace id, which identify a request in answers and logs."""

import os
import re
from collections.abc import Mapping
from itertools import count

WELL_FORMED = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}").fullmatch
# W3C Trace Context, section 3.2.2; versions after 00 may have more fields.
TRACEPARENT = re.compile(
    rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
).fullmatch


class RequestIds:
    """Gives each request an id: the client's own, or a new one that no other process makes."""

    def __init__(self) -> None:
        self._prefix = os.urandom(6).hex().encode()
        self._count = count(1)

    def choose(self, headers: Mapping[bytes, bytes]) -> bytes:
        """Return the client's `X-Request-ID` if it is well-formed, else a new id."""
        given = headers.get(b"x-request-id")
        if given is not None and WELL_FORMED(given):
            return given
        return b"%s-%x" % (self._prefix, next(self._count))


def trace_id(headers: Mapping[bytes, bytes]) -> str | None:
    """Return the trace id (32 hexadecimal digits) if the client sent a valid `traceparent`."""
    given = headers.get(b"traceparent")
    if given is None:
        return None
    found = TRACEPARENT(given)
    if found is None or (found[1] == b"00" and found[3] is not None):
        return None
    return found[2].decode()
