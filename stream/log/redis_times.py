"""Where in a Redis stream a time lies. Our entries have no times in their ids, so it is searched for."""

from collections.abc import Callable

# KEYS[1]: a stream; ARGV[1]: an id. Returns the id of the next entry that says when it arrived, and that time: its
# field t, or the milliseconds of its id where another program let Redis choose the id. Values stay in the server.
ARRIVAL_LUA = """
local after = ARGV[1]
while true do
  local found = redis.call('XRANGE', KEYS[1], '(' .. after, '+', 'COUNT', 1)
  if #found == 0 then return {} end
  local id, fields = found[1][1], found[1][2]
  for i = 1, #fields, 2 do
    if fields[i] == 't' and string.match(fields[i + 1], '^[0-9]+$') and #fields[i + 1] < 16 then
      return {id, fields[i + 1]}
    end
  end
  local ms = string.match(id, '^[0-9]+')
  if ms ~= '0' and #ms < 16 then return {id, ms} end
  after = id
end
"""


def position_at(time_ms: int, begin: int, end: int, arrival: Callable[[int], tuple[int, int] | None]) -> int:
    """Position of the first entry that arrived at ``time_ms`` or later, ``end`` if none did: a binary search.

    Args:
        time_ms: Unix milliseconds.
        begin, end: Where the stream begins and ends.
        arrival: Position → offset and arrival time of the first entry from there on that has one, None without any.
    """
    low, high = begin, end  # what is before low came earlier; from high on, nothing did
    while low < high:
        middle = (low + high) // 2
        found = arrival(middle)
        if found is None or found[0] >= high or found[1] >= time_ms:
            high = middle
        else:
            low = found[0] + 1
    return low
