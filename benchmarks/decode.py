"""How fast the wire codecs decode, and decode and join, on one thread, in the shape of KuaiRand.

33 categorical features per impression and about 2.2 feedback events per impression, every value drawn from a seeded
generator. Each codec is timed beside a peer that only opens the bytes: ``json.loads`` and reading the fields of the
dict for JSON, pyarrow's own reader for Arrow. Repeats are interleaved, so that a slow moment hits all of them.

Impressions of requests of 8 and of 50, 21 of whose 33 features are the same in a request, are decoded one by one and by
request (``by_request`` of the codecs), also with a history of 50 items of the user beside them; in processor time.

Run: ``python -m benchmarks.decode [--json FILE] [--impressions N] [--repeats N]``
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.figures import save, show
from smes.events import FeedbackBlock, ImpressionBlock
from smes.schema import ITEM_ID, MISSING, Feature, Schema, Task
from stream.codec.codec import Codec, decode, encode_feedback, encode_impressions
from stream.config import JoinConfig, MiniBatchConfig
from stream.log.event_log import OutRecord, Record
from stream.mini_batches import Assembler
from stream.topics import FEEDBACK, IMPRESSIONS

START_MS = 1_650_844_800_000
ROWS_PER_SLICE = 1_000  # impressions; in Arrow they are one record, their slice of feedback another
MS_PER_IMPRESSION = 100
RECORDS_PER_CALL = {"json": 5_000, "arrow": 16}
NUM_FEATURES = 33
SHARED_FEATURES = 21
REQUEST_SIZES = (8, 50)
HISTORY = 50
FEEDBACK_PER_IMPRESSION = 2.2


def kuairand_schema() -> Schema:
    """33 id features beside user and item, 8 binary tasks and watch time."""
    tasks = ("click", "long_view", "like", "follow", "comment", "forward", "hate", "profile_enter")
    return Schema(
        "kuairand-shape",
        tasks=(*(Task(name) for name in tasks), Task("watch_time", "regression", max_value=86_400.0)),
        features=tuple(Feature(f"onehot_feat{i}") for i in range(NUM_FEATURES)),
    )


def events(num_impressions: int, schema: Schema, seed: int) -> tuple[ImpressionBlock, FeedbackBlock]:
    """Random events; 5 % of the feature values are missing."""
    rng = np.random.default_rng(seed)
    impressions = ImpressionBlock.empty(schema, num_impressions)
    impressions.impression_id[:] = np.arange(num_impressions) + 10_000_000
    impressions.event_time_ms[:] = START_MS + MS_PER_IMPRESSION * np.arange(num_impressions)
    values = rng.integers(0, 5_000, (num_impressions, schema.id_width))
    present = rng.random(values.shape) > 0.05
    present[:, :2] = True
    impressions.ids[present] = values[present]
    n = round(num_impressions * FEEDBACK_PER_IMPRESSION)
    feedback = FeedbackBlock.empty(n)
    of = rng.integers(0, num_impressions, n)
    delayed_ms = impressions.event_time_ms[of] + rng.integers(1, 60_000, n)
    order = np.argsort(delayed_ms, kind="stable")
    feedback.impression_id[:] = impressions.impression_id[of[order]]
    feedback.event_time_ms[:] = delayed_ms[order]
    feedback.task[:] = rng.integers(0, schema.num_tasks, n)
    watch_time = feedback.task == schema.task_index["watch_time"]
    feedback.value[:] = np.where(watch_time, rng.random(n, np.float32) * 60, 1)
    return impressions, feedback


def in_requests(impressions: ImpressionBlock, schema: Schema, size: int) -> ImpressionBlock:
    """The impressions as those of requests of this size: user, time and some features are those of the first one."""
    of = np.arange(len(impressions)) // size
    shown, first = impressions.take(slice(None)), of * size
    shown.request_id[:] = of
    shown.event_time_ms[:] = shown.event_time_ms[first]
    item = {f"onehot_feat{i}" for i in range(SHARED_FEATURES, NUM_FEATURES)} | {ITEM_ID}
    for feature in schema.id_features:
        if feature.name not in item:
            columns = schema.id_slices[feature.name]
            shown.ids[:, columns] = shown.ids[first, columns]
    return shown


def impression_records(impressions: ImpressionBlock, schema: Schema, codec: Codec, *, by_request: bool) -> list[Record]:
    """The impressions in slices, as of :func:`records`."""
    blocks = [impressions.take(slice(i, i + ROWS_PER_SLICE)) for i in range(0, len(impressions), ROWS_PER_SLICE)]
    sent = [out for block in blocks for out in encode_impressions(block, schema, codec, 1, by_request=by_request)]
    return [Record(IMPRESSIONS, 0, i, out.value, out.headers, START_MS + 3_600_000) for i, out in enumerate(sent)]


def records(impressions: ImpressionBlock, feedback: FeedbackBlock, schema: Schema, codec: Codec) -> list[Record]:
    """The events as records of one partition per topic, in slices of event time as a log would return them."""
    sent: list[tuple[str, OutRecord]] = []
    taken = 0
    for start in range(0, len(impressions), ROWS_PER_SLICE):
        block = impressions.take(slice(start, start + ROWS_PER_SLICE))
        last = start + ROWS_PER_SLICE >= len(impressions)
        until = np.searchsorted(feedback.event_time_ms, block.event_time_ms[-1], side="right")
        stop = len(feedback) if last else int(until)
        sent += [(IMPRESSIONS, out) for out in encode_impressions(block, schema, codec, 1)]
        block_feedback = feedback.take(slice(taken, stop))
        sent += [(FEEDBACK, out) for out in encode_feedback(block_feedback, schema, codec, 1)]
        taken = stop
    return [
        Record(topic, 0, offset, out.value, out.headers, START_MS + 3_600_000)
        for offset, (topic, out) in enumerate(sent)
    ]


def decode_all(log: Sequence[Record], schema: Schema, per_call: int) -> int:
    """Decode in calls of ``per_call`` records; the number of events."""
    decoded_events = 0
    for start in range(0, len(log), per_call):
        decoded = decode(log[start : start + per_call], schema)
        assert not decoded.dead, decoded.dead[0]
        decoded_events += len(decoded.impressions) + len(decoded.feedback)
    return decoded_events


def decode_and_join(log: Sequence[Record], schema: Schema, per_call: int) -> int:
    """Decode, join by event time and cut mini-batches of 1,024; the number of events."""
    assembler = Assembler(schema, JoinConfig(), MiniBatchConfig(size=1024), partitions=1)
    joined_events = examples = 0
    for start in range(0, len(log), per_call):
        decoded = decode(log[start : start + per_call], schema)
        assembler.push(decoded.impressions, decoded.feedback)
        joined_events += len(decoded.impressions) + len(decoded.feedback)
        while (batch := assembler.next_batch()) is not None:
            examples += len(batch)
    assert examples > 0, "nothing was emitted: the log is shorter than the attribution window"
    return joined_events


def peer_json(log: Sequence[Record], schema: Schema) -> int:
    """The standard library's parser and one dict access per field."""
    features = [f.name for f in schema.id_features[2:]]
    for record in log:
        event = json.loads(record.value)
        if record.topic == IMPRESSIONS:
            values = event["features"]
            _ = (event["impression_id"], event["user_id"], event["item_id"], event["event_time_ms"])
            _ = [values.get(name) for name in features]
        else:
            _ = (event["impression_id"], event["event_time_ms"], event["task"], event["value"])
    return len(log)


def peer_arrow(log: Sequence[Record]) -> int:
    """pyarrow's reader alone: batches over the bytes, every column opened as NumPy (nulls as it likes)."""
    rows = 0
    for record in log:
        with pa.ipc.open_stream(record.value) as reader:
            for batch in reader:
                for column in batch.columns:
                    if not pa.types.is_dictionary(column.type):
                        column.to_numpy(zero_copy_only=False)
                rows += batch.num_rows
    return rows


def run(num_impressions: int = 20_000, repeats: int = 7, seed: int = 0) -> dict[str, float]:
    """Median events per second of each contender, and the codecs' ratios to their peers."""
    schema = kuairand_schema()
    impressions, feedback = events(num_impressions, schema, seed)
    json_log = records(impressions, feedback, schema, "json")
    arrow_log = records(impressions, feedback, schema, "arrow")
    contenders: dict[str, Callable[[], int]] = {
        "decode_json_events_per_s": lambda: decode_all(json_log, schema, RECORDS_PER_CALL["json"]),
        "decode_join_json_events_per_s": lambda: decode_and_join(json_log, schema, RECORDS_PER_CALL["json"]),
        "decode_join_arrow_events_per_s": lambda: decode_and_join(arrow_log, schema, RECORDS_PER_CALL["arrow"]),
        "peer_json_loads_events_per_s": lambda: peer_json(json_log, schema),
        "decode_arrow_events_per_s": lambda: decode_all(arrow_log, schema, RECORDS_PER_CALL["arrow"]),
        "peer_pyarrow_events_per_s": lambda: peer_arrow(arrow_log),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, contender in contenders.items():
            gc.collect()
            start = time.perf_counter()
            count = contender()
            elapsed = time.perf_counter() - start
            assert count == len(impressions) + len(feedback)
            if repeat:  # the first round warms up
                rates[name].append(count / elapsed)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        **medians,
        "decode_join_json_vs_target_50k": medians["decode_join_json_events_per_s"] / 50_000,
        "decode_join_arrow_vs_target_300k": medians["decode_join_arrow_events_per_s"] / 300_000,
        "decode_json_vs_json_loads": medians["decode_json_events_per_s"] / medians["peer_json_loads_events_per_s"],
        "decode_arrow_vs_pyarrow": medians["decode_arrow_events_per_s"] / medians["peer_pyarrow_events_per_s"],
        "json_bytes_per_event": sum(len(r.value) for r in json_log) / len(json_log),
        "arrow_bytes_per_event": sum(len(r.value) for r in arrow_log) / len(json_log),
    }


def run_requests(num_impressions: int = 20_000, repeats: int = 7, seed: int = 0) -> dict[str, float]:
    """By size of request and codec: bytes and rates one by one and by request, and medians of the rounds' ratios."""
    plain = kuairand_schema()
    history = Feature("history", "bag", source="user", max_length=HISTORY)
    figures: dict[str, float] = {}
    for schema, with_what in ((plain, ""), (replace(plain, features=(*plain.features, history)), "_with_history")):
        impressions, _ = events(num_impressions, schema, seed)
        impressions.ids[:] = np.where(impressions.ids == MISSING, 0, impressions.ids)
        for size in REQUEST_SIZES:
            shown = in_requests(impressions, schema, size)
            for codec in ("json", "arrow"):
                found = _by_request(shown, schema, codec, repeats)
                figures |= {f"requests_of_{size}{with_what}_{codec}_{name}": value for name, value in found.items()}
    return figures


def _by_request(shown: ImpressionBlock, schema: Schema, codec: Codec, repeats: int) -> dict[str, float]:
    logs = [impression_records(shown, schema, codec, by_request=by_request) for by_request in (False, True)]
    rates: list[list[float]] = [[], []]
    for repeat in range(repeats + 1):
        for log, into in zip(logs, rates, strict=True):
            gc.collect()
            start = time.process_time()
            assert decode_all(log, schema, RECORDS_PER_CALL[codec]) == len(shown)
            if repeat:  # the first round warms up
                into.append(len(shown) / (time.process_time() - start))
    alone, together = (sum(len(record.value) for record in log) / len(shown) for log in logs)
    return {
        "bytes_one_by_one": alone,
        "bytes_by_request": together,
        "bytes_ratio": alone / together,
        "impressions_per_s_one_by_one": statistics.median(rates[0]),
        "impressions_per_s_by_request": statistics.median(rates[1]),
        "decode_speedup": statistics.median(b / a for a, b in zip(*rates, strict=True)),
    }


def main() -> None:
    """Print the figures; ``--json FILE`` also writes them as one flat object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--impressions", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, at least 5 for a figure to quote")
    arguments = parser.parse_args()
    figures = run(arguments.impressions, arguments.repeats)
    figures |= run_requests(arguments.impressions, arguments.repeats)
    show(figures)
    save(figures, arguments.json)


if __name__ == "__main__":
    main()
