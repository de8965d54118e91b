"""Propose a schema file for a log: look at a bounded sample of its files, and say what is unsure."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from simulators.logs.infer_columns import Column, look_at
from simulators.logs.infer_features import FeatureLine, Side, find_sides, log_features, side_features
from simulators.logs.infer_names import described_names, slug, slugs
from simulators.logs.infer_roles import Hints, Roles, find_roles, looks_like_a_log
from simulators.logs.infer_tables import LogSample, Table
from smes.errors import LogError
from smes.schema import ITEM_ID, USER_ID
from smes_io.log_spec import NULL_WORDS


@dataclass
class Proposal:
    """What a schema file is written from.

    Attributes:
        path: What was looked at.
        name: Of the schema.
        log: The files of the log.
        roles: Its columns.
        features: In the order of their sources: user, item, context.
        sides: The tables of users and items.
        null_words: Texts that mean that there is no value, beside the usual ones.
        span_s: From the first to the last time that was seen.
        other_files: What else lies there.
        notes: What is unsure of the whole.
    """

    path: Path
    name: str
    log: Table
    roles: Roles
    features: list[FeatureLine]
    sides: list[Side]
    null_words: list[str] = field(default_factory=list)
    span_s: float = 0.0
    other_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def propose(
    path: Path, hints: Hints | None = None, progress: Callable[[int, str], None] = lambda done, name: None
) -> Proposal:
    """Look at a log and propose how it is read and what is learned from it.

    Time and memory are bounded whatever the log's size: of each table at most 48 MiB of text, or 600,000 rows of
    Parquet, are read. Nothing is written.

    Args:
        path: A folder with the log and its feature tables, or the log's file.
        hints: Columns that are known.
        progress: Called with (tables read, file) along the way.

    Raises:
        LogError: There is no table that could be a log of impressions; the message says what it lacks.
        ValueError: A hint names no column, or one that cannot be what it says.
    """
    with LogSample(path, progress) as sample:
        looked = _named_and_looked_at(sample)
        log, columns = _log_of(path, looked)
        roles = find_roles(sample, log, columns, hints or Hints())
        others = [(table, found) for table, found in looked if table is not log]
        sides, spare = find_sides(sample, log, roles, others)
        features = [_beside(line, sides, roles) for line in log_features(sample, log, columns, roles)]
        for side in sides:
            features += side_features(sample, side, next(found for table, found in others if table is side.table))
        taken = {id(log), *(id(side.table) for side in sides)}
        rest = [_files_of(table) for table, _ in others if id(table) not in taken]
        proposal = Proposal(path, slug(path.stem), log, roles, _sorted(features), sides, other_files=rest)
        proposal.notes += [f"not read: {other}" for other in spare]
        words = [word for found in [columns, *(c for _, c in others)] for column in found for word in column.words]
        proposal.null_words = [word for word in dict.fromkeys(words) if word not in NULL_WORDS]
        time = next(column for column in columns if column.name == roles.time)
        per_s = {"s": 1, "ms": 1_000, "us": 1_000_000}.get(roles.unit)
        if per_s is not None and time.least is not None and time.greatest is not None:
            proposal.span_s = (time.greatest - time.least) / per_s
        return proposal


def _named_and_looked_at(sample: LogSample) -> list[tuple[Table, list[Column]]]:
    """All tables with their columns; those of files without a header get names."""
    there = sorted(file.name for file in sample.folder.iterdir() if file.is_file())
    found = []
    for table in sample.tables:
        if not table.named:
            given = described_names(sample.folder, there, table.files, len(table.columns))
            if given is not None:
                sample.rename(table, slugs(given.names))
                note = f"the names of the columns come from {given.file}"
            else:
                sample.rename(table, _names_by_content(look_at(sample, table)))
                table.made_up = True
                note = "no header: the names of the columns are made up"
            assert table.layout is not None
            table.layout = replace(table.layout, unsure=(*table.layout.unsure, note))
        found.append((table, look_at(sample, table)))
    return found


def _names_by_content(columns: list[Column]) -> tuple[str, ...]:
    """``timestamp`` for the one column of times, ``column3`` for the others."""
    times = [c for c in columns if c.time_unit is not None and c.distinct > 1]
    return tuple("timestamp" if [c] == times else c.name for c in columns)


def _log_of(path: Path, looked: list[tuple[Table, list[Column]]]) -> tuple[Table, list[Column]]:
    """The table that is the log: the one that was named, else the largest of those that look like one."""
    if path.is_file():
        own = [pair for pair in looked if path in pair[0].files]
        if not own:
            raise LogError(f"{path}: expected rows of at least two columns, as text with delimiters or Parquet")
        return own[0]
    scored = [
        (looks_like_a_log(columns), not table.is_split, table.bytes, i) for i, (table, columns) in enumerate(looked)
    ]
    best = max(scored)
    if best[0] < 2 and len(looked) > 1:
        files = ", ".join(_files_of(table) for table, _ in looked)
        raise LogError(
            f"{path}: no table with the columns of a log of impressions, expected a user, an item and a time; "
            f"found {files} (name the log's file itself if it is among them)"
        )
    return looked[best[3]]


def _files_of(table: Table) -> str:
    more = f" and {len(table.files) - 1} more like it" if len(table.files) > 1 else ""
    return f"{table.files[0].name}{more}"


def _beside(line: FeatureLine, sides: list[Side], roles: Roles) -> FeatureLine:
    """A feature of the log beside the tables: what is stored of an entity comes from its table, if there is one."""
    if line.source not in [side.entity for side in sides]:
        return line
    note = (
        f"it goes with the {line.source}, but the log has it, and not the {line.source}s' table: requests must bring it"
    )
    return replace(line, source="context", elapsed=False, note=note)


def _sorted(features: list[FeatureLine]) -> list[FeatureLine]:
    """By source, with names that are unique."""
    order = ("user", "item", "context")
    lines = sorted(features, key=lambda line: order.index(line.source))
    taken, found = {USER_ID, ITEM_ID}, []
    for line in lines:
        name, count = line.name, 2
        while name in taken:
            name = f"{line.source}_{line.name}" if count == 2 else f"{line.name}_{count}"
            count += 1
        taken.add(name)
        found.append(replace(line, name=name))
    return found
