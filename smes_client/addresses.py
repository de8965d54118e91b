"""Opens the event log that a text names. Only the library of its kind is loaded."""

from typing import TYPE_CHECKING, Union

from stream.log.event_log import ReportingLog

if TYPE_CHECKING:
    from smes_io.redis_access import RedisAccess
    from stream.log.kafka_config import KafkaAccess

Access = Union["RedisAccess", "KafkaAccess", None]

_REDIS = ("redis://", "rediss://", "unix://")
_KAFKA = "kafka://"
_CONNECT_S, _LEAST_S = 5.0, 0.05


def open_log(address: str, namespace: str, access: Access, *, delivery_timeout_s: float) -> ReportingLog:
    """Connect to an event log; the caller closes it.

    Args:
        address: ``redis://[user[:password]@]host:port/database``, ``rediss://…`` by TLS, or
            ``kafka://host:port[,host:port…]``.
        namespace: Of the deployment.
        access: How the server lets us in, beside what the address says; None: as it is.
        delivery_timeout_s: How long an append is tried while the server is away. A first connection is tried for at
            most 5 s.

    Raises:
        ValueError: The address has another form, or ``access`` is for another kind of server.
        EventLogUnavailable: No answer in time.
        EventLogError: Wrong credentials or certificates.
    """
    if address.startswith(_REDIS):
        return _open_redis(address, namespace, access, delivery_timeout_s)
    if address.startswith(_KAFKA):
        return _open_kafka(address.removeprefix(_KAFKA).rstrip("/"), namespace, access, delivery_timeout_s)
    scheme = address.partition("://")[0] if "://" in address else "no scheme"
    raise ValueError(f"event log: {scheme}, expected redis://, rediss://, unix:// or kafka://")


def _open_redis(url: str, namespace: str, access: Access, delivery_timeout_s: float) -> ReportingLog:
    from smes_io.redis_access import RedisAccess
    from stream.log.redis_log import RedisLogConfig, RedisStreamsLog, connect_log

    if access is not None and not isinstance(access, RedisAccess):
        raise ValueError(f"access: a {type(access).__name__}, expected RedisAccess for {url.partition('://')[0]}://")
    # An answer that does not come within this time is asked for again, by another connection.
    answer_s = max(_LEAST_S, min(_CONNECT_S, delivery_timeout_s))
    client = connect_log(url, timeout_s=answer_s, access=access, namespace=namespace)
    return RedisStreamsLog(client, namespace, RedisLogConfig(outage_timeout_s=delivery_timeout_s))


def _open_kafka(bootstrap: str, namespace: str, access: Access, delivery_timeout_s: float) -> ReportingLog:
    from stream.log.kafka_config import KafkaAccess, KafkaLogConfig
    from stream.log.kafka_log import KafkaLog

    if access is not None and not isinstance(access, KafkaAccess):
        raise ValueError(f"access: a {type(access).__name__}, expected KafkaAccess for kafka://")
    config = KafkaLogConfig(outage_timeout_s=max(1.0, delivery_timeout_s))
    connect_s = max(_LEAST_S, min(_CONNECT_S, delivery_timeout_s))
    return KafkaLog(bootstrap, namespace, config, access=access, connect_timeout_s=connect_s)
