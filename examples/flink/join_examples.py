"""Feedback joined to impressions by Apache Flink, for `smes train --examples` (docs/reference/wire.md has the format).

    python join_examples.py --schema schema.json --bootstrap 127.0.0.1:9092 --events smes --examples flink

Each partition is joined by itself, in keyed state, by event time and with the watermark of `smes join`: so both give
the same verdict on what is late. README.md beside this file says what it needs, and what it leaves out.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import pyarrow as pa
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from pyflink.common import Types, WatermarkStrategy
from pyflink.datastream import KeyedProcessFunction, MapFunction, StreamExecutionEnvironment
from pyflink.datastream.connectors.number_seq import NumberSequenceSource
from pyflink.datastream.state import MapStateDescriptor, ValueStateDescriptor

TOPICS = ("impressions", "feedback")
START_MS, END_MS, BUCKET_MS, MOST_ROWS = -(2**62), 2**63 - 1, 1000, 1000


def read(number, of):
    """All records of a partition of a topic, up to its present end: topic, partition, time of arrival, event."""
    partition, topic = number // 2, TOPICS[number % 2]
    consumer, at = KafkaConsumer(bootstrap_servers=of.bootstrap), TopicPartition(f"{of.events}.{topic}", partition)
    consumer.assign([at])
    consumer.seek_to_beginning(at)
    end = consumer.end_offsets([at])[at]
    while consumer.position(at) < end:
        for record in consumer.poll(timeout_ms=500).get(at, ()):
            if record.offset < end:
                yield topic, partition, record.timestamp, json.loads(record.value)
    consumer.close()


def see(clock, time_ms, key, of):
    """The watermark of a topic before an event, which then counts: [time that most recent events reached, those]."""
    before_ms = clock[0] - round(of.lateness_s * 1000)
    if time_ms >= before_ms:
        times = dict(clock[1])
        times[key] = max(time_ms, times.get(key, time_ms))
        clock[1] = list(times.items())[-(2 * of.vouchers - 1) :]
        reached = sorted((ms for _, ms in clock[1]), reverse=True)
        clock[0] = max([clock[0], *reached[of.vouchers - 1 : of.vouchers]])
    return before_ms


class Join(KeyedProcessFunction):
    """The join of one partition. State: what is known of an impression, what is due when, how far both topics are."""

    def __init__(self, of):
        self.of, self.windows = of, {task["name"]: round(task["window_s"] * 1000) for task in of.schema["tasks"]}
        self.longest_ms, self.lateness_ms = max(self.windows.values()), round(of.lateness_s * 1000)

    def open(self, context):
        kind = Types.PICKLED_BYTE_ARRAY()
        self.known = context.get_map_state(MapStateDescriptor("known", kind, kind))
        self.due = context.get_map_state(MapStateDescriptor("due", kind, kind))
        self.clocks = context.get_state(ValueStateDescriptor("clocks", kind))

    def process_element(self, element, context):
        topic, partition, arrival_ms, event = element
        clocks = self.clocks.value() or {"done": START_MS, **{name: [START_MS, []] for name in TOPICS}}
        key, time_ms = event["impression_id"], event["event_time_ms"]
        before_ms = see(clocks[topic], time_ms, key, self.of)
        entry = self.known.get(key) or {"event": None, "done": False, "seen": [], "labels": {}, "until_ms": 0}
        if topic == "impressions":
            self.shown(key, time_ms, before_ms, event, entry)
        else:
            self.told(key, time_ms, before_ms, arrival_ms, event, entry)
        bucket = (min(clocks[name][0] for name in TOPICS) - self.lateness_ms) // BUCKET_MS
        if bucket > clocks["done"]:
            clocks["done"] = bucket
            context.timer_service().register_event_time_timer(END_MS)  # the end of a log that ends
            yield from self.emit(partition, sorted(filter(lambda b: b < bucket, self.due.keys())))
        self.clocks.update(clocks)

    def shown(self, key, time_ms, before_ms, event, entry):
        """An impression waits for its feedback, if it is neither a duplicate nor late."""
        if entry["event"] or time_ms + self.longest_ms < before_ms:
            return
        entry["labels"] = {  # what came before it: late, orphaned, or attached
            task: told
            for task, told in entry["labels"].items()
            if time_ms >= told["not_before_ms"] and told["time_ms"] >= time_ms - self.lateness_ms
        }
        entry["event"], entry["until_ms"] = event, time_ms + self.longest_ms
        self.keep(key, entry)

    def told(self, key, time_ms, before_ms, arrival_ms, event, entry):
        """Feedback is attached, or held until its impression comes, if it is no duplicate, not late and no orphan."""
        task = event["task"]
        if task in entry["seen"] or entry["done"]:
            return
        entry["seen"].append(task)
        told = {"value": event["value"], "arrival_ms": arrival_ms, "time_ms": time_ms}
        if entry["event"] is None:
            told["not_before_ms"] = max(time_ms - self.windows[task], before_ms - self.longest_ms)
            entry["labels"][task] = told
            entry["until_ms"] = max(entry["until_ms"], time_ms + self.longest_ms + self.lateness_ms)
        else:
            shown_ms = entry["event"]["event_time_ms"]
            in_window = shown_ms - self.lateness_ms <= time_ms <= shown_ms + self.windows[task]
            if in_window and before_ms <= shown_ms + self.longest_ms:
                entry["labels"][task] = told
        self.keep(key, entry)

    def keep(self, key, entry):
        self.known.put(key, entry)
        bucket = entry["until_ms"] // BUCKET_MS
        self.due.put(bucket, [*(self.due.get(bucket) or ()), key])

    def emit(self, partition, buckets):
        """Emit what is due; forget what was emitted long ago, and feedback that found no impression."""
        rows = []
        for bucket in buckets:
            for key in self.due.get(bucket):
                entry = self.known.get(key)
                if entry is None or entry["until_ms"] // BUCKET_MS != bucket:
                    continue
                if entry["done"] or entry["event"] is None:
                    self.known.remove(key)
                else:
                    rows.append((entry["until_ms"], key, entry["event"], entry["labels"]))
                    entry |= {"done": True, "until_ms": entry["until_ms"] + round(self.of.remember_s * 1000)}
                    self.keep(key, entry)
            self.due.remove(bucket)
        yield from self.records(partition, rows)

    def on_timer(self, timestamp, context):
        waiting = [(key, entry) for key, entry in self.known.items() if entry["event"] and not entry["done"]]
        rows = [(entry["until_ms"], key, entry["event"], entry["labels"]) for key, entry in waiting]
        yield from self.records(context.get_current_key(), rows)

    def records(self, partition, rows):
        rows.sort(key=lambda row: row[:2])
        for start in range(0, len(rows), MOST_ROWS):
            yield partition, as_arrow(rows[start : start + MOST_ROWS], self.of.schema)


def as_arrow(rows, schema):
    """One record of examples: an Arrow IPC stream."""
    events = [event for _, _, event, _ in rows]
    served = [event.get("served") or {} for event in events]
    scores, tasks = [one.get("scores") or {} for one in served], [task["name"] for task in schema["tasks"]]
    columns = {name: pa.array([event[name] for event in events], pa.int64()) for name in ("impression_id", "user_id")}
    columns |= {name: pa.array([event[name] for event in events], pa.int64()) for name in ("item_id", "event_time_ms")}
    columns["request_id"] = pa.array([event.get("request_id") for event in events], pa.int64())
    for feature in schema["features"]:
        if (name := feature["name"]) not in ("user_id", "item_id"):
            kind = {"numeric": pa.float32(), "id": pa.int64()}.get(feature["kind"], pa.list_(pa.int64()))
            columns[f"features.{name}"] = pa.array([(event.get("features") or {}).get(name) for event in events], kind)
    columns["served_version"] = pa.array([one.get("version") for one in served], pa.int64())
    columns["served_scores"] = pa.array(
        [[given.get(task) for task in tasks] if given else None for given in scores], pa.list_(pa.float32(), len(tasks))
    )
    columns["served_arm"] = pa.array([one.get("arm") for one in served], pa.string())
    for task in schema["tasks"]:
        told = [labels.get(task["name"]) for _, _, _, labels in rows]
        none = 0.0 if task["kind"] == "binary" else None  # what no feedback means
        columns[f"labels.{task['name']}"] = pa.array([one["value"] if one else none for one in told], pa.float32())
        columns[f"feedback_arrival_ms.{task['name']}"] = pa.array(
            [one["arrival_ms"] if one else None for one in told], pa.int64()
        )
    columns["due_ms"] = pa.array([due_ms for due_ms, _, _, _ in rows], pa.int64())
    batch, sink = pa.RecordBatch.from_pydict(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


class Send(MapFunction):
    """Appends records to the topic of examples; a task that Flink repeats after a failure appends them again."""

    def __init__(self, of):
        self.of = of
        plain = json.dumps(of.schema, sort_keys=True, separators=(",", ":"))
        self.headers = [("codec", b"arrow"), ("schema", hashlib.sha256(plain.encode()).hexdigest()[:16].encode())]

    def open(self, context):
        self.producer = KafkaProducer(bootstrap_servers=self.of.bootstrap, acks="all", enable_idempotence=True)

    def map(self, element):
        partition, value = element
        self.producer.send(f"{self.of.examples}.examples", value, headers=self.headers, partition=partition).get(60)
        return partition

    def close(self):
        self.producer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("schema", "bootstrap", "events", "examples"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--lateness-s", type=float, default=1.0, help="stream.join.allowed_lateness_s")
    parser.add_argument("--remember-s", type=float, default=600.0, help="stream.join.remember_s")
    parser.add_argument("--vouchers", type=int, default=4, help="stream.join.vouchers")
    of = parser.parse_args()
    of.schema = json.loads(Path(of.schema).read_text(encoding="utf-8"))
    consumer = KafkaConsumer(bootstrap_servers=of.bootstrap)
    partitions = len(consumer.partitions_for_topic(f"{of.events}.impressions"))
    consumer.close()

    environment = StreamExecutionEnvironment.get_execution_environment()
    environment.set_python_executable(sys.executable)
    numbers = NumberSequenceSource(0, 2 * partitions - 1)
    source = environment.from_source(numbers, WatermarkStrategy.no_watermarks(), "partitions of both topics")
    events = source.flat_map(lambda number: read(number, of))
    examples = events.key_by(lambda event: event[1]).process(Join(of))
    examples.map(Send(of)).print()
    environment.execute("join examples")


if __name__ == "__main__":
    main()
