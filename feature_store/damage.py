"""What is broken in a store: named in the log once, counted, and stepped over."""

import logging
import threading
from collections import OrderedDict

_MAX_REMEMBERED = 1000
_SHOWN_BYTES = 40

_logger = logging.getLogger(__name__)


class Damage:
    """What was found broken. Safe to share between threads.

    Attributes:
        count: How many different things were found.
        last: The last one, None before the first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, None] = OrderedDict()
        self.count = 0
        self.last: str | None = None

    def note(self, message: str) -> str:
        """Note ``<key>: <value>, expected <what>``, and return it. What is known already is not logged again."""
        with self._lock:
            self.last = message
            known = message in self._known
            self._known[message] = None
            self._known.move_to_end(message)
            if len(self._known) > _MAX_REMEMBERED:
                self._known.popitem(last=False)
            self.count += not known
        if not known:
            _logger.warning("stepped over what is broken in the store: %s", message)
        return message


def shown(value: bytes | str) -> str:
    """A value for a message: its beginning, and its length if that is not all of it."""
    beginning = repr(value[:_SHOWN_BYTES]).removeprefix("b")
    return beginning if len(value) <= _SHOWN_BYTES else f"{beginning}… ({len(value)} bytes)"
