"""The same examples by ``smes join`` and by the PyFlink job of ``examples/flink``, from one real Kafka.

    KAFKA_HOME=… python -m benchmarks.flink_examples --flink-python flinkvenv/bin/python --json flink.json

Among the events are duplicates, feedback before its impression, feedback of no impression, and events that come when
their windows are long over. Every column of every example is compared. The keys of ``--json``:

``flink_records_equal``
    whether both topics have the same examples, with the same values in the same partitions
``flink_examples``, ``examples``
    how many Flink and ``smes join`` have written
``late``, ``duplicate``, ``feedback_late``, ``orphaned``, ``feedback_duplicate``, ``attached``
    what ``smes join`` has counted
``flink_s``, ``join_s``
    seconds that each took, start and end included

It is no part of ``make test``: PyFlink has an environment of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import save
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from simulators.synthetic import synthesize
from smes.events import ExampleBlock, FeedbackBlock, ImpressionBlock
from smes.schema import Schema
from smes_cli.config import Config, load_config
from smes_cli.demo.local_servers import start_kafka
from smes_cli.join import run_join
from stream.codec.codec import encode_feedback, encode_impressions
from stream.joined.records import decode_examples
from stream.log.event_log import EventLog
from stream.log.open_log import open_event_log
from stream.topics import EXAMPLES, FEEDBACK, IMPRESSIONS

_JOB = Path(__file__).resolve().parent.parent / "examples" / "flink" / "join_examples.py"
_PARTITIONS = 3
_ROWS = 200  # of a block
_SHARE = 0.02  # of the events that something happens to, of each kind
_BLOCKS_LATE = 30


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flink-python", required=True, help="Python of an environment with apache-flink 2.2")
    parser.add_argument("--limit", type=int, default=20_000, help="impressions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    of = parser.parse_args()
    if "KAFKA_HOME" not in os.environ:
        raise SystemExit("expected KAFKA_HOME, the folder of a Kafka distribution")
    with tempfile.TemporaryDirectory() as folder:
        figures = run(of, Path(folder))
    for name, value in figures.items():
        print(f"{name:24} {value}")
    save(figures, of.json)
    return 0 if figures["flink_records_equal"] else 1


def run(of: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both joins of one log; figure → value."""
    world = folder / "world.parquet"
    synthesize(world, of.limit, seed=of.seed)
    with start_kafka(Path(os.environ["KAFKA_HOME"]), folder / "kafka") as server:
        ours, theirs = (_config(folder, server.bootstrap, namespace) for namespace in ("ours", "flink"))
        schema = ours.schema_file().schema
        with closing(open_event_log(ours.event_log)) as log:
            _fill(ours, log, world, of.seed)
        with closing(open_event_log(theirs.event_log)) as log:
            log.ensure_topic(EXAMPLES, _PARTITIONS)
        began_s = time.monotonic()
        report = run_join(
            ours, report=None, drain=True, flush=True, skip_lost=False, anew=False, should_stop=lambda: True
        )
        join_s = time.monotonic() - began_s
        flink_s = _run_flink(of.flink_python, schema, ours, folder, server.bootstrap)
        expected, got = (_examples(config, schema) for config in (ours, theirs))
    ledger = report.ledger
    return {
        "flink_records_equal": _same(got, expected),
        "flink_examples": len(got),
        "examples": len(expected),
        "late": ledger.late,
        "duplicate": ledger.duplicate,
        "feedback_late": ledger.feedback_late,
        "orphaned": ledger.orphaned,
        "feedback_duplicate": ledger.feedback_duplicate,
        "attached": ledger.attached,
        "flink_s": round(flink_s, 1),
        "join_s": round(join_s, 1),
        "impressions": ledger.impressions,
        "seed": of.seed,
    }


def _config(folder: Path, bootstrap: str, namespace: str) -> Config:
    path = folder / f"{namespace}.yaml"
    data = {
        "schema": "synthetic",
        "event_log": {
            "kind": "kafka",
            "kafka_bootstrap": bootstrap,
            "namespace": namespace,
            "partitions": _PARTITIONS,
        },
        "stream": {"features_from_store": False, "idle_after_s": 3600.0},
        "examples": {"directory": str(folder / namespace)},
    }
    path.write_text(json.dumps(data))  # JSON is YAML
    return load_config(path, {})


def _fill(config: Config, log: EventLog, world: Path, seed: int) -> None:
    """Append the events of a log in JSON, some of them twice, late, too early or without their impression."""
    random, schema = np.random.default_rng(seed), config.schema_file().schema
    for topic in (IMPRESSIONS, FEEDBACK):
        log.ensure_topic(topic, _PARTITIONS)
    with open_log(world, config.schema_file()) as reader:
        pairs = list(replay_blocks(reader, seed=seed, rows_per_block=_ROWS))
    later: list[tuple[int, ImpressionBlock, FeedbackBlock]] = []
    for number, (shown, told) in enumerate(pairs):
        for block, append in ((shown, _append_impressions), (told, _append_feedback)):
            kinds = random.random(len(block)) // _SHARE
            held, twice = block.take(kinds == 0), block.take(kinds == 1)
            again = (number + int(random.integers(1, _BLOCKS_LATE)), twice)
            then = (number + int(random.integers(_BLOCKS_LATE // 2, _BLOCKS_LATE)), held)
            if isinstance(block, FeedbackBlock):
                orphans = block.take(kinds == 2)
                orphans.impression_id[:] += 1 << 40
                append(log, schema, FeedbackBlock.concat([block.take(kinds > 0), orphans]))
                later += [(at, shown.take(slice(0, 0)), each) for at, each in (again, then)]  # type: ignore[misc]
            else:
                append(log, schema, block.take(kinds > 0))
                later += [(at, each, told.take(slice(0, 0))) for at, each in (again, then)]  # type: ignore[misc]
        for at, one, other in later:
            if at == number or (number == len(pairs) - 1 and at > number):
                _append_impressions(log, schema, one)
                _append_feedback(log, schema, other)


def _append_impressions(log: EventLog, schema: Schema, block: Any) -> None:
    if len(block):
        log.append(IMPRESSIONS, encode_impressions(block, schema, "json", _PARTITIONS))


def _append_feedback(log: EventLog, schema: Schema, block: Any) -> None:
    if len(block):
        log.append(FEEDBACK, encode_feedback(block, schema, "json", _PARTITIONS))


def _run_flink(python: str, schema: Schema, config: Config, folder: Path, bootstrap: str) -> float:
    """Run the job; the seconds it took."""
    path = folder / "schema.json"
    path.write_text(json.dumps(schema.to_dict()))
    join = config.stream.join
    command = [python, str(_JOB), "--schema", str(path), "--bootstrap", bootstrap, "--events", "ours"]
    command += ["--examples", "flink", "--lateness-s", str(join.allowed_lateness_s)]
    command += ["--remember-s", str(join.remember_s), "--vouchers", str(join.vouchers)]
    began_s = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    if done.returncode:
        said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{said}")
    return time.monotonic() - began_s


def _examples(config: Config, schema: Schema) -> ExampleBlock:
    """Everything in a topic of examples, by impression id."""
    blocks = [ExampleBlock.empty(schema)]
    with closing(open_event_log(config.event_log)) as log:
        at, end = log.begin(EXAMPLES), log.end(EXAMPLES)
        while any(at[source] < end[source] for source in at):
            fetch = log.read(at, max_records=500, timeout_s=1.0)
            for record in fetch.records:
                read = decode_examples(record, schema)
                if read.dead:
                    raise SystemExit(f"{record.partition}/{record.offset}: {read.dead[0].reason}")
                blocks.append(read.examples)
            at = fetch.positions
    examples = ExampleBlock.concat(blocks)
    return examples.take(np.argsort(examples.impression_id, kind="stable"))


def _same(got: ExampleBlock, expected: ExampleBlock) -> bool:
    """Whether all columns are equal; says on stderr which are not."""
    if len(got) != len(expected) or not np.array_equal(got.impression_id, expected.impression_id):
        other = np.setxor1d(got.impression_id, expected.impression_id)
        print(f"{len(got)} examples, expected {len(expected)}; not in both: {other[:10]}", file=sys.stderr)
        return False
    different = []
    for name, column in got.arrays().items():
        other = getattr(expected, name)
        if not np.array_equal(column, other, equal_nan=column.dtype.kind == "f"):
            rows = np.flatnonzero((column != other).reshape(len(column), -1).any(axis=1))
            print(f"{name}: {len(rows)} rows differ, such as {column[rows[:2]]} and {other[rows[:2]]}", file=sys.stderr)
            different.append(name)
    return not different


if __name__ == "__main__":
    sys.exit(main())
