"""What the page *Dead letters* shows: what was refused, by what it has in common, each letter in full, and replaying.

A replay is first asked for with ``dry_run``: the answer says what would happen, for the question that the page puts.
"""

import threading
from contextlib import closing
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Query
from pydantic import BaseModel, ConfigDict, Field

from smes.errors import EventLogUnavailable, SmesError
from smes_console.letter_catalog import Chosen, LetterCatalog, read_letter
from smes_console.sources import Reached, Sources
from smes_io.clock import wall_clock_ms
from stream.codec.validation import CODES
from stream.dead_letter_reading import LetterFilter
from stream.dead_letter_values import letter_values, outcome_lines, outcome_values, payload_lines
from stream.log.open_log import open_event_log

_READ_S = 1.0  # of a look, so that a long topic is read in several
_LOOK = "dead letters"
_MOST = 100
_MOST_LINES = 400

Id = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Time = Annotated[int, Field(ge=0, le=2**53 - 1)]
Partition = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Asked(BaseModel):
    """Letters that somebody wants to replay. What is left out chooses all.

    Attributes:
        ids: Single letters.
        reason, topic, partition: Of their events.
        since_ms, until_ms: When they were written, Unix milliseconds; the second is not included.
        adopt_schema: Take the events for those of the configured schema.
        dry_run: Only say what would happen.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    ids: Annotated[list[Id], Field(max_length=1000)] = []
    reason: str | None = None
    topic: str | None = None
    partition: Partition | None = None
    since_ms: Time | None = None
    until_ms: Time | None = None
    adopt_schema: bool = False
    dry_run: bool = False


def router(sources: Sources) -> APIRouter:
    """Everything under ``/api/letters``."""
    routes = APIRouter(prefix="/api/letters")
    catalog, replaying = LetterCatalog(), threading.Lock()

    def refresh() -> int:
        with sources.event_log() as log:
            catalog.refresh(log, _READ_S)
        return wall_clock_ms()

    def looked() -> Reached[int]:
        return sources.look(_LOOK, refresh)

    @routes.get("")
    def letters(
        reason: str | None = None,
        topic: str | None = None,
        partition: Annotated[int | None, Query(ge=0)] = None,
        since_ms: Annotated[int | None, Query(ge=0)] = None,
        until_ms: Annotated[int | None, Query(ge=0)] = None,
    ) -> dict[str, Any]:
        """The letters that are meant, counted, and the newest of them. While the log is away, what was read before."""
        chosen = Chosen(_known_code(reason), topic, partition, since_ms, until_ms)
        found = looked()
        return {
            **found.state(),
            "at_ms": found.at_ms,
            "replaying": replaying.locked(),
            "can_replay": sources.places.replayer is not None,
            **catalog.counts(chosen, _MOST),
        }

    @routes.get("/one")
    def one(id: Id) -> dict[str, Any]:
        """A letter in full."""
        looked()
        place, replayed = catalog.place_of(id), catalog.was_replayed(id)
        if place is None:
            raise HTTPException(404, detail=f"letter {id}: not in the topic, or not read yet")

        def read() -> dict[str, Any]:
            with sources.event_log() as log:
                stored = read_letter(log, *place)
            if stored is None:
                raise SmesError(f"letter {id}: no longer in the topic")
            lines = list(payload_lines(stored))
            values = letter_values(stored) | {"where": stored.place, "lines": lines[:_MOST_LINES]}
            return values | {"lines_left_out": max(0, len(lines) - _MOST_LINES)}

        found = sources.look(f"letter {id}", read)
        return {**found.state(), "replayed": replayed, "letter": found.value}

    @routes.post("/replay")
    def replay(asked: Asked) -> dict[str, Any]:
        """Append the events of letters again, each once, or say what would be done."""
        make = sources.places.replayer
        if make is None:
            raise HTTPException(409, detail="this console was started without what replays letters")
        meant = LetterFilter(
            codes=frozenset(filter(None, (_known_code(asked.reason),))),
            topics=frozenset(filter(None, (asked.topic,))),
            partitions=frozenset(() if asked.partition is None else (asked.partition,)),
            since_ms=asked.since_ms,
            until_ms=asked.until_ms,
            ids=tuple(asked.ids),
        )
        if not replaying.acquire(blocking=False):
            raise HTTPException(409, detail="another replay is on its way")
        try:
            at_ms = wall_clock_ms()
            # A connection of its own: a long replay keeps nobody waiting.
            with closing(open_event_log(sources.places.event_log)) as log:
                outcome = make(log, asked.adopt_schema).run(meant, dry_run=asked.dry_run)
        except EventLogUnavailable as error:
            raise HTTPException(503, detail=str(error)) from error
        except (SmesError, ValueError) as error:
            raise HTTPException(409, detail=str(error)) from error
        finally:
            replaying.release()
        lines = outcome_lines(outcome, dry_run=asked.dry_run, adopt_schema="“Take for the configured schema”")
        sources.forget(_LOOK)
        return {"at_ms": at_ms, **outcome_values(outcome, dry_run=asked.dry_run), "lines": list(lines)}

    return routes


def _known_code(reason: str | None) -> str | None:
    if reason is not None and reason not in CODES:
        raise HTTPException(422, detail=f"reason {reason!r}: expected one of {', '.join(CODES)}")
    return reason
