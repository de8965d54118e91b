"""Uploads the part of a rank other than 0, when rank 0's publisher says so.

The training thread takes the same cuts on every rank. Here they wait, as long as rank 0 may ask for them; threads
upload them, so that the training does not wait.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import msgspec

from feature_store.feedback_times import FeedbackTimes
from feature_store.parts import UploadedPart
from feature_store.pieces import Payload
from feature_store.snapshots import SnapshotStore
from smes.errors import FeatureStoreUnavailable, SmesError
from smes.model.deltas import FullView, RowDelta
from smes.schema import Schema
from smes_io.tensor_pieces import Piece
from trainer.cuts import Cancelled, Cut, Payloads
from trainer.part_messages import ORDERS, Begin, Decision, Report

_logger = logging.getLogger(__name__)
_JOIN_S = 2.0


class PartUploader:
    """The parts of one rank. Use it on the training thread.

    Args:
        store: Where parts go.
        schema, model: As of :class:`trainer.publisher.Publisher`.
        rank: This one, ≥ 1.
        size: How many ranks there are.
        renamed: As of :class:`trainer.cuts.Payloads`.
    """

    def __init__(
        self,
        store: SnapshotStore,
        schema: Schema,
        model: dict[str, Any],
        rank: int,
        size: int,
        *,
        renamed: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._payloads_of: Callable[[str], Payloads] = lambda lineage: Payloads(
            schema, model, lineage, store.config.precision, renamed, part=rank, parts=size
        )
        self._payloads: tuple[str, Payloads] | None = None
        self._deltas: list[tuple[int, RowDelta]] = []
        self._views: dict[int, FullView] = {}
        self._uploads: dict[str, _Upload] = {}
        self._lock = threading.Lock()  # of the line below
        self._reports: list[Report] = []

    def offer(self, decision: Decision, cut: Cut) -> None:
        """Keep a cut until rank 0 asks for it, or does not need it any more.

        Args:
            decision: What rank 0 said of it.
            cut: With a delta, a view, or both.
        """
        if self._payloads is None or self._payloads[0] != decision.lineage:
            self._payloads = decision.lineage, self._payloads_of(decision.lineage)
        self._deltas = self._deltas[max(0, len(self._deltas) - decision.deltas) :]
        self._deltas += [(cut.step, delta) for delta in cut.deltas]
        if cut.view is not None:
            self._close_view(cut.step)
            self._views[cut.step] = cut.view

    def hear(self, orders: bytes) -> None:
        """Do what rank 0 has ordered; returns at once."""
        if not orders:
            return
        said = ORDERS.decode(orders)
        self._uploads = {name: upload for name, upload in self._uploads.items() if upload.is_running}
        for order in said.begin:
            if order.upload not in said.abandon:
                self._begin(order)
        for name in said.abandon:
            upload = self._uploads.get(name)
            if upload is None or not upload.stop():
                remover = threading.Thread(target=self._remove, args=[name], name="part-remover", daemon=True)
                remover.start()
        for step in said.closed:
            self._close_view(step)

    def report(self) -> bytes:
        """What was uploaded since the last call; empty: nothing."""
        with self._lock:
            reports, self._reports = tuple(self._reports), []
        return msgspec.json.encode(reports) if reports else b""

    def close(self) -> None:
        """Stop what is being uploaded, and let the table forget its views."""
        for upload in self._uploads.values():
            upload.stop()
        for upload in self._uploads.values():
            upload.join(_JOIN_S)
        for step in list(self._views):
            self._close_view(step)
        self._uploads, self._deltas = {}, []

    def _close_view(self, step: int) -> None:
        if (view := self._views.pop(step, None)) is not None:
            view.close()

    def _begin(self, order: Begin) -> None:
        deltas = [delta for step, delta in self._deltas if step <= order.version]
        some = tuple(deltas[max(0, len(deltas) - order.deltas) :]) if order.kind == "delta" else ()
        view = None if order.kind == "delta" else self._views.pop(order.version, None)
        if self._payloads is None or len(some) < order.deltas or (view is None and order.kind != "delta"):
            why = f"no {order.kind} of step {order.version} is there, expected the cut that rank 0 took"
            self._add(Report(order.upload, error=why))
            return
        cut, payloads = _part_of_cut(order.version, some, view), self._payloads[1]
        upload = _Upload(lambda payload: self._store.upload_part(order.upload, payload, self._rank, self._size))
        self._uploads[order.upload] = upload
        upload.start(lambda: payloads.full(cut) if cut.is_full else payloads.delta(cut), order.upload, self._add, view)

    def _remove(self, upload: str) -> None:
        with suppress(SmesError):  # it expires
            self._store.abandon_part(upload, self._rank)

    def _add(self, report: Report) -> None:
        with self._lock:
            self._reports.append(report)


class _Upload:
    """One upload of a part, in a thread of its own.

    Args:
        upload: Uploads a payload, and removes what it uploaded if that fails.
    """

    def __init__(self, upload: Callable[[Payload], UploadedPart]) -> None:
        self._upload = upload
        self._lock = threading.Lock()
        self._stopped = self._ended = False
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def start(
        self, make: Callable[[], Payload], name: str, report: Callable[[Report], None], view: FullView | None
    ) -> None:
        """Upload what ``make`` makes, report it, and close the view."""

        def run() -> None:
            try:
                told = self._told(make, name)
            finally:
                if view is not None:
                    view.close()
            if told is not None:
                report(told)

        self._thread = threading.Thread(target=run, name="part-uploader", daemon=True)
        self._thread.start()

    def stop(self) -> bool:
        """Stop it at its next piece; it then removes what it has uploaded. False: it has uploaded everything."""
        with self._lock:
            self._stopped = True
            return not self._ended

    def join(self, timeout_s: float) -> None:
        """Wait for its end."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _told(self, make: Callable[[], Payload], name: str) -> Report | None:
        """What is to be reported; None: nobody waits for it any more."""
        try:
            payload = make()
            part = self._upload(replace(payload, pieces=lambda: self._until_stopped(payload)))
        except Cancelled:
            return None
        except SmesError as error:
            return Report(name, error=str(error), is_outage=isinstance(error, FeatureStoreUnavailable))
        except Exception as error:
            _logger.exception("a part of a snapshot was not uploaded")
            return Report(name, error=repr(error))
        return Report(name, part.rows, part.chunks)

    def _until_stopped(self, payload: Payload) -> Iterator[Piece]:
        for piece in payload.pieces():
            if self._stopped:
                raise Cancelled
            yield piece
        with self._lock:
            if self._stopped:
                raise Cancelled
            self._ended = True


def _part_of_cut(step: int, deltas: tuple[RowDelta, ...], view: FullView | None) -> Cut:
    """What a rank's payload is made of: no dense weights, which rank 0 has."""
    return Cut(
        step=step,
        dense={},
        deltas=deltas,
        view=view,
        positions={},
        event_time_ms=None,
        metrics={},
        cut_ms=0,
        feedback=FeedbackTimes.concat([]),
    )
