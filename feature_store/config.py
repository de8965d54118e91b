"""Configuration of the feature store: where it is, and how many snapshots it keeps."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from feature_store.signing import SigningConfig
from smes.ranges import PositiveFloat, PositiveInt, Seconds, check_ranges
from smes_io.redis_access import RedisAccess, key_prefix

if TYPE_CHECKING:
    import redis

_MIB = 1024 * 1024


@dataclass(frozen=True)
class SnapshotStoreConfig:
    """How snapshots are written, and how many are kept.

    A cut publishes what changed since the one before, and now and then a full snapshot beside it, from which what
    starts late begins. A chain is a full snapshot and all that were published after it, up to the next full one.

    Attributes:
        precision: Of the rows' weights on the way to serving: ``fp32``, exact; ``fp16``, half the bytes; ``int8``,
            8-bit numbers and one scale for each row, about 0.4 of the bytes.
        max_chain_length: Deltas after a full snapshot before the next one is made.
        max_chain_bytes_ratio: Bytes of these deltas, as a multiple of the full snapshot's, before the next one is made.
        chunk_bytes: Size of a chunk, 1 … 256 MiB; Redis' own limit for a value is 512 MiB.
        retain_bytes: Payload bytes kept in all; the oldest chains are removed first, each as a whole.
        min_retained: The chains of so many newest snapshots are kept whatever their size, so that a slow reader can
            finish.
        max_held: Versions kept that were published aside, because they are not to be served; the oldest go first.
        max_manifests: Manifests kept, at least ``min_retained``. Freshness reads them after their payload is removed.
        upload_ttl_s: Longest time for an upload. The chunks of a publisher that died expire after it, unless a
            restarted publisher of the same lineage removes them before.
    """

    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    max_chain_length: PositiveInt = 256
    max_chain_bytes_ratio: PositiveFloat = 1.0
    chunk_bytes: Annotated[int, Ge(1), Le(256 * _MIB)] = 8 * _MIB
    retain_bytes: PositiveInt = 512 * _MIB
    min_retained: PositiveInt = 2
    max_held: PositiveInt = 3
    max_manifests: PositiveInt = 256
    upload_ttl_s: Annotated[int, Ge(1), Le(1_000_000)] = 600

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.max_manifests < self.min_retained:
            raise ValueError(
                f"SnapshotStoreConfig.max_manifests: {self.max_manifests}, expected at least min_retained "
                f"({self.min_retained})"
            )


@dataclass(frozen=True)
class ChunksConfig:
    """Where the chunks of snapshots are. What is current and the manifests are in Redis in any case.

    Attributes:
        url: ``redis``, or the object store, as fsspec has it: ``s3://bucket/folder``, ``gs://…``, ``abfs://…``, or
            ``file:///folder`` for a folder that all hosts have. The library of the protocol (s3fs, gcsfs, adlfs) must
            be installed.
        options: What the library takes beside the URL, such as ``endpoint_url`` of s3fs. Keep secrets where the
            library looks for them by itself, such as in the environment.
        timeout_s: Longest wait for each object.
    """

    url: str = "redis"
    options: dict[str, Any] = field(default_factory=dict)
    timeout_s: Seconds = 30.0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.url != "redis" and "://" not in self.url:
            raise ValueError(f"ChunksConfig.url: {self.url!r}, expected redis, or a URL such as s3://bucket/folder")


@dataclass(frozen=True)
class FeatureStoreConfig:
    """Where snapshots and entity features are stored.

    Attributes:
        redis_url: The Redis server, ``redis://[user:password@]host:port/database``, by TLS ``rediss://…``.
        redis_access: How Redis lets us in, beside what the URL says.
        namespace: Prefix of every key. Deployments with different namespaces can share a server.
        timeout_s: Longest wait for the server, at the start and for each answer.
        snapshots: Sizes and retention.
        chunks: Where the chunks of snapshots are.
        feature_versions: How many rows of an entity's features are kept, each with its time, 1 … 64. Events that leave
            features out are trained on with the row that held at their time, where it is kept.
        signing: Keys by which snapshots are signed and verified.
    """

    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_access: RedisAccess = field(default_factory=RedisAccess)
    namespace: str = "smes"
    timeout_s: Seconds = 10.0
    snapshots: SnapshotStoreConfig = field(default_factory=SnapshotStoreConfig)
    chunks: ChunksConfig = field(default_factory=ChunksConfig)
    feature_versions: Annotated[int, Ge(1), Le(64)] = 4
    signing: SigningConfig = field(default_factory=SigningConfig)

    def __post_init__(self) -> None:
        check_ranges(self)
        try:
            key_prefix(self.namespace)
        except ValueError as error:
            raise ValueError(f"FeatureStoreConfig.namespace: {error}") from error

    def connect(self) -> "redis.Redis":
        """A client of the server, which has answered; the caller closes it.

        Raises:
            FeatureStoreUnavailable: No answer within ``timeout_s``.
            FeatureStoreError: Redis does not let us in.
        """
        from smes_io.redis_client import connect

        return connect(self.redis_url, self.timeout_s, access=self.redis_access, namespace=self.namespace)
