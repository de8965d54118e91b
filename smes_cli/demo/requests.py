"""Send scoring requests to a running scorer in a loop, and check every answer."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import numpy as np

from smes.arrays import F64, I64

_TOLERANCE = 1e-4  # scores of one item at two places of a batch may differ in the last bits of float32
_FIXED_EVERY = 5
_KEPT_LATENCIES = 100_000
_CALENDAR_S = 900  # hours and days begin, in every time zone, at a multiple of this


@dataclass(slots=True)
class RequestTally:
    """Counts and latencies of the requests.

    Attributes:
        requests: All requests, answered or failed.
        errors: Requests that failed, or whose answer lacked an item or a task.
        mixed_versions: Answers whose scores cannot all come from the version that they name.
        versions: (lineage, version) of the answers.
        latency_ms: Time to each of the newest 100,000 answers, measured by the caller.
        last_error: Message of the last failure.
    """

    requests: int = 0
    errors: int = 0
    mixed_versions: int = 0
    versions: set[tuple[str, int]] = field(default_factory=set)
    latency_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_LATENCIES))
    last_error: str = ""

    def quantile_ms(self, q: float) -> float | None:
        """A quantile of the latency; None before the first answer."""
        return float(np.quantile(self.latency_ms, q)) if self.latency_ms else None


class RequestLoop:
    """A thread that asks for rankings until it is stopped.

    Two checks find answers that mix versions. Every request contains one item twice, which must get the same scores in
    both places. And a fixed request is sent again and again, which must get the same scores from the same version as
    shortly before. (Over hours the scores may move: features may count the time.)

    Args:
        url: Base URL of the scorer.
        users: int64 [U], users to draw from.
        items: int64 [I], items to draw from.
        tasks: Task names that every answer must contain.
        per_s: Requests per second.
        items_per_request: Items that each request ranks.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        url: str,
        users: I64,
        items: I64,
        tasks: Sequence[str],
        *,
        per_s: float,
        items_per_request: int,
        seed: int = 0,
    ) -> None:
        self._url, self._users, self._items, self._tasks = url, users, items, set(tasks)
        self._period_s, self._per_request = 1 / per_s, items_per_request
        self._rng = np.random.default_rng(seed)
        self._fixed = self._draw()
        self._fixed_scores: dict[tuple[str, int], tuple[tuple[int, str], F64]] = {}
        self._stopped, self._counting = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="requests", daemon=True)
        self.tally = RequestTally()

    def start(self) -> None:
        """Start the thread. The scorer must be ready."""
        self._thread.start()

    def stop(self) -> RequestTally:
        """Finish the current request and stop the thread; the counts."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        return self.tally

    def so_far(self) -> RequestTally:
        """A copy of the counts, while the thread goes on."""
        with self._counting:
            tally = self.tally
            return replace(tally, versions=set(tally.versions), latency_ms=deque(tally.latency_ms))

    def _run(self) -> None:
        next_s = time.monotonic()
        with httpx.Client(base_url=self._url, timeout=10.0) as client:
            while not self._stopped.is_set():
                fixed = self.tally.requests % _FIXED_EVERY == 0
                self._ask(client, self._fixed if fixed else self._draw(), fixed=fixed)
                next_s = max(next_s + self._period_s, time.monotonic() - 1)
                self._stopped.wait(max(0.0, next_s - time.monotonic()))

    def _draw(self) -> dict[str, Any]:
        items = self._rng.choice(self._items, min(self._per_request, len(self._items)), replace=False).tolist()
        return {"user_id": int(self._rng.choice(self._users)), "context": {}, "items": [*items, items[0]]}

    def _ask(self, client: httpx.Client, request: dict[str, Any], *, fixed: bool) -> None:
        started_s, asked = time.perf_counter(), _calendar()
        latency_ms = None
        try:
            response = client.post("/v1/score", json=request)
            latency_ms = 1000 * (time.perf_counter() - started_s)
            response.raise_for_status()
            answer = response.json()
            scores, missing = self._scores(request, answer), str(answer["features_missing"])
            version, failure = (answer["lineage"], answer["version"]), ""
        except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
            failure = f"{type(error).__name__}: {error}"
        with self._counting:
            self.tally.requests += 1
            if latency_ms is not None:
                self.tally.latency_ms.append(latency_ms)
            if failure:
                self.tally.errors += 1
                self.tally.last_error = failure
            else:
                asked_as = (asked, missing) if fixed and asked == _calendar() else None
                self._check_one_version(version, scores, asked_as)

    def _scores(self, request: dict[str, Any], answer: dict[str, Any]) -> F64:
        """Scores of a complete answer: float64 [items, tasks]."""
        if [item["item_id"] for item in answer["items"]] != request["items"]:
            raise ValueError(f"answer for {len(answer['items'])} items, expected the {len(request['items'])} requested")
        for item in answer["items"]:
            if item["scores"].keys() != self._tasks:
                raise ValueError(f"answer with tasks {sorted(item['scores'])}, expected {sorted(self._tasks)}")
        if sorted(answer["ranking"]) != sorted(request["items"]):
            raise ValueError("answer with a ranking that is not a permutation of the items")
        names = sorted(self._tasks)
        return np.array([[item["scores"][name] for name in names] for item in answer["items"]])

    def _check_one_version(self, version: tuple[str, int], scores: F64, asked: tuple[int, str] | None) -> None:
        """Count an answer whose scores differ.

        ``asked``, of the fixed request alone: in which part of the day, and without which features it was answered.
        """
        self.tally.versions.add(version)
        mixed = not np.allclose(scores[0], scores[-1], rtol=_TOLERANCE, atol=_TOLERANCE)
        if asked is not None:
            then, known = self._fixed_scores.get(version, (asked, scores))
            self._fixed_scores[version] = asked, scores
            mixed |= then == asked and not np.allclose(known, scores, rtol=_TOLERANCE, atol=_TOLERANCE)
        self.tally.mixed_versions += mixed


def _calendar() -> int:
    """The part of the day: within it no feature of the hour or the day changes."""
    return int(time.time() // _CALENDAR_S)
