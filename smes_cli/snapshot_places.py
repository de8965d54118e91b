"""What commands share that need snapshots: options, the store, and versions as they are typed."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smes.errors import SnapshotNotFound

if TYPE_CHECKING:
    from feature_store.snapshots import SnapshotStore
    from smes_cli.config import Config

Lineage = Annotated[str | None, typer.Option("--lineage", help="Lineage; default: that of the version in service.")]
VersionOption = Annotated[
    str | None, typer.Option("--version", help="Version in Redis: VERSION of --lineage, or LINEAGE:VERSION.")
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Folder of checkpoints, whose newest counts, instead of a version in Redis."),
]


def snapshot_store(config: "Config") -> "SnapshotStore":
    """The configured store."""
    from feature_store.objects import Objects
    from feature_store.signing import Signer
    from feature_store.snapshots import SnapshotStore

    place = config.feature_store
    signer, objects = Signer.of(place.signing, place.namespace), Objects.of(place.chunks, place.namespace)
    return SnapshotStore(place.connect(), place.namespace, place.snapshots, signer=signer, objects=objects)


def none_published(config: "Config") -> SnapshotNotFound:
    """The error for a store without snapshots."""
    from smes_io.redis_client import masked

    place = config.feature_store
    return SnapshotNotFound(
        f"no snapshot was published yet in Redis at {masked(place.redis_url)}, namespace {place.namespace}"
    )


def typed_version(text: str, lineage: str | None) -> tuple[int, str | None]:
    """Version and lineage of ``VERSION`` or ``LINEAGE:VERSION``.

    Raises:
        typer.BadParameter: It is neither, or names another lineage than ``--lineage``.
    """
    match = re.fullmatch(r"(?:([A-Za-z0-9._-]{1,128}):)?([0-9]{1,15})", text)
    if match is None:
        raise typer.BadParameter(f"{text!r}: expected VERSION or LINEAGE:VERSION")
    if match[1] and lineage and match[1] != lineage:
        raise typer.BadParameter(f"{text!r}: another lineage than --lineage {lineage}")
    return int(match[2]), match[1] or lineage
