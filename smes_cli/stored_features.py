"""The trainer's way to features that impressions leave out."""

import threading
from collections.abc import Callable
from contextlib import ExitStack

from feature_store.entities import EntityStore
from feature_store.entity_layout import ENTITIES, own_features
from smes.errors import FeatureStoreUnavailable
from smes_cli.config import Config
from smes_io.schema_file import SchemaFile
from smes_io.stopping import StoppableCalls
from stream.left_out_features import Filled
from trainer.stored_features import Run, StoredFeatures
from trainer.waits import Waits


def open_stored_features(
    config: Config,
    schema_file: SchemaFile,
    waits: Waits,
    stop_event: threading.Event | None,
    stack: ExitStack,
) -> StoredFeatures | None:
    """What fills features that impressions leave out; None where nothing can, or is to.

    While the store is away, look-ups wait as reads of the event log do, and as long.

    Args:
        config: Where the store is.
        schema_file: Features, and the names that they had before, by which older rows have them.
        waits: Runs look-ups beside the trainer's duties.
        stop_event: Ends waits; None: nothing does.
        stack: Closes the connection.

    Raises:
        FeatureStoreUnavailable, Stopped: The store did not answer.
    """
    schema = schema_file.schema
    if not config.stream.features_from_store or not any(own_features(schema, entity) for entity in ENTITIES):
        return None
    place = config.feature_store
    client = waits.run("feature store", place.connect)
    stack.callback(client.close)
    calls = StoppableCalls()
    calls.set_stop(stop_event)
    stack.callback(calls.close)
    log = config.event_log
    outage_timeout_s = log.kafka.outage_timeout_s if log.kind == "kafka" else log.redis.outage_timeout_s
    renamed = schema_file.renamed.features
    store = EntityStore(client, schema, place.namespace, keep=place.feature_versions, renamed=renamed)
    return StoredFeatures(schema, store, _patient(waits, calls, outage_timeout_s))


def _patient(waits: Waits, calls: StoppableCalls, timeout_s: float) -> Run:
    def run(call: Callable[[], Filled]) -> Filled:
        def tried() -> Filled:
            return calls.retry("features", call, timeout_s=timeout_s, retriable=(FeatureStoreUnavailable,))

        return waits.run("features", tried)

    return run
