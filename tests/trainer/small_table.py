"""A table of rows in a dictionary, changed at random, and cuts of it: what publications are compared with."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from feature_store.feedback_times import FeedbackTimes
from feature_store.folding import read_weights
from feature_store.manifest import Manifest
from feature_store.payload import Precision, rounded
from feature_store.snapshots import SnapshotStore
from smes.arrays import F32, I64
from smes.model.deltas import RowDelta
from trainer.cuts import Cut
from trainer.publisher import Publisher

GROUPS = {"embedding": 3, "wide": 2}
NOW_MS = 1_700_000_000_000

Rows = dict[int, F32]
"""Key → its weights, those of all groups side by side."""


class CopiedView:
    """A view that holds a copy."""

    def __init__(self, rows: Rows, dense: Mapping[str, torch.Tensor]) -> None:
        self.dense = dense
        self.columns = GROUPS
        self.is_closed = False
        self._rows = rows

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def blocks(self) -> Iterator[tuple[I64, dict[str, F32]]]:
        keys = list(self._rows)
        for start in range(0, len(keys), 7):
            assert not self.is_closed
            yield arrays({key: self._rows[key] for key in keys[start : start + 7]})

    def close(self) -> None:
        self.is_closed = True


class SmallTable:
    """The table. The version is the number of changes so far, which is also the one dense weight.

    Attributes:
        step: The version.
        rows: As they are now.
        views: Every view that was opened.
    """

    def __init__(self, seed: int = 0) -> None:
        self.step = 0
        self.rows: Rows = {}
        self.views: list[CopiedView] = []
        self._rng = np.random.default_rng(seed)
        self._touched: set[int] = set()
        self._removed: set[int] = set()

    def change(self, changes: int = 8) -> None:
        """Rows are born, change, go and come back."""
        self.step += 1
        for key in self._rng.integers(-20, 20, changes).tolist():
            if key in self.rows and self._rng.random() < 0.3:
                del self.rows[key]
                self._removed.add(key)
                self._touched.discard(key)
            else:
                self.rows[key] = self._rng.normal(size=sum(GROUPS.values())).astype(np.float32)
                self._touched.add(key)
                self._removed.discard(key)

    def cut(self, *, full: bool = False, base: bool = False, arrivals: Mapping[int, int] | None = None) -> Cut:
        """What changed since the last cut; ``full``: everything; ``base``: both."""
        delta = RowDelta(*arrays({key: self.rows[key] for key in self._touched}), np.array([*self._removed], np.int64))
        self._touched.clear()
        self._removed.clear()
        dense = {"dense.step": torch.tensor([float(self.step)])}
        view = None
        if full or base:
            view = CopiedView(dict(self.rows), dense)
            self.views.append(view)
        return Cut(
            step=self.step,
            dense=dense,
            deltas=() if full else (delta,),
            view=view,
            positions={"impressions": {"0": 10 * self.step}},
            event_time_ms=NOW_MS + self.step,
            metrics={},
            cut_ms=NOW_MS,
            feedback=FeedbackTimes.of_rows([(ms, count, 0, 0, 0) for ms, count in (arrivals or {}).items()]),
        )

    def offer_to(self, publisher: Publisher, arrivals: Mapping[int, int] | None = None) -> Rows:
        """Change, and offer a cut as the training loop does; the rows at this version."""
        self.change()
        full = publisher.wants_full
        publisher.offer(self.cut(full=full, base=publisher.wants_base, arrivals=arrivals))
        return dict(self.rows)


def arrays(rows: Rows) -> tuple[I64, dict[str, F32]]:
    """Keys and columns of some rows."""
    values = np.array([*rows.values()], np.float32).reshape(len(rows), sum(GROUPS.values()))
    columns, start = {}, 0
    for name, width in GROUPS.items():
        columns[name] = values[:, start : start + width].reshape(len(rows), width)
        start += width
    return np.array([*rows], np.int64), columns


def served(store: SnapshotStore, manifest: Manifest) -> Rows:
    """The rows of a version, as a reader that starts with nothing gets them; its dense weight is checked."""
    tensors, _ = read_weights(store, manifest)
    assert tensors["dense.step"].item() == manifest.version
    values = np.concatenate([tensors[f"table.{name}"].numpy() for name in GROUPS], axis=1)
    keys = tensors["table.keys"].tolist()
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, values, strict=True))


def assert_rows(got: Rows, expected: Rows, precision: Precision = "fp32") -> None:
    """Equal bit for bit, after the precision's rounding."""
    assert got.keys() == expected.keys()
    for key, row in expected.items():
        _, columns = arrays({key: row})
        kept = np.concatenate([rounded(column, precision)[0] for column in columns.values()])
        assert got[key].tobytes() == kept.tobytes(), key
