"""Requests in every form of body that the service takes, and clients that send them."""

import asyncio
import gzip
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from benchmarks.serving import binary_head, open_inference_json, plain_json, png
from tests.service.pictures.drawings import encode, shaded, worn

INFER = "/v2/models/bn-lenet/infer"
BOUNDARY = "a-boundary"
TIMEOUT_SECONDS = 30.0
LOST = (OSError, EOFError, ValueError, TimeoutError)
"""The exceptions of a request without an answer."""


def post(path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return the bytes of a POST request."""
    lines = [f"POST {path} HTTP/1.1", "Host: attacked"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def photograph(side: int = 640) -> bytes:
    """Return a JPEG photograph of trousers on a wall, drawn by a formula."""
    return encode(worn(shaded()).resize((side, side * 6 // 5)), "JPEG", quality=90)


def good() -> dict[str, bytes]:
    """Return a request in each form of body."""
    image = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    octets = {"Content-Type": "application/octet-stream"}
    as_json = {"Content-Type": "application/json"}
    head = binary_head()
    binary = octets | {"Inference-Header-Content-Length": str(len(head))}
    pieces = image.tobytes()
    chunked = (
        b"POST /predict HTTP/1.1\r\nHost: attacked\r\nContent-Type: application/octet-stream\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
        b"200\r\n%b\r\n110\r\n%b\r\n0\r\n\r\n" % (pieces[:512], pieces[512:])
    )
    return {
        "784 bytes": post("/predict", octets, image.tobytes()),
        "784 bytes, chunked": chunked,
        "JSON": post("/predict", as_json, plain_json(image)),
        "JSON, gzip": post(
            "/predict", as_json | {"Content-Encoding": "gzip"}, gzip.compress(plain_json(image))
        ),
        "PNG": post("/predict?top_k=3", {"Content-Type": "image/png"}, png(image)),
        "JPEG photograph": post("/predict", {"Content-Type": "image/jpeg"}, photograph()),
        "form": form(png(image)),
        "OIP JSON": post(INFER, as_json, open_inference_json(image)),
        "OIP binary": post(INFER, binary, head + image.tobytes()),
    }


def form(file: bytes) -> bytes:
    """Return a request that uploads a file in a form."""
    disposition = 'form-data; name="image"; filename="a.png"'
    head = f"--{BOUNDARY}\r\nContent-Disposition: {disposition}\r\nContent-Type: image/png\r\n\r\n"
    body = head.encode() + file + f"\r\n--{BOUNDARY}--\r\n".encode()
    return post("/predict", {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}, body)


def bad() -> dict[str, bytes]:
    """Return requests that must be refused with a 4xx status."""
    octets = {"Content-Type": "application/octet-stream"}
    as_json = {"Content-Type": "application/json"}
    return {
        "783 bytes": post("/predict", octets, bytes(783)),
        "JSON cut short": post("/predict", as_json, b'{"pixels": [[0, 1'),
        "pixels of 256": post("/predict", as_json, b'{"pixels": [%b]}' % b",".join([b"256"] * 784)),
        "half a photograph": post("/predict", {"Content-Type": "image/jpeg"}, photograph()[:5000]),
        "no picture": post("/predict", {"Content-Type": "image/png"}, b"no picture"),
        "no gzip": post("/predict", as_json | {"Content-Encoding": "gzip"}, b"no gzip"),
        "a form without a file": form(b"").replace(b'"image"', b'"other"'),
        "text": post("/predict", {"Content-Type": "text/plain"}, b"trousers"),
        "no tensor": post(INFER, as_json, b'{"inputs": []}'),
        "no such model": post("/v2/models/other/infer", as_json, b"{}"),
    }


class Answer(NamedTuple):
    """An answer's status and body."""

    status: int
    body: bytes


class Client:
    """A client with one connection, which is opened when it is needed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, request: bytes) -> Answer:
        """Send a request and return its answer.

        Raises:
            LOST: there is no answer; ConnectionRefusedError means that no server listens.
        """
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await self._ask(request)
        except BaseException:
            self.close()
            raise

    async def abort(self, request: bytes) -> None:
        """Send half a request, and close the connection."""
        with suppress(*LOST):
            _, writer = await self._open()
            writer.write(request[: len(request) // 2])
            await asyncio.sleep(0)
        self.close()

    def close(self) -> None:
        """Close the connection at once."""
        if self._writer is not None:
            self._writer.transport.abort()
        self._reader = self._writer = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self._reader, self._writer

    async def _ask(self, request: bytes) -> Answer:
        reader, writer = await self._open()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        _, _, after = head.partition(b"\r\ncontent-length: ")
        body = await reader.readexactly(int(after.partition(b"\r")[0]))
        if b"\r\nconnection: close\r\n" in head:
            self.close()
        return Answer(int(head[9:12]), body)


class Outcome(NamedTuple):
    """The outcome of a request: its start, its duration, and its status or error."""

    began: float
    seconds: float
    status: int
    error: str = ""


class Load:
    """Clients in a thread; every client sends its next request soon after its answer.

    Args:
        port: the server's port.
        request: the bytes to send.
        clients: the number of clients.

    Attributes:
        outcomes: the outcomes of all requests, in the order of their ends.
        refused: the number of refused connections.
        bodies: the different bodies of good answers.
    """

    def __init__(self, port: int, request: bytes, clients: int = 8) -> None:
        self.outcomes: list[Outcome] = []
        self.refused = 0
        self.bodies: set[bytes] = set()
        self.clients = clients
        self._port = port
        self._request = request
        self._stopped = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join()

    def failed(self) -> list[Outcome]:
        """Return the outcomes of requests that were sent and got no 200."""
        return [outcome for outcome in self.outcomes if outcome.status != 200]

    def wait_for(self, more: int) -> None:
        """Wait for `more` further good answers, but at most half a minute."""
        wanted = len(self.outcomes) - len(self.failed()) + more
        deadline = time.monotonic() + 30
        while len(self.outcomes) - len(self.failed()) < wanted and time.monotonic() < deadline:
            time.sleep(0.02)

    async def _run(self) -> None:
        await asyncio.gather(*(self._client() for _ in range(self.clients)))

    async def _client(self) -> None:
        client = Client(self._port)
        while not self._stopped:
            began = time.monotonic()
            status, error = 0, ""
            try:
                status, body = await client.ask(self._request)
                if status == 200:
                    self.bodies.add(body)
            except ConnectionRefusedError:
                self.refused += 1
                await asyncio.sleep(0.02)
                continue
            except LOST as exc:
                error = repr(exc)
            self.outcomes.append(Outcome(began, time.monotonic() - began, status, error))
            await asyncio.sleep(0.002)  # so that the clients do not take all processor time
        client.close()


def answers(stream: bytes) -> Iterator[int]:
    """Yield the statuses of all answers in the bytes of a connection.

    Raises:
        ValueError: the bytes are not complete HTTP/1.1 answers.
    """
    while stream:
        head, blank, stream = stream.partition(b"\r\n\r\n")
        if not (blank and head.startswith(b"HTTP/1.1 ")):
            raise ValueError(f"not an answer: {head[:100]!r}")
        yield int(head[9:12])
        _, has_length, after = head.lower().partition(b"\r\ncontent-length: ")
        length = int(after.partition(b"\r")[0]) if has_length else 0
        if not stream.startswith(b"HTTP/1.1 "):  # otherwise it was an answer to HEAD
            if len(stream) < length and stream:
                raise ValueError(f"an answer cut short: {head[:100]!r}")
            stream = stream[length:]
