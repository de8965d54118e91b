"""The trainer's lease in the store: taken at the start, renewed in a thread of its own, given back at a stop.

While it is held no other trainer publishes in the namespace. The thread is not the publisher's: an upload that takes
longer than the lease must not end it. The scripts in the store refuse what a trainer publishes that lost its lease.
"""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from feature_store.lease import Lease
from feature_store.snapshots import SnapshotStore
from smes.errors import LeaseHeld, LeaseLost, SmesError, Stopped
from smes_io.outages import Outages

_logger = logging.getLogger(__name__)
_LOOK_S = 0.1


class LeaseKeeper:
    """Holds the namespace's lease from entering the context to leaving it.

    A trainer that was killed leaves its lease behind until that expires. So a lease of somebody else is waited for, as
    long as it has to run; if it is renewed meanwhile, its holder lives.

    Args:
        store: Where the lease is.
        ttl_s: The lease ends so long after it was last renewed; it is renewed three times as often.
        should_stop: Ends the wait for another one's lease.
        holder: What others are told; None: this host and process.

    Raises:
        LeaseHeld: By entering: another trainer publishes here; the message says who, since when and until when.
        Stopped: By entering: a stop was asked for.
    """

    def __init__(
        self,
        store: SnapshotStore,
        ttl_s: float,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        holder: str | None = None,
    ) -> None:
        self._store, self._ttl_s, self._should_stop = store, ttl_s, should_stop
        self._holder = holder or f"process {os.getpid()} on {socket.gethostname()}"
        self._lease: Lease | None = None
        self._lost: LeaseLost | None = None
        self._outages = Outages(_logger)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @property
    def number(self) -> int:
        """The fencing number to publish with."""
        assert self._lease is not None, "the context was entered"
        return self._lease.number

    def check(self) -> None:
        """Check that nobody else has taken the lease.

        Raises:
            LeaseLost: Somebody has; the message says who.
        """
        if self._lost is not None:
            raise self._lost

    def __enter__(self) -> "LeaseKeeper":
        self._lease = self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        if self._lease is None or self._lost is not None:
            return
        # In a thread: where the server hangs, the lease expires by itself.
        giving_back = threading.Thread(target=self._release, args=[self._lease], name="lease-release", daemon=True)
        giving_back.start()
        giving_back.join(0.5)

    def _acquire(self) -> Lease:
        deadline_s: float | None = None
        seen_until_ms = 0
        while True:
            try:
                return self._store.acquire(self._holder, self._ttl_s)
            except LeaseHeld as held:
                now_s = time.monotonic()
                renewed = deadline_s is not None and held.until_ms > seen_until_ms + 1000 * _LOOK_S
                if deadline_s is None:
                    seen_until_ms = held.until_ms
                    deadline_s = now_s + self._ttl_s + 1.0
                    _logger.warning("%s; waiting up to %g s for it to end", held, self._ttl_s)
                if renewed or now_s > deadline_s:
                    raise
            if self._should_stop():
                raise Stopped("lease: held by another trainer when a stop was asked for")
            self._closed.wait(_LOOK_S)

    def _renew(self) -> None:
        assert self._lease is not None, "the context was entered"
        while not self._closed.wait(self._ttl_s / 3):
            try:
                self._lease.renew()
            except LeaseLost as error:
                self._lost = error
                return
            except SmesError as error:  # it goes on being ours until somebody else takes it
                self._outages.failed("the lease", f"the lease was not renewed, trying again: {error}")
            else:
                self._outages.answered("the lease")

    def _release(self, lease: Lease) -> None:
        with suppress(SmesError):
            lease.release()
