"""The version in service, and which versions requests still answer with.

A request takes one :class:`ServedModel` and answers with it alone, so that its answer is of one version. Versions share
a table (:mod:`smes.model.serving_rows`), so it says when it begins and when it is done: what a request still reads is
not changed.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from feature_store.manifest import Manifest
from smes.arrays import F32, I64, Bool
from smes.model.serving import Explained
from smes.schema import Schema


class Scorable(Protocol):
    """Scores instances; never changes, so any number of threads may call it."""

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        """float32 [N, T]; see :meth:`smes.model.serving.ServingModel.score`."""
        ...


@runtime_checkable
class Foldable(Scorable, Protocol):
    """A model that reads its table through what changed in it, until that is folded into the table.

    Attributes:
        shadows: How many changes there are to fold.
    """

    @property
    def shadows(self) -> int: ...

    def folded(self, up_to_version: int) -> Scorable:
        """Fold the changes that lead to versions up to this one; a model of the same scores without them.

        Nobody may read a version before it.
        """
        ...


@runtime_checkable
class Knowing(Scorable, Protocol):
    """A model that can tell which ids it knows."""

    def knows(self, ids: I64) -> Bool:
        """Which ids have a row of their own; a missing one has. int64 [N, W] → bool [N, W]."""
        ...


@runtime_checkable
class OfRequests(Scorable, Protocol):
    """A model that computes once what instances of a request share."""

    def score_requests(self, ids: I64, numerics: F32, now_ms: I64, requests: I64) -> F32:
        """Score instances of several requests; as :meth:`smes.model.serving.ServingModel.score` with ``requests``."""
        ...


@runtime_checkable
class Explaining(Scorable, Protocol):
    """A model that can say what its scores are made of."""

    def explain(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> Explained:
        """As :meth:`smes.model.serving.ServingModel.explain`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A snapshot that was loaded and warmed up: the model together with the version it is. Immutable.

    Attributes:
        model, manifest: Of the version.
        schema: The schema that it was trained with.
    """

    model: Scorable
    manifest: Manifest
    schema: Schema

    @property
    def key(self) -> tuple[str, int]:
        """Lineage and version."""
        return self.manifest.lineage, self.manifest.version


class InService(Protocol):
    """The version in service of one model, and what keeps it there."""

    @property
    def served(self) -> ServedModel | None:
        """The version in service, None before the first."""

    @property
    def schema(self) -> Schema:
        """The schema of the version in service; before the first, the configured one."""

    @property
    def problem(self) -> str | None:
        """Why the newest version is not served, None when it is (or when nothing was published yet)."""

    def reading(self) -> AbstractContextManager[ServedModel]:
        """The version in service, for one request, which may use it until the block ends. There must be one."""


class Versions:
    """Which version is in service, and how many requests read which. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers: dict[ServedModel, int] = {}
        self._served: ServedModel | None = None

    @property
    def served(self) -> ServedModel | None:
        """What is in service. To score with it, use :meth:`reading`."""
        return self._served

    def put(self, served: ServedModel) -> None:
        """Put a model into service: every :meth:`reading` that begins after this has it."""
        with self._lock:
            self._served = served

    @contextmanager
    def reading(self) -> Iterator[ServedModel]:
        """What is in service, for one request; nothing of it changes until the block ends."""
        with self._lock:
            served = self._served
            assert served is not None, "a request is scored once something is in service"
            self._readers[served] = self._readers.get(served, 0) + 1
        try:
            yield served
        finally:
            with self._lock:
                self._readers[served] -= 1
                if not self._readers[served]:
                    del self._readers[served]

    def read(self) -> set[ServedModel]:
        """What is in service, and what requests still read."""
        with self._lock:
            return {served for served in (self._served, *self._readers) if served is not None}

    def oldest_read(self) -> int | None:
        """The oldest version that a request reads or may begin to read.

        None if nothing is in service, or if a request reads another lineage than that in service.
        """
        with self._lock:
            if self._served is None:
                return None
            lineages, versions = zip(*(read.key for read in (self._served, *self._readers)), strict=True)
            return min(versions) if len(set(lineages)) == 1 else None
