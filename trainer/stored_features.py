"""Features that impressions leave out, from the store, as they were at the time of the impression.

An impression that has no feature at all of its user, or none of its item, is taken to leave them out. What the store
had for that entity then takes their place: the newest row that is not later than the impression. So a trainer that
reads an impression hours later, or again after a restart, gets the same row, as long as the store keeps it
(``feature_store.feature_versions``) and nobody writes rows into the past.

Letters: N impressions, W id columns, F numeric columns.
"""

import logging
from collections.abc import Callable

import numpy as np

from feature_store.entities import EntityStore
from feature_store.entity_layout import ENTITIES, Entity, own_features
from smes.arrays import F32, I8, I64, Bool
from smes.events import ImpressionBlock, fill_elapsed
from smes.schema import MISSING, Schema
from stream.left_out_features import CARRIED, FROM_STORE, NOT_IN_STORE, WRITTEN_LATER, Filled

_logger = logging.getLogger(__name__)

Run = Callable[[Callable[[], Filled]], Filled]
"""Runs look-ups until the store has answered them."""


def run_once(call: Callable[[], Filled]) -> Filled:
    """A :data:`Run` that tries once."""
    return call()


class StoredFeatures:
    """A :class:`stream.left_out_features.FeatureSource` that asks the feature store.

    Args:
        schema: Features.
        store: Of this schema.
        run: Runs the look-ups of a block, several times if need be.
    """

    def __init__(self, schema: Schema, store: EntityStore, run: Run = run_once) -> None:
        self._schema, self._store, self._run = schema, store, run
        self._columns = {entity: _columns(schema, entity) for entity in ENTITIES}
        self._missed = dict.fromkeys(ENTITIES, 0)
        self._next_warning = dict.fromkeys(ENTITIES, 1)

    def fill(self, impressions: ImpressionBlock) -> Filled:
        """See :meth:`stream.left_out_features.FeatureSource.fill`.

        Raises:
            FeatureStoreError, Stopped: As ``run``.
        """
        rows = {entity: np.flatnonzero(self._left_out(entity, impressions)) for entity in ENTITIES}
        if not any(map(len, rows.values())):
            return Filled(impressions, np.full((len(impressions), len(ENTITIES)), CARRIED, np.int8))
        filled = self._run(lambda: self._filled(impressions, rows))
        for e, entity in enumerate(ENTITIES):
            self._warn(entity, int((filled.outcome[:, e] >= NOT_IN_STORE).sum()))
        return filled

    def _filled(self, impressions: ImpressionBlock, rows: dict[Entity, I64]) -> Filled:
        outcome_N2 = np.full((len(impressions), len(ENTITIES)), CARRIED, np.int8)
        ids_NW, numerics_NF = impressions.ids.copy(), impressions.numerics.copy()
        for e, entity in enumerate(ENTITIES):
            left_out = rows[entity]
            if len(left_out):
                times_ms = impressions.event_time_ms[left_out]
                outcome_N2[left_out, e] = self._look_up(entity, e, times_ms, left_out, ids_NW, numerics_NF)
        columns = {**impressions.arrays(), "ids": ids_NW, "numerics": numerics_NF}
        return Filled(ImpressionBlock(**columns), outcome_N2)

    def _look_up(self, entity: Entity, id_column: int, times_ms: I64, rows: I64, ids_NW: I64, numerics_NF: F32) -> I8:
        """Fill these rows; what became of each."""
        ids, numerics = ids_NW[rows], numerics_NF[rows]
        found = self._store.as_of(entity, ids[:, id_column].copy(), times_ms, ids, numerics)
        elapsed = numerics.copy()
        fill_elapsed(elapsed, self._schema, times_ms)
        own = self._columns[entity][1]
        numerics[:, own] = elapsed[:, own]
        ids_NW[rows], numerics_NF[rows] = ids, numerics
        outcome = np.where(found.known, FROM_STORE, np.where(found.later, WRITTEN_LATER, NOT_IN_STORE))
        return outcome.astype(np.int8)

    def _left_out(self, entity: Entity, impressions: ImpressionBlock) -> Bool:
        """Which impressions have no feature of the entity, bool [N]."""
        ids, numerics = self._columns[entity]
        if not len(ids) and not len(numerics):
            return np.zeros(len(impressions), np.bool_)
        left_out: Bool = np.ones(len(impressions), np.bool_)
        left_out &= np.isnan(impressions.numerics[:, numerics]).all(axis=1)
        left_out &= (impressions.ids[:, ids] == MISSING).all(axis=1)
        return left_out

    def _warn(self, entity: Entity, missed: int) -> None:
        """Say that features are not there: at the first time, and when ten times as many are missed."""
        self._missed[entity] += missed
        if self._missed[entity] >= self._next_warning[entity]:
            self._next_warning[entity] = 10 * self._missed[entity]
            _logger.warning(
                "%d impressions so far left out all %s features, and the store had none at their time: they are "
                "trained on without",
                self._missed[entity],
                entity,
            )


def _columns(schema: Schema, entity: Entity) -> tuple[I64, I64]:
    """The columns of an entity's features among ids and numerics."""
    own = {f.name for f in own_features(schema, entity)}
    ids = [c for name, s in schema.id_slices.items() if name in own for c in range(s.start, s.stop)]
    numerics = [c for c, f in enumerate(schema.numeric_features) if f.name in own]
    return np.array(ids, np.int64), np.array(numerics, np.int64)
