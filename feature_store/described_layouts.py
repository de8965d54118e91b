"""The layouts that rows of features in a store have, by their ids."""

import threading
import time
from collections.abc import Iterable
from typing import cast

import redis

from feature_store.damage import Damage, shown
from feature_store.entity_layout import Layout
from smes_io.redis_client import translated

_ASK_AGAIN_S = 5.0
_MOST_UNKNOWN = 1000


class DescribedLayouts:
    """The layouts that the store describes, asked for once each. Safe to share between threads.

    Args:
        client: Of the store.
        key: Of the layouts.
        damage: Hears of descriptions that cannot be read.
        known: Layouts that need not be asked for.
    """

    def __init__(self, client: redis.Redis, key: str, damage: Damage, known: Iterable[Layout]) -> None:
        self._client, self._key, self._damage = client, key, damage
        self._lock = threading.Lock()
        self._known: dict[bytes, Layout] = {layout.id: layout for layout in known}
        self._asked_s: dict[bytes, float] = {}

    def get(self, layout_id: bytes) -> Layout | None:
        """The layout with an id; None if there is no such one. What was not there is asked for again after 5 s."""
        layout = self._known.get(layout_id)
        if layout is not None:
            return layout
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._asked_s.get(layout_id, -_ASK_AGAIN_S) < _ASK_AGAIN_S:
                return self._known.get(layout_id)
            if len(self._asked_s) > _MOST_UNKNOWN:
                self._asked_s.clear()
            self._asked_s[layout_id] = now_s
            with translated(self._client, "the layouts of features were read"):
                described = cast("bytes | None", self._client.hget(self._key, layout_id))
            if described is None:
                return None
            try:
                layout = Layout.described(described)
                if layout.id != layout_id:
                    raise ValueError(f"layout {layout.id.hex()}")
            except ValueError as error:
                self._damage.note(f"Redis key {self._key}: {shown(described)} ({error}), expected {layout_id.hex()}")
                return None
            self._known[layout_id] = layout
            return layout
