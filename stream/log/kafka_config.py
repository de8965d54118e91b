"""The configuration of the event log on Kafka: limits, and how the brokers let us in.

A module of its own because it imports no client: a process that has the configuration need not have the event log.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

from annotated_types import Ge, Le

from smes.ranges import PositiveInt, check_ranges
from smes_io.secrets import HIDDEN, SecretError, SecretPlace
from smes_io.tls import TlsFiles

_T = TypeVar("_T")
_TELLTALE_LOGS = ("kafka.admin", "kafka.consumer", "kafka.net", "kafka.producer", "kafka.protocol")


@dataclass(frozen=True)
class KafkaLogConfig:
    """Limits of the event log on Kafka.

    Attributes:
        compression: Codec of the producer's batches. Dead letters are written with gzip instead of lz4 or zstd, because
            every client can read that.
        max_record_bytes: Largest record; also the limit of the topics that this log creates.
        fetch_max_bytes: Most bytes of one fetch, and of one partition in it. A single larger record is still read.
        batch_bytes: Size of a producer batch.
        fetch_wait_ms: How long the broker may hold a fetch without data. A read of other partitions waits this long.
        replication_factor: Of created topics; ``-1`` is the broker's default.
        outage_timeout_s: How long an operation is tried while the brokers are away, as during a restart. Also how long
            they may return nothing from before the end, until that counts as damage.
    """

    compression: Literal["lz4", "zstd", "gzip", "none"] = "lz4"
    max_record_bytes: PositiveInt = 16 * 1024 * 1024
    fetch_max_bytes: PositiveInt = 8 * 1024 * 1024
    batch_bytes: PositiveInt = 256 * 1024
    fetch_wait_ms: PositiveInt = 100
    replication_factor: int = -1
    outage_timeout_s: Annotated[float, Ge(1), Le(1_000_000)] = 120.0

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class KafkaAccess:
    """How the brokers let us in.

    Attributes:
        protocol: Of the listener, in Kafka's own words.
        mechanism: Of the ``SASL_`` protocols.
        user: The user's name, for the same.
        password: Where the user's password is, for the same: ``{file: …}`` or ``{env: …}``.
        tls: Certificates, for ``SSL`` and ``SASL_SSL``.
    """

    protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    user: str | None = None
    password: SecretPlace | None = None
    tls: TlsFiles = field(default_factory=TlsFiles)

    def __post_init__(self) -> None:
        check_ranges(self)
        for key in ("user", "password"):
            if self.sasl and getattr(self, key) is None:
                wanted = "a name" if key == "user" else "file or env"
                raise ValueError(f"KafkaAccess.{key}: missing for protocol {self.protocol}, expected {wanted}")
            if not self.sasl and getattr(self, key) is not None:
                raise ValueError(f"KafkaAccess.{key}: given for protocol {self.protocol}, expected SASL_SSL")
        if not self.encrypted and self.tls != TlsFiles():
            raise ValueError(f"KafkaAccess.tls: given for protocol {self.protocol}, expected SSL or SASL_SSL")

    @property
    def sasl(self) -> bool:
        """Whether a user logs in."""
        return self.protocol.startswith("SASL_")

    @property
    def encrypted(self) -> bool:
        """Whether the connection is by TLS."""
        return self.protocol.endswith("SSL")

    @property
    def who(self) -> str:
        """Whom the brokers take us for, as far as we can tell."""
        return f"user {self.user!r}" if self.sasl else "the client's certificate" if self.encrypted else "everybody"

    def options(self) -> dict[str, object]:
        """Arguments of kafka-python's clients; files and secrets are read now.

        Raises:
            SecretError: One of them cannot be read.
        """
        options: dict[str, object] = {"security_protocol": self.protocol}
        if self.encrypted:
            options["ssl_context"] = _named("tls", self.tls.context)
            options["ssl_check_hostname"] = self.tls.check_hostname
        if self.sasl:
            assert self.password is not None, "checked when it was made"
            keep_secrets_out_of_logs()
            options["sasl_mechanism"] = self.mechanism
            options["sasl_plain_username"] = self.user
            options["sasl_plain_password"] = _Hidden(_named("password", self.password.read))
        return options


class _Hidden(str):
    """A secret that no message shows by accident: the clients log their configuration."""

    __slots__ = ()

    def __repr__(self) -> str:
        return repr(HIDDEN)


def keep_secrets_out_of_logs() -> None:
    """Silence the client's debug messages: they have every byte that is sent, and so the passwords of PLAIN."""
    for name in _TELLTALE_LOGS:
        log = logging.getLogger(name)
        log.setLevel(max(log.level, logging.INFO))


def _named(key: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except SecretError as error:
        raise SecretError(f"event_log.kafka_access.{key}: {error}") from error
