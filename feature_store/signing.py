"""Who may say what is served: records in the store are signed with HMAC-SHA256 (RFC 2104) where keys are configured.

A record is a manifest, the manifest of a base, the pointer to the current snapshot, or what an operator decided about
serving. A signature is ``{key id}:{64 hexadecimal digits}``. It covers the record's bytes, what kind of record it is,
the namespace and the key's id. So a record that was signed for another place is no good here. A manifest has the
SHA-256 of every chunk of its payload, so its signature covers the weights too.

The first key signs, every key verifies. With keys, what is unsigned is refused like what is wrongly signed. Without
keys nothing is signed, and nothing is refused for its signature.
"""

import hmac
import re
from dataclasses import dataclass, field
from typing import Literal

from smes.errors import SnapshotForged
from smes_io.secrets import SecretError, SecretPlace

LEAST_CHARACTERS = 32
"""Of a key. Who can read the store can try out short ones."""

MAX_SIGNATURE_BYTES = 105

Kind = Literal["manifest", "base", "pointer", "pin"]
"""What is signed. No record can stand for one of another kind."""

_ID = r"[A-Za-z0-9._-]{1,40}"
_SIGNATURE = re.compile(rf"({_ID}):([0-9a-f]{{64}})")


@dataclass(frozen=True, kw_only=True)
class KeyPlace(SecretPlace):
    """A key's name, and where the key is: ``file`` or ``env``.

    Attributes:
        id: Names the key in signatures, 1 … 40 letters, digits, dots, underscores or hyphens. Give a new key a new one.
    """

    id: str

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(_ID, self.id):
            raise ValueError(f"id {self.id!r}, expected 1 … 40 letters, digits, dots, underscores or hyphens")


@dataclass(frozen=True)
class SigningConfig:
    """Keys by which snapshots, pins and what is current are signed.

    Attributes:
        keys: Each with its ``id`` and the place of the key, ``file`` or ``env``: at least 32 characters. The first
            signs, all verify. Empty: nothing is signed or verified.
    """

    keys: tuple[KeyPlace, ...] = ()

    def __post_init__(self) -> None:
        ids = [key.id for key in self.keys]
        if twice := next((id for id in ids if ids.count(id) > 1), None):
            raise ValueError(f"SigningConfig.keys: two keys with id {twice!r}, expected different ids")


@dataclass(frozen=True)
class Signer:
    """Signs records of one namespace, and refuses what is not signed as it should be.

    Attributes:
        namespace: Whose records.
    """

    namespace: str
    _keys: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, config: SigningConfig, namespace: str) -> "Signer":
        """Read the keys. They are not read again: a process that is to know a new key is started again.

        Raises:
            SecretError: A key cannot be read or is too short. The message names its place.
        """
        return cls(namespace, tuple((place.id, _key(place)) for place in config.keys))

    @property
    def active(self) -> bool:
        """Whether there are keys."""
        return bool(self._keys)

    def sign(self, kind: Kind, record: bytes) -> str | None:
        """The signature of a record by the first key; None without keys."""
        if not self._keys:
            return None
        id, key = self._keys[0]
        return f"{id}:{self._digest(kind, record, id, key)}"

    def verify(self, kind: Kind, record: bytes, signature: str | None) -> None:
        """Check the signature of a record; without keys, do nothing.

        Args:
            kind: What the record is taken for.
            record: The bytes that were signed.
            signature: What :meth:`sign` gave, or whatever was found in its place.

        Raises:
            SnapshotForged: There is none, its key is unknown, or it does not fit. The message names no more than the
                ids of keys.
        """
        if not self._keys:
            return
        known = ", ".join(id for id, _ in self._keys)
        if signature is None:
            raise SnapshotForged(f"{kind}: unsigned, expected a signature by key {known}")
        found = _SIGNATURE.fullmatch(signature)
        if found is None:
            raise SnapshotForged(f"{kind}: {len(signature)} characters that are no signature, expected one by {known}")
        id, digest = found[1], found[2]
        key = dict(self._keys).get(id)
        if key is None:
            raise SnapshotForged(f"{kind}: signed with key {id}, expected {known}")
        if not hmac.compare_digest(self._digest(kind, record, id, key), digest):
            raise SnapshotForged(
                f"{kind}: the signature by key {id} is not of this {kind} in namespace {self.namespace}: it was "
                f"changed, signed elsewhere, or signed with another key of this id"
            )

    def _digest(self, kind: Kind, record: bytes, id: str, key: bytes) -> str:
        # Lengths keep one part from running into the next.
        parts = [b"smes snapshots 1", kind.encode(), self.namespace.encode(), id.encode(), record]
        message = hmac.new(key, digestmod="sha256")
        for part in parts:
            message.update(len(part).to_bytes(8, "big"))
            message.update(part)
        return message.hexdigest()


def _key(place: KeyPlace) -> bytes:
    what = f"feature_store.signing.keys, {place.id}"
    try:
        text = place.read()
    except SecretError as error:
        raise SecretError(f"{what}: {error}") from error
    if len(text) < LEAST_CHARACTERS:
        raise SecretError(f"{what}: {place}: too short, expected at least {LEAST_CHARACTERS} random characters")
    return text.encode()
