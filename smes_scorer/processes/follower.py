"""What a process that answers does with the versions that another loads: it maps them, and says which it reads."""

import gc
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import msgspec

from smes.errors import SmesError
from smes.model.serving import required_keys
from smes.model.serving_rows import TableRows
from smes.model.shared_rows import MappedTable, Place, mapped_shadow
from smes.schema import Schema
from smes.shared_memory import Bytes, mapped
from smes_scorer.first_answers import Arrivals, FirstAnswer, FirstAnswers
from smes_scorer.loading import TableModel, request_keys
from smes_scorer.processes.board import LOADER, Board
from smes_scorer.processes.mailbox import FirstAnswered, Generation, Lend, Mailbox, Message, Status, Tell
from smes_scorer.processes.version_block import VersionBlock
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import ServedModel, Versions
from smes_scorer.warm_up import warm_up

_LOOK_S = 0.02
"""How soon the loader learns that a version is not read any more."""

_IDLE_S = 0.5
_FIRST_WAIT_S = 5.0
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerPlace:
    """What a process that answers has in common with the others.

    Attributes:
        worker: Its number, from 0.
        incarnation: How often it was started.
        board: Of all.
        boxes: Of the workers.
        loader: Box of the process that loads.
    """

    worker: int
    incarnation: int
    board: Board
    boxes: Sequence[Mailbox]
    loader: Mailbox


class Follower:
    """The version in service of one model, as the loader has it. It is used as a :class:`HotSwap` is.

    Args:
        track: Which model.
        schema: The configured one.
        telemetry: Shows what is served.
        on_schema, on_served: As of :class:`smes_scorer.hot_swap.HotSwap`.

    Attributes:
        status: What the loader said last; None: nothing yet.
        first: Set once a version was in service.
    """

    def __init__(
        self,
        track: int,
        schema: Schema,
        telemetry: Telemetry,
        *,
        on_schema: Callable[[Schema, Mapping[str, str]], None] = lambda schema, renamed: None,
        on_served: Callable[[ServedModel], None] = lambda served: None,
    ) -> None:
        self.track, self.first = track, threading.Event()
        self._schema, self._telemetry = schema, telemetry
        self._known = {schema.hash}
        self._on_schema, self._on_served = on_schema, on_served
        self._versions = Versions()
        self._generations: dict[ServedModel, int] = {}
        self._memory: dict[tuple[int, int], Bytes] = {}  # (loader, number) → what is mapped of it
        self._block: tuple[tuple[int, int], VersionBlock, TableModel] | None = None
        self.status: Status | None = None
        self._failed: str | None = None

    @property
    def served(self) -> ServedModel | None:
        """The version in service, None before the first."""
        return self._versions.served

    @property
    def schema(self) -> Schema:
        """The schema of the version in service; before the first, the configured one."""
        served = self._versions.served
        return self._schema if served is None else served.schema

    def reading(self) -> AbstractContextManager[ServedModel]:
        """The version in service, for one request, which may use it until the block ends. There must be one."""
        return self._versions.reading()

    @property
    def problem(self) -> str | None:
        """Why the newest version is not served, None when it is."""
        return self._failed or (None if self.status is None else self.status.problem)

    @property
    def holds(self) -> bool:
        """Whether the loader says that the version may answer."""
        return self.status is not None and self.status.holds

    def take(self, text: Generation, descriptors: Sequence[int]) -> bool:
        """Put a generation into service; whether it is. Never raises: the one before stays."""
        try:
            served = self._mapped(text, descriptors)
        except Exception as error:  # for want of memory, for instance
            self._failed = f"generation {text.number}: {error}"
            _logger.warning("a version of the loader could not be taken: %s", self._failed, exc_info=True)
            return False
        self._failed = None
        self._generations[served] = text.number
        self._versions.put(served)
        self._telemetry.served_version.set(served.manifest.version)
        self._telemetry.served_step.set(served.manifest.step)
        self._on_served(served)
        if not self.first.is_set():
            gc.collect()
            gc.freeze()  # as a scorer of one process does once its first version is loaded
            self.first.set()
        return True

    def reads(self) -> tuple[int, int]:
        """The oldest generation that a request reads or may begin to read, and the newest; 0: none."""
        read = self._versions.read()
        self._generations = {served: number for served, number in self._generations.items() if served in read}
        numbers = self._generations.values()
        return min(numbers, default=0), max(numbers, default=0)

    def _mapped(self, text: Generation, descriptors: Sequence[int]) -> ServedModel:
        of_place = dict(zip(text.places, descriptors, strict=True))
        memory: dict[tuple[int, int], Bytes] = {}

        def map_memory(place: Place) -> Bytes:
            name = text.loader, place.number
            found = self._memory.get(name)
            memory[name] = mapped(of_place[place], place.size) if found is None else found
            return memory[name]

        table = MappedTable(text.table, map_memory)
        shadows = tuple(mapped_shadow(place, table.groups, map_memory) for place in text.shadows)
        name, before = (text.loader, text.dense.number), self._block
        if before is not None and before[0] == name:
            block = before[1]
            rows = TableRows(before[2].rows.keys, table, shadows)
            model = TableModel(before[2].model.reading(rows), rows, before[2].keys)
        else:
            block = VersionBlock(map_memory(text.dense))
            most = table.num_rows + sum(len(shadow) for shadow in shadows)
            rows = TableRows(required_keys(block.schema, block.dense, most), table, shadows)
            model = TableModel(block.model(rows), rows, request_keys(block.schema))
            if not self.first.is_set():
                warm_up(model, block.schema, block.manifest)
            if block.schema.hash not in self._known:
                self._on_schema(block.schema, block.renamed)
                self._known.add(block.schema.hash)
        self._memory, self._block = memory, (name, block, model)
        return ServedModel(model, block.manifest, block.schema)


class Following:
    """The followers of all models of a process, and the thread that reads the process's box.

    Args:
        place: Of the process.
        followers: By track.
        figures: What is answered to whoever asks for the figures of this process.
    """

    def __init__(self, place: WorkerPlace, followers: Sequence[Follower], figures: Callable[[], bytes]) -> None:
        self._place, self._followers, self._figures = place, followers, figures
        self._served: dict[int, Message] = {}  # by track: the generation in service, with its descriptors
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="version-follower", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def loads(self) -> bool:
        """Whether the process that loads runs."""
        return self._place.board.alive(LOADER)

    @property
    def problems(self) -> dict[str, str | None]:
        """What is wrong with the other processes."""
        board, main = self._place.board, self._followers[0]
        found: dict[str, str | None] = {}
        if not self.loads:
            found["loader"] = "the process that loads versions has ended; it is started again"
        elif main.served is not None and not main.holds:
            found["loader"] = "the process that loads versions was started again, and has none yet"
        if away := [worker for worker in range(board.workers) if not board.alive(worker)]:
            found["workers"] = f"{len(away)} of {board.workers} processes that answer do not run"
        return found

    def start(self) -> None:
        """Start the thread; call it once. A process that takes another's place begins with what that served."""
        self._thread.start()
        if self._place.incarnation > 1:
            self.borrow()
            self._followers[0].first.wait(_FIRST_WAIT_S)

    def borrow(self) -> None:
        """Ask the other workers for what they serve, in case the loader has nothing yet."""
        place = self._place
        for worker, box in enumerate(place.boxes):
            if worker != place.worker and place.board.alive(worker):
                box.put(Lend(place.worker, place.incarnation))

    def stop(self) -> None:
        """Stop the thread and wait for its end."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        """Ends only when it is told to, or with the process: without it, no memory would ever be folded."""
        try:
            while not self._stopping.is_set():
                self.turn()
        except BaseException:
            _logger.exception("the thread that follows the loader failed")
            os._exit(1)  # another process takes this one's place

    def turn(self, wait_s: float = _IDLE_S) -> None:
        """Say what is read, and take what the loader has said since; wait so long for it at most."""
        place, waits = self._place, False
        place.board.beat(place.worker)
        for follower in self._followers:
            oldest, newest = follower.reads()
            place.board.reads(place.worker, follower.track, oldest, newest)
            waits |= oldest != newest
        newest_texts: dict[int, Message] = {}
        message = place.boxes[place.worker].take(min(wait_s, _LOOK_S) if waits else wait_s)
        while message is not None:
            self._take(message, newest_texts)
            message = place.boxes[place.worker].take(0)
        for track, last in newest_texts.items():
            assert isinstance(last.text, Generation)
            if self._followers[track].take(last.text, last.descriptors):
                last, self._served[track] = self._served.get(track, last), last
            if last is not self._served.get(track):
                last.close()
        for follower in self._followers if newest_texts else ():
            place.board.reads(place.worker, follower.track, *follower.reads())

    def _take(self, message: Message, newest: dict[int, Message]) -> None:
        """Take a message; of generations, only the newest for this process is kept."""
        text = message.text
        if isinstance(text, Generation) and self._is_new(text, newest.get(text.track)):
            if (older := newest.get(text.track)) is not None:
                older.close()
            newest[text.track] = message
            return
        if isinstance(text, Status):
            self._followers[text.track].status = text
        elif isinstance(text, Lend):
            self._lend(text)
        elif isinstance(text, Tell):
            message.answer(self._figures())
        message.close()

    def _is_new(self, text: Generation, taken: Message | None) -> bool:
        """Whether a generation is for this process, and not older than what it has: it may have been lent."""
        have = taken or self._served.get(text.track)
        newest = have.text.number if have is not None and isinstance(have.text, Generation) else 0
        return text.incarnation == self._place.incarnation and text.number > newest

    def _lend(self, asked: Lend) -> None:
        """Give another worker what this one serves, if that is of a loader that has ended, so that nobody folds it."""
        board = self._place.board
        for served in self._served.values():
            text = served.text
            assert isinstance(text, Generation)
            if text.loader != board.incarnation(LOADER) or not board.alive(LOADER):
                lent = msgspec.structs.replace(text, incarnation=asked.incarnation)
                self._place.boxes[asked.worker].put(lent, served.descriptors)


class ToldFirstAnswers(FirstAnswers):
    """Tells the loader when this process answered with a version for the first time: freshness is counted there.

    Args:
        loader: Box of the loader.
        track: Which model.
    """

    def __init__(self, loader: Mailbox, track: int) -> None:
        super().__init__()
        self._loader, self._track = loader, track

    def loaded(self, key: tuple[str, int], arrivals: Arrivals) -> int:
        """The loader notes what is loaded.

        Raises:
            SmesError: Always.
        """
        raise SmesError("versions are loaded by another process")

    def answered(self, key: tuple[str, int], now_ms: int) -> FirstAnswer | None:
        """Note an answer; None."""
        if key != self._latest:
            self._latest = key
            self._loader.put(FirstAnswered(self._track, *key, now_ms))
        return None
