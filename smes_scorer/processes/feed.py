"""What the process that loads does for those that answer: it tells them each version, and folds when none is older."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from smes.model.serving import ServingModel
from smes.model.serving_rows import Shadow
from smes.model.shared_rows import ShadowPlace, SharedTable, place_of, share
from smes.shared_memory import SharedBytes
from smes_scorer.loading import TableModel
from smes_scorer.processes import version_block
from smes_scorer.processes.board import Board
from smes_scorer.processes.mailbox import Generation, Mailbox, Status
from smes_scorer.versions import ServedModel, Versions

_INCARNATION_BITS = 40
_AGAIN_S = 5.0
"""A worker that has not taken what it was told for so long is told again: it may have had no room."""


@dataclass
class _Worker:
    """What a worker was told."""

    incarnation: int = 0
    first: int = 0  # the first generation that this incarnation was told
    generation: int = 0
    told_s: float = 0.0  # when it was told that
    status: Status | None = None


@dataclass
class _Told:
    """The newest generation, as workers are told it."""

    number: int
    text: Generation
    memory: list[SharedBytes] = field(default_factory=list)


class Feed(Versions):
    """The versions of one model, for all processes of a service. Readers are the workers.

    Args:
        track: Which model.
        board: Says who lives, and who reads which generation.
        boxes: Of the workers.
        incarnation: Of this process.
        renamed: The renamed features of a schema, by its hash.
    """

    def __init__(
        self,
        track: int,
        board: Board,
        boxes: Sequence[Mailbox],
        incarnation: int,
        renamed: Callable[[str], dict[str, str]],
    ) -> None:
        super().__init__()
        self.track = track
        self._board, self._boxes, self._incarnation, self._renamed = board, boxes, incarnation, renamed
        self._telling = threading.RLock()
        self._workers = [_Worker() for _ in boxes]
        self._told: _Told | None = None
        self._keys: dict[int, tuple[str, int]] = {}  # generation → lineage and version
        self._shadows: dict[Shadow, tuple[ShadowPlace, SharedBytes]] = {}
        self._dense: tuple[ServingModel, SharedBytes] | None = None
        self._status: Status | None = None

    def put(self, served: ServedModel) -> None:
        """Put a model into service: tell it to all workers. They take it within milliseconds."""
        with self._telling:
            number = (self._told.number if self._told else self._incarnation << _INCARNATION_BITS) + 1
            told = self._described(number, served)
            super().put(served)
            self._told, self._keys[number] = told, served.key
            self._tell_all()

    def say(self, status: Status) -> None:
        """Tell all workers how loading goes, if they have not been told."""
        with self._telling:
            self._status = status
            self._tell_all()

    def catch_up(self) -> None:
        """Tell workers what they have not been told: they were started since, or their boxes were full."""
        with self._telling:
            self._tell_all()

    def oldest_read(self) -> int | None:
        """As :meth:`smes_scorer.versions.Versions.oldest_read`, of the requests of all workers."""
        with self._telling:
            if self.served is None:
                return None
            keys, generations = [self.served.key], [max(self._keys)]
            for worker, told in enumerate(self._workers):
                # One that was not told anything by this process reads nothing of its memory.
                if told.first and self._board.alive(worker) and self._is_told(worker):
                    generation = self._board.oldest(worker, self.track) or told.first
                    if generation not in self._keys:
                        return None  # of a process that loaded before this one
                    generations.append(generation)
                    keys.append(self._keys[generation])
            self._keys = {number: key for number, key in self._keys.items() if number >= min(generations)}
        lineages, versions = zip(*keys, strict=True)
        return min(versions) if len(set(lineages)) == 1 else None

    def _is_told(self, worker: int) -> bool:
        return self._workers[worker].incarnation == self._board.incarnation(worker)

    def _tell_all(self) -> None:
        for worker, told in enumerate(self._workers):
            if self._board.alive(worker):
                self._tell(worker, told)

    def _tell(self, worker: int, told: _Worker) -> None:
        incarnation = self._board.incarnation(worker)
        if told.incarnation != incarnation:
            self._workers[worker] = told = _Worker(incarnation)
        box = self._boxes[worker]
        if self._told is not None and self._is_to_be_told(worker, told, self._told.number):
            text = msgspec.structs.replace(self._told.text, incarnation=incarnation)
            # Before it is sent: from then on the worker may read it.
            told.first = told.first or self._told.number
            if box.put(text, [memory.descriptor for memory in self._told.memory]):
                told.generation, told.told_s = self._told.number, time.monotonic()
        if self._status is not None and told.status != self._status and box.put(self._status):
            told.status = self._status

    def _is_to_be_told(self, worker: int, told: _Worker, number: int) -> bool:
        if told.generation != number:
            return True
        return self._board.taken(worker, self.track) < number and time.monotonic() - told.told_s >= _AGAIN_S

    def _described(self, number: int, served: ServedModel) -> _Told:
        model = served.model
        assert isinstance(model, TableModel), "processes share tables"
        table = model.rows.table
        assert isinstance(table, SharedTable), "processes share tables"
        if self._dense is None or self._dense[0].dense is not model.model.dense:
            renamed = self._renamed(served.schema.hash)
            self._dense = model.model, version_block.write(served.manifest, model.model, renamed)
        self._shadows = {shadow: self._shadows.get(shadow) or share(shadow) for shadow in model.rows.shadows}
        places, memory = table.places()
        shared = [self._shadows[shadow] for shadow in model.rows.shadows]
        memory += [one for _, one in shared] + [self._dense[1]]
        text = Generation(
            incarnation=0,
            loader=self._incarnation,
            track=self.track,
            number=number,
            table=places,
            shadows=tuple(place for place, _ in shared),
            dense=place_of(self._dense[1]),
            places=tuple(map(place_of, memory)),
        )
        return _Told(number, text, memory)
