"""Publishing cuts without holding up the trainer: a mailbox for cuts, and a thread that encodes and uploads them.

The trainer's thread copies what changed (:mod:`trainer.cuts`); the publishing thread works on that copy. A new cut
joins one that still waits in the mailbox: serving wants the newest, and one delta leads there over both. The feedback
noted for the older cut is added to the new one; the scorer measures freshness by it (:mod:`trainer.freshness`).

The first publication of a process is full, and so is the next one after a delta did not apply, because the store was
lost or went back in time. A first one that the store has already, in the same precision, is not published again: deltas
follow it. The trainer asks :attr:`Publisher.wants_full` before a cut. When the deltas have grown long,
:attr:`Publisher.wants_base` asks for a view of the whole table beside the delta of a cut; a second thread makes of it
the base of that version, from which what starts late begins.

Of several ranks, rank 0 has the publisher. Its threads have the other ranks upload their parts of a version
(:mod:`trainer.other_ranks`), and commit all of it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from feature_store.manifest import Manifest
from feature_store.snapshots import SnapshotStore
from smes.errors import LeaseLost, SmesError, SnapshotGap, SnapshotStale
from smes.schema import Schema
from smes_io.outages import Outages
from trainer.cuts import Cancelled, Cut, Payloads
from trainer.held_versions import HeldVersions
from trainer.lease import LeaseKeeper
from trainer.other_ranks import OtherRanks, ViewOfAll
from trainer.waiting_cuts import WaitingCuts

_logger = logging.getLogger(__name__)
_RETRY_S = 1.0
_LONGEST_RETRY_S = 30.0  # of a full snapshot that the store does not take
_AT_ONCE_S = 0.1  # so long a close does not ask whether the store is there
_ANSWER_S = 0.7  # a store that is there answers a small read in much less
_UNANSWERED = 2  # so many small reads without an answer: it is not there


class Publisher:
    """Publishes the newest cut, in its own thread.

    Attributes:
        published: Snapshots published, bases not counted.
        bases: Bases published.
        held: Snapshots uploaded to be kept aside, not served.
        promoted: Whether an operator was found to have put a held one into service since this was last set to False.
        failures: Publications that failed; each was tried again.
        bytes_last: Bytes of the last snapshot published; None before the first.

    Args:
        store: Where snapshots go.
        schema: Goes into the snapshot.
        model: Model configuration as plain data; goes into the snapshot.
        lineage: The lineage that the weights belong to.
        now_ms: Wall clock, Unix milliseconds.
        lease: The lease to publish with; None for none, which the store allows while nobody holds it.
        carried_from: As in :class:`feature_store.manifest.Manifest`.
        renamed: As of :class:`trainer.cuts.Payloads`.
        others: The other ranks of the training; None: there are none.
    """

    def __init__(
        self,
        store: SnapshotStore,
        schema: Schema,
        model: dict[str, Any],
        lineage: str,
        *,
        now_ms: Callable[[], int],
        lease: LeaseKeeper | None = None,
        carried_from: Sequence[str] = (),
        renamed: Mapping[str, str] = MappingProxyType({}),
        others: OtherRanks | None = None,
    ) -> None:
        self.others = others
        self._store, self._schema_hash, self.lineage, self._now_ms = store, schema.hash, lineage, now_ms
        self._carried_from = tuple(carried_from)
        parts = 1 + (others.count if others else 0)
        self._payloads = Payloads(schema, model, lineage, store.config.precision, renamed, parts=parts)
        self._lease = lease
        self._changed = threading.Condition()
        self._waiting = WaitingCuts()
        self._closing = False
        self._in_hand = 0  # deltas of the cut that is being published
        self._give_up_s = 0.0  # of the monotonic clock, once it is closing
        self._pause_s = _RETRY_S  # before the next full snapshot; longer after each that was not taken
        self._applies_to: set[int] = set()  # the version published last, and later ones of which it is not known
        self._base_thread: threading.Thread | None = None
        self._no_base_before_s = 0.0
        self.published = self.bases = self.held = self.failures = 0
        self.promoted = False
        self._held = HeldVersions(store, lineage)
        self._is_asked = False  # whether one of them is in service
        self.bytes_last: int | None = None
        self._last_failure: str | None = None
        self._outages = Outages(_logger)
        self._lost: LeaseLost | None = None
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    @property
    def wants_full(self) -> bool:
        """Whether the next cut is to have a view and no delta."""
        with self._changed:
            return self._waiting.wants_full

    @property
    def wants_base(self) -> bool:
        """Whether the next cut is to have a view beside its delta."""
        config = self._store.config
        with self._changed:
            return (
                not (self._waiting.wants_full or self._closing or self._waiting.has_base_view)
                and self._waiting.chain.is_longer_than(config.max_chain_length, config.max_chain_bytes_ratio)
                and time.monotonic() >= self._no_base_before_s
            )

    @property
    def has_owed(self) -> bool:
        """Whether a cut was offered that only a full snapshot can replace."""
        with self._changed:
            return self._waiting.owed is not None

    @property
    def num_deltas(self) -> int:
        """How many of the newest deltas may still be published, or be a part of one that is."""
        with self._changed:
            return self._waiting.num_deltas + self._in_hand

    def offer(self, cut: Cut) -> None:
        """Hand over a cut; returns at once.

        Raises:
            LeaseLost: Another trainer publishes in this namespace.
            SmesError: The publishing thread has ended, by :meth:`close` or on an unexpected error.
        """
        try:
            self.check()
            if not self.is_running:
                raise SmesError("the publishing thread has ended: its error is in the log above")
        except SmesError:
            cut.without_view()
            raise
        if self.others is not None and cut.view is not None:
            cut = replace(cut, view=ViewOfAll(cut.view, partial(self.others.close_view, cut.step)))
        with self._changed:
            self._waiting.add(cut)
            self._changed.notify_all()

    def check(self) -> None:
        """Check that this publisher may still publish.

        Raises:
            LeaseLost: Another trainer publishes in this namespace.
            SmesError: The publishing thread has ended on an unexpected error.
        """
        if self._lost is not None:
            raise self._lost
        if self._lease is not None:
            self._lease.check()
        if not (self._closing or self.is_running):
            raise SmesError("the publishing thread has ended: its error is in the log above")

    def close(self, timeout_s: float = 30.0, take_full: Callable[[], Cut] | None = None) -> bool:
        """Publish what waits, then stop; True if everything was published within ``timeout_s``.

        A store that does not answer is not waited for: then this takes a second or two. A base is not waited for
        either: the next process begins with a full snapshot.

        Args:
            timeout_s: Longest wait.
            take_full: Takes a full cut, should only that be left to publish.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            self._closing = True
            self._give_up_s = deadline_s
            self._changed.notify_all()
        self._thread.join(_AT_ONCE_S)
        unanswered = 0
        while unanswered < _UNANSWERED and self._thread.is_alive() and time.monotonic() < deadline_s:
            if take_full is not None and self.wants_full and self.has_owed:
                with suppress(SmesError):  # the thread has ended just now
                    self.offer(take_full())
            answers = self._ask_store()
            self._thread.join(min(_ANSWER_S, max(0.0, deadline_s - time.monotonic())))
            unanswered = unanswered + 1 if not answers else 0 if answers[0] else _UNANSWERED
        with self._changed:
            self._give_up_s = 0.0
            published = not self._thread.is_alive() and not self._waiting and self._waiting.owed is None
            self._waiting.give_up()
            self._changed.notify_all()
        if self._base_thread is not None:
            self._base_thread.join(_ANSWER_S)
        return published

    def _ask_store(self) -> list[bool]:
        """Ask the store for a small read, in a thread of its own.

        The list gets an entry when it is clear whether the store is there.
        """
        answers: list[bool] = []

        def ask() -> None:
            with suppress(TypeError, ValueError, AttributeError):  # of redis-py, whose client was closed meanwhile
                answers.append(self._store_answers())

        threading.Thread(target=ask, name="publisher-probe", daemon=True).start()
        return answers

    def _store_answers(self) -> bool:
        try:
            self._store.pointer()
        except SmesError:
            return False
        return True

    @property
    def has_waiting(self) -> bool:
        """Whether a cut waits in the mailbox."""
        with self._changed:
            return bool(self._waiting)

    @property
    def is_running(self) -> bool:
        """Whether the publishing thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        is_over = False
        while not is_over:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._waiting or self._waiting.needs_full or self._is_asked or self._is_over(),
                    timeout=_RETRY_S if self._closing else None,
                )
                cut = self._waiting.take() if self._waiting else None
                self._in_hand = len(cut.deltas) if cut else 0
                needs_full = cut is None and self._waiting.needs_full
                is_over = cut is None and self._is_over()
                asked, self._is_asked = self._is_asked, False
            if asked and self._held.take_promoted():
                self.promoted = True
            if cut is not None:
                is_over = self._try(cut)
                with self._changed:
                    self._in_hand = 0
            elif needs_full:
                is_over = self._until_full()

    def _try(self, cut: Cut) -> bool:
        """Publish a cut, or see to it that it is tried again; whether nothing more is to be done."""
        try:
            outcome = self._hold(cut) if cut.held else self._publish(cut)
        except LeaseLost as error:  # nothing more will be published: the trainer's thread hears it by check()
            with self._changed:
                self._lost = error
                self._waiting.give_up(cut)
            return True
        if outcome == "done":
            return False
        with self._changed:
            if outcome == "gap" or cut.is_full:
                self._waiting.give_up(cut)
            else:
                self._waiting.put_back(cut)
            pause = bool(self._waiting)
        return pause and self._pause(_RETRY_S)

    def _publish(self, cut: Cut) -> Literal["done", "failed", "gap"]:
        """Publish a cut: ``done``, ``failed``: try again, or ``gap``: only a full snapshot can be published."""
        started_s = time.monotonic()
        if self._last_failure is not None and not cut.is_full and not self._store_answers():
            self.failures += 1
            return "failed"
        try:
            manifest = self._upload(cut)
        except SnapshotStale as error:
            _logger.info("%s", error)
            self._go_on_from_stored(cut)
            self._drop_view(cut)
            return "done"
        except LeaseLost:
            raise
        except SnapshotGap as error:
            _logger.warning("a full snapshot takes the place of a delta: %s", error)
            return "gap"
        except SmesError as error:
            # Serving keeps what it has; the next cut contains this one's training.
            self.failures += 1
            self._applies_to.add(cut.step)  # it may be published all the same, and its answer lost
            self._outages.failed("publishing", f"snapshot of step {cut.step} not published, trying again: {error}")
            self._last_failure = str(error)
            return "failed"
        self._applies_to = {cut.step}
        self.published += 1
        self._last_failure = None
        self._outages.answered("publishing")
        self._pause_s = _RETRY_S
        self.bytes_last = manifest.total_bytes
        with self._changed:
            self._waiting.chain.add(manifest)
        what = f"{self.lineage}:{cut.step} ({manifest.kind}, {manifest.total_bytes} bytes)"
        _logger.debug("published %s in %.0f ms", what, 1000 * (time.monotonic() - started_s))
        if cut.view is not None and not cut.is_full:
            base_thread = threading.Thread(
                target=self._publish_base, args=[replace(cut, deltas=()), manifest], name="publisher-base", daemon=True
            )
            base_thread.start()
            self._base_thread = base_thread  # a close may wait for it from now on
        else:
            self._drop_view(cut)
        return "done"

    def _go_on_from_stored(self, cut: Cut) -> None:
        """The store has this version already: deltas follow it, if it holds its rows in the precision of ours.

        Else base and deltas would round in two ways, and a version would be two: the next one is full.
        """
        try:
            stored = self._store.chain(self._store.get(self.lineage, cut.step))
        except SmesError as error:
            _logger.warning("a full snapshot follows: %s", error)
            stored = ()
        follows = bool(stored) and all(manifest.precision == self._payloads.precision for manifest in stored)
        with self._changed:
            if follows:
                self._applies_to = {cut.step}
                self._waiting.chain.begin_with(stored)
            else:
                self._waiting.give_up()
                self._waiting.wants_full = True

    def _upload(self, cut: Cut) -> Manifest:
        return self._store.publish(
            self._payloads.full(cut) if cut.is_full else self._payloads.delta(cut),
            lineage=self.lineage,
            version=cut.step,
            schema_hash=self._schema_hash,
            step=cut.step,
            created_ms=cut.cut_ms,
            applies_to=None if cut.is_full else self._applies_to,
            precision=self._payloads.precision,
            event_time_ms=cut.event_time_ms,
            positions=cut.positions,
            metrics=cut.metrics,
            feedback_arrivals=() if cut.held else cut.feedback.merged().rows(),
            now_ms=self._now_ms,
            fencing=self._fencing,
            held=cut.held,
            carried_from=self._carried_from,
            others=self.others.of(cut.step, "full" if cut.is_full else "delta", len(cut.deltas))
            if self.others
            else None,
        )

    def _hold(self, cut: Cut) -> Literal["done"]:
        """Keep a cut aside, if the store takes it at once; in any case what changed in it goes on to the next one."""
        try:
            self._upload(cut)
        except LeaseLost:
            raise
        except SmesError as error:
            _logger.warning("the refused cut of step %d was not kept aside: %s", cut.step, error)
        else:
            self.held += 1
        self._held.add(self.lineage, cut.step)
        self._applies_to.add(cut.step)  # if it is promoted, the next delta still applies: it has all of this one, too
        with self._changed:
            self._waiting.keep(cut)
        return "done"

    def look_for_promoted(self) -> None:
        """Have the publishing thread ask the store whether a cut that was held is in service: :attr:`promoted`."""
        with self._changed:
            self._is_asked = bool(self._held)
            self._changed.notify_all()

    @property
    def _fencing(self) -> int | None:
        return None if self._lease is None else self._lease.number

    def _publish_base(self, cut: Cut, manifest: Manifest) -> None:
        """Make the base of a version, beside the publications of later ones."""
        started_s = time.monotonic()
        try:
            base = self._store.publish_base(
                self._payloads.full(cut, lambda: self._closing),
                manifest,
                precision=self._payloads.precision,
                fencing=self._fencing,
                others=self.others.of(cut.step, "base", is_cancelled=lambda: self._closing) if self.others else None,
            )
        except Cancelled:
            return
        except Exception as error:  # later versions can still be loaded from the base before
            _logger.warning(
                "the base of step %d was not published, trying again later: %s",
                cut.step,
                error,
                exc_info=not isinstance(error, SmesError),
            )
            self._no_base_before_s = time.monotonic() + _LONGEST_RETRY_S
        else:
            with self._changed:
                self._waiting.chain.begin_at(base)
            self.bases += 1
            _logger.debug(
                "the base of %s:%d: %d bytes in %.1f s",
                self.lineage,
                cut.step,
                base.total_bytes,
                time.monotonic() - started_s,
            )
        finally:
            cut.without_view()
            with self._changed:
                self._waiting.has_base_view = False

    def _drop_view(self, cut: Cut) -> None:
        with self._changed:
            self._waiting.without_view(cut)

    def _until_full(self) -> bool:
        """Ask for a full snapshot as soon as the store answers; after a failure not before a pause is over.

        True if no time is left for one.
        """
        failed = self._last_failure is not None
        while failed or not self._store_answers():
            if self._pause(self._pause_s):
                return True
            if failed:
                self._pause_s, failed = min(2 * self._pause_s, _LONGEST_RETRY_S), False
        with self._changed:
            self._waiting.wants_full = True
        return False

    def _pause(self, seconds: float) -> bool:
        """Wait before the next try; True if no time is left for one."""
        with self._changed:
            if not self._closing:
                self._changed.wait_for(lambda: self._closing, timeout=seconds)
                return False
            if time.monotonic() + _RETRY_S >= self._give_up_s:
                return True
            self._changed.wait(_RETRY_S)
            return False

    def _is_over(self) -> bool:
        """Whether nothing more is to be done. While it is closing, what is owed waits until no time is left."""
        return self._closing and (self._waiting.owed is None or time.monotonic() >= self._give_up_s)
