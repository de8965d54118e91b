"""Readers of a version see exactly this version, while later ones are put into service and folded into one table."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest

from smes.arrays import F32, I64
from smes.model.deltas import RowDelta
from smes.model.ids import IdKeys
from smes.model.serving_rows import ServingTable, Shadow, TableRows
from smes.schema import Schema, Task
from smes_scorer.versions import Foldable, ServedModel, Versions
from tests.manifests import make_manifest

SCHEMA = Schema("versions", tasks=(Task("click"),))
GROUPS = {"wide": 3}
KEYS = IdKeys(SCHEMA)
IDS = np.stack([np.arange(600), np.arange(600)], axis=1)


@dataclass(frozen=True)
class Rows:
    """A model whose scores are the rows of its ids."""

    rows: TableRows

    @property
    def shadows(self) -> int:
        return len(self.rows.shadows)

    def score(self, ids: I64, numerics: F32, now_ms: I64 | int | None = None) -> F32:
        read: F32 = self.rows.read(ids)["wide"].numpy()
        return read.reshape(len(ids), -1)

    def folded(self, up_to_version: int) -> "Rows":
        return Rows(self.rows.folded(up_to_version))


class History:
    """Random versions, and what each of them gives for all ids: row n of a version is (n, version that wrote it, n)."""

    def __init__(self, seed: int, versions: int) -> None:
        rng = np.random.default_rng(seed)
        own = KEYS.own(IDS).reshape(-1, 2)
        self.required = self._rows(KEYS.required, 0)
        self.deltas: list[RowDelta] = []
        default = np.concatenate([self.required[:1], self.required[1:]], axis=1).ravel()
        self.expected = [np.tile(default, (len(IDS), 1))]
        for version in range(1, versions + 1):
            change = rng.random((len(IDS), 2))
            written, gone = change < 0.3, (change > 0.85)
            rows = np.tile(self.expected[-1].reshape(-1, 2, 3), 1)
            values = self._rows(own[written], version)
            rows[written] = values
            rows[gone] = np.broadcast_to(default.reshape(2, 3), rows.shape)[gone]
            self.deltas.append(RowDelta(own[written], {"wide": values}, own[gone]))
            self.expected.append(rows.reshape(len(IDS), -1))

    @staticmethod
    def _rows(keys: I64, version: int) -> F32:
        mark = (keys % 1000).astype(np.float32)
        return np.stack([mark, np.full(len(keys), version, np.float32), mark], axis=1)


@pytest.mark.parametrize("seed", range(2))
def test_readers_see_exactly_their_version_while_folds_run(seed: int, until: Callable[..., None]) -> None:
    """Four readers, one of them slow, and a thread that publishes and folds as the loader does."""
    count = 250
    history = History(seed, count)
    table = ServingTable(GROUPS)
    table.add(KEYS.required, {"wide": history.required})
    versions = Versions()
    versions.put(ServedModel(Rows(TableRows(KEYS, table)), make_manifest(0), SCHEMA))
    done = threading.Event()
    most_shadows: list[int] = []

    def read(reader: int) -> int:
        rng, answers = np.random.default_rng([seed, reader]), 0
        while not done.is_set():
            some = rng.integers(0, len(IDS), 200)
            with versions.reading() as served:
                version = served.manifest.version
                for _ in range(40 if reader == 0 else 1):  # the slow one reads long after the version was replaced
                    scores = served.model.score(IDS[some], np.zeros((200, 0), np.float32))
                    np.testing.assert_array_equal(scores, history.expected[version][some], err_msg=f"version {version}")
            answers += 1
        return answers

    def publish() -> int:
        folds = 0
        for version, delta in enumerate(history.deltas, 1):
            served = versions.served
            assert served is not None
            assert isinstance(served.model, Rows)
            rows = served.model.rows.after(Shadow(delta, version, GROUPS)).with_fewer_shadows(3)
            versions.put(ServedModel(Rows(rows), make_manifest(version), SCHEMA))
            most_shadows.append(len(rows.shadows))
            for _ in range(2):
                served, up_to = versions.served, versions.oldest_read()
                assert served is not None
                assert isinstance(served.model, Foldable)
                assert up_to is not None
                folded = served.model.folded(up_to)
                assert isinstance(folded, Rows)
                folds += served.model.shadows - folded.shadows
                versions.put(ServedModel(folded, served.manifest, SCHEMA))
                threading.Event().wait(0.002)
        return folds

    with ThreadPoolExecutor(5) as pool:
        readers = [pool.submit(read, reader) for reader in range(4)]
        try:
            folds = pool.submit(publish).result()
        finally:
            done.set()
        answers = [reader.result() for reader in readers]

    assert min(answers) > 3
    assert folds > count / 4
    assert max(most_shadows) > 1, "a fold had to wait for the slow reader"
    until(lambda: versions.oldest_read() == count)


def test_the_oldest_version_that_is_read_is_known_however_often_the_served_one_changes() -> None:
    versions = Versions()
    assert versions.oldest_read() is None
    model = Rows(TableRows(KEYS, ServingTable(GROUPS)))
    first, second = ServedModel(model, make_manifest(1), SCHEMA), ServedModel(model, make_manifest(2), SCHEMA)
    versions.put(first)
    with versions.reading() as one:
        versions.put(second)
        with versions.reading() as other:
            versions.put(ServedModel(model, make_manifest(3), SCHEMA))
            assert (one, other, versions.oldest_read()) == (first, second, 1)
        assert versions.oldest_read() == 1
    assert versions.oldest_read() == 3


def test_a_reader_of_another_lineage_keeps_everything_from_being_folded() -> None:
    versions = Versions()
    model = Rows(TableRows(KEYS, ServingTable(GROUPS)))
    versions.put(ServedModel(model, make_manifest(7, "a"), SCHEMA))
    with versions.reading():
        versions.put(ServedModel(model, make_manifest(1, "b"), SCHEMA))
        assert versions.oldest_read() is None
    assert versions.oldest_read() == 1


def test_a_request_that_fails_is_over() -> None:
    versions = Versions()
    model = Rows(TableRows(KEYS, ServingTable(GROUPS)))
    versions.put(ServedModel(model, make_manifest(1), SCHEMA))
    with pytest.raises(RuntimeError), versions.reading():
        raise RuntimeError
    versions.put(ServedModel(model, make_manifest(2), SCHEMA))
    assert versions.oldest_read() == 2
