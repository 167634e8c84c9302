"""A hundred thousand mutated requests over sockets: no 500, no hang, no dead worker.

Heads, chunks and lengths are changed. Requests are sent several at once, in pieces, and truncated.
Then the connection closes its sending side, so the server must answer the complete requests and
close. One connection in a hundred stays open, and must get an answer, or be closed, all the same.
"""

import asyncio
import hashlib
from collections import Counter
from contextlib import suppress
from random import Random

from benchmarks.reliability.report import Options, Row
from benchmarks.reliability.service import serving
from benchmarks.reliability.soak import log_row
from benchmarks.reliability.traffic import LOST, answers, bad, good

CLIENTS = 32
DEADLINE_SECONDS = 2.0  # the service's deadline for a request
HANG_SECONDS = 20.0
STAYS_OPEN = 0.01
GETS = (
    *("/", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/v2", "/v2/models/stats"),
    *("/%00", "*"),
)
TOKENS = (
    *(
        b"\r\n",
        b"\n",
        b"\r",
        b"\0",
        b" ",
        b"\t",
        b":",
        b"\r\n\r\n",
        b"0\r\n\r\n",
        b"\xf0\x9f\x91\x96",
    ),
    *(
        b"-1",
        b"ffffffffffffffff",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"HEAD ",
        b"A: %b\r\n" % (b"a" * 40_000),
    ),
    *(
        field.encode("latin-1") + b"\r\n"
        for field in (
            "Transfer-Encoding: chunked",
            "Transfer-Encoding: gzip, chunked",
            "Content-Length: 5",
            "Content-Length: 99999999999999999999",
            "Content-Encoding: deflate",
            "Inference-Header-Content-Length: 7",
            "Expect: 100-continue",
            "Connection: close",
            "Connection: Upgrade\r\nUpgrade: websocket",
            "Host: \xff",
            "Accept-Encoding: gzip",
            "Origin: null",
            "X-Request-ID: \x01",
        )
    ),
)


def run(options: Options) -> list[Row]:
    """Send the requests to a service with two workers."""
    count = options.count(100_000, 300)
    with serving(workers=2, request_timeout_seconds=DEADLINE_SECONDS) as service:
        before = {worker.pid for worker in service.workers()}
        counts = asyncio.run(send_all(service.port, count, options))
        after = {worker.pid for worker in service.workers()}
        listed = ", ".join(f"{kind} {counts[kind]:,}" for kind in sorted(counts) if kind.isdigit())
        ready = service.ready()
        return [
            Row("connections; answers by status", f"{count:,}; {listed}"),
            Row.at_most("answers with status 500", counts["500"], 0),
            Row.at_most("connections that were not closed in time", counts["hang"], 0),
            Row.at_most("answers that are not HTTP/1.1, or are cut short", counts["garbled"], 0),
            Row.at_most("workers that died", len(before - after), 0),
            Row.holds("afterwards", "ready" if ready else "not ready", "ready", ready),
            log_row(service),
        ]


async def send_all(port: int, count: int, options: Options) -> Counter[str]:
    """Return the number of answers by status, and of faults by kind."""
    counts: Counter[str] = Counter()
    valid = [*good().values(), *bad().values(), *map(get, GETS)]
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            random = seeded(number)
            data = mutated(valid, random)
            found = await exchange(port, data, random)
            counts.update(found)
            if {"500", "hang", "garbled"} & {*found}:
                name = hashlib.sha256(data).hexdigest()[:12]
                options.save(f"request-{name}.bin", data)
                options.save(f"request-{name}.txt", f"number {number}: {found}".encode())

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return counts


async def exchange(port: int, data: bytes, random: Random) -> list[str]:
    """Send bytes on a new connection; return the statuses of the answers, or the fault."""
    received = b""
    try:
        async with asyncio.timeout(HANG_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                cut = random.randrange(len(data)) if random.random() < 0.2 else len(data)
                writer.write(data[:cut])
                if cut < len(data):
                    await asyncio.sleep(0)
                    writer.write(data[cut:])
                if random.random() > STAYS_OPEN:
                    writer.write_eof()
                    received = await reader.read(-1)
                else:
                    received = await reader.readuntil(b"\r\n\r\n")
                    return [received[9:12].decode()]
            finally:
                writer.transport.abort()
    except TimeoutError:
        return ["hang"]
    except LOST:  # closed without an answer, or while data was still on its way
        return ["reset"]
    with suppress(ValueError, IndexError):
        return [*map(str, answers(received))] or ["none"]
    return ["garbled"]


def seeded(number: int) -> Random:
    """Return the random generator of a connection, by its number."""
    return Random(number)  # noqa: S311 - nothing is kept secret with it


def get(path: str) -> bytes:
    """Return the bytes of a GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: attacked\r\n\r\n".encode()


def mutated(valid: list[bytes], random: Random) -> bytes:
    """Return one to four valid requests with up to six changes, sometimes truncated.

    Heads are changed more often than bodies.
    """
    data = b"".join(random.choices(valid, k=random.choice((1, 1, 1, 2, 4))))
    for _ in range(random.randrange(7)):
        if not data:
            break
        most = data.find(b"\r\n\r\n") + 4 if random.random() < 0.7 else len(data)
        at = random.randrange(most or 1)
        match random.randrange(5):
            case 0:
                data = data[:at] + random.choice(TOKENS) + data[at:]
            case 1:
                data = data[:at] + random.randbytes(random.choice((1, 1, 4))) + data[at + 1 :]
            case 2:
                data = data[:at] + data[at + random.choice((1, 2, 16)) :]
            case 3:  # repeat a line
                line = data.rfind(b"\r\n", 0, at) + 2 if b"\r\n" in data[:at] else 0
                end = data.find(b"\r\n", line) + 2
                data = data[:end] + data[line:end] + data[end:]
            case _:
                data = data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]
    return data[: random.randrange(len(data))] if data and random.random() < 0.1 else data
