"""What of the scorer depends on the schema: how a request and an answer look, and where stored features are.

The schema is that of the version that answers. So a request is read, its features are looked up, and its answer is
written by the interface of one schema.

Letters: N items, W id columns, F numeric columns.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from feature_store.entities import EntityRows, EntityStore
from smes.events import fill_elapsed
from smes.schema import Schema
from smes_scorer.answer_writer import AnswerWriter
from smes_scorer.config import ScorerConfig, fusion_weights, unknown_weights
from smes_scorer.explanation import ExplanationWriter
from smes_scorer.feature_lookup import FeatureLookup
from smes_scorer.missing import MissingFeatures
from smes_scorer.request import RequestReader, ScoreRequest, without_tasks
from smes_scorer.skew import ServedFeatures
from smes_scorer.telemetry import Telemetry

_MOST = 16


@dataclass(frozen=True, slots=True)
class Asked:
    """A request under one schema, with the instances to score.

    Attributes:
        body: As it came.
        schema: The schema.
        request: What it says.
        rows: The user with the items: ids int64 [N, W], numerics float32 [N, F].
        now_ms: When it was asked, Unix milliseconds.
    """

    body: bytes
    schema: Schema
    request: ScoreRequest
    rows: EntityRows
    now_ms: int


class Interface:
    """The interface of one schema. Safe to share between threads.

    Args:
        config: Limits of a request, and the fusion weights.
        schema: The schema.
        store: Where its stored features are.
        lookup: Looks them up.
        telemetry: Counts skew.

    Attributes:
        schema, store: As given.
        reader, writer, explanation: Of requests, answers and explanations.
        missing: Finds the features without a value.
        served: Measures what requests bring.
    """

    def __init__(
        self, config: ScorerConfig, schema: Schema, store: EntityStore, lookup: FeatureLookup, telemetry: Telemetry
    ) -> None:
        self.schema, self.store = schema, store
        self._lookup, self._config = lookup, config
        self.reader = RequestReader(schema, config.max_items, config.max_depth)
        self.writer = AnswerWriter(schema, fusion_weights(config, schema))
        self.explanation = ExplanationWriter(schema, self.writer)
        self.missing = MissingFeatures(schema)
        self.served = ServedFeatures(schema, config.skew, telemetry)

    @property
    def problem(self) -> str | None:
        """What of the configuration does not fit the schema, None if nothing."""
        unknown = ", ".join(unknown_weights(self._config, self.schema))
        return f"scorer.fusion_weights: {unknown}: no task of the version in service" if unknown else None

    def with_rows(self, body: bytes, request: ScoreRequest, now_ms: int) -> Asked:
        """A request that :attr:`reader` read, with its instances."""
        return self.with_rows_of_all([(body, request)], now_ms)[0]

    def with_rows_of_all(self, requests: Sequence[tuple[bytes, ScoreRequest]], now_ms: int) -> list[Asked]:
        """The same of several requests, at least one, given by body and request, with one look-up for all."""
        wanted = [(request.user_id, request.item_ids) for _, request in requests]
        found = self._lookup.rows_of_all(self.store, self.schema, wanted, now_ms)
        for (_, request), rows in zip(requests, found, strict=True):
            fill_elapsed(rows.numerics, self.schema, now_ms)
            request.write_context(rows)
        return [
            Asked(body, self.schema, request, rows, now_ms)
            for (body, request), rows in zip(requests, found, strict=True)
        ]

    def again(self, asked: Asked, *, to_answer: bool = True) -> Asked:
        """The same request under this schema.

        Args:
            asked: The request under any schema.
            to_answer: Whether it is answered. If not, this schema need not have the tasks that the answer names.

        Raises:
            FieldError, UnreadableBody: It is none under this schema.
        """
        if asked.schema.hash == self.schema.hash:
            return asked
        body = asked.body if to_answer or asked.request.tasks is None else without_tasks(asked.body)
        return self.with_rows(body, self.reader.read(body), asked.now_ms)


class Interfaces:
    """The interfaces of the schemas in service, made when they are needed first. Safe to share between threads.

    Args:
        config: See :class:`Interface`.
        open_store: Opens the store of a schema's features.
        lookup, telemetry: See :class:`Interface`.
    """

    def __init__(
        self,
        config: ScorerConfig,
        open_store: Callable[[Schema], EntityStore],
        lookup: FeatureLookup,
        telemetry: Telemetry,
    ) -> None:
        self._config, self._open_store, self._lookup, self._telemetry = config, open_store, lookup, telemetry
        self._lock = threading.Lock()
        self._by_hash: OrderedDict[str, Interface] = OrderedDict()
        self._damage_before = 0  # of stores that are not used any more

    def of(self, schema: Schema) -> Interface:
        """The interface of a schema."""
        interface = self._by_hash.get(schema.hash)
        if interface is not None:
            return interface
        with self._lock:
            interface = self._by_hash.get(schema.hash)
            if interface is None:
                interface = Interface(self._config, schema, self._open_store(schema), self._lookup, self._telemetry)
                self._by_hash[schema.hash] = interface
                if len(self._by_hash) > _MOST:
                    self._damage_before += self._by_hash.popitem(last=False)[1].store.damage.count
            return interface

    @property
    def damage_count(self) -> int:
        """How many different broken things were found in the stores."""
        with self._lock:
            return self._damage_before + sum(interface.store.damage.count for interface in self._by_hash.values())
