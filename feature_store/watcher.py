"""Notices a newly published snapshot: by notification, and by polling where a notification was lost."""

import threading
import time

import redis
from redis.client import PubSub

from feature_store.publication import SnapshotKeys
from smes_io.redis_client import address


class SnapshotWatcher:
    """Tells when the ``current`` pointer moved. For one thread; only :meth:`close` may be called from another.

    Redis may restart or be away at any time: the watcher subscribes again and asks for the pointer itself at least
    every ``poll_s``, so that a publication without its notification is seen too.

    Args:
        client: A client that returns bytes.
        namespace: As of the :class:`feature_store.snapshots.SnapshotStore`.
        poll_s: Longest time between two looks at the pointer.
    """

    def __init__(self, client: redis.Redis, namespace: str = "smes", poll_s: float = 1.0) -> None:
        if not poll_s > 0:
            raise ValueError(f"poll_s {poll_s}, expected more than 0 seconds")
        self._client = client
        self._keys = SnapshotKeys(namespace)
        self._poll_s = poll_s
        self._seen: bytes | None = None
        self._pubsub: PubSub | None = None
        self._closed = threading.Event()
        self.problem: str | None = None
        """Why Redis could not be asked the last time, None when it answered."""

    def wait(self, timeout_s: float) -> bool:
        """Whether the pointer moved since the last time this returned True, waiting up to ``timeout_s`` for it.

        The first call returns True at once if anything is published.
        """
        deadline = time.monotonic() + timeout_s
        while not self._closed.is_set():
            if self._moved():
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            self._listen(min(remaining, self._poll_s))
        if self._closed.is_set():
            self._unsubscribe()
        return False

    def close(self) -> None:
        """Make a running :meth:`wait` return within ``poll_s``; idempotent."""
        self._closed.set()

    def _moved(self) -> bool:
        try:
            # Subscribed before looking: what is published after the look is notified.
            self._subscribe()
            pointer = self._client.get(self._keys.key("current"))
        except redis.RedisError as error:
            self._lost(error)
            return False
        self.problem = None
        assert pointer is None or isinstance(pointer, bytes)
        if pointer is None or pointer == self._seen:
            return False
        self._seen = pointer
        return True

    def _subscribe(self) -> PubSub:
        if self._pubsub is None:
            pubsub: PubSub = self._client.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call] # redis has no types here
            pubsub.subscribe(self._keys.key("published"))
            self._pubsub = pubsub
        return self._pubsub

    def _listen(self, timeout_s: float) -> None:
        """Return when a notification came, or after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while self._pubsub is not None and (remaining := deadline - time.monotonic()) > 0:
            try:
                if self._pubsub.get_message(timeout=remaining) is not None:
                    return
            except redis.RedisError as error:
                self._lost(error)
        # Only without a connection is there time left: no hammering at a server that is away.
        self._closed.wait(max(0.0, deadline - time.monotonic()))

    def _lost(self, error: redis.RedisError) -> None:
        self.problem = f"Redis at {address(self._client)} gave no answer: {error}"
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            pubsub.close()
