"""Which snapshots are kept: by bytes and by number, in whole chains.

A *chain* is a version with a full payload and the versions that lead on from it by deltas. None of them can be loaded
without those before it in the chain, so a chain is removed whole, in one atomic step, the oldest first. The chain of
the current version and those of the newest ``min_retained`` versions stay, whatever their size. So do those that
operators' decisions need: what is pinned, what is in service, and what was before it. A version that is held goes with
the chain that it leads on from.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from feature_store.config import SnapshotStoreConfig
from feature_store.damage import Damage, shown
from feature_store.manifest import ChunkNames, Manifest, SnapshotKeys, member, split_member
from feature_store.pins import Pins
from feature_store.pointer import name_in
from feature_store.publication import Publication
from feature_store.reading import SnapshotReader

_MAX_SEARCHES = 3  # for the chunks of broken snapshots, before one publication
_READ_AGAIN = 16  # versions, before one publication
_logger = logging.getLogger(__name__)
_READ_AT_ONCE = 16  # manifests: so many are read whole, however long each is
_MOST_VERSIONS = 4096  # readers look through all that are listed


@dataclass(frozen=True, slots=True)
class Kept:
    """What retention knows of one loadable version.

    Attributes:
        name: ``lineage:version``.
        parent: Name of the version that its delta applies to; None for a full one.
        own_bytes: Of its payload.
        chunks: Of its payload.
        base_bytes, base_chunks: Likewise, of its base; 0 and none without.
    """

    name: str
    parent: str | None
    own_bytes: int
    chunks: ChunkNames
    base_bytes: int = 0
    base_chunks: ChunkNames = field(default_factory=ChunkNames)

    @property
    def begins_chain(self) -> bool:
        """Whether it can be loaded without the versions before it."""
        return self.parent is None or bool(self.base_chunks)

    @property
    def total_bytes(self) -> int:
        """Of both payloads."""
        return self.own_bytes + self.base_bytes


class Retention:
    """Makes room for publications, and knows the chains.

    What was read of a version is remembered while the version is listed; before each publication a few of them are read
    again, so that what breaks is noticed. Use it from one thread at a time.

    Args:
        keys: Names of the keys.
        reader: Reads names and manifests.
        publication: Removes snapshots.
        pins: Says what is kept for operators' decisions.
        config: How much is kept.
        damage: Where what is broken is noted.
    """

    def __init__(
        self,
        keys: SnapshotKeys,
        reader: SnapshotReader,
        publication: Publication,
        pins: Pins,
        config: SnapshotStoreConfig,
        damage: Damage,
    ) -> None:
        self._keys, self._reader, self._publication, self._pins = keys, reader, publication, pins
        self._config, self._damage = config, damage
        self._known: dict[str, Kept] = {}
        self._next = 0  # of the versions to read again
        self._beyond: str | None = None  # the warning that was given last
        self._is_swept = False

    def make_room(self, new_bytes: int, *, replaces: bool) -> None:
        """Remove the oldest chains until one more version of ``new_bytes`` fits.

        Args:
            new_bytes: Of its payload.
            replaces: Whether it takes the place of what is current.
        """
        listed = self._reader.raw_names("index")
        for name in listed[self._next : self._next + _READ_AGAIN]:
            self._known.pop(name.decode(errors="replace"), None)
        self._next = self._next + _READ_AGAIN if self._next + _READ_AGAIN < len(listed) else 0
        kept = self._kept(listed)
        pointer = name_in(self._reader.raw_pointer())
        self._forget([name for name in listed if name.decode(errors="replace") not in kept and name != pointer])
        needed = {name.decode() for name in listed[max(0, len(listed) - max(1, self._config.min_retained - 1)) :]}
        needed.add(pointer.decode(errors="replace"))
        decided = self._pins.kept(replaced=replaces)
        held = {member(manifest.lineage, manifest.version): manifest for manifest in self._held()}
        in_all = sum(version.total_bytes for version in kept.values()) + sum(m.total_bytes for m in held.values())
        surplus_bytes = in_all + new_bytes - self._config.retain_bytes
        surplus = len(kept) + 1 - _MOST_VERSIONS
        beyond: list[str] = []
        for chain in _chains(kept):
            if surplus_bytes <= 0 and surplus <= 0:
                break
            names = [version.name for version in chain]
            if not needed.isdisjoint(names):
                continue
            if not decided.isdisjoint(names):
                beyond += sorted(decided.intersection(names))
                continue
            payloads = (version.chunks + version.base_chunks for version in chain)
            self._publication.remove(names, sum(payloads, ChunkNames()))
            surplus_bytes -= sum(version.total_bytes for version in chain)
            surplus -= len(chain)
            lost = [m for m in held.values() if m.kind == "delta" and member(m.lineage, m.parent or 0) in names]
            self._remove_held(lost)
            surplus_bytes -= sum(manifest.total_bytes for manifest in lost)
        self._say_beyond(beyond if surplus_bytes > 0 else [])
        self._trim_history()
        self._sweep()

    def drop_held(self, name: str, one_more: bool) -> None:
        """Remove the oldest held versions, so that no more than configured are left, and this one, if it is held.

        Args:
            name: ``lineage:version`` of what is about to be published.
            one_more: Whether it will be held.
        """
        held = self._reader.raw_names("held")
        surplus = len(held) + one_more - self._config.max_held
        gone = [old for i, old in enumerate(held) if i < surplus or old == name.encode() or split_member(old) is None]
        manifests = self._reader.manifests([old.decode() for old in gone if split_member(old) is not None])
        self._remove_held(manifests)
        removed = {member(manifest.lineage, manifest.version).encode() for manifest in manifests}
        self._publication.forget("held", [old for old in gone if old not in removed])

    def _held(self) -> tuple[Manifest, ...]:
        return self._reader.manifests(self._reader.names("held"))

    def _remove_held(self, manifests: Sequence[Manifest]) -> None:
        names = [member(manifest.lineage, manifest.version) for manifest in manifests]
        self._publication.remove_held(names, sum(map(self._keys.chunks, manifests), ChunkNames()))

    def _sweep(self) -> None:
        """Once in each process, remove what is left of removals that broke off."""
        if self._is_swept:
            return
        self._publication.sweep(self._listed)
        self._is_swept = True

    def _listed(self) -> Iterator[ChunkNames]:
        """The chunks of all payloads that are listed, read anew."""
        self._known = {}
        for version in self._kept(self._reader.raw_names("index")).values():
            yield version.chunks + version.base_chunks
        yield from map(self._keys.chunks, self._held())

    def _say_beyond(self, names: Sequence[str]) -> None:
        """Warn, once for each state, that decisions keep more than the configured bytes."""
        message = ", ".join(names) or None
        if message is not None and message != self._beyond:
            _logger.warning(
                "snapshots take more than retain_bytes (%d): %s and what they lead on from stay, because they are "
                "pinned, in service or what a rollback goes back to",
                self._config.retain_bytes,
                message,
            )
        self._beyond = message

    def chain_of(self, name: str) -> list[Kept] | None:
        """The versions from the newest one with a full payload to this one; None where one of them is not listed."""
        kept = self._kept(self._reader.raw_names("index"))
        chain: list[Kept] = []
        while name in kept:
            version = kept[name]
            chain.append(version)
            if version.begins_chain:
                return chain[::-1]
            assert version.parent is not None, "it begins no chain"
            name = version.parent
        return None

    def forget(self, name: str) -> None:
        """Read a version again, because it has got a base."""
        self._known.pop(name, None)

    def _kept(self, listed: Sequence[bytes]) -> dict[str, Kept]:
        """The versions of these names that can be read, by name, in their order."""
        names = [name.decode() for name in listed if split_member(name) is not None]
        unknown = [name for name in names if name not in self._known]
        for start in range(0, len(unknown), _READ_AT_ONCE):
            some = unknown[start : start + _READ_AT_ONCE]
            bases = {member(m.lineage, m.version): m for m in self._reader.manifests(some, "bases")}
            for manifest in self._reader.manifests(some):
                name = member(manifest.lineage, manifest.version)
                self._known[name] = self._of(manifest, bases.get(name))
        self._known = {name: self._known[name] for name in names if name in self._known}
        return self._known

    def _of(self, manifest: Manifest, base: Manifest | None) -> Kept:
        return Kept(
            name=member(manifest.lineage, manifest.version),
            parent=None if manifest.kind == "full" else member(manifest.lineage, manifest.parent or 0),
            own_bytes=manifest.total_bytes,
            chunks=self._keys.chunks(manifest),
            base_bytes=base.total_bytes if base else 0,
            base_chunks=self._keys.chunks(base) if base else ChunkNames(),
        )

    def _forget(self, broken: Sequence[bytes]) -> None:
        """Remove what is no name, and snapshots whose manifest is gone or broken, which nobody can load."""
        for name in broken[:_MAX_SEARCHES]:
            place = f"Redis key {self._keys.key('index')}: {shown(name)}"
            self._damage.note(f"{place}, expected the name of a snapshot whose manifest can be read")
            if split_member(name) is not None:
                self._publication.remove_chunks_of(name)
        self._publication.forget("index", broken)

    def _trim_history(self) -> None:
        junk = [name for name in self._reader.raw_names("history") if split_member(name) is None]
        for name in junk[:_MAX_SEARCHES]:
            self._damage.note(f"Redis key {self._keys.key('history')}: {shown(name)}, expected lineage:version")
        self._publication.forget("history", junk)
        self._publication.trim_history(self._config.max_manifests, self._reader.raw_names("index"))


def _chains(kept: dict[str, Kept]) -> list[list[Kept]]:
    """The versions by chain, in the order of the chains' first ones. A delta without its parent is a chain alone."""
    chains: list[list[Kept]] = []
    chain_of: dict[str, list[Kept]] = {}
    for version in kept.values():
        if version.begins_chain or version.parent not in chain_of:
            chains.append([])
            chain_of[version.name] = chains[-1]
        else:
            assert version.parent is not None, "it begins no chain"
            chain_of[version.name] = chain_of[version.parent]
        chain_of[version.name].append(version)
    return chains
