"""Overload: refusals must be quick, and the service must recover at once.

Photographs arrive at ten times the capacity, whether earlier ones are answered or not. For 784
bytes, `wrk` uses more connections than a worker admits and asks again at once; a Python client is
too slow for this.
"""

import asyncio
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from benchmarks.load import SCRIPT, BenchmarkError, Cores, Requests, run_wrk
from benchmarks.reliability.report import Options, Row
from benchmarks.reliability.service import Service, apart, serving
from benchmarks.reliability.soak import log_row
from benchmarks.reliability.traffic import LOST, Client, Outcome, photograph, post

TIMES = 10
IN_FLIGHT = 64  # half of them photographs: about 250 ms of work
ROUNDS = 5  # the machine's speed varies, so each has its own capacity
GOODPUT = 0.8
RECOVERY_SECONDS = 1.0
SLOWER = 2.0  # recovered means: p99 at most this many times the p99 before
WRK_CONNECTIONS = 960  # a worker admits 512; most shells allow 1,024 descriptors
OCTETS = {"Content-Type": "application/octet-stream"}


def run(options: Options) -> list[Row]:
    """Overload a service with one worker, in both ways."""
    rounds, seconds = (2, 1.0) if options.quick else (ROUNDS, 8.0)
    return [*open_loop(rounds, seconds), *closed_loop(rounds, max(1, int(seconds / 2)))]


class Round(NamedTuple):
    """One overload with photographs.

    Attributes:
        outcomes: of all its photographs.
        capacity: photographs a second, the mean of that before and that after.
        goodput: good answers a second until the end of the arrivals / capacity.
        recovery: the seconds until the service was as quick as before.
    """

    outcomes: list[Outcome]
    capacity: float
    goodput: float
    recovery: float


def open_loop(rounds: int, seconds: float) -> list[Row]:
    """Send photographs at ten times the capacity for some seconds, in some rounds."""
    request = post("/predict", {"Content-Type": "image/jpeg"}, photograph())
    with serving(workers=1, max_in_flight=IN_FLIGHT) as service, apart(service):
        asyncio.run(probe(service, request, 0.2))  # warm
        quiet = percentile([o.seconds for o in asyncio.run(probe(service, request, seconds / 2))])
        before, found = asyncio.run(measure_capacity(service, request, seconds / 2)), []
        for _ in range(rounds):
            outcomes, end = asyncio.run(arrive(service, request, TIMES * before, seconds))
            probes = asyncio.run(probe(service, request, 3.0, to_the_end=False))
            after = asyncio.run(measure_capacity(service, request, seconds / 2))
            capacity, before = (before + after) / 2, after
            goodput = good_answers(outcomes, end) / seconds / capacity
            recovered = recovery(probes, end, SLOWER * quiet)
            found.append(Round(outcomes, capacity, goodput, recovered))
        return [*open_loop_rows(found, seconds), log_row(service)]


def good_answers(outcomes: Sequence[Outcome], end: float) -> int:
    """Return the number of good answers until a time; those in flight then do not count."""
    return sum(o.status == 200 and o.began + o.seconds <= end for o in outcomes)


def open_loop_rows(rounds: Sequence[Round], seconds: float) -> list[Row]:
    """Return the figures of the photographs."""
    outcomes = [outcome for one in rounds for outcome in one.outcomes]
    counts = Counter(outcome.error or str(outcome.status) for outcome in outcomes)
    others = {name: count for name, count in counts.items() if name not in ("200", "503")}
    listed = "; ".join(f"{count:,} x {name}" for name, count in counts.most_common())
    refused = [outcome.seconds for outcome in outcomes if outcome.status == 503]
    return [
        Row(
            "photographs a second: the capacity; the arrivals",
            f"{fmean(one.capacity for one in rounds):,.0f};"
            f" {len(outcomes) / len(rounds) / seconds:,.0f}",
        ),
        Row.holds("photographs: answers", listed, "200 or 503", not others),
        Row.mean_at_least(
            "photographs: good answers a second / capacity",
            [one.goodput for one in rounds],
            GOODPUT,
        ),
        Row("photographs: median time of a 503", f"{1e3 * percentile(refused, 50):.1f} ms"),
        Row.at_most(
            "photographs: seconds until p99 is at most twice that before",
            max(one.recovery for one in rounds),
            RECOVERY_SECONDS,
        ),
    ]


async def measure_capacity(service: Service, request: bytes, seconds: float) -> float:
    """Return the good answers a second to 16 clients; each waits for its answer."""
    found = await asyncio.gather(*(probe(service, request, seconds) for _ in range(16)))
    return sum(map(len, found)) / seconds


async def probe(
    service: Service, request: bytes, seconds: float, to_the_end: bool = True
) -> list[Outcome]:
    """Send requests on one connection, one after the other; return the outcomes.

    Raises:
        BenchmarkError: an answer is not 200, unless `to_the_end` is false.
    """
    client, outcomes = Client(service.port), []
    end = time.monotonic() + seconds
    while (began := time.monotonic()) < end:
        status, _ = await client.ask(request)
        outcomes.append(Outcome(began, time.monotonic() - began, status))
        if to_the_end and status != 200:
            raise BenchmarkError(f"the answer to a lone request was {status}")
    client.close()
    return outcomes


async def arrive(
    service: Service, request: bytes, rate: float, seconds: float
) -> tuple[list[Outcome], float]:
    """Send requests at a rate, on a free connection or a new one.

    Returns:
        the outcomes, and the time when the last request was sent.
    """
    free: list[Client] = []
    outcomes: list[Outcome] = []
    running: set[asyncio.Task[None]] = set()

    async def ask() -> None:
        client = free.pop() if free else Client(service.port)
        began, status, error = time.monotonic(), 0, ""
        try:
            status, _ = await client.ask(request)
        except LOST as exc:
            error = type(exc).__name__
        outcomes.append(Outcome(began, time.monotonic() - began, status, error))
        free.append(client)

    begin, sent = time.monotonic(), 0
    while (now := time.monotonic()) < begin + seconds:
        while sent < (now - begin) * rate:
            task = asyncio.create_task(ask())
            running.add(task)
            task.add_done_callback(running.discard)
            sent += 1
        await asyncio.sleep(0.001)
    end = time.monotonic()
    await asyncio.gather(*running)
    for client in free:
        client.close()
    return outcomes, end


def recovery(probes: Sequence[Outcome], end: float, limit: float) -> float:
    """Return the seconds until the p99 of the following second is within the limit.

    Args:
        probes: requests sent one after the other, from the end of the overload on.
        end: the end of the overload.
        limit: the largest allowed p99, in seconds.
    """
    for first in probes:
        window = [o for o in probes if first.began <= o.began < first.began + 1]
        if (
            all(o.status == 200 for o in window)
            and percentile([o.seconds for o in window]) <= limit
        ):
            return max(0.0, first.began - end)
    return math.inf


def percentile(seconds: Sequence[float], percent: float = 99) -> float:
    """Return the smallest value that `percent` of the values do not exceed; NaN for no values."""
    if not seconds:
        return math.nan
    return sorted(seconds)[math.ceil(percent / 100 * len(seconds)) - 1]


def closed_loop(rounds: int, seconds: int) -> list[Row]:
    """Send 784 bytes on more connections than a worker admits, again at once after every answer."""
    what = f"784 bytes, {WRK_CONNECTIONS} clients that ask again at once"
    try:
        cores = Cores.choose()
    except (BenchmarkError, AttributeError) as exc:  # macOS has no CPU affinity
        return [Row.not_measured(what, str(exc))]
    requests = Requests("/predict", OCTETS, [bytes(range(196)) * 4])
    rates, goodput, afterwards, failed = [], [], [], 0
    answers: Counter[str] = Counter()
    with serving(workers=1) as service, apart(service), requests.folder:
        _wrk(service, requests, 64, 1, cores)  # warm
        capacities = [_wrk(service, requests, 64, seconds, cores)[0]]
        for _ in range(rounds):
            before = statuses(service)
            rate, lost = _wrk(service, requests, WRK_CONNECTIONS, seconds, cores)
            counted = statuses(service) - before
            again, _ = _wrk(service, requests, 64, 1, cores)
            capacities.append(_wrk(service, requests, 64, seconds, cores)[0])
            capacity = fmean(capacities[-2:])
            rates.append(rate)
            goodput.append(counted["200"] / seconds / capacity)
            afterwards.append(again / capacity)
            answers += counted
            failed += lost
        listed = "; ".join(f"{count:,} x {status}" for status, count in answers.most_common())
        return [
            Row(
                f"{what}: the capacity (64 clients); answers of any status",
                f"{fmean(capacities):,.0f}; {fmean(rates):,.0f} a second",
            ),
            Row.holds(f"{what}: answers", listed, "200 or 503", answers.keys() <= {"200", "503"}),
            Row.at_most(f"{what}: connections lost", failed, 0),
            Row.mean_at_least(f"{what}: good answers a second / capacity", goodput, GOODPUT),
            Row.mean_at_least(
                "784 bytes: answers in the second afterwards / capacity", afterwards, GOODPUT
            ),
            log_row(service),
        ]


def _wrk(
    service: Service, requests: Requests, connections: int, seconds: int, cores: Cores
) -> tuple[float, int]:
    """Return the answers a second, of any status, and the number of failed connections."""
    script = SCRIPT.replace("errors.timeout,", "errors.timeout - errors.status,")
    outcome = run_wrk(script, service.port, requests, connections, seconds, cores)
    return outcome["requests"] / outcome["microseconds"] * 1e6, int(outcome["failed"])


def statuses(service: Service) -> Counter[str]:
    """Return the service's counts of answers of `/predict`, by status."""
    line = r'^http_requests_total\{method="POST",route="/predict",status="(\d+)"\} (\S+)$'
    found = re.findall(line, service.get("/metrics"), re.MULTILINE)
    return Counter({status: int(float(count)) for status, count in found})
