"""Which event log a deployment uses, and how to open it."""

import re
from dataclasses import dataclass, field
from typing import Literal

from smes.ranges import PositiveInt, Seconds, check_ranges
from smes_io.redis_access import RedisAccess
from stream.log.event_log import EventLog
from stream.log.kafka_config import KafkaAccess, KafkaLogConfig
from stream.log.redis_log import RedisLogConfig, RedisStreamsLog, connect_log

_NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class EventLogConfig:
    """The event log of a deployment.

    Attributes:
        kind: ``redis`` (Redis Streams) or ``kafka``.
        redis_url: The Redis server, ``redis://[user:password@]host:port/database``, by TLS ``rediss://…``.
        redis_access: How Redis lets us in, beside what the URL says.
        kafka_bootstrap: The Kafka brokers, ``host:port[,host:port…]``.
        kafka_access: How Kafka lets us in.
        namespace: Prefix of keys and topics. Deployments with different namespaces can share a server.
        partitions: Partitions of each topic that is created.
        connect_timeout_s: Longest wait for the server's first answer.
        redis: Limits on Redis.
        kafka: Limits on Kafka.
    """

    kind: Literal["redis", "kafka"] = "redis"
    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_access: RedisAccess = field(default_factory=RedisAccess)
    kafka_bootstrap: str = "127.0.0.1:9092"
    kafka_access: KafkaAccess = field(default_factory=KafkaAccess)
    namespace: str = "smes"
    partitions: PositiveInt = 2
    connect_timeout_s: Seconds = 10.0
    redis: RedisLogConfig = field(default_factory=RedisLogConfig)
    kafka: KafkaLogConfig = field(default_factory=KafkaLogConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        if not _NAMESPACE.fullmatch(self.namespace):
            raise ValueError(
                f"EventLogConfig.namespace: {self.namespace!r}, expected 1 … 64 of letters, digits, '.', '_' and '-'"
            )


def open_event_log(config: EventLogConfig) -> EventLog:
    """Connect to the event log that ``config`` names; the caller closes it.

    Raises:
        ValueError: The URL is malformed.
        EventLogUnavailable: No answer within ``connect_timeout_s``; the message names the server.
        EventLogError: Wrong credentials or certificates.
        SecretError: A file or variable with a secret, or a certificate, cannot be read.
    """
    if config.kind == "kafka":
        from stream.log.kafka_log import KafkaLog  # the client is a large library

        return KafkaLog(
            config.kafka_bootstrap,
            config.namespace,
            config.kafka,
            access=config.kafka_access,
            connect_timeout_s=config.connect_timeout_s,
        )
    client = connect_log(
        config.redis_url,
        timeout_s=config.connect_timeout_s,
        access=config.redis_access,
        namespace=config.namespace,
    )
    return RedisStreamsLog(client, config.namespace, config.redis)
