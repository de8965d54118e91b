"""As many malformed events as good ones, through a real event log and the real trainer.

Guarantee shown: every malformed event has its dead letter, every good one is trained on, and the audit balances.
``make soak`` runs it with 10,000 of each.
"""

import json
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.chaos_malformed import append_both
from simulators.synthetic import synthesize
from smes_cli.__main__ import run
from stream.dead_letter_reading import StoredLetter, read_entries
from stream.log.open_log import open_event_log
from stream.topics import IMPRESSIONS
from tests.integration.training import drain, read_pairs, totals
from tests.running import read_config, write_config
from trainer.report import conservation_errors


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
