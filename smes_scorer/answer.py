"""One scoring request from its body to the body of its answer, by one arm and one version of its weights.

Letters: N items, T tasks.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from smes.arm_names import MAIN
from smes.arrays import F32, I64
from smes.errors import SmesError
from smes.model.serving import Explained
from smes_io.clock import wall_clock_ms
from smes_scorer.arms import NO_ARMS, Arm, Arms
from smes_scorer.explanation import MOST_EXPLAINED
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.interface import Asked, Interface, Interfaces
from smes_scorer.request import FieldError, ScoreRequest
from smes_scorer.scoring_queue import Done
from smes_scorer.shadow_scoring import Answered
from smes_scorer.telemetry import Telemetry
from smes_scorer.versions import Explaining, InService, Knowing, OfRequests, Scorable, ServedModel

MOST_TOGETHER = 1_000
"""Most items that are scored in one call for several requests."""

_T = TypeVar("_T")

_logger = logging.getLogger(__name__)


class NotReady(SmesError):
    """No snapshot was loaded yet, so there is nothing to answer with."""


@dataclass(frozen=True, slots=True)
class _Scored:
    """What an arm makes of a request: the request under the schema of the version, and its scores."""

    interface: Interface
    asked: Asked
    key: tuple[str, int]
    scores_NT: F32

    def written(self, arm: str) -> bytes:
        """The body of the answer."""
        rows, request = self.asked.rows, self.asked.request
        missing = self.interface.missing.of(rows.ids, rows.numerics)
        return self.interface.writer.write(arm, self.key, request, self.scores_NT, missing)


class Answerer:
    """Answers scoring requests. Safe to share between threads.

    Args:
        interfaces: Reads requests and writes answers, under the schema of the version that answers.
        swap: Holds the model in service.
        first_answers: Notes each version's first answer, for freshness.
        telemetry: Counts ignored context, freshness, and what became of the arms' requests.
        now_ms: Wall clock in Unix milliseconds, the one that stamps arrivals at the event log.
        arms: The other arms.
    """

    def __init__(
        self,
        interfaces: Interfaces,
        swap: InService,
        first_answers: FirstAnswers,
        telemetry: Telemetry,
        now_ms: Callable[[], int] = wall_clock_ms,
        arms: Arms = NO_ARMS,
    ) -> None:
        self._interfaces = interfaces
        self._swap = swap
        self._arms = arms
        self._first_answers = first_answers
        self._telemetry = telemetry
        self._now_ms = now_ms

    @property
    def interface(self) -> Interface:
        """That of the version in service; before the first, of the configured schema."""
        return self._interfaces.of(self._swap.schema)

    def answer(self, body: bytes) -> bytes:
        """The JSON body of the answer to the JSON body of a request.

        Raises:
            FieldError: A field of the request is wrong.
            UnreadableBody: The body cannot be parsed.
            NotReady: No snapshot was loaded yet.
            SmesError: The model gave a score that is no number.
        """
        interface = self.interface
        return self._answered(interface.with_rows(body, self._read(interface, body), self._now_ms()))

    def answer_all(self, bodies: Sequence[bytes], done: Done) -> None:
        """Answer requests that came together. Those that one version answers are scored in one call of the model.

        A request is answered as it would be alone, by :meth:`answer`, but for the rounding of its scores; what is
        wrong with one is no matter of the others.

        Args:
            bodies: The JSON bodies of the requests.
            done: Takes the number of each request with its answer, or with what :meth:`answer` would raise.
        """
        interface = self.interface
        numbers: list[int] = []
        read: list[tuple[bytes, ScoreRequest]] = []
        for number, body in enumerate(bodies):
            try:
                read.append((body, self._read(interface, body)))
                numbers.append(number)
            except Exception as error:  # noqa: BLE001 - raised where the request waits
                done(number, error)
        if not read:
            return
        done.flush()
        together: list[tuple[int, Asked]] = []
        size = 0
        for number, asked in zip(numbers, interface.with_rows_of_all(read, self._now_ms()), strict=True):
            if together and size + len(asked.rows.ids) > MOST_TOGETHER:
                self._answer_together(together, done)
                together, size = [], 0
            together.append((number, asked))
            size += len(asked.rows.ids)
        self._answer_together(together, done)

    def _read(self, interface: Interface, body: bytes) -> ScoreRequest:
        request = interface.reader.read(body)
        if request.ignored_context:
            self._telemetry.ignored_context.inc(request.ignored_context)
        self._check_ready()
        return request

    def _answered(self, asked: Asked) -> bytes:
        """The answer to one request, by its arm or, where that cannot, by the main arm."""
        arm = self._arms.chosen(asked.request.user_id)
        if arm is not None and (by_arm := self._by_arm(arm, asked)) is not None:
            return self._written_by_arm(arm, by_arm)
        return self._written_by_main(self._scored(self._swap, asked, measured=True))

    def _written_by_arm(self, arm: Arm, scored: _Scored) -> bytes:
        answer = scored.written(arm.name)
        self._note(arm.name, scored.key, arm.first_answers, arm.telemetry)
        return answer

    def _written_by_main(self, scored: _Scored) -> bytes:
        answer = scored.written(MAIN)
        self._note(MAIN, scored.key, self._first_answers, self._telemetry)
        self._arms.shadow(scored.asked.request.user_id, Answered(scored.asked, scored.scores_NT))
        return answer

    def _answer_together(self, numbered: list[tuple[int, Asked]], done: Done) -> None:
        """Answer requests, each arm's in one call of its model; alone what cannot be answered so."""
        of_arms: dict[Arm | None, list[tuple[int, Asked]]] = {}
        for number, asked in numbered:
            arm = self._arms.chosen(asked.request.user_id)
            of_arms.setdefault(arm if arm is not None and arm.is_ready else None, []).append((number, asked))
        for arm, some in of_arms.items():
            swap = self._swap if arm is None else arm.swap
            scored = self._scored_together(swap, [asked for _, asked in some], measured=arm is None)
            for place, (number, asked) in enumerate(some):
                try:
                    if scored is None:
                        answer: bytes | Exception = self._answered(asked)
                    elif arm is None:
                        if (chosen := self._arms.chosen(asked.request.user_id)) is not None:
                            self._telemetry.arms.fell_back(chosen.name, "not_ready")
                        answer = self._written_by_main(scored[place])
                    else:
                        answer = self._written_by_arm(arm, scored[place])
                except Exception as error:  # noqa: BLE001 - raised where the request waits
                    answer = error
                done(number, answer)
                if scored is None:
                    done.flush()
            done.flush()

    def _scored_together(self, swap: InService, together: list[Asked], *, measured: bool) -> list[_Scored] | None:
        """Score requests in one call; None where one is alone, of another schema, or makes the model fail."""
        if len(together) == 1:
            return None
        interface = self._interfaces.of(together[0].schema)
        with swap.reading() as served:
            if served.schema.hash != interface.schema.hash:
                return None
            counts = [len(asked.rows.ids) for asked in together]
            times_N = np.repeat([asked.now_ms for asked in together], counts)
            ids_NW = np.concatenate([asked.rows.ids for asked in together])
            numerics_NF = np.concatenate([asked.rows.numerics for asked in together])
            try:
                scores_NT = _scores_of_requests(served.model, ids_NW, numerics_NF, times_N, counts)
            except Exception:  # each is scored alone, and what is wrong is said where it is
                _logger.debug("requests could not be scored together", exc_info=True)
                return None
            if not np.isfinite(scores_NT).all():
                return None
            if measured:
                for asked in together:
                    if interface.served.wants():
                        _measure(interface, asked, served)
            parts = np.split(scores_NT, np.cumsum(counts)[:-1])
            return [_Scored(interface, asked, served.key, part) for asked, part in zip(together, parts, strict=True)]

    def explain(self, body: bytes) -> bytes:
        """The answer to a request, and what it is made of, by the arm and version that :meth:`answer` would take.

        Nothing is counted: nobody is served by it.

        Raises:
            FieldError, UnreadableBody, NotReady, SmesError: As :meth:`answer`; at most :data:`MOST_EXPLAINED` items.
        """
        interface = self.interface
        request = interface.reader.read(body)
        if len(request.items) > MOST_EXPLAINED:
            raise FieldError(
                ("body", "items"), f"{len(request.items)} items, expected at most {MOST_EXPLAINED} to explain"
            )
        self._check_ready()
        asked = interface.with_rows(body, request, self._now_ms())
        arm = self._arms.chosen(request.user_id)
        if arm is not None and arm.is_ready:
            return by_one_version(self._interfaces, arm.swap, asked, partial(_explained, arm.name))
        return by_one_version(self._interfaces, self._swap, asked, partial(_explained, MAIN))

    def _check_ready(self) -> None:
        if self._swap.served is None:
            raise NotReady(self._swap.problem or "no snapshot was published yet")

    def _scored(self, swap: InService, asked: Asked, *, measured: bool = False) -> _Scored:
        """Score a request by the version in service, under its schema: the answer is of this version alone."""

        def score(interface: Interface, asked: Asked, served: ServedModel) -> _Scored:
            scores_NT = served.model.score(asked.rows.ids, asked.rows.numerics, asked.now_ms)
            if measured and interface.served.wants():
                _measure(interface, asked, served)
            return _Scored(interface, asked, served.key, scores_NT)

        return by_one_version(self._interfaces, swap, asked, score)

    def _by_arm(self, arm: Arm, asked: Asked) -> _Scored | None:
        """What a split arm makes of a request; None where it cannot, and the main arm is to answer."""
        if not arm.is_ready:
            self._telemetry.arms.fell_back(arm.name, "not_ready")
            return None
        try:
            scored = self._scored(arm.swap, asked)
        except Exception:
            _logger.warning("arm %s could not score a request, so the main arm does", arm.name, exc_info=True)
            self._telemetry.arms.fell_back(arm.name, "failed")
            return None
        if not np.isfinite(scored.scores_NT).all():
            self._telemetry.arms.fell_back(arm.name, "failed")
            return None
        return scored

    def _note(self, arm: str, key: tuple[str, int], first_answers: FirstAnswers, telemetry: Telemetry) -> None:
        """Count an answer, and the freshness of its version if it is the version's first."""
        if self._arms.any:
            self._telemetry.arms.answered(arm)
        first = first_answers.answered(key, self._now_ms())
        if first is not None:
            telemetry.first_answer(first)


def _scores_of_requests(model: Scorable, ids_NW: I64, numerics_NF: F32, times_N: I64, counts: Sequence[int]) -> F32:
    if not isinstance(model, OfRequests):
        return model.score(ids_NW, numerics_NF, times_N)
    starts_R = np.cumsum(counts, dtype=np.int64) - np.array(counts, np.int64)
    return model.score_requests(ids_NW, numerics_NF, times_N, starts_R)


def by_one_version(
    interfaces: Interfaces, swap: InService, asked: Asked, use: Callable[[Interface, Asked, ServedModel], _T]
) -> _T:
    """Use the version in service for a request under its schema; nothing of the version changes meanwhile."""
    while True:
        interface = interfaces.of(swap.schema)
        asked = interface.again(asked)
        with swap.reading() as served:
            if served.schema.hash == asked.schema.hash:
                return use(interface, asked, served)
        # A version of another schema came into service in between.


def _explained(arm: str, interface: Interface, asked: Asked, served: ServedModel) -> bytes:
    rows, model = asked.rows, served.model
    if isinstance(model, Explaining):
        explained = model.explain(rows.ids, rows.numerics, asked.now_ms)
    else:
        explained = Explained(model.score(rows.ids, rows.numerics, asked.now_ms), None, rows.ids, rows.numerics)
    scored = _Scored(interface, asked, served.key, explained.scores_NT)
    answer = interface.writer.read(scored.written(arm))
    places_K = interface.writer.places(asked.request, explained.scores_NT)
    return interface.explanation.write(answer, places_K, asked.request.tasks, rows, explained)


def _measure(interface: Interface, asked: Asked, served: ServedModel) -> None:
    """Measure the features of a request, and which of its ids the model knows."""
    ids, model = asked.rows.ids, served.model
    known = model.knows(ids) if isinstance(model, Knowing) else None
    interface.served.add(ids, asked.rows.numerics, asked.now_ms, known)
