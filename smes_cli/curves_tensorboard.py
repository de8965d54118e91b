"""A run's metrics over time as event files of TensorBoard."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from smes.errors import SmesError
from trainer.lineages import root_of

_SUFFIX = ".smes"
"""End of the names of our files: other event files of a folder stay."""
_NAME = re.compile(r"[\w-]+")  # it becomes a folder
_EXPERTS = ("active_mean", "dead", "load_skew", "drift", "overlap")


def write_tensorboard(out: Path, lines: Iterable[dict[str, Any]], tasks: Sequence[str] | None = None) -> dict[str, int]:
    """Write an event file for each run among the lines: ``OUT/LINEAGE``. It replaces the one of an earlier call.

    A line is a step of TensorBoard: its optimiser step, at the time when it was written. The tags are ``METRIC/TASK``
    and ``experts/…``, ``rows/…``, ``lag/…``, ``run/impressions``.

    Args:
        out: Folder, created if missing.
        lines: Of :func:`trainer.history.read_history`.
        tasks: Names of tasks; None for all.

    Returns:
        Lineage, without its forks → lines written.

    Raises:
        SmesError: TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise SmesError(
            f"--tensorboard: TensorBoard is not installed ({error}), expected: pip install 'smes-online[tensorboard]'"
        ) from error
    writers: dict[str, Any] = {}
    before: dict[str, list[Path]] = {}
    written: dict[str, int] = {}
    try:
        for line in lines:
            run = root_of(line["lineage"])
            if _NAME.fullmatch(run) is None:
                raise SmesError(f"a line of lineage {line['lineage']!r}: expected a name of letters and digits")
            if run not in writers:
                before[run] = list((out / run).glob(f"events.out.tfevents.*{_SUFFIX}"))
                writers[run], written[run] = EventFileWriter(str(out / run), filename_suffix=_SUFFIX), 0
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in _scalars(line, tasks)]
            event = Event(wall_time=line["wall_ms"] / 1000, step=line["step"], summary=Summary(value=values))
            writers[run].add_event(event)
            written[run] += 1
    except OSError as error:
        raise SmesError(f"--tensorboard {out}: cannot be written: {error.strerror}") from error
    finally:
        for writer in writers.values():
            writer.close()
    for paths in before.values():
        for path in paths:
            path.unlink(missing_ok=True)
    return written


def _scalars(line: dict[str, Any], tasks: Sequence[str] | None) -> Iterator[tuple[str, float]]:
    """Tag and value of everything in a line that has a value."""
    names = [name for name in line["tasks"] if tasks is None or name in tasks]
    experts, drifts = line["experts"], line["experts"].get("drift_of_tasks", {})
    tagged = {f"{key}/{name}": value for name in names for key, value in line["tasks"][name].items()}
    tagged |= {f"routing_drift/{name}": drifts.get(name) for name in names}
    tagged |= {f"experts/{key}": experts.get(key) for key in _EXPERTS}
    tagged |= {f"rows/{key}": value for key, value in line["rows"].items()}
    tagged |= {f"lag/{key}": value for key, value in (line["lag"] or {}).items()}
    tagged |= {f"run/{key}": line[key] for key in ("impressions", "trained")}
    return ((tag, float(value)) for tag, value in tagged.items() if value is not None)
