"""Hot swap: a thread loads each new snapshot in the background and puts it into service by one assignment.

A request reads one :class:`ServedModel` and answers with it alone, so that its answer is of one version.
"""

import json
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
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
from smes.model.fitting import fitting_config
from smes.model.serving import ServingModel
from smes.schema import Schema
from smes.schema_difference import describe_difference_from
from smes_scorer.first_answers import Arrivals, FirstAnswers
from smes_scorer.telemetry import Telemetry


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
        difference = describe_difference_from(metadata.get("schema"), schema)
        got = str(metadata.get("schema_hash"))
        raise SchemaMismatch("snapshot payload", expected=schema.hash, got=got, difference=difference)
    try:
        # Checked before it is built: building a configuration of absurd size takes time and memory already.
        config = ModelConfig.from_dict(fitting_config(json.loads(metadata["model"]), tensors))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise SnapshotError(f"snapshot payload: model configuration: {error}") from error
    try:
        return ServingModel.from_state(schema, config, tensors)
    except ValueError as error:
        raise SnapshotError(f"snapshot payload: {error}") from error


_WARM_UP_ITEMS = (1, 100)
_RETRY_S = 5.0  # doubled after each failure
_LONGEST_RETRY_S = 300.0
_MAX_REFUSALS = 100
_OLDER_TRIED = 3
_logger = logging.getLogger(__name__)


class _Unfit(Exception):
    """The bytes are those that were published, and no model can be made of them: trying again is no use."""


@dataclass(slots=True)
class _Refusal:
    """Why a snapshot was refused, how often, and when to try it again."""

    reason: str
    tries: int
    again_s: float


class HotSwap:
    """Keeps the ``current`` snapshot in service.

    When that fails (Redis is away, the snapshot is damaged or of another schema), the model in service stays, and
    :attr:`problem` gives the reason until the failure is over. A scorer without a model then serves the newest older
    snapshot that it can. A snapshot whose verified bytes make no model is not tried again; one whose bytes are damaged
    is, after longer and longer pauses. Requests never wait for loading.

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
        self._refusals: OrderedDict[Hashable, _Refusal] = OrderedDict()
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
            self.problem = self._store.pointer_problem or self.problem
        except (FeatureStoreError, SnapshotNotFound) as error:
            # Redis is away or was restarted, or the snapshot was trimmed while it was read: look again next time.
            if self.problem is None:
                _logger.warning("no newer snapshot can be loaded: %s", error)
            self.problem = str(error)
        except Exception as error:  # whatever a bad snapshot raises, the model in service stays
            _logger.debug("a snapshot was refused", exc_info=True)
            self._refuse(manifest, error)

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.refresh()
            try:
                self._watcher.wait(self._poll_s)
            except Exception:  # whatever the channel brings, the thread goes on
                if self._stopping.is_set():
                    return  # the watcher was closed while it waited
                _logger.warning("waiting for a snapshot failed", exc_info=True)
                self._stopping.wait(self._poll_s)

    def _is_new(self, manifest: Manifest | None) -> bool:
        """Whether the current snapshot is to be loaded now; sets :attr:`problem` when it is not."""
        served = self.served
        if manifest is None or (served is not None and served.key == _key(manifest)):
            self.problem = None
            return False
        if served is not None and served.manifest.lineage == manifest.lineage and served.key > _key(manifest):
            # Redis was restored from an older state; the trainer's next publication ends this.
            self.problem = (
                f"version {manifest.version} is published, older than version {served.manifest.version} in service"
            )
            return False
        refusal = self._refusals.get(_identity(manifest))
        if refusal is None or self._monotonic_s() >= refusal.again_s:
            return True
        self.problem = refusal.reason
        return False

    def _refuse(self, manifest: Manifest | None, error: Exception) -> None:
        """Note why a snapshot was refused. Without a model in service, serve an older one."""
        unfit = isinstance(error, _Unfit)
        cause = error.__cause__ if isinstance(error, _Unfit) else error
        reason = str(cause) if isinstance(cause, SmesError) else repr(cause)
        if manifest is not None or reason != self.problem:
            self._telemetry.load_failures.inc()
            _logger.warning("a snapshot was refused: %s", reason, exc_info=not isinstance(cause, SmesError))
        self.problem = reason
        if manifest is None:
            return
        before = self._refusals.pop(_identity(manifest), None)
        tries = before.tries + 1 if before else 1
        pause_s = math.inf if unfit else min(_RETRY_S * 2 ** (tries - 1), _LONGEST_RETRY_S)
        self._refusals[_identity(manifest)] = _Refusal(reason, tries, self._monotonic_s() + pause_s)
        if len(self._refusals) > _MAX_REFUSALS:
            self._refusals.popitem(last=False)
        if self.served is None:
            self._serve_an_older(manifest)
            self.problem = reason

    def _serve_an_older(self, current: Manifest) -> None:
        """Put the newest snapshot but the current one into service, if one can be loaded."""
        try:
            for manifest in [m for m in reversed(self._store.list()) if _key(m) != _key(current)][:_OLDER_TRIED]:
                if _identity(manifest) not in self._refusals:
                    try:
                        self._swap(manifest)
                        return
                    except _Unfit as error:
                        self._refusals[_identity(manifest)] = _Refusal(str(error.__cause__), 1, math.inf)
                    except SnapshotError:
                        continue
        except Exception:
            _logger.warning("no older snapshot could be served", exc_info=True)

    def _swap(self, manifest: Manifest) -> None:
        name = f"snapshot {manifest.lineage}:{manifest.version}"
        if manifest.schema_hash != self._schema.hash:
            raise _Unfit from SchemaMismatch(name, expected=self._schema.hash, got=manifest.schema_hash)
        payload = self._store.load(manifest)
        try:
            model = self._built(name, manifest, payload)
        except SmesError as error:
            raise _Unfit from error
        arrivals, gaps = self._new_arrivals(manifest)
        served = ServedModel(model, manifest)
        dropped = self._first_answers.loaded(served.key, arrivals)
        self._telemetry.freshness_uncounted.inc(gaps + dropped)
        self.served = served
        self.problem = None
        self._telemetry.swaps.inc()
        self._telemetry.served_version.set(manifest.version)
        self._telemetry.served_step.set(manifest.step)
        _logger.debug("%s is in service", name)

    def _built(self, name: str, manifest: Manifest, payload: bytes) -> Scorable:
        """A model that was warmed up, from bytes that were verified."""
        metadata = decode_metadata(payload)
        if (metadata.get("lineage"), metadata.get("version")) != (manifest.lineage, str(manifest.version)):
            raise SnapshotError(f"{name}: its payload says {metadata.get('lineage')}:{metadata.get('version')}")
        model = self._load(payload, self._schema)
        self._warm_up(name, model)
        return model

    def _new_arrivals(self, manifest: Manifest) -> tuple[Arrivals, int]:
        """The feedback trained on since the version in service, and how many versions between have no manifest."""
        before = self.served
        if before is None or before.manifest.lineage != manifest.lineage:
            return Arrivals.of(()), 0
        try:
            between = self._store.manifests_between(manifest.lineage, before.manifest.version, manifest.version - 1)
        except SmesError as error:  # freshness is left out, and the swap goes on
            _logger.warning("freshness leaves out what was published before %s: %s", manifest.version, error)
            between = ()
        manifests = [*between, manifest]
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


def _identity(manifest: Manifest) -> Hashable:
    """Equal for snapshots of the same bytes."""
    return (*_key(manifest), manifest.schema_hash, manifest.chunks)
