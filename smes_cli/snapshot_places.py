"""What the snapshot commands share: the store, versions as they are typed, and times as they are shown."""

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from smes.errors import SnapshotNotFound

if TYPE_CHECKING:
    from feature_store.snapshots import SnapshotStore
    from smes_cli.config import Config

Lineage = Annotated[str | None, typer.Option("--lineage", help="Lineage; default: that of the version in service.")]


def snapshot_store(config: "Config") -> "SnapshotStore":
    """The configured store."""
    from feature_store.signing import Signer
    from feature_store.snapshots import SnapshotStore
    from smes_io.redis_client import connect

    place = config.feature_store
    signer = Signer.of(place.signing, place.namespace)
    client = connect(place.redis_url, place.timeout_s, access=place.redis_access, namespace=place.namespace)
    return SnapshotStore(client, place.namespace, place.snapshots, signer=signer)


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


def utc(unix_ms: int | None) -> str:
    """A time for a table cell; a dash for None."""
    if unix_ms is None:
        return "–"
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")
