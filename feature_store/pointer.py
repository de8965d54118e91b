"""The pointer: one string in Redis that says which snapshot is current.

Without keys it is ``lineage:version``. With keys it is ``lineage:version order signature``; the signature is of what
stands before it. Every pointer has a higher order than the one before: at least the server's time in milliseconds, so
that orders grow even over a server that came back empty. A reader refuses a pointer of a lower order than it has read:
whoever may write to the store can put back what was signed before, but cannot sign it anew.
"""

import re
from dataclasses import dataclass

import redis

from feature_store.damage import shown
from feature_store.manifest import SnapshotKeys, split_member
from feature_store.redis_reads import beginning, server_ms
from feature_store.signing import MAX_SIGNATURE_BYTES, Signer
from smes.errors import SnapshotError, SnapshotForged

MAX_POINTER_BYTES = 200 + MAX_SIGNATURE_BYTES
_ORDER = re.compile(r"[1-9][0-9]{0,15}")


@dataclass(frozen=True, slots=True)
class Pointer:
    """A pointer that was read and verified, or that is to be written.

    Attributes:
        name: ``lineage:version``.
        order: Higher than that of the pointer before; 0 for one without a signature.
    """

    name: str
    order: int = 0

    @classmethod
    def read(cls, raw: bytes, signer: Signer) -> "Pointer":
        """Read a pointer.

        Raises:
            SnapshotForged: It is not signed as it should be.
            SnapshotError: It is no pointer.
        """
        name, *signed = raw.decode(errors="replace").split(" ")
        order = signed[0] if len(signed) == 2 and _ORDER.fullmatch(signed[0]) else None
        if split_member(name) is None or (signed and order is None):
            raise SnapshotError(f"{shown(raw)}, expected lineage:version")
        if order is None:
            signer.verify("pointer", name.encode(), None)
            return cls(name)
        signer.verify("pointer", f"{name} {order}".encode(), signed[1])
        return cls(name, int(order))

    def text(self, signer: Signer) -> str:
        """What to write: signed if there are keys."""
        record = f"{self.name} {self.order}"
        signature = signer.sign("pointer", record.encode())
        return self.name if signature is None else f"{record} {signature}"


class Pointers:
    """Reads what the pointer's key holds, and makes the next pointer.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        signer: Signs and verifies; None: nothing is signed.
    """

    def __init__(self, client: redis.Redis, keys: SnapshotKeys, signer: Signer | None = None) -> None:
        self._client, self._key = client, keys.key("current")
        self.signer = signer or Signer(keys.namespace)

    def raw(self) -> bytes:
        """The beginning of what the key holds, empty if there is no pointer. Its own length is not trusted."""
        return beginning(self._client, self._key, MAX_POINTER_BYTES)

    def to(self, name: str) -> tuple[str, bytes]:
        """A pointer to a snapshot, to be written over the one that is there.

        Returns:
            Its text; and what is there now if that is forged, so that a script does not heed it, else nothing.
        """
        if not self.signer.active:
            return name, b""
        raw, order, forged = self.raw(), 0, b""
        try:
            order = Pointer.read(raw, self.signer).order
        except SnapshotForged:
            forged = raw
        except SnapshotError:
            pass  # no pointer, or junk, which no script heeds
        return Pointer(name, max(server_ms(self._client), order + 1)).text(self.signer), forged


def name_in(raw: bytes) -> bytes:
    """The name that a pointer holds, if it is one; nothing is verified."""
    return raw.partition(b" ")[0]
