"""Looking up stored features, and looking now and then whether there are any."""

import threading
import time
from collections.abc import Callable, Sequence

from feature_store.entities import EntityRows, EntityStore, blank_rows
from feature_store.entity_layout import own_features
from smes.arrays import I64
from smes.errors import SmesError
from smes.schema import ITEM_ID, USER_ID, Schema
from smes_scorer.telemetry import Telemetry

_NAMED = 3


class FeatureLookup:
    """Looks up stored features. When a look-up fails, requests are scored without them for ``retry_s``.

    Safe to share between threads.

    Args:
        telemetry: Counts failures and unknown entities.
        retry_s: After a failure, how long no look-up is tried.
        monotonic_s: Clock of the retries.
    """

    def __init__(
        self, telemetry: Telemetry, *, retry_s: float, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._telemetry = telemetry
        self._retry_s = retry_s
        self._monotonic_s = monotonic_s
        self._next_try_s = float("-inf")
        self._look_up_problem: str | None = None
        self._empty: str | None = None

    @property
    def problem(self) -> str | None:
        """Why the last look-up failed or what it found broken, or that the store is empty; None when none of these."""
        return self._look_up_problem or self._empty

    def rows_of_all(
        self, store: EntityStore, schema: Schema, asked: Sequence[tuple[int, I64]], now_ms: int
    ) -> list[EntityRows]:
        """The instances of users with N items, with their stored features where they could be looked up.

        Args:
            store: Where the features of the schema are; its client's timeout bounds the look-up.
            schema: Which columns there are.
            asked: User and items of each request, int64 [N]; at least one.
            now_ms: Unix milliseconds.
        """
        if self._monotonic_s() < self._next_try_s:
            return self._without_features(schema, asked)
        try:
            found = store.get_many(asked, now_ms)
        except SmesError as error:
            self._telemetry.feature_store_failures.inc()
            self._look_up_problem = str(error)
            self._next_try_s = self._monotonic_s() + self._retry_s
            return self._without_features(schema, asked)
        self._look_up_problem = found[0].problem
        self._telemetry.unknown_users.inc(sum(not rows.user_known for rows in found))
        self._telemetry.unknown_items.inc(sum(int((~rows.items_known).sum()) for rows in found))
        if self._empty is not None and any(self._found_any(rows, schema) for rows in found):
            self.check(store, schema)
        return found

    def check(self, store: EntityStore, schema: Schema) -> None:
        """Look whether the store holds features at all, where the schema has stored ones. Never raises."""
        names = [f.name for f in schema.features if f.source != "context" and f.name not in (USER_ID, ITEM_ID)]
        try:
            is_empty = bool(names) and not store.holds_any()
        except SmesError:
            return  # that it gives no answer, look-ups say
        shown = ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
        self._empty = f"the store holds none, and the schema has stored ones: {shown}" if is_empty else None
        self._telemetry.no_features.set(is_empty)

    @staticmethod
    def _found_any(rows: EntityRows, schema: Schema) -> bool:
        """Whether a row was found; without features of its source, every entity counts as known."""
        of_user, of_item = own_features(schema, "user"), own_features(schema, "item")
        return bool((of_user and rows.user_known) or (of_item and rows.items_known.any()))

    def _without_features(self, schema: Schema, asked: Sequence[tuple[int, I64]]) -> list[EntityRows]:
        self._telemetry.scored_without_features.inc(len(asked))
        return [blank_rows(schema, user_id, item_ids) for user_id, item_ids in asked]


class StoreChecks:
    """Calls something now and then, in a thread of its own, at first when it starts.

    Args:
        check: Called; must not raise.
        every_s: Seconds between two calls.
    """

    def __init__(self, check: Callable[[], None], every_s: float) -> None:
        self._check, self._every_s = check, every_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feature-store-check", daemon=True)

    def start(self) -> None:
        """Start the thread; call it once."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for it."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self._check()
            if self._stopping.wait(self._every_s):
                return
