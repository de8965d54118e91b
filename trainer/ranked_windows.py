"""Windows of the evaluation, and the impressions in them whose labels are still to come.

Letters: N impressions, T tasks.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smes.arrays import F32, I64, Arrays, Bool, GrowingColumns
from smes.events import ExampleBlock
from smes.id_map import IdMap
from smes.metrics import group_auc
from smes.schema import MISSING


class RankedWindow:
    """The impressions that one frozen copy of the weights scored, with their final labels.

    Attributes:
        number: Number of the window, from 0.
        counts: Whether its GAUC counts: its weights had seen something.
        scored: Impressions scored; some of them may be without final labels yet.

    Args:
        num_tasks: T.
        number, counts, scored: As above.
        arrays: What :meth:`arrays` returned, to go on with; None for a new window.
    """

    def __init__(
        self,
        num_tasks: int,
        number: int = 0,
        *,
        counts: bool = False,
        scored: int = 0,
        arrays: dict[str, NDArray[Any]] | None = None,
    ) -> None:
        self.number, self.counts, self.scored = number, counts, scored
        shape = (0, num_tasks)
        self._empty: dict[str, NDArray[Any]] = {
            "group": np.zeros((0, 2), np.int64),  # is it a request; the request or user
            "scores": np.zeros(shape, np.float32),
            "labels": np.zeros(shape, np.float32),
            "mask": np.zeros(shape, np.bool_),
        }
        self._parts = [self._empty if arrays is None else arrays]

    @property
    def labelled(self) -> int:
        """Impressions with their final labels."""
        return sum(len(part["group"]) for part in self._parts)

    def add(self, examples: ExampleBlock, scores: F32) -> None:
        """Add impressions with final labels. A score that is not finite makes the AUC of its group undefined."""
        mask: Bool = examples.label_mask
        group = groups_of(examples)
        self._parts.append({"group": group, "scores": scores, "labels": examples.labels, "mask": mask})

    def with_more(self, examples: ExampleBlock, scores: F32) -> "RankedWindow":
        """A copy with further impressions, as :meth:`add` takes them; this window stays as it is."""
        arrays = self.arrays()
        other = RankedWindow(arrays["scores"].shape[1], self.number, counts=self.counts, arrays=arrays)
        other.add(examples, scores)
        return other

    def arrays(self) -> Arrays:
        """All columns."""
        merged = {name: np.concatenate([part[name] for part in self._parts]) for name in self._empty}
        self._parts = [merged]
        return merged

    def group_auc(self) -> NDArray[np.float64]:
        """(Σ examples · AUC, Σ examples) over the groups with both classes, per task; 0 if it does not count. [T, 2]"""
        arrays = self.arrays()
        totals = np.zeros((arrays["scores"].shape[1], 2))
        if len(arrays["group"]) == 0 or not self.counts:
            return totals
        group = _numbered(arrays["group"])
        for t in range(len(totals)):
            rows = arrays["mask"][:, t]
            auc, examples, _ = group_auc(group[rows], arrays["scores"][rows, t], arrays["labels"][rows, t])
            totals[t] = (auc * examples).sum(), examples.sum()
        return totals


def _numbered(group_N2: I64) -> I64:
    """A number for each group, from 0. int64 [N, 2] → int64 [N]."""
    order = np.lexsort((group_N2[:, 1], group_N2[:, 0]))
    ordered = group_N2[order]
    number = np.zeros(len(order), np.int64)
    number[order[1:]] = np.cumsum((ordered[1:] != ordered[:-1]).any(axis=1))
    return number


def groups_of(examples: ExampleBlock) -> I64:
    """The group that each impression is ranked in: is it a request; the request or the user. int64 [N, 2]."""
    has_request = examples.request_id != MISSING
    return np.stack([has_request, np.where(has_request, examples.request_id, examples.user_id)], axis=1)


class OpenImpressions:
    """Scores of the impressions that were trained on before their final labels are known, until these come.

    Memory is bounded by how many impressions there are in the longest attribution window: the join keeps more of each.

    Args:
        num_tasks: T.
    """

    def __init__(self, num_tasks: int) -> None:
        self._rows = IdMap()
        scores = np.zeros((0, num_tasks), np.float32)
        self._columns = GrowingColumns(
            {
                "window": np.zeros(0, np.int64),
                "frozen": scores,
                "scores": scores.copy(),
                "is_trained_on": np.zeros(0, np.bool_),
            }
        )

    def __len__(self) -> int:
        return len(self._rows)

    def begin(self, impression_id: I64, window: int) -> None:
        """Note these impressions before the first step on them.

        Args:
            impression_id: int64 [N].
            window: Number of the window.
        """
        rows = self._rows.insert(impression_id)
        self._columns.reserve(self._rows.num_rows)
        arrays = self._columns.arrays
        arrays["window"][rows], arrays["frozen"][rows], arrays["is_trained_on"][rows] = window, np.nan, False

    def score_frozen(self, impression_id: I64, scores: F32) -> None:
        """Note the scores that the window's frozen weights give, before :meth:`close`. int64 [N], float32 [N, T]."""
        self._columns.arrays["frozen"][self._rows.find(impression_id)] = scores

    def score(self, impression_id: I64, scores: F32) -> None:
        """Note the scores that the weights had given just before that step. int64 [N], float32 [N, T]."""
        rows = self._rows.find(impression_id)
        found = rows >= 0
        self._columns.arrays["scores"][rows[found]] = scores[found]
        self._columns.arrays["is_trained_on"][rows[found]] = True

    def close(self, closings: ExampleBlock) -> tuple[ExampleBlock, Arrays]:
        """Take out impressions whose final labels are known.

        Returns:
            Those of them that were noted, and their columns: ``window`` int64 [N], ``frozen`` and ``scores`` float32
            [N, T], and whether they were trained on, bool [N]: not if their step was not finite.
        """
        known = closings.take(self._rows.find(closings.impression_id) >= 0)
        rows = self._rows.remove(known.impression_id)
        return known, {name: column[rows] for name, column in self._columns.arrays.items()}

    def state(self) -> Arrays:
        """Arrays from which :meth:`load_state` goes on."""
        keys, rows = self._rows.items()
        return {"impression_id": keys, **{name: column[rows] for name, column in self._columns.arrays.items()}}

    def load_state(self, state: Arrays) -> None:
        """The inverse of :meth:`state`."""
        self._rows = IdMap.from_keys(state["impression_id"])
        self._columns = GrowingColumns({name: state[name].copy() for name in self._columns.arrays})
