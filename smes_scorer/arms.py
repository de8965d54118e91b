"""Other models beside the one in service: a *split* arm answers a share of the users, a *shadow* is only measured.

An arm serves what another trainer publishes in a namespace of its own, or the newest candidate that was held back in
ours. It has its own loader and its own version in service. A request is answered by one arm and one version.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import redis
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from feature_store.config import ChunksConfig
from feature_store.manifest import Manifest
from feature_store.objects import Objects
from feature_store.signing import Signer, SigningConfig
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.schema import Schema
from smes_scorer.config import ArmConfig, ScorerConfig
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.interface import Interfaces
from smes_scorer.loading import Load
from smes_scorer.shadow_scoring import Answered, ShadowScorer
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import InService, Versions

_SHOWN = frozenset(
    f"smes_scorer_{name}"
    for name in (
        "served_version",
        "served_step",
        "snapshot_age_seconds",
        "swaps",
        "load_failures",
        "refusals",
        "versions_answered",
        "freshness_milliseconds",
    )
)
"""Series of a loader that ``/metrics`` shows of every arm, as ``smes_scorer_arm_…``."""


class HeldCandidates(SnapshotStore):
    """A store whose readers serve the newest of the versions that were published aside, if there is one."""

    _names: frozenset[tuple[str, int]] = frozenset()

    def to_serve(self) -> Manifest | None:
        """Manifest of the newest candidate, None without any."""
        held = self._candidates()
        self._names = frozenset((manifest.lineage, manifest.version) for manifest in held)
        return held[-1] if held else None

    def fallbacks(self) -> tuple[Manifest, ...]:
        """The other candidates, the newest first."""
        return tuple(reversed(self._candidates()))

    def _candidates(self) -> tuple[Manifest, ...]:
        """What is listed as held, and says so itself: the list is not signed."""
        return tuple(manifest for manifest in self.held() if manifest.held is not None)

    def holds(self, key: tuple[str, int]) -> bool:
        """Whether this version was still a candidate at the last :meth:`to_serve`."""
        return key in self._names


class Arm:
    """One arm: what it serves, and how often it answered.

    Attributes:
        name, config: As configured.
        swap: Its version in service.
        first_answers, telemetry: Its own.
    """

    def __init__(
        self, name: str, config: ArmConfig, swap: InService, first_answers: FirstAnswers, telemetry: Telemetry
    ) -> None:
        self.name, self.config, self.swap = name, config, swap
        self.first_answers, self.telemetry = first_answers, telemetry
        telemetry.snapshot_age_s.set_function(self._age_s)

    @property
    def is_ready(self) -> bool:
        """Whether it can answer: it has a model. That of a held version counts only while the version is held."""
        raise NotImplementedError

    def start(self) -> None:
        """Start loading."""

    def stop(self) -> None:
        """Stop loading."""

    @property
    def problem(self) -> str | None:
        """What is wrong, None if nothing. That nothing is held back is no problem."""
        if self.swap.problem is None and self.swap.served is None and not self.config.held:
            return "no snapshot was published yet"
        return self.swap.problem

    def _age_s(self) -> float:
        served = self.swap.served
        return 0.0 if served is None else max(0.0, time.time() - served.manifest.created_ms / 1000)

    def summary(self) -> dict[str, object]:
        """What ``/health/ready`` and ``/v1/stats`` say of it."""
        served = self.swap.served
        return {
            "kind": "shadow" if self.config.shadow else "split",
            "share": self.config.share,
            "ready": self.is_ready,
            "lineage": served.manifest.lineage if served else None,
            "version": served.manifest.version if served else None,
            "step": served.manifest.step if served else None,
            "snapshot_age_ms": round(self._age_s() * 1000) if served else None,
            "problem": self.problem,
            "refused": self.telemetry.refused.summary(),
        }


class LoadingArm(Arm):
    """An arm that loads its versions itself; arguments as of :class:`Arm`, and where versions come from."""

    def __init__(
        self,
        name: str,
        config: ArmConfig,
        store: SnapshotStore,
        swap: HotSwap,
        first_answers: FirstAnswers,
        telemetry: Telemetry,
    ) -> None:
        super().__init__(name, config, swap, first_answers, telemetry)
        self._store, self._loading = store, swap
        store.damage.on_new = telemetry.refused.note

    @property
    def is_ready(self) -> bool:
        """As :attr:`Arm.is_ready`."""
        served = self.swap.served
        if served is None:
            return False
        return self._store.holds(served.key) if isinstance(self._store, HeldCandidates) else True

    @property
    def alive(self) -> bool:
        """Whether the loader thread runs."""
        return self._loading.alive

    def start(self) -> None:
        """Start loading."""
        self._loading.start()

    def stop(self) -> None:
        """Stop loading, and wait for the end of the thread."""
        self._loading.stop()


class Arms:
    """All arms but the main one. Safe to share between threads.

    Args:
        arms: In the order in which they are configured.
        salt: Goes into the hash of a user.
        shadows: What scores for the arms that are shadows.
        clients: Closed with the arms.
    """

    def __init__(
        self, arms: tuple[Arm, ...], salt: str, shadows: tuple[ShadowScorer, ...], clients: tuple[redis.Redis, ...]
    ) -> None:
        self._arms, self._salt, self._clients = arms, salt.encode(), clients
        self._splits = [(arm, arm.config.share or 0.0) for arm in arms if not arm.config.shadow]
        shares = {arm.name: 1.0 if arm.config.share is None else arm.config.share for arm in arms}
        self._shadows = [(shadow, shares[shadow.name]) for shadow in shadows]

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return bool(self._arms)

    def __iter__(self) -> Iterator[Arm]:
        return iter(self._arms)

    def chosen(self, user_id: int) -> Arm | None:
        """The arm that answers a user, None for the main one: always the same, whichever process is asked.

        A user is a point in 0 … 1, and the arms have intervals of it, in their order. So an arm that grows takes no
        users from those before it, and the last one takes users from the main arm alone.
        """
        if not self._splits:
            return None
        point = user_point(user_id, self._salt)
        end = 0.0
        for arm, share in self._splits:
            end += share
            if point < end:
                return arm
        return None

    def shadow(self, user_id: int, answered: Answered) -> None:
        """Have a request that the main arm answered scored by the shadows that see the user. Never waits."""
        if self._shadows:
            point = user_point(user_id, self._salt)
            for shadow, share in self._shadows:
                if point >= 1 - share:  # splits begin at 0, shadows end at 1: so they see the main arm's users first
                    shadow.offer(answered)

    def start(self) -> None:
        """Start loading and measuring."""
        for arm in self._arms:
            arm.start()
        for shadow, _ in self._shadows:
            shadow.start()

    def stop(self) -> None:
        """Stop both."""
        for shadow, _ in self._shadows:
            shadow.stop()
        for arm in self._arms:
            arm.stop()

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            client.close()


NO_ARMS = Arms((), "", (), ())
"""The main arm stands alone."""


def user_point(user_id: int, salt: bytes) -> float:
    """Where a user lies in 0 … 1: BLAKE2b of salt and id, so that different salts give independent points."""
    digest = hashlib.blake2b(user_id.to_bytes(8, "little", signed=True), digest_size=8, key=salt[:64]).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


@dataclass(frozen=True)
class ArmPlaces:
    """What the arms are opened with.

    Attributes:
        connected: Opens a client for a namespace.
        namespace: Of the main arm.
        signing: Keys that verify, the same for every namespace; a signature holds for its own alone.
        chunks: Where chunks are, of every namespace.
        on_schema: As of :class:`smes_scorer.hot_swap.HotSwap`.
    """

    connected: Callable[[str], redis.Redis]
    namespace: str
    signing: SigningConfig
    chunks: ChunksConfig
    on_schema: Callable[[Schema, Mapping[str, str]], None]


def open_arms(
    config: ScorerConfig, schema: Schema, places: ArmPlaces, interfaces: Interfaces, load: Load, telemetry: Telemetry
) -> Arms:
    """Open the configured arms; nothing is loaded before :meth:`Arms.start`.

    Args:
        config: Has ``arms``.
        schema: The configured schema, with which every arm begins.
        places: Where their snapshots are.
        interfaces: Of the schemas that are served.
        load: Builds a model from payloads.
        telemetry: Of the main arm; its registry gets the arms' series.

    Raises:
        ValueError: An arm's namespace is the main arm's.
        SecretError: The keys cannot be read.
    """
    if not config.arms:
        return NO_ARMS
    opened = [open_arm(config, name, schema, places, load) for name in config.arms]
    arms = tuple(arm for arm, _ in opened)
    return with_arms(arms, config, interfaces, telemetry, tuple(client for _, client in opened))


def open_arm(
    config: ScorerConfig, name: str, schema: Schema, places: ArmPlaces, load: Load, versions: Versions | None = None
) -> tuple[LoadingArm, redis.Redis]:
    """Open one arm; as :func:`open_arms`. ``versions`` are as of :class:`smes_scorer.hot_swap.HotSwap`."""
    arm_config = config.arms[name]
    if arm_config.namespace == places.namespace:
        raise ValueError(f"scorer.arms.{name}.namespace: {places.namespace!r}, expected another trainer's")
    namespace = arm_config.namespace or places.namespace
    client = places.connected(namespace)
    kind = HeldCandidates if arm_config.held else SnapshotStore
    signer, objects = Signer.of(places.signing, namespace), Objects.of(places.chunks, namespace)
    store = kind(client, namespace, signer=signer, objects=objects)
    swap = HotSwap(
        store,
        SnapshotWatcher(client, namespace, config.poll_s),
        schema,
        load,
        first_answers := FirstAnswers(),
        own := Telemetry(),
        poll_s=config.poll_s,
        on_schema=places.on_schema,
        versions=versions,
    )
    return LoadingArm(name, arm_config, store, swap, first_answers, own), client


def with_arms(
    arms: tuple[Arm, ...],
    config: ScorerConfig,
    interfaces: Interfaces,
    telemetry: Telemetry,
    clients: tuple[redis.Redis, ...] = (),
) -> Arms:
    """The arms together, with what scores for those that are shadows; arguments as of :func:`open_arms`."""
    shadows = tuple(
        _shadow_of(arm, interfaces, telemetry, config.max_shadow_waiting) for arm in arms if arm.config.shadow
    )
    telemetry.registry.register(arm_series(arms))
    return Arms(arms, config.split_salt, shadows, clients)


def _shadow_of(arm: Arm, interfaces: Interfaces, telemetry: Telemetry, most: int) -> ShadowScorer:
    return ShadowScorer(arm.name, arm.swap, lambda: arm.is_ready, interfaces, telemetry.arms, max_waiting=most)


def arm_series(arms: Iterable[Arm]) -> Collector:
    """The loaders' series of arms, with the arm as a label."""
    return _ArmSeries({arm.name: arm.telemetry for arm in arms})


class _ArmSeries(Collector):
    """The loaders' series of all arms, with the arm as a label."""

    def __init__(self, telemetries: Mapping[str, Telemetry]) -> None:
        self._telemetries = telemetries

    def collect(self) -> Iterator[Any]:
        families: dict[str, Metric] = {}
        for arm, telemetry in self._telemetries.items():
            for family in telemetry.registry.collect():
                if family.name not in _SHOWN:
                    continue
                renamed = family.name.replace("smes_scorer_", "smes_scorer_arm_", 1)
                shown = families.setdefault(renamed, Metric(renamed, f"{family.documentation}, by arm", family.type))
                for sample in family.samples:
                    if not sample.name.endswith("_created"):
                        name = sample.name.replace("smes_scorer_", "smes_scorer_arm_", 1)
                        shown.add_sample(name, {"arm": arm, **sample.labels}, sample.value)
        yield from families.values()
