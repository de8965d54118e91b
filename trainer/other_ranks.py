"""The other ranks of a training, as rank 0's publishing threads see them: who uploads what, and who has done so."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec
from torch import Tensor

from feature_store.parts import UploadedPart
from smes.arrays import F32, I64
from smes.errors import FeatureStoreUnavailable, SnapshotError
from smes.model.deltas import FullView
from trainer.cuts import Cancelled
from trainer.part_messages import REPORTS, Begin, Kind, Orders, Report

_LOOK_S = 0.2


class OtherRanks:
    """Passes orders to the other ranks and reports from them. Safe to share between threads.

    The publishing threads wait here; the training thread carries the messages, by :meth:`orders` and :meth:`hear`.

    Args:
        count: How many other ranks there are, ≥ 1.
        timeout_s: Longest wait for their parts; the store's ``upload_ttl_s`` is a good value.
    """

    def __init__(self, count: int, timeout_s: float) -> None:
        self.count = count
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._begin: list[Begin] = []
        self._abandon: list[str] = []
        self._closed: list[int] = []
        self._reports: dict[str, dict[int, Report]] = {}  # of the uploads that are waited for
        self._gone: str | None = None

    def orders(self) -> bytes:
        """What the other ranks are to do since the last call; empty: nothing. For the training thread."""
        with self._changed:
            orders = Orders(tuple(self._begin), tuple(self._abandon), tuple(self._closed))
            self._begin, self._abandon, self._closed = [], [], []
        return msgspec.json.encode(orders) if orders else b""

    def hear(self, reports: Sequence[bytes]) -> None:
        """Take what the ranks report, in their order; that of rank 0 is left out. For the training thread."""
        with self._changed:
            for rank, text in enumerate(reports):
                for report in REPORTS.decode(text) if rank and text else ():
                    if report.upload in self._reports:
                        self._reports[report.upload][rank] = report
            self._changed.notify_all()

    def gone(self, why: str) -> None:
        """Nothing will be heard any more: what waits ends with this reason."""
        with self._changed:
            self._gone = why
            self._changed.notify_all()

    def close_view(self, version: int) -> None:
        """Have the other ranks close their views of a cut."""
        with self._changed:
            self._closed.append(version)

    def of(
        self, version: int, kind: Kind, deltas: int = 0, is_cancelled: Callable[[], bool] = lambda: False
    ) -> "OthersOfUpload":
        """The other ranks in one publication.

        Args:
            version, kind, deltas: As of :class:`trainer.part_messages.Begin`.
            is_cancelled: Asked while their parts are waited for.
        """
        return OthersOfUpload(self, version, kind, deltas, is_cancelled)

    def begin(self, order: Begin) -> None:
        """Have them upload."""
        with self._changed:
            self._begin.append(order)
            self._reports[order.upload] = {}

    def abandon(self, upload: str) -> None:
        """Have them stop an upload, and remove what they have."""
        with self._changed:
            self._reports.pop(upload, None)
            self._abandon.append(upload)

    def wait(self, upload: str, is_cancelled: Callable[[], bool]) -> list[UploadedPart]:
        """What they have uploaded; see :meth:`feature_store.parts.OtherParts.wait`."""
        deadline_s = time.monotonic() + self._timeout_s
        with self._changed:
            while len(reports := self._reports[upload]) < self.count:
                _raise_failure(reports)
                if self._gone is not None:
                    raise SnapshotError(f"upload {upload}: {self._gone}")
                if is_cancelled():
                    raise Cancelled
                if time.monotonic() >= deadline_s:
                    missing = [rank for rank in range(1, self.count + 1) if rank not in reports]
                    raise FeatureStoreUnavailable(
                        f"upload {upload}: no part of rank {', '.join(map(str, missing))} within {self._timeout_s:g} s"
                    )
                self._changed.wait(_LOOK_S)
            _raise_failure(reports)
            del self._reports[upload]
        return [UploadedPart(reports[rank].chunks, reports[rank].rows) for rank in sorted(reports)]


class ViewOfAll:
    """Rank 0's view of a cut; when it is closed, those of the other ranks are.

    Args:
        view: Rank 0's.
        close_others: Has the others close theirs.
    """

    def __init__(self, view: FullView, close_others: Callable[[], None]) -> None:
        self._view, self._close_others = view, close_others
        self._is_closed = False

    @property
    def dense(self) -> Mapping[str, Tensor]:
        return self._view.dense

    @property
    def columns(self) -> Mapping[str, int]:
        return self._view.columns

    @property
    def num_rows(self) -> int:
        return self._view.num_rows

    def blocks(self) -> Iterator[tuple[I64, dict[str, F32]]]:
        return self._view.blocks()

    def close(self) -> None:
        self._view.close()
        if not self._is_closed:
            self._is_closed = True
            self._close_others()


class OthersOfUpload:
    """:class:`feature_store.parts.OtherParts` of one publication."""

    def __init__(
        self, ranks: OtherRanks, version: int, kind: Kind, deltas: int, is_cancelled: Callable[[], bool]
    ) -> None:
        self._ranks, self._version, self._kind, self._deltas = ranks, version, kind, deltas
        self._is_cancelled = is_cancelled
        self._upload: str | None = None

    @property
    def count(self) -> int:
        return self._ranks.count

    def begin(self, upload: str) -> None:
        self._upload = upload
        self._ranks.begin(Begin(upload, self._version, self._kind, self._deltas))

    def wait(self) -> list[UploadedPart]:
        assert self._upload is not None, "it was begun"
        return self._ranks.wait(self._upload, self._is_cancelled)

    def abandon(self) -> None:
        if self._upload is not None:
            self._ranks.abandon(self._upload)


def _raise_failure(reports: dict[int, Report]) -> None:
    for rank, report in sorted(reports.items()):
        if report.error is not None:
            kind = FeatureStoreUnavailable if report.is_outage else SnapshotError
            raise kind(f"rank {rank}: {report.error}")
