"""Appending to Redis streams: the next id, also after a foreign entry, and the incarnation of a new stream."""

import uuid
from collections.abc import Callable, Sequence
from typing import cast

import redis
from redis.typing import EncodableT, FieldT

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

# KEYS[1]: a stream. The largest id that an entry of it ever had.
_LAST_LUA = """
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do if info[i] == 'last-generated-id' then return info[i + 1] end end
"""


class Appender:
    """Adds records to streams.

    Args:
        client: Returns bytes.
        now_ms: The producer's clock, Unix milliseconds.
        keep: About how many entries a stream keeps.
    """

    def __init__(self, client: redis.Redis, now_ms: Callable[[], int], keep: int) -> None:
        self._client, self._now_ms, self._keep = client, now_ms, keep
        self._newest: dict[str, Id] = {}  # of streams that somebody else writes to, too

    def incarnations(self, keys: Sequence[str]) -> list[str]:
        """The streams' incarnations; one that has none gets a random one."""
        pipe = self._client.pipeline(transaction=False)
        for key in keys:
            pipe.eval(_INCARNATION_LUA, 1, key, _new_name())
        return [cast(bytes, name).decode() for name in pipe.execute()]

    def sending(self, placed: Sequence[Placed], where: str) -> Callable[[], None]:
        """A call that adds the records; called again after an error, it adds those that were not acknowledged.

        Args:
            placed: What to add.
            where: Names the server in errors.
        """
        return _Sending(self, placed, self._now_ms(), where)

    def add(self, placed: Sequence[Placed], arrival_ms: int) -> list[object]:
        """Add the first records with one round trip, usually all; the answer to each, an id or an error."""
        ids = {key: next_ids(self._newest.get(key, NO_ID)) for key in sorted({key for key, _, _ in placed})}
        pipe = self._client.pipeline(transaction=False)
        for key in ids:  # before the first entry
            pipe.eval(_INCARNATION_LUA, 1, key, _new_name())
        for key, _, record in placed[: min(most for _, most in ids.values())]:
            fields: dict[FieldT, EncodableT] = {"v": record.value, "h": pack_headers(record.headers), "t": arrival_ms}
            pipe.xadd(key, fields, id=ids[key][0], maxlen=self._keep, approximate=True)
        answers: list[object] = pipe.execute(raise_on_error=False)
        return answers[len(ids) :]

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
    """Records on their way, without those that were acknowledged."""

    def __init__(self, appender: Appender, placed: Sequence[Placed], arrival_ms: int, where: str) -> None:
        self._appender, self._unsent, self._arrival_ms, self._where = appender, list(placed), arrival_ms, where

    def __call__(self) -> None:
        turns = 0
        while self._unsent and turns < _MOST_TURNS:
            late = self._send()
            for key, at in late.items():
                self._appender.catch_up(key, at)
            turns += bool(late)
        if not self._unsent:
            return
        raise EventLogError(f"{self._where}: {_MOST_TURNS} turns lost to a program that adds larger ids all the time")

    def _send(self) -> dict[str, TopicPartition]:
        """Send the next records; the streams where somebody was faster with a larger id.

        With an error, too, what was acknowledged is no longer among the unsent.
        """
        answers = self._appender.add(self._unsent, self._arrival_ms)
        left: list[Placed] = []
        late: dict[str, TopicPartition] = {}
        put_off: Exception | None = None
        refused: list[tuple[TopicPartition, Exception]] = []
        for one, answer in zip(self._unsent, answers, strict=False):
            if not isinstance(answer, Exception):
                self._appender.added(one[0], parse_id(cast(bytes, answer)))
            elif isinstance(answer, redis.ConnectionError) or not_now(answer):
                put_off = answer
                left.append(one)
            elif _BEHIND in str(answer):
                late[one[0]] = one[1]
                left.append(one)
            else:
                refused.append((one[1], answer))
        self._unsent = left + self._unsent[len(answers) :]
        if refused:
            at, first = refused[0]
            if "WRONGTYPE" in str(first):
                raise first  # the log names the key
            many = f"{len(refused)} of {len(answers)} records refused"
            raise EventLogError(f"{at.topic}/{at.partition} in {self._where}: {many}: {first}")
        if put_off:
            raise put_off
        return late


def _new_name() -> str:
    return f"{_INCARNATION}{uuid.uuid4().hex}"
