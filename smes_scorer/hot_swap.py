"""Hot swap: a thread loads each new snapshot in the background and puts it into service by one assignment.

A request reads one :class:`ServedModel` and answers with it alone, so that its answer is of one version.
"""

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from feature_store.entities import blank_rows
from feature_store.payload import decode, decode_metadata
from feature_store.publication import Manifest
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.arrays import F32, I64
from smes.errors import FeatureStoreError, SchemaMismatch, SmesError, SnapshotError, SnapshotNotFound
from smes.model.config import ModelConfig
from smes.model.serving import ServingModel
from smes.schema import Schema
from smes_scorer.telemetry import Arrivals, FirstAnswers, Telemetry


class Scorable(Protocol):
    """Scores instances; never changes, so any number of threads may call it."""

    def score(self, ids: I64, numerics: F32) -> F32:
        """float32 [N, T] for int64 [N, W] and float32 [N, F]."""
        ...


Load = Callable[[bytes, Schema], Scorable]
"""Builds a model from a snapshot's payload for the configured schema."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A snapshot that was loaded and warmed up: the model together with the version it is. Immutable."""

    model: Scorable
    manifest: Manifest

    @property
    def key(self) -> tuple[str, int]:
        """Lineage and version."""
        return self.manifest.lineage, self.manifest.version


def load_serving_model(payload: bytes, schema: Schema) -> ServingModel:
    """The :class:`smes.model.serving.ServingModel` of a payload.

    Raises:
        SnapshotError: The payload is of another format or damaged, or its tensors do not fit its model configuration.
        SchemaMismatch: It was trained with another schema.
    """
    tensors, metadata = decode(payload)
    if metadata.get("schema_hash") != schema.hash:
        raise SchemaMismatch("snapshot payload", expected=schema.hash, got=str(metadata.get("schema_hash")))
    try:
        config = ModelConfig.from_dict(json.loads(metadata["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise SnapshotError(f"snapshot payload: model configuration: {error}") from error
    try:
        return ServingModel(schema, config, tensors)
    except ValueError as error:
        raise SnapshotError(f"snapshot payload: {error}") from error


_WARM_UP_ITEMS = (1, 100)
_RETRY_REFUSED_S = 5.0
_logger = logging.getLogger(__name__)


class HotSwap:
    """Keeps the ``current`` snapshot in service.

    When that fails (Redis is away, the snapshot is damaged or of another schema), the model in service stays, and
    :attr:`problem` gives the reason until the failure is over. Requests never wait for loading.

    Args:
        store: Where snapshots come from; used by the loader thread alone.
        watcher: Waits for publications; used by the loader thread alone.
        schema: The configured schema; snapshots of another one are refused.
        load: Builds a model from a payload.
        first_answers: Notes every version before it serves.
        telemetry: Counts swaps and failures.
        poll_s: Longest time between two looks at the store.
        monotonic_s: Clock of the retries.
    """

    def __init__(
        self,
        store: SnapshotStore,
        watcher: SnapshotWatcher,
        schema: Schema,
        load: Load,
        first_answers: FirstAnswers,
        telemetry: Telemetry,
        *,
        poll_s: float,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._watcher = watcher
        self._schema = schema
        self._load = load
        self._first_answers = first_answers
        self._telemetry = telemetry
        self._poll_s = poll_s
        self._monotonic_s = monotonic_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshot-loader", daemon=True)
        self._refused: tuple[tuple[str, int], float] | None = None  # the version, and when to try it again
        self.served: ServedModel | None = None
        """The model in service. A request reads this attribute once."""
        self.problem: str | None = None
        """Why the current snapshot is not served, None when it is (or when nothing was published yet)."""

    @property
    def alive(self) -> bool:
        """Whether the loader thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the loader thread; call it once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the loader thread and wait for its end."""
        self._stopping.set()
        self._watcher.close()
        self._thread.join()

    def refresh(self) -> None:
        """Look at the store once and load a new snapshot. Never raises."""
        manifest: Manifest | None = None
        try:
            manifest = self._store.current()
            if self._is_new(manifest):
                assert manifest is not None
                self._swap(manifest)
        except (FeatureStoreError, SnapshotNotFound) as error:
            # Redis is away or was restarted, or the snapshot was trimmed while it was read: look again next time.
            if self.problem is None:
                _logger.warning("no newer snapshot can be loaded: %s", error)
            self.problem = str(error)
        except Exception as error:  # whatever a bad snapshot raises, the model in service stays
            self._telemetry.load_failures.inc()
            self.problem = str(error) if isinstance(error, SmesError) else repr(error)
            _logger.warning("a snapshot was refused: %s", self.problem, exc_info=not isinstance(error, SmesError))
            if manifest is not None:
                self._refused = (_key(manifest), self._monotonic_s() + _RETRY_REFUSED_S)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.refresh()
            self._watcher.wait(self._poll_s)

    def _is_new(self, manifest: Manifest | None) -> bool:
        """Whether the current snapshot is to be loaded now; updates :attr:`problem` when it is not."""
        if manifest is None:
            self.problem = None
            return False
        key, served = _key(manifest), self.served
        if served is not None and served.key == key:
            self.problem = None
            return False
        if served is not None and served.manifest.lineage == manifest.lineage and served.key > key:
            # Redis was restored from an older state; the trainer's next publication ends this.
            self.problem = (
                f"version {manifest.version} is published, older than version {served.manifest.version} in service"
            )
            return False
        refused_lately = (
            self._refused is not None and self._refused[0] == key and self._monotonic_s() < self._refused[1]
        )
        return not refused_lately

    def _swap(self, manifest: Manifest) -> None:
        name = f"snapshot {manifest.lineage}:{manifest.version}"
        if manifest.schema_hash != self._schema.hash:
            raise SchemaMismatch(name, expected=self._schema.hash, got=manifest.schema_hash)
        arrivals, gaps = self._new_arrivals(manifest)
        payload = self._store.load(manifest)
        metadata = decode_metadata(payload)
        if (metadata.get("lineage"), metadata.get("version")) != (manifest.lineage, str(manifest.version)):
            raise SnapshotError(f"{name}: its payload says {metadata.get('lineage')}:{metadata.get('version')}")
        model = self._load(payload, self._schema)
        self._warm_up(name, model)
        served = ServedModel(model, manifest)
        dropped = self._first_answers.loaded(served.key, arrivals)
        self._telemetry.freshness_uncounted.inc(gaps + dropped)
        self.served = served
        self.problem = None
        self._refused = None
        self._telemetry.swaps.inc()
        self._telemetry.served_version.set(manifest.version)
        self._telemetry.served_step.set(manifest.step)
        _logger.debug("%s is in service", name)

    def _new_arrivals(self, manifest: Manifest) -> tuple[Arrivals, int]:
        """The feedback trained on since the version in service, and how many versions between have no manifest."""
        before = self.served
        if before is None or before.manifest.lineage != manifest.lineage:
            return Arrivals.of(()), 0
        manifests = self._store.manifests_between(manifest.lineage, before.manifest.version, manifest.version)
        parents = [before.manifest.version, *(m.version for m in manifests)]
        gaps = sum(m.parent != parent for m, parent in zip(manifests, parents, strict=False))
        return Arrivals.of(manifests), gaps

    def _warm_up(self, name: str, model: Scorable) -> None:
        """Score as requests will, so that first-use compilation and allocation are done and a broken model shows."""
        for n in _WARM_UP_ITEMS:
            rows = blank_rows(self._schema, 0, np.arange(n))
            scores = model.score(rows.ids, rows.numerics)
            if scores.shape != (n, self._schema.num_tasks) or not np.isfinite(scores).all():
                raise SnapshotError(f"{name}: warm-up gave scores of shape {list(scores.shape)} or not all finite")


def _key(manifest: Manifest) -> tuple[str, int]:
    return manifest.lineage, manifest.version
