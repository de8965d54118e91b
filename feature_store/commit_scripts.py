"""The scripts by which Redis commits, mends and removes snapshots; each is one atomic step.

:mod:`feature_store.publication` has the keys and runs them.
"""

from feature_store.lease import LEASE_FUNCTIONS
from feature_store.pins import MAX_DECISION_BYTES
from feature_store.pointer import MAX_POINTER_BYTES

# Commits an upload in one atomic step.
#
# KEYS: current, manifests, index, history, held, sequence, uploads, lease, fencing, fenced, then in order the chunks
#       that are in Redis.
# ARGV: lineage, version, manifest JSON, upload, fencing number, channel, the version that a delta applies to ('' for a
#       full snapshot), 'held' to keep it aside ('' otherwise), the new pointer, the pointer that is there if it is
#       forged ('' otherwise), then the names under which other ranks uploaded their parts.
# Returns
#   'ok'         committed, now or by an earlier call whose answer the client lost;
#   'fenced …'   another publisher holds or held the lease (as taken() has it), nothing was changed;
#   'stale V'    the lineage's current version V is this one or a later one; or V is this version, and the index lists
#                it already. Nothing was changed;
#   'gap P'      the current version is not the one that the delta applies to, nothing was changed;
#   'lost I'     chunk I (or, with I = 0, the whole upload) is gone, nothing was announced.
#
# A pointer counts only if it names a snapshot that has a manifest.
COMMIT = f"""{LEASE_FUNCTIONS}
local current, manifests, index, history, held, sequence, uploads, lease, fencing, fenced = unpack(KEYS, 1, 10)
local lineage, version, manifest, upload, number, channel, parent, aside, text, forged = unpack(ARGV)
local member = lineage .. ':' .. version
local other = taken(lease, fencing, number)
if other then
    note_fenced(fenced, number, member)
    return 'fenced ' .. other
end
if redis.call('HEXISTS', uploads, upload) == 0 then
    if redis.call('HGET', manifests, member) == manifest then return 'ok' end
    return 'lost 0'
end
for i = 11, #ARGV do
    if redis.call('HEXISTS', uploads, ARGV[i]) == 0 then return 'lost 0' end
end
local raw = redis.pcall('GETRANGE', current, 0, {MAX_POINTER_BYTES})
local pointer = type(raw) == 'string' and raw ~= forged and string.match(raw, '^[^ ]*') or ''
if redis.call('HEXISTS', manifests, pointer) == 1 then
    local served_lineage, served_version = string.match(pointer, '^(.*):(%d+)$')
    if served_lineage == lineage and tonumber(served_version) >= tonumber(version) then
        return 'stale ' .. served_version
    end
end
if redis.call('ZSCORE', index, member) and redis.call('HEXISTS', manifests, member) == 1 then
    return 'stale ' .. version
end
if parent ~= '' and pointer ~= lineage .. ':' .. parent then return 'gap ' .. pointer end
for i = 11, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 0 then return 'lost ' .. (i - 11) end
end
for i = 11, #KEYS do redis.call('PERSIST', KEYS[i]) end
local order = redis.call('INCR', sequence)
redis.call('HSET', manifests, member, manifest)
if aside == 'held' then
    redis.call('ZADD', held, order, member)
    redis.call('HDEL', uploads, upload, unpack(ARGV, 11))
    return 'ok'
end
redis.call('ZREM', held, member)
redis.call('ZADD', index, order, member)
redis.call('ZADD', history, order, member)
redis.call('HDEL', uploads, upload, unpack(ARGV, 11))
redis.call('SET', current, text)
redis.call('PUBLISH', channel, member)
return 'ok'
"""

# Commits the base of a version that was published as a delta, in one atomic step.
#
# KEYS: index, manifests, bases, uploads, lease, fencing, then in order the chunks that are in Redis.
# ARGV: lineage, version, manifest JSON, upload, fencing number, then the names under which other ranks uploaded.
# Returns 'ok', 'fenced …' and 'lost I' as above, or 'gone': the version itself cannot be loaded any more.
COMMIT_BASE = f"""{LEASE_FUNCTIONS}
local index, manifests, bases, uploads, lease, fencing = unpack(KEYS, 1, 6)
local lineage, version, manifest, upload, number = unpack(ARGV)
local member = lineage .. ':' .. version
local other = taken(lease, fencing, number)
if other then return 'fenced ' .. other end
if redis.call('HEXISTS', uploads, upload) == 0 then
    if redis.call('HGET', bases, member) == manifest then return 'ok' end
    return 'lost 0'
end
for i = 6, #ARGV do
    if redis.call('HEXISTS', uploads, ARGV[i]) == 0 then return 'lost 0' end
end
if not redis.call('ZSCORE', index, member) or redis.call('HEXISTS', manifests, member) == 0 then return 'gone' end
for i = 7, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 0 then return 'lost ' .. (i - 7) end
end
for i = 7, #KEYS do redis.call('PERSIST', KEYS[i]) end
redis.call('HSET', bases, member, manifest)
redis.call('HDEL', uploads, upload, unpack(ARGV, 6))
return 'ok'
"""

# Puts keys of the wrong kind aside, and lets the sequence go on above every order given so far.
#
# KEYS: sequence, index, history, held, manifests, uploads, bases, then the names under which each of these is put
#       aside.
# Returns the keys that were broken.
MEND = """
local sequence, index, history, held, manifests, uploads, bases = unpack(KEYS, 1, 7)
local aside = {}
for i = 1, 7 do aside[KEYS[i]] = KEYS[i + 7] end
local broken = {}
local function expect(key, kind)
    local found = redis.call('TYPE', key).ok
    if found == 'none' or found == kind then return end
    redis.call('RENAME', key, aside[key])
    redis.call('EXPIRE', aside[key], 86400)
    table.insert(broken, key)
end
expect(sequence, 'string')
expect(index, 'zset')
expect(history, 'zset')
expect(held, 'zset')
expect(manifests, 'hash')
expect(uploads, 'hash')
expect(bases, 'hash')
local largest, last = 2^52, 0
for _, key in ipairs({index, history, held}) do
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
# KEYS: names of chunks, at most 200.
REMOVE_CHUNKS = """
for _, key in ipairs(KEYS) do
    if redis.call('PTTL', key) >= 0 then redis.call('UNLINK', key) end
end
"""

# Puts what an operator decided into force, in one atomic step.
#
# KEYS: decision, decisions, current, manifests, index, history, held, sequence, then the names under which the first
#       two are put aside if they hold another kind of value.
# ARGV: the record in force as the operator saw it, the new record, its number, the lineage:version that it names, the
#       pointer as the operator saw it, the new pointer ('' to leave it), channel, 'held' if the version may be a held
#       one ('' otherwise), how many decisions to keep.
# Returns
#   'ok'       decided, now or by an earlier call whose answer the client lost;
#   'changed'  another record is in force, or another snapshot is current; nothing was changed;
#   'gone'     the version is not listed any more; nothing was changed.
DECIDE = f"""
local decision, decisions, current, manifests, index, history, held, sequence = unpack(KEYS, 1, 8)
local before, record, number, member, seen, pointer, channel, aside, most = unpack(ARGV)
local function text_of(key, bytes)
    local text = redis.pcall('GETRANGE', key, 0, bytes)
    return type(text) == 'string' and text or '(no string)'
end
local function put_aside(key, kind, name)
    local found = redis.call('TYPE', key).ok
    if found == 'none' or found == kind then return end
    redis.call('RENAME', key, name)
    redis.call('EXPIRE', name, 86400)
end
local found = text_of(decision, {MAX_DECISION_BYTES})
if found == record then return 'ok' end
if found ~= before or text_of(current, {MAX_POINTER_BYTES}) ~= seen then return 'changed' end
if redis.call('HEXISTS', manifests, member) == 0 then return 'gone' end
if not redis.call('ZSCORE', index, member) then
    if aside ~= 'held' or not redis.call('ZSCORE', held, member) then return 'gone' end
    local order = redis.call('INCR', sequence)
    redis.call('ZREM', held, member)
    redis.call('ZADD', index, order, member)
    redis.call('ZADD', history, order, member)
end
if pointer ~= '' then redis.call('SET', current, pointer) end
put_aside(decision, 'string', KEYS[9])
put_aside(decisions, 'hash', KEYS[10])
if redis.call('HLEN', decisions) > 2 * tonumber(most) then
    redis.call('RENAME', decisions, KEYS[10])
    redis.call('EXPIRE', KEYS[10], 86400)
end
redis.call('SET', decision, record)
redis.call('HSET', decisions, number, record)
local numbers = redis.call('HKEYS', decisions)
table.sort(numbers, function(a, b) return (tonumber(a) or 0) < (tonumber(b) or 0) end)
for i = 1, #numbers - tonumber(most) do redis.call('HDEL', decisions, numbers[i]) end
redis.call('PUBLISH', channel, member)
return 'ok'
"""
