"""Where the versions come from that an application answers with: it loads them itself, or another process does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import redis
from prometheus_client import generate_latest

from feature_store.config import ChunksConfig
from feature_store.objects import Objects
from feature_store.signing import Signer, SigningConfig
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.schema import Schema
from smes_scorer.arms import ArmPlaces, Arms, open_arms
from smes_scorer.config import ScorerConfig
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.hot_swap import HotSwap
from smes_scorer.interface import Interfaces
from smes_scorer.loading import Load
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import InService, ServedModel


class Runs(Protocol):
    """Something with threads of its own."""

    def start(self) -> None:
        """Start them; called once."""

    def stop(self) -> None:
        """Stop them and wait for their end."""


@dataclass(frozen=True)
class Source:
    """Where an application has its versions from.

    Attributes:
        swap: The version in service.
        arms: Those of the arms.
        first_answers: Notes each version's first answer, for freshness.
        runs: Started with the application, and stopped with it.
        clients: Closed with it.
        alive: Whether this process can go on; if not, it is to be started again.
        loads: Whether somebody loads versions.
        damage: How many different broken things were found where snapshots are.
        problems: What is wrong beside the snapshots, by its name.
        refused: As of :meth:`smes_scorer.refused.Refused.summary`.
        summary: As of :meth:`smes_scorer.telemetry.Telemetry.summary`.
        metrics: All series, as Prometheus reads them.
    """

    swap: InService
    arms: Arms
    first_answers: FirstAnswers
    runs: tuple[Runs, ...]
    clients: tuple[redis.Redis, ...]
    alive: Callable[[], bool]
    loads: Callable[[], bool]
    damage: Callable[[], int]
    problems: Callable[[], Mapping[str, str | None]]
    refused: Callable[[], Mapping[str, Any]]
    summary: Callable[[], dict[str, object]]
    metrics: Callable[[], bytes]


@dataclass(frozen=True)
class Wanted:
    """What a source is opened for.

    Attributes:
        config, schema: As of :func:`smes_scorer.app.create_app`.
        interfaces, telemetry: Of the application.
        on_schema, on_served: As of :class:`smes_scorer.hot_swap.HotSwap`.
    """

    config: ScorerConfig
    schema: Schema
    interfaces: Interfaces
    telemetry: Telemetry
    on_schema: Callable[[Schema, Mapping[str, str]], None]
    on_served: Callable[[ServedModel], None]


Open = Callable[[Wanted], Source]
"""Opens a source; nothing is loaded before it is started."""


def loaded_here(
    connected: Callable[[str], redis.Redis], namespace: str, signing: SigningConfig, chunks: ChunksConfig, load: Load
) -> Open:
    """Versions that the application loads itself.

    Args:
        connected: Opens a client for a namespace.
        namespace, signing, chunks, load: As of :func:`smes_scorer.app.create_app`.
    """
    return partial(_loaded_here, connected, namespace, signing, chunks, load)


def _loaded_here(
    connected: Callable[[str], redis.Redis],
    namespace: str,
    signing: SigningConfig,
    chunks: ChunksConfig,
    load: Load,
    wanted: Wanted,
) -> Source:
    config, telemetry, first_answers = wanted.config, wanted.telemetry, FirstAnswers()
    client = connected(namespace)
    signer, objects = Signer.of(signing, namespace), Objects.of(chunks, namespace)
    store = SnapshotStore(client, namespace, signer=signer, objects=objects)
    store.damage.on_new = telemetry.refused.note
    swap = HotSwap(
        store,
        SnapshotWatcher(client, namespace, config.poll_s),
        wanted.schema,
        load,
        first_answers,
        telemetry,
        poll_s=config.poll_s,
        on_schema=wanted.on_schema,
        on_served=wanted.on_served,
    )
    places = ArmPlaces(connected, namespace, signing, chunks, wanted.on_schema)
    arms = open_arms(config, wanted.schema, places, wanted.interfaces, load, telemetry)
    return Source(
        swap=swap,
        arms=arms,
        first_answers=first_answers,
        runs=(swap, arms),
        clients=(client,),
        alive=lambda: swap.alive,
        loads=lambda: swap.alive,
        damage=lambda: store.damage.count,
        problems=dict,
        refused=telemetry.refused.summary,
        summary=telemetry.summary,
        metrics=lambda: generate_latest(telemetry.registry),
    )
