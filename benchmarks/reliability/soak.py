"""Load of 0.8 of the capacity for half an hour: memory, failures and bits of the answers."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from benchmarks.load import BenchmarkError
from benchmarks.reliability.report import Options, Row
from benchmarks.reliability.service import Service, Usage, apart, serving
from benchmarks.reliability.traffic import LOST, Answer, Client, bad, good

CLIENTS = 32
SHARE = 0.8  # of the capacity: the load
BAD, ABORTED = 0.05, 0.01
FIRST_SECONDS = 60.0  # after this, nothing may grow; in a short soak, a tenth of it
GROWTH_PERCENT = 2.0


@dataclass
class Findings:
    """The counts of a soak.

    Attributes:
        counts: the number of requests by result: "good", "bad", "aborted"; "5xx", "other answer",
            "no answer".
        samples: the seconds since the start, and the usage of each worker then.
    """

    counts: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[float, dict[int, Usage]]] = field(default_factory=list)


def run(options: Options) -> list[Row]:
    """Load a service with two workers; compare every answer with the one at the start."""
    seconds = 2.0 if options.quick else options.minutes * 60
    with serving(workers=2, max_in_flight=512) as service, apart(service):
        requests = [*good().items(), *bad().items()]
        reference = asyncio.run(ask_once(service, requests))
        for name, found in reference.items():
            if (found.status == 200) != (name in good()):
                raise BenchmarkError(f"{name} is answered {found.status}: {found.body!r}")
        capacity = asyncio.run(measure_capacity(service, min(10.0, seconds / 4)))
        before = service.usage()
        findings = asyncio.run(soak(service, reference, SHARE * capacity, seconds))
        time.sleep(1)  # until it has closed the clients' connections
        after = service.usage()
        return [*rows(findings, before, after, capacity, seconds), log_row(service)]


async def ask_once(service: Service, requests: Sequence[tuple[str, bytes]]) -> dict[str, Answer]:
    """Return the answer to each request, sent alone."""
    client = Client(service.port)
    found = {name: await client.ask(request) for name, request in requests}
    client.close()
    return found


async def measure_capacity(service: Service, seconds: float) -> float:
    """Return the answers a second when all forms of body are sent in turn."""
    requests = [*good().values()]
    done, end = 0, time.monotonic() + seconds

    async def ask(turn: int) -> None:
        nonlocal done
        client = Client(service.port)
        while time.monotonic() < end:
            await client.ask(requests[turn % len(requests)])
            turn, done = turn + 1, done + 1
        client.close()

    await asyncio.gather(*map(ask, range(CLIENTS)))
    return done / seconds


async def soak(
    service: Service, reference: dict[str, Answer], rate: float, seconds: float
) -> Findings:
    """Send requests at a steady rate, and measure the workers once a second."""
    findings, random = Findings(), Random(0)  # noqa: S311 - nothing is kept secret with it
    forms, wrong = [*good().items()], [*bad().items()]
    begin, sent = time.monotonic(), 0

    async def client() -> None:
        nonlocal sent
        connection = Client(service.port)
        while (due := sent / rate) < seconds:
            sent += 1
            await asyncio.sleep(begin + due - time.monotonic())
            draw = random.random()
            name, request = random.choice(wrong if draw < BAD else forms)
            if draw > 1 - ABORTED:
                await connection.abort(request)
                findings.counts["aborted"] += 1
                continue
            try:
                answer = await connection.ask(request)
            except LOST:
                findings.counts["no answer"] += 1
                continue
            findings.counts[judge(answer, reference[name])] += 1
        connection.close()

    async def watch() -> None:
        while (passed := time.monotonic() - begin) < seconds:
            findings.samples.append((passed, service.usage()))
            await asyncio.sleep(min(1.0, seconds / 20))

    await asyncio.gather(watch(), *(client() for _ in range(CLIENTS)))
    return findings


def judge(answer: Answer, expected: Answer) -> str:
    """Compare an answer with the answer to the same request at the start.

    For refusals only the status is compared, because they have a request id.
    """
    if answer.status >= 500:
        return "5xx"
    if answer.status != expected.status:
        return "other answer"
    if answer.status != 200:
        return "bad"
    return "good" if answer.body == expected.body else "other answer"


def rows(
    findings: Findings,
    before: dict[int, Usage],
    after: dict[int, Usage],
    capacity: float,
    seconds: float,
) -> list[Row]:
    """Return the figures, with their goals."""
    counts = findings.counts
    first = min(FIRST_SECONDS, seconds / 10)
    early = next(usage for passed, usage in findings.samples if passed >= first)
    late = findings.samples[-1][1]
    same = before.keys() & early.keys() & late.keys() & after.keys()
    growth = max((100 * (late[pid].memory / early[pid].memory - 1) for pid in same), default=0.0)
    descriptors = max((after[pid].descriptors - before[pid].descriptors for pid in same), default=0)
    threads = max((late[pid].threads - early[pid].threads for pid in same), default=0)
    sent = f"{counts.total():,} at {counts.total() / seconds:,.0f} a second"
    largest = max(usage.memory for usage in late.values()) / 1e6
    return [
        Row("requests, at 0.8 of the capacity", f"{sent} of {capacity:,.0f}"),
        Row(
            "of these: good; bad; aborted",
            f"{counts['good']:,}; {counts['bad']:,}; {counts['aborted']:,}",
        ),
        Row.at_most("answers with status 5xx", counts["5xx"], 0),
        Row.at_most(
            "answers with other bits or status than at the start", counts["other answer"], 0
        ),
        Row.at_most("requests without an answer", counts["no answer"], 0),
        Row.at_most("workers replaced", len(before.keys() - same), 0),
        Row.at_most(
            f"growth of a worker's memory since {first:.0f} s", growth, GROWTH_PERCENT, " %"
        ),
        Row("the memory of the larger worker at the end", f"{largest:.0f} MB"),
        Row.at_most("more open descriptors than before", descriptors, 0),
        Row.at_most(f"more threads than after {first:.0f} s", threads, 0),
    ]


def log_row(service: Service) -> Row:
    """Return the row of tracebacks in the service's log."""
    return Row.at_most("tracebacks in the log", service.tracebacks(), 0)
