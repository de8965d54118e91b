"""Notices when the ``current`` pointer moves or an operator decides what is served, by notification and by polling."""

import threading
import time

import redis
from redis.client import PubSub

from feature_store.damage import Damage
from feature_store.manifest import SnapshotKeys
from feature_store.pins import Pins
from feature_store.reading import SnapshotReader
from smes_io.redis_client import address, drop_connections, not_now


class SnapshotWatcher:
    """Notices when the ``current`` pointer moves, or what an operator decided changes.

    For one thread; only :meth:`close` may be called from another.

    Redis may restart or be away at any time. The watcher then subscribes again. It also reads both records at least
    every ``poll_s``, so it sees a publication whose notification was lost.

    Args:
        client: A client that returns bytes.
        namespace: As of the :class:`feature_store.snapshots.SnapshotStore`.
        poll_s: Longest time between two reads of the pointer.
    """

    def __init__(self, client: redis.Redis, namespace: str = "smes", poll_s: float = 1.0) -> None:
        if not poll_s > 0:
            raise ValueError(f"poll_s: {poll_s}, expected more than 0")
        self._client = client
        self._keys = SnapshotKeys(namespace)
        self._reader = SnapshotReader(client, self._keys, Damage())
        self._pins = Pins(client, self._keys, self._reader, Damage())
        self._poll_s = poll_s
        self._seen: tuple[bytes, bytes] | None = None
        self._pubsub: PubSub | None = None
        self._closed = threading.Event()
        self.problem: str | None = None
        """Why Redis did not answer the last time, None when it did."""

    def wait(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` for a change; whether there was one since this last returned True.

        The first call returns True at once if anything is published.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._closed.is_set():
            if self._moved():
                return True
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                break
            self._listen(min(remaining_s, self._poll_s))
        if self._closed.is_set():
            self._unsubscribe()
        return False

    def close(self) -> None:
        """Make a running :meth:`wait` return within ``poll_s``; idempotent."""
        self._closed.set()

    def _moved(self) -> bool:
        try:
            # Subscribe before reading, so that what comes after the read is announced.
            self._subscribe()
            found = self._reader.raw_pointer(), self._pins.raw()
        except redis.RedisError as error:
            self._lost(error)
            return False
        self.problem = None
        if not any(found) or found == self._seen:
            return False
        self._seen = found
        return True

    def _subscribe(self) -> PubSub:
        if self._pubsub is None:
            # redis has no types here
            pubsub: PubSub = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
            pubsub.subscribe(self._keys.key("published"))
            self._pubsub = pubsub
        return self._pubsub

    def _listen(self, timeout_s: float) -> None:
        """Return when a notification arrives, or after ``timeout_s``."""
        deadline_s = time.monotonic() + timeout_s
        while self._pubsub is not None and (remaining_s := deadline_s - time.monotonic()) > 0:
            try:
                if self._pubsub.get_message(timeout=remaining_s) is not None:
                    return
            except redis.RedisError as error:
                self._lost(error)
        # There is time left only if the connection was lost. Waiting spares a server that is away.
        self._closed.wait(max(0.0, deadline_s - time.monotonic()))

    def _lost(self, error: redis.RedisError) -> None:
        self.problem = f"Redis at {address(self._client)} gave no answer: {error}"
        self._unsubscribe()
        if not_now(error) is not None:  # another server may have the keys, or be the primary, by now
            drop_connections(self._client)

    def _unsubscribe(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()
