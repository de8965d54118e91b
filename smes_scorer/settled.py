"""What a process that serves does once, when its first version is there."""

import gc
from collections.abc import Callable, Iterable

from feature_store.payload import PayloadContent
from smes.schema import Schema
from smes_scorer.loading import Load
from smes_scorer.versions import Scorable


class FrozenAfterFirst:
    """Loads versions. Once the first is loaded, loops are compiled, and the collector leaves alone what there is.

    Libraries, application and model are some 300,000 objects that stay. The collector looks at all of them whenever a
    quarter as many new ones have come together, for 100 ms and more, in which no request is answered.

    Args:
        load: Loads a version.
        compiled: Waits until no request and no version would wait for a compiler.
    """

    def __init__(self, load: Load, compiled: Callable[[], None] = lambda: None) -> None:
        self._load, self._compiled, self._any = load, compiled, False

    def __call__(self, payloads: Iterable[PayloadContent], schema: Schema, before: Scorable | None) -> Scorable:
        """As :meth:`smes_scorer.loading.Load.__call__`."""
        model = self._load(payloads, schema, before)
        if not self._any:
            self._compiled()
            self._any = True
            gc.collect()
            gc.freeze()
        return model
