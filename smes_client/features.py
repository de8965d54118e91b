"""Stores the features of users and items, one or many at a time, with the time from which they hold."""

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from feature_store.entities import DEFAULT_VERSIONS, EntityStore
from feature_store.entity_layout import Entity
from feature_store.entity_values import columns_of, entity_ids
from smes.errors import FeatureStoreUnavailable
from smes.schema import Schema
from smes_client.checked import Id
from smes_client.schemas import load_schema
from smes_io.clock import retry, wall_clock_ms
from smes_io.redis_client import open_client

if TYPE_CHECKING:
    from smes_io.redis_access import RedisAccess

_MANY = 1000

Values = Mapping[str, Any]
"""Name of a feature → an id (an integer, or a text that becomes one), a list of ids, or a number; None: missing."""


class Features:
    """Writes features into a deployment's store. Thread-safe.

    A row holds all features of its user or item at a time; one left out is missing. The store keeps the last few rows
    of each, so that the trainer reads what held when an impression was shown, and the scorer what holds now.

    Args:
        schema: The deployment's: a schema or its file.
        redis_url: ``redis://[user[:password]@]host:port/database``, or ``rediss://…`` by TLS.
        namespace: Of the deployment.
        access: How the server lets us in, beside what the URL says.
        keep: How many rows of a user or item are kept; as the deployment's ``feature_store.feature_versions``.
        timeout_s: How long a write is tried while the server is away, seconds.
        now_ms: Wall clock in Unix milliseconds.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        schema: Schema | str | Path,
        redis_url: str,
        *,
        namespace: str = "smes",
        access: "RedisAccess | None" = None,
        keep: int = DEFAULT_VERSIONS,
        timeout_s: float = 10.0,
        now_ms: Callable[[], int] = wall_clock_ms,
    ) -> None:
        self._schema, self._timeout_s, self._now_ms = load_schema(schema), timeout_s, now_ms
        self._client = open_client(redis_url, timeout_s, access=access, namespace=namespace)
        self._store = EntityStore(self._client, self._schema, namespace, keep=keep, now_ms=now_ms)

    def put_user(self, user: Id, values: Values, time_ms: int | None = None) -> bool:
        """Store a user's features.

        Args:
            user: The user's id.
            values: The features.
            time_ms: From when they hold, Unix milliseconds; 0: from ever; None: from now.

        Returns:
            Whether the row is kept; false if it is older than all rows of the user that are.

        Raises:
            ValueError: A feature is unknown, or a value not of its kind; the message names it.
            FeatureStoreUnavailable: No answer within ``timeout_s``.
            FeatureStoreError: Redis refused.
        """
        return self._put("user", [(user, values)], time_ms) == 0

    def put_item(self, item: Id, values: Values, time_ms: int | None = None) -> bool:
        """Store an item's features; as :meth:`put_user`."""
        return self._put("item", [(item, values)], time_ms) == 0

    def put_users(self, rows: Iterable[tuple[Id, Values]], time_ms: int | None = None) -> int:
        """Store the features of many users, a thousand in each round trip.

        Args:
            rows: Ids and features, read as they are written.
            time_ms: As of :meth:`put_user`.

        Returns:
            How many of the rows were dropped, because they are older than all that are kept of their user.

        Raises:
            ValueError, FeatureStoreUnavailable, FeatureStoreError: As :meth:`put_user`. Thousands before may be
                written; to write all again changes nothing that is there.
        """
        return self._put_many("user", rows, time_ms)

    def put_items(self, rows: Iterable[tuple[Id, Values]], time_ms: int | None = None) -> int:
        """Store the features of many items; as :meth:`put_users`."""
        return self._put_many("item", rows, time_ms)

    def close(self) -> None:
        """Close the connections; idempotent."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put_many(self, entity: Entity, rows: Iterable[tuple[Id, Values]], time_ms: int | None) -> int:
        time_ms = self._now_ms() if time_ms is None else time_ms
        waiting, dropped = iter(rows), 0
        while many := list(islice(waiting, _MANY)):
            dropped += self._put(entity, many, time_ms)
        return dropped

    def _put(self, entity: Entity, rows: list[tuple[Id, Values]], time_ms: int | None) -> int:
        ids = entity_ids([entity_id for entity_id, _ in rows], f"{entity}_id")
        columns = columns_of(self._schema, entity, [values for _, values in rows])
        at_ms = np.full(len(rows), self._now_ms() if time_ms is None else time_ms, np.int64)  # the same at each try
        return retry(
            lambda: self._store.put_many(entity, ids, columns, at_ms),
            timeout_s=self._timeout_s,
            retriable=(FeatureStoreUnavailable,),
        )
