"""As many malformed events as good ones: every malformed one has its dead letter, every good one is trained on.

Every impression and every feedback event of a synthetic log is appended twice, as it is and with a fault, in a random
order. Each fault has the code that its dead letter must have.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.chaos_system import System, read_config
from simulators.logs.reader import open_log
from simulators.merge import replay_blocks
from simulators.synthetic import synthesize
from smes.events import FeedbackBlock, ImpressionBlock
from smes_cli.config import Config
from stream.codec.codec import encode_feedback, encode_impressions
from stream.dead_letter_reading import StoredLetter, read_entries
from stream.log.event_log import OutRecord
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from trainer.report import conservation_errors

Break = Callable[[dict[str, Any]], object]


def _without(name: str) -> Break:
    return lambda event: {key: value for key, value in event.items() if key != name}


IMPRESSION_FAULTS: list[tuple[str, Break]] = [
    ("unparsable", lambda event: json.dumps(event)[:-2]),
    ("unparsable", lambda event: [event]),
    ("missing_field", _without("item_id")),
    ("bad_id", lambda event: event | {"user_id": "seven"}),
    ("bad_id", lambda event: event | {"impression_id": 2**63}),
    ("bad_time", lambda event: event | {"event_time_ms": event["event_time_ms"] // 1000}),
    ("bad_type", lambda event: event | {"features": 3}),
    ("bad_number", lambda event: event | {"served": {"version": 1, "scores": {"click": 1e300}}}),
]
"""Code of the dead letter, and what is done to an impression."""

FEEDBACK_FAULTS: list[tuple[str, Break]] = [
    ("unknown_task", lambda event: event | {"task": "wink"}),
    ("label_range", lambda event: event | {"value": -1}),
    ("missing_field", _without("value")),
]
"""The same for feedback."""


def malformed(records: list[OutRecord], faults: list[tuple[str, Break]]) -> tuple[list[OutRecord], list[str]]:
    """Each record with one of the faults, in turn, and their codes."""
    spoiled, codes = [], []
    for i, record in enumerate(records):
        code, spoil = faults[i % len(faults)]
        value = spoil(json.loads(record.value))
        text = value if isinstance(value, str) else json.dumps(value)
        spoiled.append(OutRecord(text.encode(), record.headers, record.partition))
        codes.append(code)
    return spoiled, codes


def append_both(pairs: Iterable[tuple[ImpressionBlock, FeedbackBlock]], config: Config, seed: int = 7) -> list[str]:
    """Append every event twice, good and malformed, in one random order within a period; the codes to expect."""
    schema, partitions = config.schema_file().schema, config.event_log.partitions
    random = np.random.default_rng(seed)
    expected: list[str] = []
    with closing(open_event_log(config.event_log)) as log:
        for topic in (IMPRESSIONS, FEEDBACK):
            log.ensure_topic(topic, partitions)
        for impressions, feedback in pairs:
            for topic, good, faults in (
                (IMPRESSIONS, encode_impressions(impressions, schema, "json", partitions), IMPRESSION_FAULTS),
                (FEEDBACK, encode_feedback(feedback, schema, "json", partitions), FEEDBACK_FAULTS),
            ):
                bad, codes = malformed(good, faults)
                expected += codes
                # Good ones keep their order.
                places = np.sort(random.permutation(2 * len(good))[: len(good)])
                mixed: list[OutRecord] = bad.copy()
                for place, record in zip(places.tolist(), good, strict=True):
                    mixed.insert(place, record)
                if mixed:
                    log.append(topic, mixed)
    return expected


def run_malformed(system: System, home: Path, *, impressions: int, seed: int) -> dict[str, Any]:
    """Append them, train on them in a process, and count.

    Args:
        system: Its servers are fresh.
        home: Where the synthetic log is written.
        impressions: Good ones; as many malformed ones come beside them, and the same of feedback.
        seed: Of the log and of the order.

    Raises:
        ChaosError: The trainer failed.
    """
    log = home / "malformed.parquet"
    synthesize(log, impressions, seed)
    path = system.write_config("malformed")
    config = read_config(path)
    with open_log(log, config.schema_file()) as reader:
        codes = append_both(replay_blocks(reader, seed), config, seed)
    report = system.train_to_the_end("train", path)
    audit = system.audit(path)
    with closing(open_event_log(config.event_log)) as events:
        letters = {each.id: each.letter.code for each in read_entries(events) if isinstance(each, StoredLetter)}
    return {
        "malformed": len(codes),
        "malformed_dead_lettered": sum((Counter(codes) & Counter(letters.values())).values()),
        "letters": len(letters),
        "letters_by_code": dict(Counter(letters.values())),
        "good": impressions,
        "good_trained": report["events"]["trained"],
        "good_feedback_attached": report["feedback"]["attached"],
        "audit_balanced": audit["balanced"],
        "audit_imbalances": audit["imbalances"],
        "ledger_errors": conservation_errors(report),
    }
