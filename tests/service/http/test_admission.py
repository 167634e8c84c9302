"""Admission limits requests and evicts slow senders; the tests move the clock."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from service.errors import Overloaded, ServiceError, SlowRequest
from service.http import admission as module
from service.http.admission import Admission
from service.http.budget import BodyBudget


class Clock:
    """Stands in for `perf_counter` and for the event loop's timers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> object:
        self.timers.append((self.now + seconds, callback))
        return callback

    def pass_(self, seconds: float) -> None:
        """Let time pass, and run the timers that are due."""
        self.now += seconds
        due = [callback for at, callback in self.timers if at <= self.now + 1e-9]
        self.timers = [timer for timer in self.timers if timer[0] > self.now + 1e-9]
        for callback in due:
            callback()


class Exchange:
    def __init__(self, started: float) -> None:
        self.started = started
        self.cancelled = 0

    def cancel(self) -> None:
        self.cancelled += 1


class Sender:
    """A connection that gives back the bytes it holds when it is evicted."""

    def __init__(self, budget: BodyBudget, held: int = 0) -> None:
        self.budget, self.held = budget, held
        self.errors: list[ServiceError] = []
        self.woken = 0

    def evict(self, error: ServiceError) -> None:
        self.errors.append(error)
        self.budget.give_back(self.held)

    def wake(self) -> None:
        self.woken += 1


class Gauge:
    value: float | None = None

    def set(self, value: float) -> None:
        self.value = value


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    return clock


@pytest.fixture
def gauge() -> Gauge:
    return Gauge()


@pytest.fixture
def admission(gauge: Gauge) -> Admission:
    """Admit two requests at a time, for ten seconds, with bodies of 100 bytes."""
    return Admission(2, 10.0, 100, gauge)


def admit(admission: Admission, clock: Clock, ago: float = 0.0) -> Any:
    exchange: Any = Exchange(clock.now - ago)
    admission.admit(exchange)
    return exchange


def receive(admission: Admission, held: int = 0) -> Sender:
    sender = Sender(admission.budget, held)
    admission.start_read_deadline(sender)
    return sender


class TestInFlight:
    def test_requests_are_admitted_up_to_the_limit(
        self, admission: Admission, clock: Clock
    ) -> None:
        first, _ = admit(admission, clock), admit(admission, clock)
        with pytest.raises(Overloaded) as refused:
            admit(admission, clock)
        assert refused.value.message == "The server is at its limit; try again in a second."
        assert refused.value.headers == {"Retry-After": "1"}
        assert admission.in_flight == 2
        admission.finish(first)
        assert admission.in_flight == 1
        admit(admission, clock)
        with pytest.raises(Overloaded):
            admit(admission, clock)

    def test_requests_that_still_arrive_are_not_in_flight(
        self, admission: Admission, clock: Clock
    ) -> None:
        for _ in range(5):
            receive(admission)
        assert admission.in_flight == 0
        admit(admission, clock)

    def test_a_request_is_cancelled_at_its_deadline_and_not_before(
        self, admission: Admission, clock: Clock
    ) -> None:
        older, younger = admit(admission, clock, ago=4.0), admit(admission, clock, ago=1.0)
        clock.pass_(5.9)
        assert (older.cancelled, younger.cancelled) == (0, 0)
        clock.pass_(0.1)
        assert (older.cancelled, younger.cancelled) == (1, 0)
        admission.finish(older)
        clock.pass_(3.0)
        assert (older.cancelled, younger.cancelled) == (1, 1)

    def test_the_gauge_is_set_by_the_sweep(
        self, admission: Admission, clock: Clock, gauge: Gauge
    ) -> None:
        exchange = admit(admission, clock)
        assert gauge.value is None
        clock.pass_(0.1)
        assert gauge.value == 1
        admission.finish(exchange)
        clock.pass_(0.1)
        assert gauge.value == 0

    def test_a_new_one_does_not_drain(self, admission: Admission) -> None:
        assert admission.draining is False


class TestSweep:
    def test_one_timer_serves_all_and_stops_after_the_last(
        self, admission: Admission, clock: Clock
    ) -> None:
        exchanges = [admit(admission, clock), admit(admission, clock)]
        senders = [receive(admission) for _ in range(100)]
        assert [at for at, _ in clock.timers] == [pytest.approx(clock.now + 0.1)]
        clock.pass_(0.1)
        assert len(clock.timers) == 1
        for sender in senders:
            admission.stop_read_deadline(sender)
        clock.pass_(0.1)
        assert len(clock.timers) == 1  # for those in flight
        for exchange in exchanges:
            admission.finish(exchange)
        clock.pass_(0.1)
        assert clock.timers == []
        receive(admission)
        assert len(clock.timers) == 1

    def test_it_runs_while_a_request_arrives(self, admission: Admission, clock: Clock) -> None:
        sender = receive(admission)
        clock.pass_(0.1)
        assert len(clock.timers) == 1
        admission.stop_read_deadline(sender)
        clock.pass_(0.1)
        assert clock.timers == []


class TestSenders:
    def test_each_sender_past_the_deadline_is_evicted_once(
        self, admission: Admission, clock: Clock
    ) -> None:
        late = [receive(admission) for _ in range(3)]
        clock.pass_(1.0)
        in_time = receive(admission)
        clock.pass_(8.9)
        assert not any(sender.errors for sender in late)
        clock.pass_(0.1)
        for sender in late:
            (error,) = sender.errors
            assert isinstance(error, SlowRequest)
        assert in_time.errors == []
        clock.pass_(0.5)
        assert [len(sender.errors) for sender in late] == [1, 1, 1]

    def test_more_bytes_do_not_move_the_deadline(self, admission: Admission, clock: Clock) -> None:
        sender = receive(admission)
        clock.pass_(9.0)
        admission.start_read_deadline(sender)
        clock.pass_(1.0)
        assert len(sender.errors) == 1

    def test_a_complete_request_has_no_read_deadline(
        self, admission: Admission, clock: Clock
    ) -> None:
        sender = receive(admission)
        admission.stop_read_deadline(sender)
        admission.stop_read_deadline(sender)  # again, when its client leaves
        clock.pass_(11.0)
        assert sender.errors == []


class TestRest:
    def test_a_refused_client_rests_for_two_tenths_of_a_second_at_least(
        self, admission: Admission, clock: Clock
    ) -> None:
        """The sweep wakes it, so a rest takes up to a tenth longer."""
        receive(admission)
        clock.pass_(0.05)
        sender = Sender(admission.budget)
        admission.rest(sender)
        admission.rest(sender)  # its next request, which it had sent before the refusal
        clock.pass_(0.15)  # a sweep, at 0.2 s
        assert sender.woken == 0
        clock.pass_(0.1)
        assert sender.woken == 1
        clock.pass_(1.0)
        assert sender.woken == 1

    def test_the_sweep_runs_until_all_are_awake(self, admission: Admission, clock: Clock) -> None:
        senders = [Sender(admission.budget) for _ in range(3)]
        for sender in senders:
            admission.rest(sender)
        assert len(clock.timers) == 1
        clock.pass_(0.2)
        assert [sender.woken for sender in senders] == [1, 1, 1]
        assert clock.timers == []

    def test_a_connection_that_closes_is_not_woken(
        self, admission: Admission, clock: Clock
    ) -> None:
        sender = receive(admission)
        admission.rest(sender)
        admission.forget(sender)
        admission.forget(sender)
        clock.pass_(11.0)
        assert (sender.woken, sender.errors) == (0, [])


class TestEviction:
    def test_no_more_senders_are_evicted_than_needed(
        self, admission: Admission, clock: Clock
    ) -> None:
        """Four bodies of 100 bytes fit; a sender is slow after two seconds."""
        admission.budget.take(300)
        senders = [receive(admission, 100) for _ in range(3)]
        whole = senders.pop(0)
        admission.stop_read_deadline(whole)
        clock.pass_(2.0)
        admission.budget.take(100)
        assert [sender.errors for sender in senders] == [[], []]
        admission.budget.take(100)
        assert [len(sender.errors) for sender in senders] == [1, 0]
        (error,) = senders[0].errors
        assert isinstance(error, SlowRequest)
        assert error.message == "The request came too slowly; send all of it at once."
        assert whole.errors == []

    def test_a_sender_that_is_not_slow_is_not_evicted(
        self, admission: Admission, clock: Clock
    ) -> None:
        sender = receive(admission, 400)
        admission.budget.take(400)
        clock.pass_(1.9)
        with pytest.raises(Overloaded) as refused:
            admission.budget.take(1)
        assert refused.value.message == (
            "The server is receiving too much at once; try again in a second."
        )
        assert refused.value.headers == {"Retry-After": "1"}
        assert sender.errors == []

    def test_several_are_evicted_when_one_is_not_enough(
        self, admission: Admission, clock: Clock
    ) -> None:
        senders = [receive(admission, 10) for _ in range(3)]
        admission.budget.take(400)
        clock.pass_(3.0)
        admission.budget.take(20)
        assert [len(sender.errors) for sender in senders] == [1, 1, 0]


class TestBudget:
    def test_four_bodies_fit_to_the_last_byte(self) -> None:
        budget = BodyBudget(100, lambda: False)
        assert (budget.max_bytes, budget.bytes_left) == (100, 400)
        assert not budget.decompressing.locked()
        budget.take(400)
        with pytest.raises(Overloaded):
            budget.take(1)
        assert budget.bytes_left == -1  # the caller gives it back
        budget.give_back(1)
        budget.give_back(100)
        budget.take(100)
        assert budget.bytes_left == 0

    def test_taking_nothing_is_never_refused(self) -> None:
        budget = BodyBudget(100, lambda: False)
        with pytest.raises(Overloaded):
            budget.take(401)
        budget.take(0)
        budget.take(-1)
        assert budget.bytes_left == 0
