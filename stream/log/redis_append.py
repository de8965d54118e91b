"""Appending to Redis streams: once, the next id, also after a foreign entry, and the incarnation of a new stream.

A batch of records for one stream is added by a script, which leaves the first entry's id under a key of the batch's own
for a while. Sent a second time, because its acknowledgement was lost, the batch is found to be there.
"""

import math
import uuid
from collections.abc import Callable, Sequence
from typing import cast

import redis

from smes.errors import EventLogError
from smes_io.redis_client import not_now
from stream.log.event_log import OutRecord, TopicPartition
from stream.log.redis_entries import pack_headers
from stream.log.redis_ids import NO_ID, Id, next_ids, offset_of, parse_id

Placed = tuple[str, TopicPartition, OutRecord]
"""A stream's key, its partition, and a record for it."""

_BEHIND = "equal or smaller than the target stream top item"
_MOST_TURNS = 1000  # each one lost to another writer that adds ids of its own
_INCARNATION = "incarnation-"

# KEYS[1]: a stream; ARGV[1]: a name. Returns the stream's incarnation, which becomes ARGV[1] if it has none.
_INCARNATION_LUA = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
    for i = 1, #group, 2 do
      if group[i] == 'name' and string.sub(group[i + 1], 1, 12) == 'incarnation-' then return group[i + 1] end
    end
  end
end
redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
return ARGV[1]
"""

# KEYS[1]: a stream; KEYS[2]: what remembers the batch. ARGV: a name for the stream's incarnation, the id to ask for,
# about how many entries are kept, for how many seconds the batch is remembered, the arrival time; then value and
# headers of each record. Returns the id of the batch's first entry; those of the others follow it.
_ADD_LUA = (
    """
local before = redis.call('GET', KEYS[2])
if before then return before end
local function named()"""
    + _INCARNATION_LUA
    + """end
named()
local first
for i = 6, #ARGV, 2 do
  local id = redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[3], ARGV[2], 'v', ARGV[i], 'h', ARGV[i + 1], 't', ARGV[5])
  first = first or id
end
redis.call('SET', KEYS[2], first, 'EX', ARGV[4])
return first
"""
)

# KEYS[1]: a stream. The largest id that an entry of it ever had.
_LAST_LUA = """
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do if info[i] == 'last-generated-id' then return info[i + 1] end end
"""


class _Batch:
    """Records for one stream that are added together, once however often they are sent.

    Args:
        key: The stream.
        at: Its partition.
        rows: Their places in what the caller gave.
        records: As many.
    """

    def __init__(self, key: str, at: TopicPartition, rows: Sequence[int], records: Sequence[OutRecord]) -> None:
        self.key, self.at, self.rows, self.records = key, at, rows, records
        self.token = uuid.uuid4().hex


class Appender:
    """Adds records to streams.

    Args:
        client: Returns bytes.
        prefix: Of the log's keys.
        now_ms: The producer's clock, Unix milliseconds.
        keep: About how many entries a stream keeps.
        remember_s: For how long the server remembers what was added, so that it adds nothing twice.
    """

    def __init__(
        self, client: redis.Redis, prefix: str, now_ms: Callable[[], int], keep: int, remember_s: float
    ) -> None:
        self._client, self._prefix, self._now_ms, self._keep = client, prefix, now_ms, keep
        self._remember_s = max(1, math.ceil(remember_s))
        self._newest: dict[str, Id] = {}  # of streams that somebody else writes to, too

    def incarnations(self, keys: Sequence[str]) -> list[str]:
        """The streams' incarnations; one that has none gets a random one."""
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.eval(_INCARNATION_LUA, 1, key, _new_name())
        return [cast(bytes, name).decode() for name in pipe.execute()]

    def sending(self, placed: Sequence[Placed], where: str) -> Callable[[], list[int | None]]:
        """A call that adds the records and returns their offsets; called again after an error, it goes on.

        Args:
            placed: What to add.
            where: Names the server in errors.
        """
        return _Sending(self, placed, self._now_ms(), where)

    def most(self, key: str) -> int:
        """How many records one batch of a stream may have."""
        return next_ids(self._newest.get(key, NO_ID))[1]

    def add(self, batches: Sequence[_Batch], arrival_ms: int) -> list[object]:
        """Add the batches with one round trip; of each the first entry's id, or an error."""
        pipe = self._client.pipeline(transaction=False)
        for batch in batches:
            ask, _ = next_ids(self._newest.get(batch.key, NO_ID))
            fields = (field for record in batch.records for field in (record.value, pack_headers(record.headers)))
            arguments = (_new_name(), ask, self._keep, self._remember_s, arrival_ms, *fields)
            sent = f"{self._prefix}:log:sent:{batch.token}"
            pipe.eval(_ADD_LUA, 2, batch.key, sent, *arguments)  # type: ignore[arg-type]  # bytes are taken, too
        answers: list[object] = pipe.execute(raise_on_error=False)
        return answers

    def added(self, key: str, entry: Id) -> None:
        """Take note of the newest id of a stream that somebody else writes to, too."""
        if entry[0] > 0:
            self._newest[key] = entry

    def catch_up(self, key: str, at: TopicPartition) -> None:
        """Go on after the largest id of a stream, which a foreign entry has.

        Raises:
            EventLogError: The id is too large to be a position.
        """
        newest = parse_id(cast(bytes, self._client.eval(_LAST_LUA, 1, key)))
        offset_of(at, newest)
        self.added(key, newest)


class _Sending:
    """Records on their way: those not yet sent, by stream, and of each stream the batch that may have been added."""

    def __init__(self, appender: Appender, placed: Sequence[Placed], arrival_ms: int, where: str) -> None:
        self._appender, self._arrival_ms, self._where = appender, arrival_ms, where
        self._records = [record for _, _, record in placed]
        self._offsets: list[int | None] = [None] * len(placed)
        self._at: dict[str, TopicPartition] = {}
        self._unsent: dict[str, list[int]] = {}
        for row, (key, at, _) in enumerate(placed):
            self._at[key] = at
            self._unsent.setdefault(key, []).append(row)
        self._open: dict[str, _Batch] = {}

    def __call__(self) -> list[int | None]:
        turns = 0
        while any(self._unsent.values()) and turns < _MOST_TURNS:
            late = self._send()
            for key in late:
                self._appender.catch_up(key, self._at[key])
            turns += bool(late)
        if not any(self._unsent.values()):
            return self._offsets
        raise EventLogError(f"{self._where}: {_MOST_TURNS} turns lost to a program that adds larger ids all the time")

    def _send(self) -> list[str]:
        """Send the next batch of each stream; the streams where somebody was faster with a larger id.

        With an error, too, what was acknowledged is no longer among the unsent.
        """
        for key, rows in self._unsent.items():
            if rows and key not in self._open:
                first = rows[: self._appender.most(key)]
                self._open[key] = _Batch(key, self._at[key], first, [self._records[row] for row in first])
        batches = list(self._open.values())
        late: list[str] = []
        put_off: Exception | None = None
        refused: list[tuple[_Batch, Exception]] = []
        for batch, answer in zip(batches, self._appender.add(batches, self._arrival_ms), strict=True):
            if not isinstance(answer, Exception):
                self._acknowledged(batch, parse_id(cast(bytes, answer)))
            elif isinstance(answer, redis.ConnectionError) or not_now(answer):
                put_off = answer
            elif _BEHIND in str(answer):  # nothing was added, by an earlier try neither
                late.append(batch.key)
                del self._open[batch.key]
            else:
                refused.append((batch, answer))
        if refused:
            first_refused, error = refused[0]
            if "WRONGTYPE" in str(error):
                raise error  # the log names the key
            count, total = (sum(len(each.rows) for each in some) for some in ([b for b, _ in refused], batches))
            at = first_refused.at
            many = f"{count} of {total} records refused"
            raise EventLogError(f"{at.topic}/{at.partition} in {self._where}: {many}: {error}")
        if put_off:
            raise put_off
        return late

    def _acknowledged(self, batch: _Batch, first: Id) -> None:
        milliseconds, sequence = first
        for n, row in enumerate(batch.rows):
            self._offsets[row] = offset_of(batch.at, (milliseconds, sequence + n))
        self._appender.added(batch.key, (milliseconds, sequence + len(batch.rows) - 1))
        del self._open[batch.key]
        self._unsent[batch.key] = self._unsent[batch.key][len(batch.rows) :]


def _new_name() -> str:
    return f"{_INCARNATION}{uuid.uuid4().hex}"
