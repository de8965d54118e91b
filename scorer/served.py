"""The one immutable thing that a request captures: a model together with the version it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from smes.events import F32, I64
from smes.manifest import Manifest
from smes.schema import Schema


class Scorable(Protocol):
    """Scores instances; never changes, and any number of threads may call it."""

    def score(self, ids: I64, numerics: F32) -> F32:
        """float32 [N, T] for int64 [N, W] and float32 [N, F]."""
        ...


Load = Callable[[bytes, Schema], Scorable]
"""Builds a model from a snapshot's payload for the configured schema."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded, warmed-up snapshot."""

    model: Scorable
    manifest: Manifest

    @property
    def key(self) -> tuple[str, int]:
        return self.manifest.lineage, self.manifest.version
