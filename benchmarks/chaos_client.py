"""A caller of the scorers that asks steadily while chaos happens, as a load balancer's callers do.

A scorer that the benchmark itself has taken down is asked no more, and a request that it was answering goes to the next
one. Every other failure is an error: no server's fault may reach an answer.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from smes.arrays import I64

_TIMEOUT_S = 5.0
_KEPT_ERRORS = 20


@dataclass
class Answers:
    """Counts.

    Attributes:
        requests: All.
        failed_over: Requests that a scorer was answering when the benchmark took it down; another one answered.
        errors: Requests that a scorer failed although nothing was done to it, or that nobody answered.
        slowest_ms: Longest time to an answer that needed one scorer only.
        versions: (lineage, version) that answered.
        messages: Of the first errors.
    """

    requests: int = 0
    failed_over: int = 0
    errors: int = 0
    slowest_ms: float = 0.0
    versions: set[tuple[str, int]] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "scorer_requests": self.requests,
            "scorer_failed_over": self.failed_over,
            "scorer_errors": self.errors,
            "scorer_slowest_ms": round(self.slowest_ms, 1),
            "versions_answered": len(self.versions),
        } | ({"scorer_error_messages": self.messages} if self.messages else {})


class Caller:
    """A thread that asks until it is stopped.

    Args:
        urls: Name of a scorer → base URL.
        users, items: int64, ids to draw from.
        tasks: That each answer must hold.
        per_s: Requests a second.
        items_per_request: Items of each.
        seed: Of the draws.
    """

    def __init__(
        self,
        urls: Mapping[str, str],
        users: I64,
        items: I64,
        tasks: Sequence[str],
        *,
        per_s: float = 20.0,
        items_per_request: int = 50,
        seed: int = 0,
    ) -> None:
        self._urls, self._users, self._items, self._tasks = dict(urls), users, items, set(tasks)
        self._period_s, self._count = 1 / per_s, min(items_per_request, len(items))
        self._rng = np.random.default_rng(seed)
        self._down: set[str] = set()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="caller", daemon=True)
        self.answers = Answers()

    def start(self) -> None:
        """Start to ask. The scorers must be ready."""
        self._thread.start()

    def stop(self) -> Answers:
        """Finish the last request; the counts."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        return self.answers

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """While a scorer is taken down by intent: until it is ready again."""
        self._down.add(name)
        try:
            yield
        finally:
            self._down.discard(name)

    def _run(self) -> None:
        next_s = time.monotonic()
        with httpx.Client(timeout=_TIMEOUT_S) as client:
            while not self._stopped.is_set():
                self._ask(client, self.answers.requests % len(self._urls))
                self.answers.requests += 1
                next_s = max(next_s + self._period_s, time.monotonic() - 1)
                self._stopped.wait(max(0.0, next_s - time.monotonic()))

    def _ask(self, client: httpx.Client, first: int) -> None:
        items = self._rng.choice(self._items, self._count, replace=False).tolist()
        request = {"user_id": int(self._rng.choice(self._users)), "context": {}, "items": items}
        names = [*list(self._urls)[first:], *list(self._urls)[:first]]
        failures: list[str] = []
        excused = True
        for name in names:
            if name in self._down:
                continue
            started_s = time.perf_counter()
            try:
                self._check(items, client.post(f"{self._urls[name]}/v1/score", json=request))
            except (httpx.HTTPError, KeyError, TypeError, ValueError) as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
                excused &= name in self._down
                continue
            if not failures:
                self.answers.slowest_ms = max(self.answers.slowest_ms, 1000 * (time.perf_counter() - started_s))
            self.answers.failed_over += bool(failures) and excused
            break
        else:
            excused = False
            failures.append("nobody answered")
        if not excused:
            self.answers.errors += 1
            if len(self.answers.messages) < _KEPT_ERRORS:
                self.answers.messages.append("; ".join(failures))

    def _check(self, items: list[int], response: httpx.Response) -> None:
        response.raise_for_status()
        answer = response.json()
        if [item["item_id"] for item in answer["items"]] != items or sorted(answer["ranking"]) != sorted(items):
            raise ValueError(f"an answer for other items than the {len(items)} requested")
        if any(item["scores"].keys() != self._tasks for item in answer["items"]):
            raise ValueError(f"an answer without one of the tasks {sorted(self._tasks)}")
        if not all(np.isfinite(list(item["scores"].values())).all() for item in answer["items"]):
            raise ValueError("an answer with a score that is not finite")
        self.answers.versions.add((answer["lineage"], answer["version"]))
