"""``smes dead-letters``: what was refused, why, and back into the event log after a fix."""

import json
import logging
import time
from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from smes.errors import SmesError
from smes_cli.command_line import SchemaOfEvents, config_of, stop_signals
from smes_cli.console import console, number, progress
from smes_cli.letter_text import escaped, letter_lines, one_line
from smes_cli.times import unix_ms_of, utc

if TYPE_CHECKING:
    from smes_cli.config import Config
    from stream.dead_letter_reading import LetterFilter, LetterGroup, StoredLetter
    from stream.dead_letter_replay import Replayer, TooLate
    from stream.log.event_log import EventLog

_logger = logging.getLogger(__name__)
_FOLLOW_S = 0.5

dead_letters_app = typer.Typer(no_args_is_help=True, help="Events that were refused: look at them, and replay them.")

Reasons = Annotated[
    list[str] | None, typer.Option("--reason", help="Only letters with this code; may be given several times.")
]
Topics = Annotated[
    list[str] | None, typer.Option("--topic", help="Only events of this topic; may be given several times.")
]
PartitionsOfEvents = Annotated[
    list[int] | None, typer.Option("--partition", help="Only events of this partition; may be given several times.")
]
Since = Annotated[
    str | None,
    typer.Option(
        "--since",
        help="Only letters written from then on: 2026-11-27T20:00 (UTC), Unix milliseconds, or 90s, 15m, 2h, 7d ago.",
    ),
]
Until = Annotated[str | None, typer.Option("--until", help="Only letters written before then, as --since.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dead_letters_app.command("list")
def dead_letters_list(
    context: typer.Context,
    by: Annotated[
        Literal["reason", "partition", "hour", "day", "letter"],
        typer.Option(help="Count by reason and topic, and also by partition, hour or day; or list single letters."),
    ] = "reason",
    reason: Reasons = None,
    topic: Topics = None,
    partition: PartitionsOfEvents = None,
    since: Since = None,
    until: Until = None,
    limit: Annotated[int, typer.Option(help="Most letters that --by letter lists, the newest ones.", min=1)] = 100,
    as_json: AsJson = False,
) -> None:
    """Count the dead letters by reason and topic, partition or time, or list them."""
    chosen = _filter(reason, topic, partition, since, until)
    with closing(_open_log(config_of(context))) as log:
        if by == "letter":
            _print_letters(_newest(log, chosen, limit), as_json=as_json)
            return
        groups, done, foreign = _groups(log, chosen, by)
    if as_json:
        _print_json({"groups": [_group_values(g, done) for g in groups], "foreign": foreign})
        return
    _print_groups(groups, done, by)
    if foreign:
        console.print(f"{foreign:,} entries of the topic are neither letters nor notes of this version")


@dead_letters_app.command("show")
def dead_letters_show(
    context: typer.Context,
    letter: Annotated[
        str, typer.Argument(help="Its id, or at least the first four digits; or topic/partition/offset[/row].")
    ],
    as_json: AsJson = False,
) -> None:
    """Show one letter: where the event was, what is wrong with it, and the event."""
    from stream.dead_letter_reading import LetterFilter

    chosen = LetterFilter(ids=(letter,))
    with closing(_open_log(config_of(context))) as log:
        found = _newest(log, chosen, 2)
        done = _replayed(log) if found else set()
    if not found:
        raise SmesError(f"letter {letter}: not there, expected an id or a place that `smes dead-letters list` shows")
    if len(found) > 1:
        ids = ", ".join(each.id for each in found)
        raise SmesError(f"letter {letter}: several letters, expected more digits of one of {ids}, …")
    if as_json:
        from stream.dead_letter_values import letter_values

        values = letter_values(found[0]) | {"replayed": found[0].number in done}
        _print_json(values)
        return
    for line in letter_lines(found[0], replayed=found[0].number in done):
        console.print(line, highlight=False, soft_wrap=True)


@dead_letters_app.command("tail")
def dead_letters_tail(
    context: typer.Context,
    lines: Annotated[int, typer.Option("-n", help="First print so many of the newest letters.", min=0)] = 10,
    reason: Reasons = None,
    topic: Topics = None,
    partition: PartitionsOfEvents = None,
    as_json: AsJson = False,
) -> None:
    """Print the newest letters, then each one that is written, until stopped (Ctrl-C)."""
    from stream.dead_letter_reading import StoredLetter, follow_entries, topic_bounds

    chosen = _filter(reason, topic, partition, None, None)
    with closing(_open_log(config_of(context))) as log, stop_signals() as should_stop:
        log.set_stop(should_stop)
        positions = topic_bounds(log)[1]
        shown = _newest(log, chosen, lines) if lines else []
        _print_each(shown, as_json=as_json)
        while not should_stop():
            if not positions:  # the first letter makes the topic
                should_stop.wait(_FOLLOW_S)
                positions = topic_bounds(log)[0]
                continue
            entries, positions = follow_entries(log, positions, _FOLLOW_S)
            fresh = [each for each in entries if isinstance(each, StoredLetter) and chosen.matches(each)]
            _print_each(fresh, as_json=as_json)


@dead_letters_app.command("replay")
def dead_letters_replay(
    context: typer.Context,
    letters: Annotated[
        list[str] | None,
        typer.Argument(help="Ids or places of letters, as `show` takes them; default: see the options."),
    ] = None,
    reason: Reasons = None,
    topic: Topics = None,
    partition: PartitionsOfEvents = None,
    since: Since = None,
    until: Until = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every letter; without it, name letters or give an option.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Append nothing; say what would be done.")] = False,
    adopt_schema: Annotated[
        bool,
        typer.Option(
            "--adopt-schema",
            help="Take the events for those of the configured schema, whatever schema hash they came with.",
        ),
    ] = False,
    schema: SchemaOfEvents = None,
    as_json: AsJson = False,
) -> None:
    """Append the events of letters to the event log again, each once, after what refused them was fixed."""
    chosen = _filter(reason, topic, partition, since, until, letters)
    if not every and not any((reason, topic, partition, since, until, letters)):
        raise ValueError("replay: expected letters, an option that chooses some, or --all")
    config = config_of(context, schema)
    from stream.dead_letter_values import outcome_lines, outcome_values

    with closing(_open_log(config)) as log, stop_signals() as should_stop:
        log.set_stop(should_stop)
        replayer = replayer_of(config, log, adopt_schema=adopt_schema)
        with progress("replay", None) as advance:
            outcome = replayer.run(
                chosen,
                dry_run=dry_run,
                should_stop=should_stop,
                on_progress=(lambda letters: None) if as_json else (lambda letters: advance(letters, "letters")),
            )
    if as_json:
        _print_json(outcome_values(outcome, dry_run=dry_run))
        return
    for line in outcome_lines(outcome, dry_run=dry_run, adopt_schema="--adopt-schema"):
        console.print(line, highlight=False, soft_wrap=True)


def replayer_of(config: "Config", log: "EventLog", *, adopt_schema: bool) -> "Replayer":
    """Re-injects letters as this configuration says.

    Raises:
        ValueError: There is no schema, or one of ``stream.old_schemas`` cannot be read.
    """
    from smes_cli.schema_changes import declared_changes
    from stream.dead_letter_replay import Replayer

    return Replayer(
        log,
        config.schema_file().schema,
        changes=declared_changes(config),
        max_future_ms=round(config.stream.max_future_s * 1000),
        adopt_schema=adopt_schema,
        too_late=_too_late(config),
    )


def _filter(
    reason: list[str] | None,
    topic: list[str] | None,
    partition: list[int] | None,
    since: str | None,
    until: str | None,
    ids: list[str] | None = None,
) -> "LetterFilter":
    from stream.codec.validation import CODES
    from stream.dead_letter_reading import LetterFilter

    for code in reason or ():
        if code not in CODES:
            raise ValueError(f"--reason {code!r}: expected one of {', '.join(CODES)}")
    now_ms = round(time.time() * 1000)
    return LetterFilter(
        codes=frozenset(reason or ()),
        topics=frozenset(topic or ()),
        partitions=frozenset(partition or ()),
        since_ms=None if since is None else unix_ms_of("--since", since, now_ms),
        until_ms=None if until is None else unix_ms_of("--until", until, now_ms),
        ids=tuple(ids or ()),
    )


def _open_log(config: "Config") -> "EventLog":
    from stream.log.open_log import open_event_log

    return open_event_log(config.event_log)


def _newest(log: "EventLog", chosen: "LetterFilter", most: int) -> "list[StoredLetter]":
    """The letters that match, each once, the ones written last; in the order of their writing."""
    from stream.dead_letter_reading import StoredLetter, read_entries

    seen: set[int] = set()
    kept: list[StoredLetter] = []
    for entry in read_entries(log):
        if isinstance(entry, StoredLetter) and chosen.matches(entry) and entry.number not in seen:
            seen.add(entry.number)
            kept.append(entry)
            if len(kept) >= 2 * most:
                kept = sorted(kept, key=lambda each: each.written_ms)[-most:]
    return sorted(kept, key=lambda each: each.written_ms)[-most:]


def _replayed(log: "EventLog") -> set[int]:
    from stream.dead_letter_replay import read_notes

    return read_notes(log)[0]


def _groups(log: "EventLog", chosen: "LetterFilter", by: str) -> "tuple[list[LetterGroup], set[int], int]":
    """The letters by what they have in common, the numbers of those that were replayed, and entries that are none."""
    from stream.dead_letter_reading import Foreign, LetterGroup, StoredLetter, read_entries

    groups: dict[tuple[str, str, str], LetterGroup] = {}
    group_of: dict[int, LetterGroup] = {}
    done: set[int] = set()
    foreign = 0
    for entry in read_entries(log):
        if isinstance(entry, Foreign):
            foreign += 1
        elif not isinstance(entry, StoredLetter):
            done |= {int(each, 16) for each in entry.ids} if entry.note == "done" else set()
        elif chosen.matches(entry) and entry.number not in group_of:
            letter = entry.letter
            key = (letter.code, letter.topic, _where(entry, by))
            group = groups.setdefault(key, LetterGroup(*key, example=entry, first_ms=entry.written_ms))
            group.add(entry)
            group_of[entry.number] = group
    return [groups[key] for key in sorted(groups)], done, foreign


def _where(stored: "StoredLetter", by: str) -> str:
    if by == "partition":
        return str(stored.letter.partition)
    if by in ("hour", "day"):
        return utc(stored.written_ms)[: 13 if by == "hour" else 10]
    return ""


def _print_groups(groups: "list[LetterGroup]", done: set[int], by: str) -> None:
    if not groups:
        console.print("no dead letters")
        return
    table = Table(box=None)
    extra = [] if by == "reason" else [by]
    for title in (
        "reason",
        "topic",
        *extra,
        "letters",
        "events",
        "replayed",
        "first (UTC)",
        "last (UTC)",
        "for example",
    ):
        table.add_column(
            title, overflow="fold", justify="right" if title in ("letters", "events", "replayed") else "left"
        )
    for group in groups:
        counts = (len(group.numbers), group.events, len(group.numbers & done))
        where = [group.where] if extra else []
        example = f"{group.example.id}  {group.example.letter.reason[:100]}"
        times = (utc(group.first_ms), utc(group.last_ms))
        words = (escaped(word) for word in (group.code, group.topic, *where))
        table.add_row(*words, *map(number, counts), *times, escaped(example))
    console.print(table)


def _group_values(group: "LetterGroup", done: set[int]) -> dict[str, Any]:
    from stream.dead_letter_values import letter_values

    return {
        "reason": group.code,
        "topic": group.topic,
        "where": group.where or None,
        "letters": len(group.numbers),
        "events": group.events,
        "replayed": len(group.numbers & done),
        "first_ms": group.first_ms,
        "last_ms": group.last_ms,
        "example": letter_values(group.example),
    }


def _print_json(values: Any) -> None:
    """ASCII alone: a terminal may obey other characters, too."""
    console.print_json(json.dumps(values), ensure_ascii=True)


def _print_letters(letters: "list[StoredLetter]", *, as_json: bool) -> None:
    from stream.dead_letter_values import letter_values

    if as_json:
        _print_json([letter_values(each) for each in letters])
        return
    if not letters:
        console.print("no dead letters")
    _print_each(letters, as_json=False)


def _print_each(letters: "Iterable[StoredLetter]", *, as_json: bool) -> None:
    """One line each."""
    from stream.dead_letter_values import letter_values

    for each in letters:
        line = json.dumps(letter_values(each)) if as_json else one_line(each)
        console.print(line, highlight=False, soft_wrap=True)


def _too_late(config: "Config") -> "TooLate | None":
    """What the newest checkpoint would not learn from; None if there is none to ask."""
    from smes_cli.stream_state import newest_stream_state
    from stream.dead_letter_replay import too_late_by

    try:
        state = newest_stream_state(config)
    except (SmesError, KeyError) as error:
        _logger.warning("which events come too late is not known, for lack of a checkpoint: %s", error)
        return None
    if state is None:
        return None
    lateness_ms = round(config.stream.join.allowed_lateness_s * 1000)
    return too_late_by(config.schema_file().schema, state.arrays, lateness_ms)
