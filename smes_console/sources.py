"""What every page reads from: trainer, scorer, snapshots, event log, and folders of metrics over time.

Any of them may be away at any time, and a page still shows the rest. So a look at one of them never raises and never
takes longer than two seconds: it gives a :class:`Reached`, with what was found or with the problem, in words. However
many browsers ask, each place is asked once a second at most.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import httpx

from feature_store.config import FeatureStoreConfig
from smes.errors import SmesError
from smes_io.bearer import one_token
from smes_io.clock import wall_clock_ms
from smes_io.schema_file import SchemaFile
from smes_io.secrets import SecretPlace, masked_text
from stream.log.open_log import EventLogConfig

if TYPE_CHECKING:
    import redis

    from feature_store.snapshots import SnapshotStore
    from stream.dead_letter_replay import Replayer
    from stream.log.event_log import EventLog

FRESH_S = 1.0
"""So long a look counts for everybody who asks."""
TIMEOUT_S = 2.0
"""Longest wait for one look."""
_CALL_S = 1.5  # longest wait inside of a look, so that its own words come before the look is over
_SLOW_S = 0.5
_MOST_LOOKS = 16
_REMEMBERED = 256  # looks of different names

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reached(Generic[_T]):
    """What a look found, or why it found nothing.

    Attributes:
        value: What was found; None where there is a problem.
        problem: In one line, with what is away; None where nothing is.
        at_ms: When the value was found, Unix milliseconds; where there is a problem, when it was last seen.
        since_ms: Since when there is a problem; None where there is none.
    """

    value: _T | None
    problem: str | None
    at_ms: int
    since_ms: int | None = None

    def state(self) -> dict[str, Any]:
        """What a page is told of it beside the value: ``problem`` and ``since_ms``."""
        return {"problem": self.problem, "since_ms": self.since_ms}


@dataclass(frozen=True)
class Places:
    """Where everything is; made of the whole configuration by ``smes console``.

    Attributes:
        event_log, feature_store: As configured.
        schema: Of the events; None where none is configured.
        trainer_url, scorer_url: Base URLs; None: there is none.
        trainer_token, scorer_token: What these want to be shown; None: nothing.
        history: Folder of the run's metrics over time; None: there is none.
        baselines: Name → folder of another run's.
        snapshot_interval_s: How often the trainer cuts; a version in service that is much older is stale.
        replayer: Makes what re-injects dead letters of a log, and whether it adopts the present schema; None: nobody
            does.
    """

    event_log: EventLogConfig
    feature_store: FeatureStoreConfig
    schema: SchemaFile | None = None
    trainer_url: str | None = None
    scorer_url: str | None = None
    trainer_token: SecretPlace | None = None
    scorer_token: SecretPlace | None = None
    history: Path | None = None
    baselines: Mapping[str, Path] | None = None
    snapshot_interval_s: float = 1.0
    replayer: "Callable[[EventLog, bool], Replayer] | None" = None


class Sources:
    """Looks at the places. Thread-safe.

    Attributes:
        places: With every wait bounded by two seconds.

    Args:
        places: Where everything is.
        monotonic: Seconds of a clock that never goes back.
    """

    def __init__(self, places: Places, monotonic: Callable[[], float] = time.monotonic) -> None:
        log, store = places.event_log, places.feature_store
        self.places = replace(
            places,
            event_log=replace(log, connect_timeout_s=min(_CALL_S, log.connect_timeout_s)),
            feature_store=replace(store, timeout_s=min(_CALL_S, store.timeout_s)),
        )
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._looks: dict[str, _Look] = {}
        self._pool = ThreadPoolExecutor(_MOST_LOOKS, thread_name_prefix="console-look")
        self._waiters = ThreadPoolExecutor(2 * _MOST_LOOKS, thread_name_prefix="console-wait")
        self._http = httpx.Client(timeout=_CALL_S)
        self._store_lock = threading.Lock()
        self._redis: redis.Redis | None = None
        self._store: SnapshotStore | None = None
        log = self.places.event_log  # a look is not tried for as long as a trainer tries
        patience: dict[str, Any] = {"outage_timeout_s": _CALL_S}
        self._log_config = replace(log, redis=replace(log.redis, **patience), kafka=replace(log.kafka, **patience))
        self._logs: dict[str, _Log] = {}

    # ---- one look at anything

    def look(self, name: str, what: Callable[[], _T], *, fresh_s: float = FRESH_S, waits: bool = True) -> Reached[_T]:
        """Do something that may fail or take long: at most once in ``fresh_s``, and waited for two seconds at most.

        A place that was slow to fail is not waited for until it answers: its problem is told at once.

        Args:
            name: Looks of one name share their result.
            what: Called on a thread of its own; a :class:`SmesError` or :class:`OSError` becomes the problem.
            fresh_s: So long a result counts.
            waits: With False, a result that no longer counts is given at once, and renewed meanwhile.
        """
        with self._lock:
            while len(self._looks) > _REMEMBERED:
                del self._looks[next(iter(self._looks))]
            look = self._looks[name] = self._looks.pop(name, _Look())  # the newest stands last
            if look.running is None and self._monotonic() - look.done_s >= fresh_s:
                look.started_s = self._monotonic()
                look.running = self._pool.submit(self._do, name, look, what)
            running, left_s = look.running, look.started_s + TIMEOUT_S - self._monotonic()
            waits = not look.slow and (waits or not look.ended)
        if running is not None and waits:
            done = threading.Event()
            running.add_done_callback(lambda _: done.set())
            if not done.wait(max(0.0, left_s)):
                with self._lock:
                    if look.running is not None:
                        look.slow = True
                        look.failed(f"{name}: no answer within {TIMEOUT_S:g} s")
        with self._lock:
            return look.result

    def _do(self, name: str, look: "_Look", what: Callable[[], Any]) -> None:
        problem, value = None, None
        try:
            value = what()
        except (SmesError, OSError, ValueError) as error:
            problem = masked_text(str(error)) or type(error).__name__
        except Exception as error:
            problem = f"{name}: {type(error).__name__}: {error}"
            _logger.exception("looking at %s", name)
        finally:
            with self._lock:
                if problem is None:
                    look.found(value)
                else:
                    look.failed(problem)
                look.running, look.done_s, look.ended = None, self._monotonic(), True
                look.slow = problem is not None and look.done_s - look.started_s > _SLOW_S

    def forget(self, name: str) -> None:
        """Look anew at the next call, because something was changed; a look that is on its way does not count."""
        with self._lock:
            self._looks.pop(name, None)

    def together(self, *looks: Callable[[], Any]) -> list[Any]:
        """The results of several functions that each look at something, in their order, as quick as the slowest."""
        return list(self._waiters.map(lambda look: look(), looks))

    # ---- trainer and scorer

    def trainer(self) -> Reached[dict[str, Any]]:
        """``/v1/stats`` of the trainer."""
        return self.look("trainer", lambda: self._ask_trainer("/v1/stats"))

    def trainer_brief(self) -> Reached[dict[str, Any]]:
        """The same without ``experts``, which is by far the longest part."""
        return self.look("trainer, in brief", lambda: self._ask_trainer("/v1/stats?without=experts"))

    def trainer_history(self, after: int | None = None, last: int | None = None) -> Reached[dict[str, Any]]:
        """``/v1/history`` of the trainer: ``lines``, oldest first, and ``next``.

        Args:
            after: Number of a stretch: only the lines after it.
            last: Only so many of the newest.
        """
        query = "&".join(f"{key}={value}" for key, value in (("after", after), ("last", last)) if value is not None)
        path = f"/v1/history?{query}"
        return self.look(f"trainer{path}", lambda: self._ask_trainer(path))

    def scorer(self) -> Reached[dict[str, Any]]:
        """``/v1/stats`` of the scorer."""
        return self.look("scorer", lambda: self._ask_scorer("/v1/stats"))

    def scorer_ready(self) -> Reached[dict[str, Any]]:
        """``/health/ready`` of the scorer, whatever it says."""
        return self.look("scorer, readiness", lambda: self._ask_scorer("/health/ready", also=(503,)))

    def ask_scorer(self, path: str, body: Any) -> httpx.Response:
        """Send the scorer a request, and give its answer, whatever its status.

        Raises:
            SmesError: There is no scorer, or it gave no answer within two seconds.
        """
        places = self.places
        return self._request("scorer", places.scorer_url, places.scorer_token, "POST", path, body)

    def _ask_trainer(self, path: str) -> dict[str, Any]:
        places = self.places
        return _object(self._request("trainer", places.trainer_url, places.trainer_token, "GET", path), path)

    def _ask_scorer(self, path: str, also: Collection[int] = ()) -> dict[str, Any]:
        places = self.places
        return _object(self._request("scorer", places.scorer_url, places.scorer_token, "GET", path), path, also)

    def _request(
        self, who: str, url: str | None, token: SecretPlace | None, method: str, path: str, body: Any = None
    ) -> httpx.Response:
        if url is None:
            raise SmesError(f"{who}: its address is not known; give --{who}, or configure console.{who}_url")
        headers = {} if token is None else {"authorization": f"Bearer {one_token(token, key=f'token of the {who}')}"}
        try:
            return self._http.request(method, url.rstrip("/") + path, headers=headers, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SmesError(f"{who} {url}: no answer: {error or type(error).__name__}") from error

    # ---- what lies in Redis or Kafka

    def snapshots(self) -> "SnapshotStore":
        """The store of snapshots; use it inside of a :meth:`look`.

        Raises:
            SmesError: Redis gave no answer within two seconds, or does not let us in.
        """
        from feature_store.objects import Objects
        from feature_store.signing import Signer
        from feature_store.snapshots import SnapshotStore

        with self._store_lock:
            if self._store is None:
                place = self.places.feature_store
                signer, objects = Signer.of(place.signing, place.namespace), Objects.of(place.chunks, place.namespace)
                self._redis = place.connect()
                self._store = SnapshotStore(
                    self._redis, place.namespace, place.snapshots, signer=signer, objects=objects
                )
            return self._store

    @contextmanager
    def event_log(self, connection: str = "pages") -> Iterator["EventLog"]:
        """The event log, for one thread at a time; use it inside of a :meth:`look`.

        A connection is kept, and made anew after an error.

        Args:
            connection: Its name; those of other names go on meanwhile.

        Raises:
            SmesError: The log gave no answer within two seconds, or does not let us in.
        """
        from stream.log.open_log import open_event_log

        with self._lock:
            kept = self._logs.setdefault(connection, _Log())
        if not kept.lock.acquire(timeout=TIMEOUT_S):
            raise SmesError(f"event log: no answer within {TIMEOUT_S:g} s")
        try:
            if kept.log is None:
                kept.log = open_event_log(self._log_config)
            yield kept.log
        except BaseException:
            kept.close()
            raise
        finally:
            kept.lock.release()

    def close(self) -> None:
        """Close the connections, when the looks that are on their way have ended: about two seconds at most."""
        for pool in (self._pool, self._waiters):
            pool.shutdown(cancel_futures=True)
        self._http.close()
        if self._redis is not None:
            self._redis.close()
        for kept in self._logs.values():
            kept.close()


class _Log:
    """A connection to the event log, if it is open."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.log: EventLog | None = None

    def close(self) -> None:
        log, self.log = self.log, None
        if log is not None:
            log.close()


class _Look:
    """The newest result of one name, and the look that is on its way, if any."""

    def __init__(self) -> None:
        self.running: Future[None] | None = None
        self.started_s = self.done_s = float("-inf")
        self.slow = False  # it took long to fail
        self.ended = False  # at least once
        self.result: Reached[Any] = Reached(None, "not looked at yet", 0)

    def found(self, value: Any) -> None:
        self.result = Reached(value, None, wall_clock_ms())

    def failed(self, problem: str) -> None:
        since_ms = self.result.since_ms if self.result.since_ms is not None else wall_clock_ms()
        self.result = Reached(None, problem, self.result.at_ms, since_ms)


def _object(response: httpx.Response, path: str, also: Collection[int] = ()) -> dict[str, Any]:
    url = response.url.copy_with(path=None, query=None)
    if response.status_code != 200 and response.status_code not in also:
        raise SmesError(f"{url}: {path}: status {response.status_code}: {response.text[:200]}")
    try:
        value = response.json()
    except ValueError as error:
        raise SmesError(f"{url}: {path}: no JSON") from error
    if not isinstance(value, dict):
        raise SmesError(f"{url}: {path}: expected an object")
    return value
