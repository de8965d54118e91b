"""Opening the event log that the configuration names, and the checks of that configuration."""

import pytest

from smes.errors import EventLogUnavailable
from stream.log.event_log import OutRecord, TopicPartition
from stream.log.kafka_config import KafkaLogConfig
from stream.log.kafka_log import KafkaLog
from stream.log.open_log import EventLogConfig, open_event_log
from stream.log.redis_log import RedisLogConfig, RedisStreamsLog


def test_opens_redis(redis_url: str, namespace: str) -> None:
    log = open_event_log(EventLogConfig(redis_url=redis_url, namespace=namespace))

    assert isinstance(log, RedisStreamsLog)

    log.ensure_topic("t", 1)
    log.append("t", [OutRecord(b"x", (), 0)])

    assert log.end("t") == {TopicPartition("t", 0): 1}

    log.close()


@pytest.mark.kafka
def test_opens_kafka(kafka_bootstrap: str, namespace: str) -> None:
    log = open_event_log(EventLogConfig(kind="kafka", kafka_bootstrap=kafka_bootstrap, namespace=namespace))

    assert isinstance(log, KafkaLog)

    log.ensure_topic("t", 3)

    assert log.partitions("t") == 3

    log.close()


@pytest.mark.parametrize("kind", ["redis", "kafka"])
def test_a_server_that_does_not_answer_is_an_error_after_the_connect_timeout(kind: str) -> None:
    config = EventLogConfig(
        kind=kind,  # type: ignore[arg-type]  # parametrised literal
        redis_url="redis://127.0.0.1:1/0",
        kafka_bootstrap="127.0.0.1:1",
        connect_timeout_s=0.5,
    )

    with pytest.raises(EventLogUnavailable, match=r"127\.0\.0\.1:1.*within 0\.5 s"):
        open_event_log(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: EventLogConfig(kind="rabbit"),  # type: ignore[arg-type]  # the point
            "EventLogConfig.kind: 'rabbit', expected one of redis, kafka",
        ),
        (lambda: EventLogConfig(namespace="a b"), "EventLogConfig.namespace: 'a b', expected 1 … 64 of letters"),
        (lambda: EventLogConfig(partitions=0), "EventLogConfig.partitions: 0, expected at least 1"),
        (lambda: EventLogConfig(connect_timeout_s=0), "EventLogConfig.connect_timeout_s: 0, expected more than 0"),
        (lambda: RedisLogConfig(max_entries_per_partition=0), "max_entries_per_partition: 0, expected at least 1"),
        (lambda: RedisLogConfig(outage_timeout_s=-1), "RedisLogConfig.outage_timeout_s: -1, expected at least 0"),
        (lambda: KafkaLogConfig(max_record_bytes=0), "KafkaLogConfig.max_record_bytes: 0, expected at least 1"),
        (lambda: KafkaLogConfig(outage_timeout_s=0), "KafkaLogConfig.outage_timeout_s: 0, expected at least 1"),
    ],
)
def test_a_bad_value_is_named_with_what_was_expected(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()
