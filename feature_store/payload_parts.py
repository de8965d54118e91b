"""Payloads that several ranks of a training wrote: each a part, which is a payload of its own.

Rank k has the rows that it owns, and the keys of its rows that went. Dense weights are in the part of rank 0 alone. The
metadata are the same in all parts, but for ``part``: ``k/N``. The parts follow each other in the order of the ranks.
"""

from collections.abc import Iterable, Iterator

from feature_store.manifest import Manifest
from feature_store.payload import PayloadContent, read_payload
from smes.errors import SnapshotError
from smes_io.tensor_pieces import Piece

PART = "part"


def part_text(part: int, parts: int) -> str:
    """The value of ``part`` in the metadata."""
    return f"{part}/{parts}"


def read_published(pieces: Iterable[Piece], manifest: Manifest) -> PayloadContent:
    """Read a payload, of one process or of several ranks, up to its rows.

    Args:
        pieces: As :meth:`feature_store.snapshots.SnapshotStore.pieces` gives them.
        manifest: The payload's.

    Raises:
        SnapshotError: As :func:`feature_store.payload.read_payload`, or a part is not the one that the manifest says;
            of all but the first, when the rows are read.
    """
    name = f"snapshot {manifest.lineage}:{manifest.version}"
    sizes, count = manifest.part_bytes, len(manifest.parts)
    if not count:
        content = read_payload(pieces, sizes[0])
        if PART in content.metadata:
            raise SnapshotError(f"{name}: a part of a payload, {content.metadata[PART][:20]}, expected all of it")
        return content
    source = iter(pieces)

    def opened(part: int) -> PayloadContent:
        content = read_payload(_some(source, sizes[part], f"{name}: part {part}"), sizes[part])
        found, expected = content.metadata.get(PART, "none"), part_text(part, count)
        if (found, content.num_rows) != (expected, manifest.parts[part].rows):
            raise SnapshotError(
                f"{name}: part {found[:20]} with {content.num_rows} rows, expected {expected} with "
                f"{manifest.parts[part].rows}"
            )
        return content

    first = opened(0)

    def others() -> Iterator[PayloadContent]:
        for part in range(1, count):
            content = opened(part)
            if content.dense:
                raise SnapshotError(f"{name}: dense weights in part {part}, expected them in part 0 alone")
            if differing := _differing(first, content):
                raise SnapshotError(f"{name}: part {part} differs from part 0 in {differing}, expected the same")
            yield content
        if next(source, None) is not None:
            raise SnapshotError(f"{name}: more after its last part, expected nothing")

    return first.followed_by(others(), sum(part.rows for part in manifest.parts))


def _some(source: Iterator[Piece], count: int, what: str) -> Iterator[Piece]:
    """The next pieces, of ``count`` bytes in all. Parts begin with pieces of their own."""
    while count:
        piece = next(source, None)
        if piece is None:
            return
        count -= memoryview(piece).nbytes
        if count < 0:
            raise SnapshotError(f"{what}: ends within a piece, expected one of its own")
        yield piece


def _differing(first: PayloadContent, other: PayloadContent) -> str:
    """The metadata in which a part is not of the same payload."""
    names = sorted((first.metadata.keys() | other.metadata.keys()) - {PART})
    return ", ".join([name for name in names if first.metadata.get(name) != other.metadata.get(name)][:5])
