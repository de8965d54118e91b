"""An outage is told when it begins, once a minute, and when it is over, whoever notices it how often."""

import logging

import pytest

from smes_io.outages import Outages


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_hours_of_tries_by_several_threads_are_a_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    outages = Outages(logging.getLogger("test"), clock)
    for second in range(150):
        clock.now_s = float(second)
        outages.failed("Redis", "Redis: no route")
        outages.failed("Redis", "Redis: the lease: no route")
        outages.answered("Kafka")
    outages.failed("Kafka", "Kafka: refused")
    outages.answered("Redis")
    outages.answered("Redis")
    outages.failed("Redis", "Redis: no route")

    assert caplog.messages == [
        "Redis: no route",
        "Redis: no route (60 s by now, 119 more tries failed)",
        "Redis: no route (120 s by now, 119 more tries failed)",
        "Kafka: refused",
        "Redis: answers again after 149 s",
        "Redis: no route",
    ]
