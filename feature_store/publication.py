"""How a snapshot gets into Redis and out again: upload, commit, removal of what was abandoned, retention.

The keys are :class:`SnapshotKeys`; all of them lie under ``{namespace}:snapshots:``

================== ======= ==========================================================================
``current``        string  ``lineage:version`` of what serving should load
``manifests``      hash    ``lineage:version`` → manifest JSON; outlives the chunks, for freshness
``index``          zset    ``lineage:version`` of every loadable snapshot, by order of publication
``history``        zset    the same of every manifest kept
``sequence``       integer order of publication
``uploads``        hash    upload → what a publisher has begun and not finished (JSON)
``chunk:{u}:{i}``  string  piece i of upload u; expires unless its publication completes
================== ======= ==========================================================================

and the channel ``published`` carries ``lineage:version``.

The order of a publication: ``uploads`` entry, chunks (expiring), then in one script: chunks made permanent, manifest,
``current``, announcement. So whenever a publisher dies, readers see the snapshot before or all of this one.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import redis

from feature_store.manifest import Manifest
from smes.errors import SnapshotError, SnapshotStale

# One atomic step: refuse to go backwards, make the chunks permanent, write the manifest, move the pointer, announce.
# A client that lost the answer asks again: what is committed already is answered ok.
_COMMIT = """
local current, manifests, index, history, sequence, uploads = unpack(KEYS)
local lineage, version, manifest, upload, chunks, prefix, channel = unpack(ARGV)
local member = lineage .. ':' .. version
if redis.call('HEXISTS', uploads, upload) == 0 then
    if redis.call('HGET', manifests, member) == manifest then return 'ok' end
    return 'lost 0'
end
local pointer = redis.call('GET', current)
if pointer then
    local served_lineage, served_version = string.match(pointer, '^(.*):(%d+)$')
    if served_lineage == lineage and tonumber(served_version) >= tonumber(version) then
        return 'stale ' .. served_version
    end
end
for i = 0, tonumber(chunks) - 1 do
    if redis.call('PERSIST', prefix .. upload .. ':' .. i) == 0 then return 'lost ' .. i end
end
local order = redis.call('INCR', sequence)
redis.call('HSET', manifests, member, manifest)
redis.call('ZADD', index, order, member)
redis.call('ZADD', history, order, member)
redis.call('HDEL', uploads, upload)
redis.call('SET', current, member)
redis.call('PUBLISH', channel, member)
return 'ok'
"""

# Only what is still registered as unfinished: a commit whose answer was lost keeps its chunks.
_REMOVE_UPLOAD = """
if redis.call('HDEL', KEYS[1], ARGV[1]) == 1 then
    for i = 0, tonumber(ARGV[2]) - 1 do redis.call('UNLINK', ARGV[3] .. ARGV[1] .. ':' .. i) end
end
"""


@dataclass(frozen=True)
class SnapshotKeys:
    """Names of the keys (see the module's table) and of their members."""

    namespace: str

    def key(self, name: str) -> str:
        return f"{self.namespace}:snapshots:{name}"

    def chunk(self, upload: str, i: int) -> str:
        return self.key(f"chunk:{upload}:{i}")

    def chunks(self, manifest: Manifest) -> list[str]:
        return [self.chunk(manifest.upload, i) for i in range(len(manifest.chunks))]


def member(lineage: str, version: int) -> str:
    """How a snapshot is named in Redis and in messages."""
    return f"{lineage}:{version}"


def split_member(name: str) -> tuple[str, int]:
    """The inverse of :func:`member`."""
    lineage, _, version = name.rpartition(":")
    return lineage, int(version)


def stale(lineage: str, version: int, served_version: int) -> SnapshotStale:
    return SnapshotStale(f"snapshot {member(lineage, version)}: version {served_version} is already published")


class Publication:
    """The writing half of a snapshot store. Redis' errors pass through untranslated.

    Args:
        client: A client that returns bytes.
        keys: Where everything lies.
        upload_ttl_s: When the chunks of an unfinished upload expire.
    """

    def __init__(self, client: redis.Redis, keys: SnapshotKeys, upload_ttl_s: int) -> None:
        self._client = client
        self._keys = keys
        self._upload_ttl_s = upload_ttl_s
        self._commit_script = client.register_script(_COMMIT)
        self._remove_script = client.register_script(_REMOVE_UPLOAD)

    def upload(self, manifest: Manifest, payload: bytes) -> None:
        """Write the chunks; nobody reads them yet."""
        begun = {"lineage": manifest.lineage, "chunks": len(manifest.chunks), "begun_s": self._server_s()}
        self._client.hset(self._keys.key("uploads"), manifest.upload, json.dumps(begun))
        view, start = memoryview(payload), 0
        for key, chunk in zip(self._keys.chunks(manifest), manifest.chunks, strict=True):
            self._client.set(key, view[start : start + chunk.bytes], ex=self._upload_ttl_s)
            start += chunk.bytes

    def commit(self, manifest: Manifest) -> None:
        """Make an upload the current snapshot, atomically.

        Raises:
            SnapshotStale: The lineage is there already, or further.
            SnapshotError: A chunk is gone.
        """
        cut: list[str | int | bytes] = [manifest.lineage, manifest.version, manifest.to_json(), manifest.upload]
        names = ("current", "manifests", "index", "history", "sequence", "uploads")
        answer = self._commit_script(
            keys=[self._keys.key(name) for name in names],
            args=[*cut, len(manifest.chunks), self._keys.key("chunk:"), self._keys.key("published")],
        )
        outcome, _, detail = answer.decode().partition(" ")
        if outcome == "stale":
            raise stale(manifest.lineage, manifest.version, int(detail))
        if outcome != "ok":
            raise SnapshotError(
                f"snapshot {member(manifest.lineage, manifest.version)}: chunk {detail} of {len(manifest.chunks)} was "
                f"gone before the publication was complete: another publisher of the lineage is running, Redis "
                f"restarted empty, or the upload took longer than {self._upload_ttl_s} s"
            )

    def abandon(self, manifest: Manifest) -> None:
        """Remove what a failed publication left, as far as Redis still answers (else it expires)."""
        try:
            self._remove(manifest.upload, len(manifest.chunks))
        except redis.RedisError:
            return

    def remove_abandoned(self, lineage: str) -> None:
        """Remove unfinished uploads: those of this lineage, whose only publisher is here, and overdue ones."""
        now_s = self._server_s()
        for upload, text in self._client.hgetall(self._keys.key("uploads")).items():
            begun = json.loads(text)
            if begun["lineage"] == lineage or now_s - begun["begun_s"] > self._upload_ttl_s:
                self._remove(upload, begun["chunks"])

    def trim(self, removable: Sequence[Manifest], surplus_bytes: int) -> None:
        """Remove payloads in the order given until ``surplus_bytes`` are freed."""
        for manifest in removable:
            if surplus_bytes <= 0:
                return
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.zrem(self._keys.key("index"), member(manifest.lineage, manifest.version))
                pipeline.unlink(*self._keys.chunks(manifest))
                pipeline.execute()
            surplus_bytes -= manifest.total_bytes

    def trim_history(self, max_manifests: int) -> None:
        """Remove the oldest manifests beyond ``max_manifests`` - 1 (one more is coming), never a loadable one's."""
        loadable = set(self._client.zrange(self._keys.key("index"), 0, -1))
        surplus = self._client.zrange(self._keys.key("history"), 0, -max_manifests)
        gone = [name for name in surplus if isinstance(name, bytes) and name not in loadable]
        if gone:
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.zrem(self._keys.key("history"), *gone)
                pipeline.hdel(self._keys.key("manifests"), *gone)
                pipeline.execute()

    def _remove(self, upload: bytes | str, chunks: int) -> None:
        self._remove_script(keys=[self._keys.key("uploads")], args=[upload, chunks, self._keys.key("chunk:")])

    def _server_s(self) -> int:
        seconds, _ = self._client.time()
        return int(seconds)
