"""Features for the online store are, value for value, what impressions carry."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from simulators.logs.reader import ENTITIES, LogReader, open_log
from simulators.synthetic import synthesize
from smes.hashing import stable_id
from smes.schema import MISSING
from smes_io.schema_file import SchemaFile, load_builtin, load_schema_file

Table = dict[int, dict[str, NDArray[Any]]]


def tables(reader: LogReader) -> dict[str, Table]:
    found: dict[str, Table] = {entity: {} for entity in ENTITIES}
    for block in chain.from_iterable(map(reader.entity_blocks, ENTITIES)):
        for row, entity_id in enumerate(block.ids.tolist()):
            assert entity_id not in found[block.entity]
            found[block.entity][entity_id] = {
                name: np.atleast_1d(values[row]) for name, values in block.columns.items()
            }
    return found


def assert_as_in_impressions(reader: LogReader, found: dict[str, Table], *, latest_only: bool) -> int:
    """Compare with every impression (or with the last one of each entity); the number of values compared."""
    schema, compared = reader.schema, 0
    blocks = list(reader.blocks())
    for entity, id_column in (("user", 0), ("item", 1)):
        seen: set[int] = set()
        for block in reversed(blocks):
            impressions = block.impressions
            for row in range(len(block) - 1, -1, -1):
                entity_id = int(impressions.ids[row, id_column])
                if (latest_only and entity_id in seen) or entity_id not in found[entity]:
                    continue
                seen.add(entity_id)
                values = found[entity][entity_id]
                for feature in schema.id_features[2:]:
                    if feature.source == entity:
                        expected = impressions.ids[row, schema.id_slices[feature.name]]
                        np.testing.assert_array_equal(values[feature.name], expected)
                        compared += 1
                for index, feature in enumerate(schema.numeric_features):
                    if feature.source == entity:
                        stored = values[feature.name]
                        if feature.elapsed:  # impressions carry the days from the stored time to their own
                            stored = (impressions.event_time_ms[row] / 1000 - stored.astype(np.float64)) / 86_400
                        np.testing.assert_array_equal(stored.astype(np.float32), impressions.numerics[row, [index]])
                        compared += 1
    return compared


def test_side_tables_handmade(shop_dir: Path, shop_schema: SchemaFile) -> None:
    with open_log(shop_dir, shop_schema) as reader:
        found = tables(reader)
        compared = assert_as_in_impressions(reader, found, latest_only=False)

    assert compared == 3 * 2 + 3 * 2
    assert set(found["user"]) == {stable_id("c1"), stable_id("c2")}
    # The last row of a key counts.
    assert found["user"][stable_id("c2")]["plan"] == stable_id("silver")
    assert found["item"][12]["brand"] == stable_id("acme")
    assert found["item"][12]["labels"].tolist() == [MISSING] * 3
    assert set(found["item"][11]) == {"brand", "labels"}


@pytest.mark.kuairand
def test_side_tables_of_kuairand(kuairand_dir: Path) -> None:
    schema_file = load_builtin("kuairand")
    with open_log(kuairand_dir, schema_file, limit=500) as reader:
        found = tables(reader)
        assert assert_as_in_impressions(reader, found, latest_only=False) > 500 * 30
        lines = {
            entity: len(next(kuairand_dir.glob(pattern)).read_text().splitlines()) - 1
            for entity, pattern in (("user", "user_features_*.csv"), ("item", "video_features_basic_*.csv"))
        }
    assert {entity: len(table) for entity, table in found.items()} == lines


def test_without_side_tables_the_latest_value_counts(tmp_path: Path) -> None:
    path = tmp_path / "world.parquet"
    summary = synthesize(path, 3000, seed=2)
    schema_file = load_builtin("synthetic")
    with open_log(path, schema_file) as reader:
        found = tables(reader)
        assert assert_as_in_impressions(reader, found, latest_only=True) > 4000
    assert {entity: len(table) for entity, table in found.items()} == {"user": summary.users, "item": summary.items}


def test_the_latest_value_counts_in_any_order_of_the_file(tmp_path: Path, shop_yaml: Path) -> None:
    """Without a table the last impression in event time decides, wherever it is in the file."""
    shop_yaml.write_text(
        "name: inline\ntasks: [{name: y}]\nfeatures: [{name: level, source: user}]\n"
        "log: {user_id: u, item_id: i, event_time: t, labels: {y: y}}\n"
    )
    (tmp_path / "inline.csv").write_text("u,i,t,y,level\n1,5,300,0,new\n1,5,100,0,old\n2,5,50,1,\n")

    with open_log(tmp_path / "inline.csv", load_schema_file(shop_yaml)) as reader:
        found = tables(reader)

    assert found["user"][1]["level"] == stable_id("new")
    assert found["user"][2]["level"] == MISSING
    assert not found["item"]
