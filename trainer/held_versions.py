"""Versions that the gate held back, and whether an operator has put one of them into service since."""

from contextlib import suppress

from feature_store.manifest import Manifest, member
from feature_store.snapshots import SnapshotStore
from smes.errors import SmesError
from trainer.lineages import root_of


class HeldVersions:
    """The held versions of a history of weights, with those from before a restart and of what it forked from.

    Args:
        store: Where they are kept aside.
        lineage: Of the history.
    """

    def __init__(self, store: SnapshotStore, lineage: str) -> None:
        self._store = store
        self._names: set[str] = set()
        with suppress(SmesError):  # then those from before this process are not known
            self._names.update(
                _name(manifest) for manifest in store.held() if root_of(manifest.lineage) == root_of(lineage)
            )

    def __bool__(self) -> bool:
        """Whether there is one."""
        return bool(self._names)

    def add(self, lineage: str, version: int) -> None:
        """A version was held back."""
        self._names.add(member(lineage, version))

    def take_promoted(self) -> bool:
        """Whether one of them is in service now; each is told once. False where the store cannot say."""
        with suppress(SmesError):
            served = self._store.to_serve()
            if served is not None and _name(served) in self._names:
                self._names.remove(_name(served))
                return True
        return False


def _name(manifest: Manifest) -> str:
    return member(manifest.lineage, manifest.version)
