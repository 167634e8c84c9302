"""The API key, which every request but those for open paths must send, if one is set."""

import hmac
from collections.abc import Iterable, Mapping

from service.errors import Unauthorized


class ApiKey:
    """Checks the key of requests (RFC 6750).

    Args:
        key: the API key; None accepts every request.
        open_paths: paths that need no key; one that ends in `*` is a prefix.
    """

    def __init__(self, key: str | None, open_paths: Iterable[str]) -> None:
        self._key = None if key is None else key.encode()
        self._open_paths = frozenset(path for path in open_paths if path[-1] != "*")
        self._open_prefixes = tuple(path[:-1] for path in open_paths if path[-1] == "*")

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Check the key of one request.

        Raises:
            Unauthorized: the key is missing or wrong.
        """
        if self._key is None or path in self._open_paths or path.startswith(self._open_prefixes):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise Unauthorized(
                "Send the API key as `Authorization: Bearer KEY`.",
                headers={"WWW-Authenticate": 'Bearer realm="bn-lenet"'},
            )
