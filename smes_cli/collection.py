"""Imports of a long-lived process, without the garbage collector."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage while the block imports: that is a fifth of the processor time of a start.

    Imports make hundreds of thousands of objects, and nearly all of them stay: the collector would look at them again
    and again, and find nothing. They are kept out of later collections, too, so that none holds up a step or an answer
    for a tenth of a second.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if "duckdb" not in sys.modules:  # which would print at the end that its objects were not collected
                gc.freeze()
            gc.enable()
