"""As many malformed events as good ones, through a real event log and the real trainer.

Guarantee shown: every malformed event has its dead letter, every good one is trained on, and the audit balances.
``make soak`` runs it with 10,000 of each.
"""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulators.synthetic import synthesize
from smes_cli.__main__ import run
from stream.codec.codec import encode_feedback, encode_impressions
from stream.dead_letter_reading import StoredLetter, read_entries
from stream.log.event_log import OutRecord
from stream.log.open_log import open_event_log
from stream.topics import FEEDBACK, IMPRESSIONS
from tests.integration.training import Pairs, drain, read_pairs, totals
from tests.running import read_config, write_config
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
FEEDBACK_FAULTS: list[tuple[str, Break]] = [
    ("unknown_task", lambda event: event | {"task": "wink"}),
    ("label_range", lambda event: event | {"value": -1}),
    ("missing_field", _without("value")),
]


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


@pytest.mark.parametrize("impressions", [400, pytest.param(10_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("kind", ["redis", pytest.param("kafka", marks=pytest.mark.kafka)])
def test_every_malformed_event_is_dead_lettered_and_every_good_one_trained(
    request: pytest.FixtureRequest,
    kind: str,
    impressions: int,
    redis_url: str,
    namespace: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    synthesize(tmp_path / "world.parquet", impressions, seed=5)
    kafka = request.getfixturevalue("kafka_bootstrap") if kind == "kafka" else None
    path = write_config(tmp_path, redis_url, namespace, kafka=kafka)
    config = read_config(path)
    pairs = read_pairs(config, tmp_path / "world.parquet")
    codes = append_both(pairs, config)

    report = drain(config, flush=True)
    capsys.readouterr()
    audited = run(["-c", str(path), "audit", "--json"])
    result = json.loads(capsys.readouterr().out)

    shown, outcomes = totals(pairs)
    assert shown == impressions
    assert conservation_errors(report) == []
    assert report["events"]["trained"] == impressions
    assert report["events"]["dead_lettered"] == impressions
    assert (report["feedback"]["received"], report["feedback"]["dead_lettered"]) == (2 * outcomes, outcomes)
    with closing(open_event_log(config.event_log)) as log:
        found = [entry for entry in read_entries(log) if isinstance(entry, StoredLetter)]
    assert len({each.id for each in found}) == len(found) == impressions + outcomes == len(codes)
    assert sorted(each.letter.code for each in found) == sorted(codes)
    assert (audited, result["balanced"], result["imbalances"], result["notes"]) == (0, True, [], [])
    assert sum(result["letters"].values()) == len(codes)
    sums = {
        name: sum(each[name] for each in result["partitions"] if each["topic"] == IMPRESSIONS)
        for name in ("appended", "read", "recounted", "trained", "dead_lettered", "letters", "unread", "waiting")
    }
    assert sums == {
        "appended": 2 * impressions,
        "read": 2 * impressions,
        "recounted": 2 * impressions,
        "trained": impressions,
        "dead_lettered": impressions,
        "letters": impressions,
        "unread": 0,
        "waiting": 0,
    }


def append_both(pairs: Pairs, config: Any) -> list[str]:
    """Append every event twice, good and malformed, in one random order within a period; the codes to expect."""
    schema, partitions = config.schema_file().schema, config.event_log.partitions
    random = np.random.default_rng(7)
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
