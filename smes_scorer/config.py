"""Configuration of the scoring service."""

import math
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt, Le

from smes.arm_names import EXPECTED, MAIN, is_arm_name
from smes.arrays import F32
from smes.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Seconds, check_ranges
from smes.schema import Schema
from smes_io.secrets import SecretPlace

_LONGEST_SALT = 64  # bytes; BLAKE2b takes no longer key


@dataclass(frozen=True)
class ArmConfig:
    """Another model beside the one in service: what another trainer publishes, or a candidate that was held back.

    It has features and tasks of the same schema, and memory of its own.

    Attributes:
        namespace: Where another trainer publishes. Null: ``held``.
        held: Serve the newest version that was published aside in the scorer's own namespace. While there is none, the
            main arm answers.
        share: Which share of the users it answers, or sees as a shadow, more than 0, at most 1. Null: all, for a
            shadow.
        shadow: It only scores what the main arm answered, after the answer, and is measured.
    """

    namespace: str | None = None
    held: bool = False
    share: Annotated[float, Gt(0), Le(1)] | None = None
    shadow: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
        if (self.namespace is None) != self.held:
            raise ValueError(f"ArmConfig.namespace: {self.namespace!r}, expected either a namespace or held: true")
        if self.share is None and not self.shadow:
            raise ValueError("ArmConfig.share: null, expected a share of the users, or shadow: true")


@dataclass(frozen=True)
class SkewConfig:
    """When features count as distributed otherwise where the model serves than where it is trained.

    Attributes:
        deviations: Least distance, in its standard errors.
        share: Least distance of fill rates, and of the shares of unknown ids. Of an item's feature only the fill rate
            counts, from twice as much.
        mean: Least distance of means, in standard deviations of what was trained on.
        ignored: Features that do not count.
    """

    deviations: PositiveFloat = 5.0
    share: PositiveFloat = 0.1
    mean: PositiveFloat = 0.25
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ScorerConfig:
    """How the scoring service listens, scores and limits requests.

    Attributes:
        host: Address to listen on.
        port: TCP port, 0 for any free one.
        fusion_weights: Task → factor of its score in the fused score, by which items are ranked. The default is 1 for
            a binary task and 0 for a regression task.
        arms: Name → another model beside the one in service, which is the arm ``main``:
            ``{namespace: …, share: 0.1}`` or ``{held: true, shadow: true}``. ``namespace`` is where another trainer
            publishes, and ``held: true`` stands for the newest candidate that was kept aside in the scorer's own
            namespace. The arm answers ``share`` of the users, or with ``shadow: true`` only scores what the main arm
            answered. A name has up to 16 of ``a-z``, ``0-9``, ``_`` and ``-``.
        split_salt: Goes into the hash that gives each user to an arm, at most 64 bytes: another salt, another split.
        max_shadow_waiting: Most answered requests that wait for a shadow; one more is left out, and counted.
        tokens: Where the bearer tokens are that callers must show, one a line: ``{file: …}`` or ``{env: …}``. A file
            is read again when it changes. Null: everybody may ask for everything.
        max_items: Most items of one request.
        max_body_bytes: Largest request body.
        max_depth: How deep the lists and objects of a body may be nested. A request needs 3.
        processes: Processes that answer, on one port. With more than one, another process loads the versions, and all
            of them read its one copy of the table. What follows here holds for each of them.
        workers: Threads that score.
        max_together: Most requests that one of these takes at once, of those that wait at that moment. Their scores
            are computed in one call of the model.
        max_waiting: Most requests that wait for one of these; one more is answered 503 with ``Retry-After``.
        max_age_s: Longest wait for one of these, seconds; then the request is answered 503 and not scored. Nor is one
            whose caller has left. One that would wait for longer, as long as requests took lately, is answered 503 at
            once.
        max_connections: Most open connections; one more is answered 503 and closed. Keep it below the process's limit
            of open files.
        header_timeout_s: Longest time until a request's headers are complete, seconds; then the connection is cut.
        body_timeout_s: Longest time from there until its body is complete; then it is answered 408.
        request_timeout_s: Longest time from there until its answer begins; then it is answered 503.
        send_timeout_s: Longest time in which a caller may take its answer; then the connection is cut.
        torch_threads: Threads that score one request; 1 leaves the other cores to other requests and to the trainer.
        entity_timeout_ms: Longest wait for the stored features of a request; then it is scored without them.
        entity_retry_s: After such a failure, how long requests are scored without a look-up.
        entity_cache_bytes: Memory for stored features of items that are kept in the process. They are read again as
            soon as features of any item were written. 0: none are kept.
        entity_cache_s: How long they are kept at most, seconds: after that, rows are noticed that were written past
            `smes features put` and the client, or by an older release of them.
        entity_check_s: How often it is looked whether the store holds features at all, where the schema has some.
        skew: When features count as distributed otherwise where the model serves than where it is trained.
        poll_s: Longest time until a new snapshot is noticed, even when its notification was lost.
        redis_timeout_s: Longest wait for Redis at the start, and for each of its answers while a snapshot is loaded.
        shutdown_s: Within this the service ends when it is stopped, seconds. The requests in flight have half of it;
            those that are not answered by then get 503.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    fusion_weights: dict[str, float] = field(default_factory=dict)
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    split_salt: str = ""
    max_shadow_waiting: PositiveInt = 32
    tokens: SecretPlace | None = None
    max_items: PositiveInt = 1000
    max_body_bytes: PositiveInt = 1024 * 1024
    max_depth: Annotated[int, Ge(3)] = 32
    processes: PositiveInt = 1
    workers: PositiveInt = 2
    max_together: PositiveInt = 16
    max_waiting: NonNegativeInt = 200
    max_age_s: Seconds = 5.0
    max_connections: PositiveInt = 512
    header_timeout_s: Seconds = 5.0
    body_timeout_s: Seconds = 10.0
    request_timeout_s: Seconds = 30.0
    send_timeout_s: Seconds = 10.0
    torch_threads: PositiveInt = 1
    entity_timeout_ms: Annotated[int, Ge(1), Le(1_000_000_000)] = 50
    entity_retry_s: Seconds = 1.0
    entity_cache_bytes: NonNegativeInt = 64 * 1024 * 1024
    entity_cache_s: Seconds = 60.0
    entity_check_s: Seconds = 10.0
    skew: SkewConfig = field(default_factory=SkewConfig)
    poll_s: Seconds = 0.5
    redis_timeout_s: Seconds = 5.0
    shutdown_s: Annotated[int, Ge(1), Le(1_000_000)] = 10

    def __post_init__(self) -> None:
        check_ranges(self)
        for task, weight in self.fusion_weights.items():
            if not math.isfinite(weight):
                raise ValueError(f"ScorerConfig.fusion_weights.{task}: {weight}, expected a finite number")
        for name in self.arms:
            if name == MAIN or not is_arm_name(name):
                raise ValueError(f"ScorerConfig.arms: {name!r}, expected {EXPECTED}, and not {MAIN}")
        if len(self.split_salt.encode()) > _LONGEST_SALT:
            raise ValueError(f"ScorerConfig.split_salt: {self.split_salt!r}, expected at most {_LONGEST_SALT} bytes")
        shares = math.fsum(arm.share or 0.0 for arm in self.arms.values() if not arm.shadow)
        if shares > 1:
            raise ValueError(f"ScorerConfig.arms: shares of {shares:g} in all, expected at most 1")


def fusion_weights(config: ScorerConfig, schema: Schema) -> F32:
    """float32 [T]: the factor of each task's score in the fused score."""
    weights = [config.fusion_weights.get(t.name, 1.0 if t.kind == "binary" else 0.0) for t in schema.tasks]
    return np.array(weights, np.float32)


def unknown_weights(config: ScorerConfig, schema: Schema) -> list[str]:
    """The names in ``fusion_weights`` that are no task of the schema."""
    return [task for task in config.fusion_weights if task not in schema.task_index]


def check_names(config: ScorerConfig, schema: Schema) -> None:
    """Check the names of tasks and features against the configured schema.

    Raises:
        ValueError: ``fusion_weights`` names a task, or ``skew.ignored`` a feature, that it does not have.
    """
    if unknown := unknown_weights(config, schema):
        known = ", ".join(schema.task_index)
        raise ValueError(f"scorer.fusion_weights: {unknown[0]!r}, expected one of the tasks {known}")
    features = [f.name for f in schema.features]
    if strange := [name for name in config.skew.ignored if name not in features]:
        raise ValueError(f"scorer.skew.ignored: {strange[0]!r}, expected one of the features {', '.join(features)}")
