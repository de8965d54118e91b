"""How a snapshot is written to Redis and removed from it.

The keys are :class:`feature_store.manifest.SnapshotKeys`, all under ``{namespace}:snapshots:``

================== ======= ==========================================================================
``current``        string  ``lineage:version`` of the snapshot that serving should load
``manifests``      hash    ``lineage:version`` → manifest JSON; kept longer than the chunks, for freshness
``index``          zset    ``lineage:version`` of every loadable snapshot, in order of publication
``history``        zset    ``lineage:version`` of every manifest kept, in order of publication
``sequence``       integer number of publications so far
``uploads``        hash    upload → lineage, chunks and begin (JSON) of an unfinished upload
``chunk:{u}:{i}``  string  chunk i of upload u; expires unless its upload is committed
``lease``          string  who may publish (:mod:`feature_store.lease`)
``fencing``        string  the last fencing number given out
================== ======= ==========================================================================

The channel ``published`` announces every ``lineage:version``.

A publication writes the ``uploads`` entry, then the chunks, which expire. Then one script makes the chunks permanent,
writes the manifest, moves ``current`` and announces the snapshot. So readers see the snapshot before or all of this
one, whenever the publisher dies.

No script loops over more than a bounded number of keys, so that none keeps Redis from answering others. A key of the
wrong kind is put aside, as ``{key}:broken``, for a day.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, TypeVar, cast

import msgspec
import redis
from msgspec import Meta

from feature_store.damage import Damage, shown
from feature_store.lease import LEASE_FUNCTIONS, Leases
from feature_store.manifest import (
    LARGEST_INTEGER,
    MAX_CHUNKS,
    Chunk,
    Manifest,
    SnapshotKeys,
    member,
    split_member,
    stale,
)
from smes.errors import SnapshotError
from smes_io.redis_client import FEATURE_STORE, retry_during_outage

__all__ = ["LARGEST_INTEGER", "Chunk", "Manifest", "Publication", "SnapshotKeys", "member", "split_member", "stale"]

_T = TypeVar("_T")
_SLICE = 200  # keys that one call looks at
_SCAN_S = 1.0
_MAX_PAGES = 50  # of unfinished uploads, looked at before a publication

# Commits an upload in one atomic step.
#
# KEYS: current, manifests, index, history, sequence, uploads, lease, fencing.
# ARGV: lineage, version, manifest JSON, upload, number of chunks, prefix of the chunk keys, channel, fencing number.
# Returns
#   'ok'         committed, now or by an earlier call whose answer the client lost;
#   'fenced …'   another publisher holds or held the lease (as taken() has it), nothing was changed;
#   'stale V'    the lineage's current version V is this one or a later one, nothing was changed;
#   'lost I'     chunk I (or, with I = 0, the whole upload) is gone, nothing was announced.
#
# A pointer counts only if it names a snapshot that has a manifest.
_COMMIT = f"""{LEASE_FUNCTIONS}
local current, manifests, index, history, sequence, uploads, lease, fencing = unpack(KEYS)
local lineage, version, manifest, upload, chunks, prefix, channel, number = unpack(ARGV)
local member = lineage .. ':' .. version
chunks = math.min(tonumber(chunks), {MAX_CHUNKS})
local other = taken(lease, fencing, number)
if other then return 'fenced ' .. other end
if redis.call('HEXISTS', uploads, upload) == 0 then
    if redis.call('HGET', manifests, member) == manifest then return 'ok' end
    return 'lost 0'
end
local pointer = redis.pcall('GETRANGE', current, 0, 200)
if type(pointer) == 'string' and redis.call('HEXISTS', manifests, pointer) == 1 then
    local served_lineage, served_version = string.match(pointer, '^(.*):(%d+)$')
    if served_lineage == lineage and tonumber(served_version) >= tonumber(version) then
        return 'stale ' .. served_version
    end
end
for i = 0, chunks - 1 do
    if redis.call('EXISTS', prefix .. upload .. ':' .. i) == 0 then return 'lost ' .. i end
end
for i = 0, chunks - 1 do redis.call('PERSIST', prefix .. upload .. ':' .. i) end
local order = redis.call('INCR', sequence)
redis.call('HSET', manifests, member, manifest)
redis.call('ZADD', index, order, member)
redis.call('ZADD', history, order, member)
redis.call('HDEL', uploads, upload)
redis.call('SET', current, member)
redis.call('PUBLISH', channel, member)
return 'ok'
"""

# Puts keys of the wrong kind aside, and lets the sequence go on above every order given so far.
#
# KEYS: sequence, index, history, manifests, uploads. Returns the keys that were broken.
_MEND = """
local sequence, index, history, manifests, uploads = unpack(KEYS)
local broken = {}
local function expect(key, kind)
    local found = redis.call('TYPE', key).ok
    if found == 'none' or found == kind then return end
    redis.call('RENAME', key, key .. ':broken')
    redis.call('EXPIRE', key .. ':broken', 86400)
    table.insert(broken, key)
end
expect(sequence, 'string')
expect(index, 'zset')
expect(history, 'zset')
expect(manifests, 'hash')
expect(uploads, 'hash')
local largest, last = 2^52, 0
for _, key in ipairs({index, history}) do
    for _ = 1, 200 do
        local top = redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')
        local order = tonumber(top[2] or '0') or 1/0
        if order <= largest then
            last = math.max(last, math.floor(order))
            break
        end
        redis.call('ZADD', key, 0, top[1])
        table.insert(broken, key)
    end
end
local text = redis.call('GETRANGE', sequence, 0, 16)
local order = #text <= 16 and string.match(text, '^%d+$') and tonumber(text) or 0
if order > largest then order = 0 end
if order < last or (text ~= '' and order == 0) then
    redis.call('SET', sequence, string.format('%.0f', last))
    table.insert(broken, sequence)
end
return broken
"""

# Removes chunks that are not part of a committed snapshot: those expire.
#
# KEYS: names of chunks, at most _SLICE.
_REMOVE_CHUNKS = """
for _, key in ipairs(KEYS) do
    if redis.call('PTTL', key) >= 0 then redis.call('UNLINK', key) end
end
"""


class _Begun(msgspec.Struct, frozen=True):
    """An unfinished upload."""

    lineage: Annotated[str, Meta(max_length=128)]
    chunks: Annotated[int, Meta(ge=0, le=MAX_CHUNKS)]
    begun_s: Annotated[int, Meta(ge=0, le=LARGEST_INTEGER)]


_BEGUN = msgspec.json.Decoder(_Begun)


class Publication:
    """Writes and removes snapshots.

    Args:
        client: A client that returns bytes.
        keys: Names of the keys.
        upload_ttl_s: When the chunks of an unfinished upload expire.
        outage_timeout_s: How long each operation is tried while the server is away or is a replica.
        damage: Where what is broken is noted.
    """

    def __init__(
        self,
        client: redis.Redis,
        keys: SnapshotKeys,
        upload_ttl_s: int,
        outage_timeout_s: float = 2.0,
        damage: Damage | None = None,
    ) -> None:
        self._client = client
        self._keys = keys
        self._upload_ttl_s = upload_ttl_s
        self._outage_timeout_s = outage_timeout_s
        self._damage = damage or Damage()
        self.leases = Leases(client, keys.key(""), outage_timeout_s)
        self._commit_script = client.register_script(_COMMIT)
        self._mend_script = client.register_script(_MEND)
        self._remove_script = client.register_script(_REMOVE_CHUNKS)

    def mend(self) -> None:
        """Put aside what would refuse a publication: keys of the wrong kind, orders beyond all bounds."""
        names = ("sequence", "index", "history", "manifests", "uploads")
        keys = [self._keys.key(name) for name in names]
        broken = self._tried("the snapshots' keys were checked", lambda: self._mend_script(keys=keys))
        for key in broken:
            self._damage.note(f"Redis key {key.decode(errors='replace')}: mended, expected what publications write")

    def upload(self, manifest: Manifest, payload: bytes) -> None:
        """Write the chunks; readers do not see them yet."""
        name = member(manifest.lineage, manifest.version)
        begun = {"lineage": manifest.lineage, "chunks": len(manifest.chunks), "begun_s": self._server_s()}
        entry = (self._keys.key("uploads"), manifest.upload, json.dumps(begun))
        self._tried(f"snapshot {name} was published", lambda: self._client.hset(*entry))
        view, start = memoryview(payload), 0
        for key, chunk in zip(self._keys.chunks(manifest), manifest.chunks, strict=True):
            piece = view[start : start + chunk.bytes]
            self._tried(f"snapshot {name} was published", self._writing(key, piece))
            start += chunk.bytes

    def commit(self, manifest: Manifest, fencing: int | None = None) -> None:
        """Make an upload the current snapshot, atomically.

        Args:
            manifest: What was uploaded.
            fencing: The number of the publisher's lease; None is allowed while nobody holds one.

        Raises:
            LeaseHeld, LeaseLost: As :meth:`feature_store.lease.Leases.check`.
            SnapshotStale: The lineage's current version is this one or a later one.
            SnapshotError: A chunk is gone.
        """
        name = member(manifest.lineage, manifest.version)
        names = ("current", "manifests", "index", "history", "sequence", "uploads", "lease", "fencing")
        keys = [self._keys.key(key) for key in names]
        args: list[str | int | bytes] = [manifest.lineage, manifest.version, manifest.to_json(), manifest.upload]
        args += [len(manifest.chunks), self._keys.key("chunk:"), self._keys.key("published")]
        args.append("" if fencing is None else str(fencing))
        answer = self._tried(f"snapshot {name} was published", lambda: self._commit_script(keys=keys, args=args))
        outcome, _, detail = answer.decode(errors="replace").partition(" ")
        if outcome == "fenced":
            raise self.leases.refused(fencing, detail)
        if outcome == "stale":
            raise stale(manifest.lineage, manifest.version, int(detail))
        if outcome != "ok":
            raise SnapshotError(
                f"snapshot {name}: chunk {detail} of {len(manifest.chunks)} was "
                f"gone before the publication was complete: another publisher of the lineage is running, Redis "
                f"restarted empty, or the upload took longer than {self._upload_ttl_s} s"
            )

    def abandon(self, manifest: Manifest) -> None:
        """Remove the chunks of a failed publication. If Redis does not answer, they expire."""
        try:
            self._remove(manifest.upload, len(manifest.chunks))
        except redis.RedisError:
            return

    def remove_abandoned(self, lineage: str) -> None:
        """Remove unfinished uploads: all of this lineage, which has no other publisher, and overdue ones of others."""
        now_s, cursor = self._server_s(), 0
        for _ in range(_MAX_PAGES):
            cursor, page = self._client.hscan(self._keys.key("uploads"), cursor, count=_SLICE)
            for upload, text in cast("dict[bytes, bytes]", page).items():
                begun = self._begun(upload, text)
                if begun is None or begun.lineage == lineage or abs(now_s - begun.begun_s) > self._upload_ttl_s:
                    self._remove(upload, begun.chunks if begun else 0)
            if cursor == 0:
                return

    def trim(self, removable: Sequence[Manifest], surplus_bytes: int) -> None:
        """Remove payloads, in the order given, until ``surplus_bytes`` are freed."""
        for manifest in removable:
            if surplus_bytes <= 0:
                return
            self._client.zrem(self._keys.key("index"), member(manifest.lineage, manifest.version))
            for keys in _slices(self._keys.chunks(manifest)):
                self._client.unlink(*keys)
            surplus_bytes -= manifest.total_bytes

    def trim_history(self, max_manifests: int, loadable: Iterable[bytes]) -> None:
        """Remove the oldest manifests until one more fits into ``max_manifests``. Loadable snapshots keep theirs."""
        kept = set(loadable)
        surplus = cast("list[bytes]", self._client.zrange(self._keys.key("history"), 0, -max_manifests))
        for gone in _slices([name for name in surplus if name not in kept]):
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.zrem(self._keys.key("history"), *gone)
                pipeline.hdel(self._keys.key("manifests"), *gone)
                pipeline.execute()

    def forget(self, key: str, names: Sequence[bytes]) -> None:
        """Remove names from ``index`` or ``history``."""
        for some in _slices(names):
            self._client.zrem(self._keys.key(key), *some)

    def remove_chunks_of(self, name: bytes) -> None:
        """Remove the chunks of a snapshot whose manifest is gone or broken.

        Looks through the names of all keys, for a bounded time.
        """
        pattern = _glob_escaped(self._keys.key("chunk:")) + name.decode() + ":*"
        deadline_s, cursor = time.monotonic() + _SCAN_S, 0
        while time.monotonic() < deadline_s:
            cursor, found = self._client.scan(cursor, match=pattern, count=1000)
            for keys in _slices(found):
                self._client.unlink(*keys)
            if cursor == 0:
                return

    def _begun(self, upload: bytes, text: bytes) -> _Begun | None:
        try:
            return _BEGUN.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            place = f"Redis key {self._keys.key('uploads')}, {shown(upload)}"
            self._damage.note(f"{place}: {shown(text)}, expected an unfinished upload: {error}")
            return None

    def _remove(self, upload: bytes | str, chunks: int) -> None:
        """Remove an unfinished upload. A committed one is no longer listed, and its chunks do not expire."""
        if not self._client.hdel(self._keys.key("uploads"), upload):
            return
        name = upload if isinstance(upload, str) else upload.decode(errors="replace")
        for keys in _slices([self._keys.chunk(name, i) for i in range(chunks)]):
            self._remove_script(keys=keys)

    def _writing(self, key: str, piece: memoryview) -> Callable[[], object]:
        return lambda: self._client.set(key, piece, ex=self._upload_ttl_s)

    def _tried(self, doing: str, call: Callable[[], _T]) -> _T:
        return retry_during_outage(self._client, doing, call, FEATURE_STORE, self._outage_timeout_s)

    def _server_s(self) -> int:
        seconds, _ = self._client.time()
        return int(seconds)


def _glob_escaped(text: str) -> str:
    """The text as a pattern of Redis that matches nothing else."""
    return "".join(f"\\{c}" if c in "\\*?[]^" else c for c in text)


def _slices(values: Sequence[_T]) -> Iterable[Sequence[_T]]:
    return (values[start : start + _SLICE] for start in range(0, len(values), _SLICE))
