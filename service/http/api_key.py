"""Who may call: whoever sends the API key, where one is set."""

import hmac
from collections.abc import Iterable, Mapping

from service.errors import Unauthorized


class ApiKey:
    """Checks the key of requests (RFC 6750).

    Args:
        key: None lets everybody in.
        open_paths: paths that need no key; one that ends in `*` stands for all that begin so.
    """

    def __init__(self, key: str | None, open_paths: Iterable[str]) -> None:
        self._key = None if key is None else key.encode()
        self._open_paths = frozenset(path for path in open_paths if path[-1] != "*")
        self._open_prefixes = tuple(path[:-1] for path in open_paths if path[-1] == "*")

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Check a request.

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
