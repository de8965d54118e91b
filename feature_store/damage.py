"""What is broken or forged in a store: named in the log once, counted, and stepped over."""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from smes.errors import PinError, SchemaMismatch, SnapshotDamaged, SnapshotForged

_MAX_REMEMBERED = 1000
_SHOWN_BYTES = 40

Reason = Literal["key", "pointer", "pin", "manifest", "chunk", "payload", "schema", "signature", "older", "fenced"]
"""Why something in a store is refused:

- ``key``: a key holds another kind of value than expected, or junk;
- ``pointer``, ``pin``, ``manifest``: such a record cannot be read, or names what is not there;
- ``chunk``: a chunk is missing, or is not the one that was published;
- ``payload``: the bytes are those that were published, and make no model;
- ``schema``: the snapshot is of another schema;
- ``signature``: a record is unsigned or wrongly signed;
- ``older``: a version or a pointer is older than the one that was read before;
- ``fenced``: somebody published without the lease, which another publisher has.
"""

_logger = logging.getLogger(__name__)


class Damage:
    """What was found broken. Safe to share between threads.

    Attributes:
        count: How many different things were found.
        last: The last one, None before the first.
        on_new: Called once with each different one: its reason and its message.
    """

    def __init__(self, on_new: Callable[[Reason, str], None] = lambda reason, message: None) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, None] = OrderedDict()
        self.count = 0
        self.last: str | None = None
        self.on_new = on_new

    def note(self, message: str, reason: Reason = "key") -> str:
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
            self.on_new(reason, message)
        return message


def reason_of(error: BaseException | None, otherwise: Reason) -> Reason:
    """Why something is refused, as far as the exception says it."""
    if isinstance(error, SnapshotForged):
        return "signature"
    if isinstance(error, SnapshotDamaged):
        return "chunk"
    if isinstance(error, SchemaMismatch):
        return "schema"
    if isinstance(error, PinError):
        return "pin"
    return otherwise


def shown(value: bytes | str) -> str:
    """A value for a message: its beginning, and its length if that is not all of it."""
    beginning = repr(value[:_SHOWN_BYTES]).removeprefix("b")
    return beginning if len(value) <= _SHOWN_BYTES else f"{beginning}… ({len(value)} bytes)"
