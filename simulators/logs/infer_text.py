"""Write a proposed schema as YAML with comments. A comment that begins with ``?`` says what is unsure."""

import glob
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

import yaml

from simulators.logs.files import is_packed
from simulators.logs.infer import Proposal
from simulators.logs.infer_features import FeatureLine, Side
from simulators.logs.infer_format import unique_names
from simulators.logs.infer_labels import Label, nice_above
from simulators.logs.infer_tables import Table
from smes_io.log_spec import NULL_WORDS, CsvFormat

_WIDTH = 118
_MOST_TASKS = 62
_MOST_NAMED = 6
_DAYS_S = 3 * 86_400


def schema_text(proposal: Proposal) -> str:
    """The schema file, which :func:`smes_io.schema_file.load_schema_file` takes."""
    labels = list(proposal.roles.labels)[:_MOST_TASKS]
    tasks = unique_names([label.task for label in labels])
    lines = [*_head(proposal), "", f"name: {_scalar(proposal.name)}", "", "tasks:"]
    lines += [
        *_comment(
            "How long after the impression an outcome may come, in seconds of event time (window_s). An impression "
            "waits that long before it is trained on, so make it as short as the outcomes allow.",
            2,
        )
    ]
    for task, label in zip(tasks, labels, strict=True):
        lines += _task(task, label, proposal.span_s)
    for label in proposal.roles.labels[_MOST_TASKS:]:
        lines += _comment(f"? {label.column}: an outcome too, but a schema has at most {_MOST_TASKS} tasks", 2)
    lines += ["", "features:" if proposal.features else "features: []"]
    lines += _comment(
        "An outcome must never be a feature: what is known only after the impression does not belong here.", 2
    )
    for source in ("user", "item", "context"):
        of_source = [line for line in proposal.features if line.source == source]
        if of_source:
            where = {"context": "from the log; a scoring request brings its own"}.get(source, f"stored of the {source}")
            lines += _comment(f"---- {source}: {where}", 2)
        for line in of_source:
            lines += _feature(line)
    lines += _left_out(proposal)
    if proposal.span_s > _DAYS_S and "time_unit" not in proposal.roles.notes:
        hint = "? The hour may tell something: derive: [{name: hour, kind: hour_of_day, time_zone: UTC}]"
        lines += ["", *_comment(hint)]
    lines += ["", "log:", *_log(proposal)]
    lines += _sources(proposal.features)
    lines += ["  labels:"]
    if any(label.time_column is None for label in labels):
        lines += _comment(
            "The log does not say when these happened. So a delay after the impression is drawn: median in seconds, "
            "and sigma of its logarithm.",
            4,
        )
    for task, label in zip(tasks, labels, strict=True):
        lines += [f"    {_scalar(task)}: {_mapping(_label(label))}"]
    return "\n".join(lines) + "\n"


def unsure_lines(text: str) -> int:
    """How many places of a schema file are marked as unsure."""
    return sum("# ? " in line for line in text.splitlines())


def _head(proposal: Proposal) -> Iterator[str]:
    log, notes = proposal.log, list(proposal.notes)
    yield from _comment(f"Proposed by `smes schema infer` from {proposal.path.name}. What is unsure is marked with ?.")
    yield from _comment(f"Next: `smes check {proposal.path.name} --schema THIS_FILE` says what the log holds.")
    for table in (log, *(side.table for side in proposal.sides)):
        what = f"{table.files[0].name}: {'a sample of ' if table.sampled else ''}{table.rows:,} rows"
        for reason in () if table.layout is None else table.layout.unsure:
            notes.append(f"{table.files[0].name}: {reason}")
        yield from _comment(what)
    if proposal.other_files:
        listed = "; ".join(proposal.other_files[:12]) + ("; …" if len(proposal.other_files) > 12 else "")
        notes.append(f"not used: {listed}")
    for note in notes:
        yield from _comment(f"? {note}")


def _task(name: str, label: Label, span_s: float) -> Iterator[str]:
    window = label.window_s
    if label.time_column is None and 0 < span_s < 1200:
        window = min(max(nice_above(span_s / 20), 1.0), window)
    values: dict[str, Any] = {"name": name}
    if label.kind == "regression":
        values["kind"] = "regression"
    values["window_s"] = _short(window)
    if label.kind == "regression":
        values |= {"unit": label.unit} if label.unit else {}
        values["max_value"] = _short(label.max_value or 86_400.0)
    notes = [label.note] if label.note else []
    if label.time_column is not None:
        notes.append("99 % of its outcomes come within the window")
    yield from _noted(f"  - {_mapping(values)}", "; ".join(notes), 2)


def _feature(line: FeatureLine) -> Iterator[str]:
    values: dict[str, Any] = {"name": line.name}
    if line.kind != "id":
        values["kind"] = line.kind
    if line.kind == "bag":
        values["max_length"] = line.max_length
    if line.transform:
        values["transform"] = "log1p"
    if line.source != "context":
        values["source"] = line.source
    if line.elapsed:
        values["elapsed"] = True
    yield from _noted(f"  - {_mapping(values)}", line.note, 2)


def _left_out(proposal: Proposal) -> Iterator[str]:
    found = [("", proposal.roles.left_out), *((f" of the {s.entity}s' table", s.left_out) for s in proposal.sides)]
    for table, columns in found:
        by_reason: dict[str, list[str]] = {}
        for name, why in columns.items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            mark = "? " if "?" in why else ""
            yield from _comment(f"{mark}Left out{table}: {', '.join(names)}: {why}", 2)


def _log(proposal: Proposal) -> Iterator[str]:
    roles, log = proposal.roles, proposal.log
    yield f"  files: {_flow(_patterns(log))}"
    if log.layout is not None and (csv := _csv(log, log.layout.csv)):
        yield f"  csv: {_mapping(csv, 7)}"
    for key, value in (
        ("impression_id", roles.impression),
        ("request_id", roles.request),
        ("user_id", roles.user),
        ("item_id", roles.item),
        ("event_time", roles.time),
        ("time_unit", roles.unit),
    ):
        if value is not None:
            yield from _noted(f"  {key}: {_scalar(value)}", roles.notes.get(key, ""), 2)
    if proposal.null_words:
        yield from _noted(
            f"  null_words: {_flow([*NULL_WORDS, *proposal.null_words])}", "texts in columns of numbers", 2
        )
    if roles.max_rejected is not None:
        yield from _noted(f"  max_rejected: {roles.max_rejected}", roles.notes["max_rejected"], 2)
    for side in proposal.sides:
        yield from _side(side, log)


def _side(side: Side, log: Table) -> Iterator[str]:
    values: dict[str, Any] = {"files": _patterns(side.table), "key": side.key}
    layout = side.table.layout
    if layout is not None:
        csv = _csv(side.table, layout.csv)
        inherited = {} if log.layout is None else _csv(log, log.layout.csv)
        if csv or inherited:
            values["csv"] = csv or {"delimiter": layout.csv.delimiter}
    note = "" if side.share > 0.9 else f"only {side.share:.0%} of the log's {side.entity}s are in it"
    yield from _noted(f"  {side.entity}_features: {_mapping(values, 17)}", note, 2)


def _sources(features: Sequence[FeatureLine]) -> Iterator[str]:
    needed = [f for f in features if f.expr is not None or f.separator is not None or f.column != f.name]
    if needed:
        yield "  features:"
    for feature in needed:
        if feature.expr is None:
            values = {"column": feature.column} | ({"separator": feature.separator} if feature.separator else {})
            yield f"    {_scalar(feature.name)}: {_mapping(values)}"
        elif len(feature.expr) < _WIDTH - 30:
            yield f"    {_scalar(feature.name)}: {_mapping({'expr': feature.expr})}"
        else:
            yield f"    {_scalar(feature.name)}:"
            yield "      expr: >-"
            pieces = feature.expr.split(", CASE ")
            for i, piece in enumerate(pieces):
                yield f"        {'CASE ' if i else ''}{piece}{',' if i + 1 < len(pieces) else ''}"


def _label(label: Label) -> dict[str, Any]:
    values: dict[str, Any] = {"column": label.column}
    if label.threshold is not None:
        values["threshold"] = _short(label.threshold)
    if label.scale is not None:
        values["scale"] = label.scale
    if label.time_column is not None:
        values["time_column"] = label.time_column
    else:
        values["delay"] = {"median_s": 1, "sigma": 0.5}
    return values


def _csv(table: Table, csv: CsvFormat) -> dict[str, Any]:
    """What of a text file's layout has to be declared."""
    suffixes = [suffix.lower() for suffix in table.files[0].suffixes]
    if is_packed(table.files[0]):
        suffixes.pop()
    usual = {".csv": ",", ".txt": ",", ".tsv": "\t"}.get(suffixes[-1] if suffixes else "")
    found: dict[str, Any] = {} if csv.delimiter == usual else {"delimiter": csv.delimiter}
    default = CsvFormat()
    for key in ("quote", "escape", "encoding", "skip_lines"):
        if getattr(csv, key) != getattr(default, key):
            found[key] = getattr(csv, key)
    return found | ({"names": list(csv.names)} if csv.names else {})


def _patterns(table: Table) -> list[str]:
    """Patterns that match a table's files and no others beside them."""
    names = [file.name for file in table.files]
    if len(names) > _MOST_NAMED:
        start = _common(names)
        end = _common([name[len(start) :][::-1] for name in names])[::-1]
        pattern = f"{glob.escape(start)}*{glob.escape(end)}"
        if {file.name for file in table.files[0].parent.glob(pattern)} == {*names}:
            return [pattern]
    return [glob.escape(name) for name in names]


def _common(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    return next((first[:i] for i, letter in enumerate(first) if i >= len(last) or letter != last[i]), first)


def _noted(line: str, note: str, indent: int) -> Iterator[str]:
    """A line with a note behind it, or before it where it is long."""
    if not note:
        yield line
    elif len(line) + len(note) + 5 <= _WIDTH:
        yield f"{line}  # ? {note}"
    else:
        yield from _comment(f"? {note}", indent)
        yield line


def _comment(text: str, indent: int = 0) -> list[str]:
    start = " " * indent + "# "
    return wrap(text, _WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False)


def _short(value: float) -> float | int:
    return int(value) if float(value).is_integer() else round(float(value), 6)


def _flow(value: Any, width: float = float("inf")) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=width, allow_unicode=True, sort_keys=False)
    return text.strip()


def _mapping(values: dict[str, Any], before: int = 0) -> str:
    """A mapping in braces, over several lines where it is long; ``before`` is what stands in its first line already."""
    text = _flow(values)
    if before == 0 or len(text) + before <= _WIDTH:
        return text
    return "\n      ".join(_flow(values, _WIDTH - 30).splitlines())


def _scalar(value: str) -> str:
    return _flow([value])[1:-1]
