"""Stored features of a request, or none in time: a slow feature store must not become a slow scorer."""

import time
from collections.abc import Callable

from feature_store.entities import EntityRows, EntityStore, blank_rows
from scorer.telemetry import Telemetry
from smes.errors import SmesError
from smes.events import I64
from smes.schema import Schema


class FeatureLookup:
    """Reads entity features; on failure, scoring goes on with the ids alone for ``retry_s``, then it is tried again.

    Safe to share between threads.

    Args:
        store: Its client's timeout bounds a look-up.
        schema: Which columns there are.
        telemetry: Counts failures and unknown entities.
        retry_s: How long not to ask after a failure.
        monotonic_s: Clock of the retries.
    """

    def __init__(
        self,
        store: EntityStore,
        schema: Schema,
        telemetry: Telemetry,
        *,
        retry_s: float,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._schema = schema
        self._telemetry = telemetry
        self._retry_s = retry_s
        self._monotonic_s = monotonic_s
        self._asks_again_s = float("-inf")
        self.problem: str | None = None
        """Why the last look-up failed, None when it succeeded."""

    def rows(self, user_id: int, item_ids: I64) -> EntityRows:
        """A user's instances with N items, with what is stored of them."""
        if self._monotonic_s() < self._asks_again_s:
            return self._without(user_id, item_ids)
        try:
            rows = self._store.get(user_id, item_ids)
        except SmesError as error:
            self._telemetry.feature_store_failures.inc()
            self.problem = str(error)
            self._asks_again_s = self._monotonic_s() + self._retry_s
            return self._without(user_id, item_ids)
        self.problem = None
        self._telemetry.unknown_users.inc(not rows.user_known)
        self._telemetry.unknown_items.inc(int((~rows.items_known).sum()))
        return rows

    def _without(self, user_id: int, item_ids: I64) -> EntityRows:
        self._telemetry.scored_without_features.inc()
        return blank_rows(self._schema, user_id, item_ids)
