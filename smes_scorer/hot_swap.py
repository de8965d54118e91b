"""Hot swap: a thread loads each new snapshot in the background and puts it into service by one assignment.

A request reads one :class:`smes_scorer.versions.ServedModel` and answers with it alone, so that its answer is of one
version. A delta is put into service as soon as it is loaded, in front of the table that it changes; it is folded into
the table when no request reads an older version any more.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from feature_store.damage import Reason, reason_of
from feature_store.manifest import Manifest
from feature_store.snapshots import SnapshotStore, SnapshotWatcher
from smes.errors import FeatureStoreError, PinError, SmesError, SnapshotError, SnapshotForged, SnapshotNotFound
from smes.schema import Schema
from smes_scorer.first_answers import FirstAnswers, new_arrivals
from smes_scorer.loading import Load
from smes_scorer.payloads import LoadStopped, Payloads
from smes_scorer.refusals import Refusals
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import Foldable, Scorable, ServedModel, Versions
from smes_scorer.warm_up import warm_up

_OLDER_TRIED = 3
_FOLD_RETRY_S = 0.02
_FAILED_FOLD_RETRY_S = 5.0
_logger = logging.getLogger(__name__)


class _Refused(Exception):
    """A payload was refused, by the exception that caused this.

    Args:
        manifest: Of the payload.
        for_ever: Whether its bytes are those that were published, so that trying again is no use.
    """

    def __init__(self, manifest: Manifest, *, for_ever: bool) -> None:
        super().__init__(f"snapshot {manifest.lineage}:{manifest.version}")
        self.manifest = manifest
        self.for_ever = for_ever

    @property
    def reason(self) -> str:
        return str(self.__cause__) if isinstance(self.__cause__, SmesError) else repr(self.__cause__)


class _WaitsForRetry(Exception):
    """A payload on the way was refused before, and is not to be tried yet."""


class HotSwap:
    """Keeps the snapshot in service that is to be served: the current one, unless an operator decided otherwise.

    It goes back to an older version of a lineage only if an operator decided so.

    When that fails (Redis is away, the snapshot is damaged or of another schema, or the decision cannot be read), the
    model in service stays, and :attr:`problem` gives the reason until the failure is over. A scorer without a model
    then serves the best other snapshot that it can: what is pinned, or the newest, but never what was rolled back. A
    snapshot whose verified bytes make no model is not tried again; one whose bytes are damaged is, after longer and
    longer pauses. Requests never wait for loading.

    A version of another schema is put into service, with its schema, if its manifest says that its weights were carried
    over from the schema in service, or if its schema was in service before. Any other is refused.

    A version is reached by the deltas since the one in service, or from the newest full snapshot: where the scorer
    starts, where deltas are missing, of another lineage, or refused, and where that is less to load.

    Args:
        store: Where snapshots come from; used by the loader thread alone.
        watcher: Waits for publications; used by the loader thread alone.
        schema: The configured schema.
        load: Builds a model from payloads.
        first_answers: Notes every version before it serves.
        telemetry: Counts swaps and failures.
        poll_s: Longest time between two looks at the store.
        monotonic_s: Clock of the retries.
        on_served: Called with each version that was put into service; must not raise.
        on_schema: Called with a schema that a version brings, before it is in service, and with its renamed features:
            name → the name before.
        versions: Which version is in service and who reads which; by default, requests of this process.
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
        on_served: Callable[[ServedModel], None] = lambda served: None,
        on_schema: Callable[[Schema, Mapping[str, str]], None] = lambda schema, renamed: None,
        versions: Versions | None = None,
    ) -> None:
        self._store = store
        self._watcher = watcher
        self._schemas = {schema.hash: schema}
        self._schema = schema
        self._on_served, self._on_schema = on_served, on_schema
        self._load = load
        self._first_answers = first_answers
        self._telemetry = telemetry
        self._poll_s = poll_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="snapshot-loader", daemon=True)
        self._monotonic_s = monotonic_s
        self._refusals = Refusals(monotonic_s)
        self._no_fold_before_s = 0.0
        self._fenced_tries: int | None = None
        self._versions = Versions() if versions is None else versions
        self._newest: tuple[str, int] | None = None  # of the lineage in service, the newest version that served
        telemetry.shadows.set_function(lambda: self.shadows)
        self.problem: str | None = None
        """Why the current snapshot is not served, None when it is (or when nothing was published yet)."""

    @property
    def served(self) -> ServedModel | None:
        """The version in service, None before the first."""
        return self._versions.served

    @property
    def schema(self) -> Schema:
        """The schema of the version in service; before the first, the configured one."""
        served = self._versions.served
        return self._schema if served is None else served.schema

    def reading(self) -> AbstractContextManager[ServedModel]:
        """The version in service, for one request, which may use it until the block ends. There must be one."""
        return self._versions.reading()

    @property
    def alive(self) -> bool:
        """Whether the loader thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the loader thread; call it once."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the loader thread and wait for its end. A load under way ends at its next chunk."""
        self._stopping.set()
        self._watcher.close()
        self._thread.join()

    def refresh(self) -> None:
        """Look at the store once and load a new snapshot; fold what can be folded. Never raises."""
        try:
            manifest = self._store.to_serve()
            decision = self._store.pins.last
            self._telemetry.pinned.set(decision is not None and decision.pins)
            if self._is_new(manifest):
                assert manifest is not None
                self._swap_or_refuse(manifest)
            self.problem = self._store.pointer_problem or self.problem
            self._look_for_fenced()
        except LoadStopped:
            return
        except (FeatureStoreError, SnapshotNotFound) as error:
            # Redis is away or was restarted, or the snapshot was trimmed while it was read: look again next time.
            if self.problem is None:
                _logger.warning("no newer snapshot can be loaded: %s", error)
            self.problem = str(error)
        except Exception as error:  # whatever a bad store raises, the model in service stays
            reason = str(error) if isinstance(error, SmesError) else repr(error)
            if reason != self.problem:
                self._count_failure(error, reason, "pointer")
            _logger.debug("the store could not be read", exc_info=True)
            if self.served is None and isinstance(error, PinError | SnapshotForged):
                self._serve_a_fallback()
            self.problem = reason
        self._fold()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.refresh()
            try:
                self._wait()
            except Exception:  # whatever the channel brings, the thread goes on
                if self._stopping.is_set():
                    return  # the watcher was closed while it waited
                _logger.warning("waiting for a snapshot failed", exc_info=True)
                self._stopping.wait(self._poll_s)

    def _wait(self) -> None:
        """Wait for a publication, and fold meanwhile what waits for requests to end."""
        until_s = time.monotonic() + self._poll_s
        while (left_s := until_s - time.monotonic()) > 0 and not self._stopping.is_set():
            if self._watcher.wait(min(left_s, _FOLD_RETRY_S) if self.shadows else left_s):
                return
            self._fold()

    def _is_new(self, manifest: Manifest | None) -> bool:
        """Whether the current snapshot is to be loaded now; sets :attr:`problem` when it is not."""
        served = self.served
        if manifest is None or (served is not None and served.key == _key(manifest)):
            self.problem = self._store.pointer_problem
            return False
        if served is not None and self._store.signed and (problem := self._store.pointer_problem):
            self.problem = problem  # the pointer is broken: nothing signed says that this manifest is current
            return False
        goes_back = served is not None and served.key[0] == manifest.lineage and served.key > _key(manifest)
        if served is not None and goes_back and not self._store.pins.may_go_back_to(manifest):
            # Redis was restored from an older state; the trainer's next publication ends this.
            self.problem = (
                f"version {manifest.version} is published, older than version {served.manifest.version} in service"
            )
            self._telemetry.refused.note("older", self.problem)
            return False
        reason = self._refusals.why(manifest)
        if reason is not None:
            self.problem = reason
        return reason is None

    def _look_for_fenced(self) -> None:
        """Name publications that the store refused since the last look, because another publisher had the lease."""
        tries, message = self._store.fenced()
        if self._fenced_tries is not None and tries > self._fenced_tries:
            self._telemetry.refused.note("fenced", message)
        self._fenced_tries = tries

    def _swap_or_refuse(self, manifest: Manifest) -> None:
        """Put a snapshot into service. If it is refused, say why; without a model in service, serve an older one."""
        try:
            self._swap(manifest)
            return
        except _WaitsForRetry as error:
            reason = str(error)
        except _Refused as error:
            reason = error.reason
        except SnapshotNotFound:
            raise
        except SnapshotError as error:  # no way leads there
            reason = str(error)
            self._count_failure(error, reason, "manifest")
        if self._refusals.why(manifest) is None:
            # A payload on its way was refused. Others may lead to it before the pause is over, by a newer base.
            self._refusals.note(manifest, reason, for_ever=False)
        if self.served is None:
            self._serve_a_fallback(manifest)
        self.problem = reason

    def _serve_a_fallback(self, refused: Manifest | None = None) -> None:
        """Put the best snapshot into service that is not the refused one, if one can be loaded."""
        tried = 0
        try:
            for manifest in [m for m in self._store.fallbacks() if refused is None or _key(m) != _key(refused)]:
                try:
                    self._swap(manifest)
                    return
                except _WaitsForRetry:
                    continue
                except (_Refused, SnapshotError):
                    tried += 1
                    if tried == _OLDER_TRIED:
                        return
        except LoadStopped:
            raise
        except Exception:
            _logger.warning("no older snapshot could be served", exc_info=True)

    def _swap(self, manifest: Manifest) -> None:
        """Put a snapshot into service, on the first of the ways to it that is passable.

        Raises:
            _Refused: The payload in whose way it stands; noted.
            _WaitsForRetry: It was refused before.
            FeatureStoreError: Redis is away.
            SnapshotNotFound: Retention removed it.
            SnapshotError: No way leads to it.
        """
        refused: _Refused | None = None
        waiting: str | None = None
        for way in self._ways(manifest):
            waiting = waiting or next(filter(None, map(self._refusals.why, way)), None)
            if any(self._refusals.why(step) is not None for step in way):
                continue
            try:
                self._go(way, manifest)
                return
            except _Refused as error:
                _logger.debug("a snapshot was refused", exc_info=True)
                self._count_failure(error.__cause__, error.reason, "payload")
                self._refusals.note(error.manifest, error.reason, for_ever=error.for_ever)
                refused = error
        if refused is not None:
            raise refused
        raise _WaitsForRetry(waiting)

    def _ways(self, manifest: Manifest) -> Iterator[tuple[Manifest, ...]]:
        """What to load to get to a version: from the one in service if that leads there, and from a full snapshot."""
        served = self.served
        have: int | None = None
        if served is not None and served.key[0] == manifest.lineage and served.schema.hash == manifest.schema_hash:
            have = served.manifest.version
        shortest = self._store.chain(manifest, have)
        yield shortest
        if shortest[0].kind == "delta":
            try:
                anew = self._store.chain(manifest, None)
            except SnapshotError as error:
                _logger.debug("no full snapshot leads to the version: %s", error)
                return
            yield anew

    def _go(self, way: tuple[Manifest, ...], manifest: Manifest) -> None:
        """Load a way's payloads, and put the version that it leads to into service."""
        before = self.served
        model, schema = self._built(way, before.model if before and way[0].kind == "delta" else None)
        served = ServedModel(model, manifest, schema)
        self._note_arrivals(manifest)
        if schema.hash not in self._schemas:
            self._schemas[schema.hash] = schema
            _logger.info("snapshot %s:%s brings schema %s, which is served from now on", *served.key, schema.hash)
        self._versions.put(served)
        self.problem = None
        self._telemetry.swaps.inc()
        self._telemetry.full_loads.inc(way[0].kind == "full")
        self._telemetry.served_version.set(manifest.version)
        self._telemetry.served_step.set(manifest.step)
        _logger.debug("snapshot %s:%s is in service", *served.key)
        self._on_served(served)

    def _built(self, way: tuple[Manifest, ...], before: Scorable | None) -> tuple[Scorable, Schema]:
        """A model that was warmed up, from bytes that were verified, and its schema.

        Raises:
            _Refused: A payload could not be read, or no model be made of it.
            FeatureStoreError, SnapshotNotFound: As the store.
        """
        payloads = Payloads(self._store, self._schemas, self.schema.hash, way, self._stopping)
        try:
            schema = payloads.schema()
            model = self._load(payloads, schema, before)
            warm_up(model, schema, payloads.at)
            if schema.hash not in self._schemas:
                self._on_schema(schema, payloads.renamed)
        except (FeatureStoreError, SnapshotNotFound, LoadStopped):
            raise
        except Exception as error:  # whatever a bad snapshot raises, the model in service stays
            verified = error is not payloads.store_error
            raise _Refused(payloads.at, for_ever=verified and isinstance(error, SmesError)) from error
        return model, schema

    @property
    def shadows(self) -> int:
        """Deltas that are served and wait for requests to end, so that they can be folded into the table."""
        served = self.served
        return served.model.shadows if served is not None and isinstance(served.model, Foldable) else 0

    def _fold(self) -> None:
        """Fold what no request reads without any more, and put the same version, without it, into service."""
        served = self.served
        if served is None or not isinstance(served.model, Foldable) or not served.model.shadows:
            return
        if self._monotonic_s() < self._no_fold_before_s:
            return
        up_to = self._versions.oldest_read()
        if up_to is None:
            return
        try:
            folded = served.model.folded(up_to)
            if folded is not served.model:
                self._versions.put(ServedModel(folded, served.manifest, served.schema))
        except Exception:  # for want of memory, for instance; the version goes on as it is
            _logger.warning("a delta could not be folded into the table; tried again later", exc_info=True)
            self._no_fold_before_s = self._monotonic_s() + _FAILED_FOLD_RETRY_S

    def _note_arrivals(self, manifest: Manifest) -> None:
        """Note the feedback of a version that is about to serve. One that serves again brings none."""
        newest = self._newest
        if newest is not None and newest[0] == manifest.lineage and newest[1] >= manifest.version:
            return
        arrivals, gaps = new_arrivals(self._store, newest, manifest)
        self._newest = _key(manifest)
        dropped = self._first_answers.loaded(self._newest, arrivals)
        self._telemetry.freshness_uncounted.inc(gaps + dropped)

    def _count_failure(self, error: BaseException | None, reason: str, what: Reason) -> None:
        self._telemetry.load_failures.inc()
        self._telemetry.refused.note(reason_of(error, what), reason)
        exc_info = error if error is not None and not isinstance(error, SmesError) else None
        _logger.warning("a snapshot was refused: %s", reason, exc_info=exc_info)


def _key(manifest: Manifest) -> tuple[str, int]:
    return manifest.lineage, manifest.version
