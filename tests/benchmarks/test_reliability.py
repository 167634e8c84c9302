"""The campaigns run, and detect the faults that they look for."""

import asyncio
import json
import math
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import capacity
from benchmarks.load import BenchmarkError
from benchmarks.page import with_section
from benchmarks.reliability import __main__ as command_line
from benchmarks.reliability import (
    artefacts,
    faults,
    fuzz,
    overload,
    report,
    requests,
    scale,
    service,
    soak,
    traffic,
)
from benchmarks.reliability.report import Options, Record, Row
from benchmarks.reliability.service import Usage
from benchmarks.reliability.traffic import Answer, Outcome
from service.errors import InvalidInput
from tests.benchmarks.crashes import crash_or_hang

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RECORD = Record("soak", "python -m x", "a machine", 90.0, (Row.at_most("failures", 0, 0),))


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(quick=True, failures=tmp_path / "failures")


def verdicts(rows: list[Row]) -> dict[str, bool | None]:
    return {row.what: row.met for row in rows if row.goal}


# The command, its file and its page


@pytest.mark.parametrize("name", ["soak", "fuzz", "requests", "artefacts"])
def test_a_campaign_meets_its_goals_and_is_recorded(name: str, tmp_path: Path) -> None:
    """A little of each, against a real server; two seconds are too short to judge growth."""
    file, page = tmp_path / "found.jsonl", tmp_path / "found.md"
    page.write_text(f"# Found\n\n{report.BEGIN}\nold\n{report.END}\nThe rest.\n")
    arguments = [name, "--quick", "--json", "--inputs", "40", "--out", str(file)]
    result = CliRunner().invoke(command_line.main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    (record,) = report.read(file).values()
    assert json.loads(result.stdout)["campaign"] == record.campaign == name
    missed = [row.what for row in record.rows if row.met is False]
    assert [what for what in missed if not what.startswith(("growth of", "more threads"))] == []
    assert sum(row.met is True for row in record.rows) >= 2
    assert record.command == f"python -m benchmarks.reliability {name} --inputs 40 --quick"
    assert page.read_text().startswith("# Found\n")
    assert page.read_text().endswith("\nThe rest.\n")
    assert f"| {name} | {record.rows[0].what} | {record.rows[0].figure} |" in page.read_text()


@pytest.mark.slow
def test_every_other_campaign_runs(tmp_path: Path) -> None:
    """Goals of the overload depend on the machine's speed, so they are not checked."""
    file = tmp_path / "found.jsonl"
    arguments = ["overload", "faults", "training", "scale", "--quick", "--out", str(file)]
    result = CliRunner().invoke(command_line.main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    found = report.read(file)
    assert [*found] == ["overload", "faults", "training", "scale"]
    for name in ("faults", "training"):
        assert [row for row in found[name].rows if row.met is False] == []


def test_a_campaign_that_the_file_has_is_not_run_again_unless_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(name: str, _: Options) -> Record:
        ran.append(name)
        return replace(RECORD, campaign=name)

    monkeypatch.setattr(command_line, "_run", run)
    file = tmp_path / "found.jsonl"
    report.append(file, RECORD)
    everything = [*report.CAMPAIGNS]
    for arguments, expected in (
        ([], everything[1:]),
        ([], []),
        (["soak"], ["soak"]),
        (["--again"], everything),
    ):
        ran.clear()
        result = CliRunner().invoke(command_line.main, [*arguments, "--out", str(file)])
        assert result.exit_code == 0, result.output
        assert ran == expected
    assert "failures" in result.stdout


def test_a_campaign_that_cannot_run_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, _: Options) -> Record:
        if name == "soak":
            raise BenchmarkError("the service is not ready")
        return replace(RECORD, campaign=name)

    monkeypatch.setattr(command_line, "_run", run)
    file = tmp_path / "found.jsonl"
    result = CliRunner().invoke(command_line.main, ["soak", "fuzz", "--out", str(file)])
    assert result.exit_code == 1
    assert "soak: the service is not ready\n" in result.stderr
    assert [*report.read(file)] == ["fuzz"]


@pytest.mark.parametrize(("met", "status"), [(True, 0), (None, 0), (False, 1)])
def test_a_missed_goal_gives_exit_status_1(
    met: bool | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = replace(RECORD, rows=(Row("figure", "1", "0", met), RECORD.rows[0]))
    monkeypatch.setattr(command_line, "_run", lambda *_: record)
    assert CliRunner().invoke(command_line.main, ["soak", "--quick"]).exit_code == status


def test_a_quick_run_writes_nothing_and_needs_no_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(name: str, _: Options) -> Record:
        ran.append(name)
        return RECORD

    monkeypatch.setattr(command_line, "FILE", tmp_path / "file.jsonl")
    monkeypatch.setattr(command_line, "_run", run)
    assert CliRunner().invoke(command_line.main, ["--quick"]).exit_code == 0
    assert ran == [name for name in report.CAMPAIGNS if name != "scale"]
    assert [*tmp_path.iterdir()] == []


def test_the_last_record_of_a_campaign_counts(tmp_path: Path) -> None:
    file = tmp_path / "new" / "found.jsonl"
    assert report.read(file) == {}
    second = replace(RECORD, rows=(Row("failures", "3", "0", met=False),))
    for record in (RECORD, replace(RECORD, campaign="fuzz"), second):
        report.append(file, record)
    assert report.read(file) == {"soak": second, "fuzz": replace(RECORD, campaign="fuzz")}


def test_the_committed_page_is_made_from_the_committed_file() -> None:
    page = PAGE.read_text(encoding="utf-8")
    text = report.section(report.read(command_line.FILE))
    assert page == with_section(page, text, report.BEGIN, report.END), (
        f"between its marks, docs/reliability.md should have:\n{text}"
    )


def test_the_page_says_not_measured_for_missing_campaigns() -> None:
    lines = report.section({"soak": RECORD}).splitlines()
    assert "| soak | failures | 0 | 0 | met |" in lines
    assert "| soak | `python -m x` | 1.5 | a machine |" in lines
    assert f"| fuzz | {report.CAMPAIGNS['fuzz']} | not measured |  |  |" in lines


@pytest.mark.parametrize(
    ("row", "figure", "goal", "verdict"),
    [
        (Row.at_most("x", 2.0, 2.0, " %"), "2 %", "≤ 2 %", "met"),
        (Row.at_most("x", 2.01, 2.0, " %"), "2.01 %", "≤ 2 %", "missed"),
        (Row.at_most("x", math.nan, 2.0), "nan", "≤ 2", "missed"),
        (Row.at_most("x", 1234, 0), "1,234", "0", "missed"),
        (Row.at_least("x", 0.8, 0.8), "0.8", "≥ 0.8", "met"),
        (Row.at_least("x", 0.79, 0.8), "0.79", "≥ 0.8", "missed"),
        (Row.not_measured("x", "no docker"), "not measured: no docker", "", ""),
    ],
)
def test_a_value_equal_to_its_goal_meets_it(row: Row, figure: str, goal: str, verdict: str) -> None:
    assert (row.figure, row.goal, row.verdict) == (figure, goal, verdict)


# Soak


@pytest.mark.parametrize(
    ("answer", "expected", "found"),
    [
        (Answer(200, b"a"), Answer(200, b"a"), "good"),
        (Answer(200, b"b"), Answer(200, b"a"), "other answer"),
        (Answer(422, b"id 2"), Answer(422, b"id 1"), "bad"),
        (Answer(200, b"a"), Answer(422, b"a"), "other answer"),
        (Answer(400, b"a"), Answer(422, b"a"), "other answer"),
        (Answer(503, b"a"), Answer(200, b"a"), "5xx"),
    ],
)
def test_an_answer_is_compared_with_the_one_at_the_start(
    answer: Answer, expected: Answer, found: str
) -> None:
    assert soak.judge(answer, expected) == found


def soaked(growth: float = 1.0, more: int = 0, **counts: int) -> dict[str, bool | None]:
    """Return the verdicts on 600 seconds in which a worker of 100 MB grows from 60 s on."""
    usage = {1: Usage(10**8, 10, 4), 2: Usage(10**8, 10, 4)}
    late = usage | {2: Usage(int(growth * 10**8), 99, 4 + more)}
    found = soak.Findings(Counter(good=100, **counts), [(0, {1: Usage(1, 1, 1)})])
    found.samples += [(59.0, {}), (60.0, usage), (599.0, late)]
    after = usage | {2: Usage(1, 10 + more, 4)}
    return verdicts(soak.rows(found, usage, after, 700.0, 600.0))


def test_a_soak_detects_growth_and_failures() -> None:
    assert set(soaked().values()) == {True}
    memory = "growth of a worker's memory since 60 s"
    assert soaked(growth=1.019)[memory]
    assert not soaked(growth=1.021)[memory]
    more = soaked(more=1)
    assert not more["more open descriptors than before"]
    assert not more["more threads than after 60 s"]
    assert [*soaked(**{"5xx": 1}).values()].count(False) == 1
    assert [*soaked(**{"other answer": 1}).values()].count(False) == 1
    assert [*soaked(**{"no answer": 1}).values()].count(False) == 1


def test_a_replaced_worker_is_detected() -> None:
    before, after = ({1: Usage(1, 1, 1), last: Usage(1, 1, 1)} for last in (2, 3))
    found = soak.Findings(samples=[(1.0, before), (2.0, after)])
    assert not verdicts(soak.rows(found, before, after, 1.0, 2.0))["workers replaced"]


# Overload


def outcomes(*seconds: float, status: int = 200) -> list[Outcome]:
    """Make the outcomes of requests, one every tenth of a second from 10 s on."""
    return [Outcome(10 + i / 10, taken, status) for i, taken in enumerate(seconds)]


def test_recovery_is_the_time_until_a_whole_second_is_quick() -> None:
    quick = [0.01] * 20
    assert overload.recovery(outcomes(*quick), end=10.0, limit=0.02) == 0
    assert overload.recovery(outcomes(0.5, 0.3, *quick), 10.0, 0.02) == pytest.approx(0.2)
    assert overload.recovery(outcomes(0.01, 0.3, *quick), 10.0, 0.02) == pytest.approx(0.2)
    refused = [*outcomes(0.001, status=503), *outcomes(1, 0.01, 0.01)[1:]]
    assert overload.recovery(refused, 10.0, 0.02) == pytest.approx(0.1)
    assert overload.recovery(outcomes(*[0.5] * 20), 10.0, 0.02) == math.inf


def test_percentiles_are_values_of_the_sample() -> None:
    assert overload.percentile(range(1, 101)) == 99
    assert overload.percentile([3, 1, 2], 50) == 2
    assert math.isnan(overload.percentile([]))


def test_an_answer_that_is_neither_good_nor_a_503_misses_the_goals() -> None:
    found = [*outcomes(0.1, 0.1), *outcomes(0.001, 0.003, 0.002, status=503)]
    good = overload.Round(found, capacity=2.0, goodput=0.9, recovery=0.9)
    rows = overload.open_loop_rows([good, good._replace(goodput=0.7)], seconds=2.5)
    assert verdicts(rows) == {
        "photographs: answers": True,
        "photographs: good answers a second / capacity": True,  # 0.8
        "photographs: seconds until p99 is at most twice that before": True,
    }
    figures = [row.figure for row in rows]
    assert figures == ["2; 2", "6 x 503; 4 x 200", "0.800 ± 1.271 (2 rounds)", "2.0 ms", "0.9"]
    for other in (Outcome(1, 1, 500), Outcome(1, 1, 0, "ConnectionResetError")):
        bad = overload.Round([*found, other], 2.0, 0.69, 1.1)
        rows = overload.open_loop_rows([good, bad], 2.5)
        assert [*verdicts(rows).values()] == [False, False, False]


def test_answers_after_the_end_of_the_arrivals_do_not_count() -> None:
    found = [*outcomes(0.5, 0.5, 0.5), *outcomes(0.1, status=503)]  # until 10.5, 10.6 and 10.7 s
    assert overload.good_answers(found, end=10.65) == 2


# Fuzz


def test_every_seed_is_valid() -> None:
    """Otherwise its mutations would all fail at the first check."""
    for data in fuzz.seeds():
        try:
            fuzz.read(data)
        except InvalidInput:  # `none` takes 28x28 grayscale alone
            assert data[:1] == b"P"
    assert {data[:1] for data in fuzz.seeds()} == {b"A", b"P", b"J", b"F", b"T", b"B"}


def test_mutations_differ_and_are_reproducible() -> None:
    valid = fuzz.seeds()
    made = [fuzz.mutated(valid, np.random.default_rng([0, i])) for i in range(50)]
    assert len({*made} - {*valid}) > 40
    assert made == [fuzz.mutated(valid, np.random.default_rng([0, i])) for i in range(50)]


@pytest.mark.parametrize(
    ("error", "fails"), [(InvalidInput("no"), False), (OSError("no"), True), (KeyError(1), True)]
)
def test_only_our_errors_are_accepted(
    error: Exception, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(fuzz, "read_picture", broken)
    found, _ = fuzz.attempt(b"Aa picture")
    assert found == (repr(error) if fails else "")


def test_a_decoder_that_returns_no_image_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SHAPE", (28, 27))
    assert fuzz.attempt(b"J" + b'{"pixels": [%b]}' % b",".join([b"0"] * 784))[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_crash_and_a_hang_are_saved_and_the_other_inputs_are_tried(
    seed: int, options: Options
) -> None:
    failed, _ = fuzz.hunt(options, seed, 5, crash_or_hang, stuck_seconds=0.5)
    assert failed == 1
    (saved,) = options.failures.glob("*.bin")
    assert saved.read_bytes() == b"input 2"


# Requests over sockets


async def served(answer: bytes, *, closes: bool = True) -> list[str]:
    """Return what one exchange finds with a server that gives this answer, and closes or not."""
    left, handled = asyncio.Event(), asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if not closes:
            await left.wait()
        writer.close()
        handled.set()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        found = await requests.exchange(port, b"GET / HTTP/1.1\r\n\r\n", requests.seeded(1))
        left.set()
        await handled.wait()
    return found


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (OK, ["200"]),
        (OK + OK.replace(b"200", b"500"), ["200", "500"]),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, ["100", "200"]),
        (OK[:-2] + OK, ["200", "200"]),  # HEAD has no body
        (b"", ["none"]),
        (OK[:-1], ["garbled"]),
        (b"HTTP/1.1 200", ["garbled"]),
        (b"SSH-2.0", ["garbled"]),
    ],
)
def test_every_answer_on_a_connection_is_counted(answer: bytes, found: list[str]) -> None:
    assert asyncio.run(served(answer)) == found


@pytest.mark.parametrize(
    ("stays_open", "answer", "found"),
    [
        (0, OK, "hang"),  # the client closed its side, the server did not
        (1, b"", "hang"),
        (1, OK, "200"),  # both stay open for the next request
    ],
)
def test_a_connection_without_an_end_or_an_answer_is_a_hang(
    stays_open: int, answer: bytes, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "HANG_SECONDS", 0.2)
    monkeypatch.setattr(requests, "STAYS_OPEN", stays_open)
    assert asyncio.run(served(answer, closes=False)) == [found]


def test_a_request_that_breaks_the_server_is_saved(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def exchange(port: int, data: bytes, random: Random) -> list[str]:  # noqa: ARG001 - the signature
        return ["500" if random.random() < 0.5 else "200"]

    monkeypatch.setattr(requests, "exchange", exchange)
    counts = asyncio.run(requests.send_all(0, 20, options))
    assert counts["500"] + counts["200"] == 20
    assert 0 < counts["500"] == len([*options.failures.glob("request-*.bin")])


def test_mutated_requests_are_reproducible() -> None:
    valid = [*traffic.good().values()]
    made = [requests.mutated(valid, requests.seeded(number)) for number in range(50)]
    assert made == [requests.mutated(valid, requests.seeded(number)) for number in range(50)]
    assert len({*made}) > 40


# Clients


def test_a_load_counts_good_answers_and_failures() -> None:
    """The second connection is cut; later the server is gone, and connections are refused."""
    count = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        while await reader.read(1000):
            if count == 1:
                writer.write(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            else:
                writer.write(OK[:-1])
            writer.close()

    async def run() -> traffic.Load:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        load = traffic.Load(server.sockets[0].getsockname()[1], b"ask", clients=1)
        with load:
            while len(load.outcomes) < 2:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)
            server.close()
            while not load.refused:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.01)
        return load

    load = asyncio.run(run())
    assert load.outcomes[0].status == 200
    assert load.bodies == {b"ok"}
    assert load.failed()
    assert all("IncompleteReadError" in outcome.error for outcome in load.failed())


# Artefacts


def test_a_file_that_gives_other_answers_is_detected(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(["refused", "identical", "other answers", "traceback"] * 2)
    monkeypatch.setattr(artefacts, "outcome", lambda *_: next(found))
    monkeypatch.setattr(artefacts, "files", lambda *_, **__: [b"x" * 100] * 4)
    assert verdicts(artefacts.run(options)) == {
        "damaged files: other answers": False,
        "files refused without one clear sentence": False,
        "slowest file": True,
    }


# Faults


@pytest.mark.parametrize(
    ("status", "said", "met"),
    [
        (1, "Error: the disk is full: make room.\n", True),
        (1, "Traceback\n  File\nOSError: no.\n", False),
        (0, "Fine.", False),
        (-9, "Killed.", False),
        (1, "", False),
    ],
)
def test_a_command_must_fail_with_one_sentence(status: int, said: str, met: bool) -> None:
    done = subprocess.CompletedProcess([], status, "", said)
    assert faults._one_sentence("x", done).met is met


def test_a_fault_that_raises_an_error_is_a_missed_goal(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_server() -> list[Row]:
        raise OSError("no port")

    fine = Row.at_most("failed", 0, 0)
    monkeypatch.setattr(faults, "QUICK", (no_server, lambda: [fine]))
    assert [row.met for row in faults.run(options)] == [False, True]


def test_a_limit_holds_for_the_command_that_follows(tmp_path: Path) -> None:
    command = faults.limited("RLIMIT_NOFILE", 32)
    code = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    done = subprocess.run(
        [*command, command[0], "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == "(32, 32)\n"


# Scale


def test_a_step_counts_failures_and_measures_latency_around_it() -> None:
    """Quiet from 10 to 11 s, the change to 12 s, quiet until 13 s."""
    took = [*[0.001] * 10, *[0.05] * 10, *[0.002] * 10]
    moments = (10.0, 11.0, 12.0, 13.0)
    rows = scale.step_rows("x", outcomes(*took), moments, refused=0, most=0)
    assert [row.figure for row in rows] == ["0 of 30", "1.0; 50.0; 2.0 ms"]
    assert rows[0].met
    failed = [*outcomes(*took), Outcome(11.5, 0.1, 502), Outcome(99, 1, 500)]
    assert scale.step_rows("x", failed, moments, 0, 0)[0].figure == "1 of 31"
    assert not scale.step_rows("x", failed, moments, 0, 0)[0].met
    assert scale.step_rows("x", failed, moments, 0, 1)[0].met
    assert not scale.step_rows("x", failed, moments, 1, 1)[0].met


def test_without_docker_nothing_is_measured(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    (row,) = scale.run(replace(options, quick=False))
    assert row.figure == "not measured: docker is not installed"
    assert row.met is None


# Service


def test_settings_from_outside_do_not_reach_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BNLENET_API_KEY", "secret")
    found = service.environment(port=1)
    assert found["BNLENET_PORT"] == "1"
    assert "BNLENET_API_KEY" not in found


# What requests cost

SERVING = {
    "rows": {"784 bytes": {"16": {"rate": 10_000}}, "OIP JSON": {"16": {"rate": 5_000}}},
    "model_step": {"16": {"an_image": 30_000}},
    "memory_megabytes": {"BN-LeNet": 100},
}
CONVERSION = "a photograph (5.5 against 10.6 ms of processor\ntime)"


def test_costs_are_inverse_rates_of_one_core() -> None:
    found = {cost.form: cost for cost in capacity.costs(SERVING, CONVERSION)}
    assert {form: round(cost.microseconds) for form, cost in found.items()} == {
        "`/predict`, 784 bytes": 100,
        "Open Inference Protocol, JSON": 200,
        capacity.PHOTOGRAPH: 5630,  # the conversion, a request, and the mirror image
    }
    cost = found["`/predict`, 784 bytes"]
    assert cost.per_node() == pytest.approx(96_000)  # 16 cores at 0.6
    assert cost.nodes() == 11
    rows = capacity.table(SERVING, CONVERSION, price=0.1).splitlines()
    assert "| memory of a node, at most | 4.0 GB |" in rows
    assert "| with a GPU that needs no time: `/predict`, 784 bytes | 1.43 times as many |" in rows
    assert rows[2] == "| `/predict`, 784 bytes | 100 | 10,000 | 96,000 | 11 | 17.60 | 890 | 0.7 |"


def test_a_page_without_the_time_of_the_conversion_is_refused() -> None:
    with pytest.raises(ValueError, match="the page has nothing like"):
        capacity.table(SERVING, "")


def test_the_committed_plan_is_computed_from_the_measured_figures() -> None:
    """`python -m benchmarks.capacity --write docs/operations.md` brings it up to date."""
    operations = ROOT / "docs" / "operations.md"
    page = operations.read_text(encoding="utf-8")
    record = json.loads(capacity.RECORD.read_text(encoding="utf-8"))
    text = capacity.table(record, capacity.PERFORMANCE.read_text(encoding="utf-8"))
    assert page == with_section(page, text, capacity.BEGIN, capacity.END)
