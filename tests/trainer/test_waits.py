"""Calls that wait for a server: the caller's thread goes on with its duties, and hears a stop."""

import threading
import time

import pytest

from smes.errors import EventLogUnavailable, Stopped
from stream.log.memory_log import InMemoryLog
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.trainer.small_world import fill, make_trainer, open_log, train_to_the_end
from trainer.waits import WaitingLog, Waits

DEADLINE_S = 60.0


def test_the_result_or_the_error_of_a_call_is_that_of_the_wait() -> None:
    waits = Waits(lambda: False)

    def fails() -> None:
        raise EventLogUnavailable("away")

    assert waits.run("sum", lambda: 1 + 1) == 2
    with pytest.raises(EventLogUnavailable, match="away"):
        waits.run("fails", fails)


def test_duties_are_done_in_the_callers_thread_until_the_call_returns() -> None:
    waits, answer, threads = Waits(lambda: False), threading.Event(), []

    def duties() -> None:
        threads.append(threading.get_ident())
        if len(threads) == 3:
            answer.set()

    waits.meanwhile = duties

    assert waits.run("answer", lambda: answer.wait(DEADLINE_S))
    assert len(threads) >= 3
    assert set(threads) == {threading.get_ident()}


def test_a_duty_that_waits_itself_has_no_duties() -> None:
    waits, answer, depth = Waits(lambda: False), threading.Event(), [0]

    def duties() -> None:
        depth[0] += 1
        assert depth[0] == 1
        waits.run("a second call", lambda: time.sleep(1.0))  # longer than what counts as quick
        depth[0] -= 1
        answer.set()

    waits.meanwhile = duties

    assert waits.run("answer", lambda: answer.wait(DEADLINE_S))


def test_what_a_duty_raises_ends_the_wait() -> None:
    waits, never = Waits(lambda: False), threading.Event()

    def duties() -> None:
        raise EventLogUnavailable("a duty failed")

    waits.meanwhile = duties
    with pytest.raises(EventLogUnavailable, match="a duty failed"):
        waits.run("never", lambda: never.wait(DEADLINE_S))
    assert not waits.settled(0.0)
    never.set()
    assert waits.settled(DEADLINE_S)


def test_a_stop_ends_a_wait_that_does_not_hear_it_itself() -> None:
    stop, never = threading.Event(), threading.Event()
    waits = Waits(stop.is_set)
    stop.set()

    with pytest.raises(Stopped, match="never: no answer yet when a stop was asked for"):
        waits.run("never", lambda: never.wait(DEADLINE_S))

    never.set()
    assert waits.settled(DEADLINE_S)


def test_a_log_behind_it_trains_as_without_it() -> None:
    log = open_log()
    fill(log, 1500)
    plain, behind = make_trainer(log, None), make_trainer(WaitingLog(log, Waits(lambda: False)), None)

    train_to_the_end(plain)
    train_to_the_end(behind)

    assert behind.stream.ledger() == plain.stream.ledger()
    assert behind.learner.step_number == plain.learner.step_number > 5


def test_every_method_of_the_log_is_passed_on() -> None:
    inner = InMemoryLog()
    log, stop = WaitingLog(inner, Waits(lambda: False)), threading.Event()
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, 3)

    assert (log.partitions(IMPRESSIONS), log.incarnations(FEEDBACK)) == (3, inner.incarnations(FEEDBACK))
    assert log.begin(IMPRESSIONS) == log.end(IMPRESSIONS) == inner.end(IMPRESSIONS)
    log.set_stop(stop)
    stop.set()
    began_s = time.monotonic()
    assert log.read(log.begin(IMPRESSIONS), max_records=1, timeout_s=DEADLINE_S).records == []
    assert time.monotonic() - began_s < DEADLINE_S  # the stop ended the wait for a first record
    log.close()
