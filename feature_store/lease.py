"""The publisher's lease: at most one trainer publishes in a namespace, and a trainer that lost its lease cannot.

Keys, all under ``{namespace}:snapshots:``; the braces are part of the key, a hash tag

============ ====== =======================================================================================
``lease``    string ``number:since:token:holder`` of the publisher; it expires by Redis' own clock
``fencing``  string the last number given out; every new holder gets a higher one
``fenced``   string ``tries:at:number:lineage:version`` of the last try to publish without the lease, at in milliseconds
============ ====== =======================================================================================

A number is at least the server's time in milliseconds. So numbers grow even over a server that came back empty, or
over a failover to a replica that had missed the last one. The scripts compare numbers at the moment of a commit
(:mod:`feature_store.publication`). What is neither a lease nor a number of ours counts as absent.
"""

import logging
import secrets
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NamedTuple

import redis

from smes.errors import FeatureStoreUnavailable, LeaseHeld, LeaseLost
from smes_io.redis_client import FEATURE_STORE, address, retry_during_outage

LONGEST_LEASE_S = 3600.0
_LONGEST_HOLDER = 200

_logger = logging.getLogger(__name__)

# Defines for a script:
#   read_lease(key)          {number, since, left, token, holder}, or nil if there is no lease that runs;
#   last_number(key)         the last fencing number, 0 if there is none;
#   note_fenced(key, n, m)   note under the key that a publisher with number n ('' for none) tried to publish m without
#                            the lease: tries so far, the server's time in milliseconds, n, m;
#   taken(lease, fencing, n) who keeps the holder of number n ('' for none) from publishing, or nil. A lease that
#                            expired stays good until somebody else takes one.
LEASE_FUNCTIONS = f"""
local function server_ms()
    local now = redis.call('TIME')
    return tonumber(now[1]) * 1000 + math.floor(tonumber(now[2]) / 1000)
end
local function read_lease(key)
    local text = redis.pcall('GETRANGE', key, 0, {_LONGEST_HOLDER * 4 + 100})
    if type(text) ~= 'string' then return nil end
    local number, since, token, holder = string.match(text, '^(%d+):(%d+):(%x+):(.*)$')
    local left = redis.call('PTTL', key)
    if not number or #number > 16 or #since > 16 or left <= 0 or left > {int(LONGEST_LEASE_S * 1000)} then
        return nil
    end
    return {{number = number, since = since, left = left, token = token, holder = holder}}
end
local function last_number(key)
    local text = redis.pcall('GETRANGE', key, 0, 16)
    if type(text) ~= 'string' or #text > 16 or not string.match(text, '^%d+$') then return 0 end
    local number = tonumber(text)
    return number <= server_ms() + 1e11 and number or 0
end
local function describe(held)
    return string.format('%s %s %.0f %s', held.number, held.since, server_ms() + held.left, held.holder)
end
local function note_fenced(key, number, member)
    local text = redis.pcall('GETRANGE', key, 0, 16)
    local tries = type(text) == 'string' and tonumber(string.match(text, '^%d+')) or 0
    redis.call('SET', key, string.format('%.0f:%.0f:%s:%s', tries + 1, server_ms(), number, member))
end
local function taken(lease, fencing, number)
    local held = read_lease(lease)
    if held and held.number ~= number then return describe(held) end
    if not held and number ~= '' and last_number(fencing) > tonumber(number) then return '0 0 0 ' end
    return nil
end
"""

# KEYS: lease, fencing. ARGV: token, holder, milliseconds. Returns 'ok NUMBER SINCE', or 'held …' as describe() has it.
_ACQUIRE = f"""{LEASE_FUNCTIONS}
local lease, fencing = unpack(KEYS)
local token, holder, ttl_ms = unpack(ARGV)
local held = read_lease(lease)
if held and held.token == token then return 'ok ' .. held.number .. ' ' .. held.since end
if held then return 'held ' .. describe(held) end
local now = server_ms()
local number = string.format('%.0f', math.max(last_number(fencing) + 1, now))
redis.call('SET', fencing, number)
redis.call('SET', lease, string.format('%s:%.0f:%s:%s', number, now, token, holder), 'PX', ttl_ms)
return string.format('ok %s %.0f', number, now)
"""

# KEYS: lease, fencing. ARGV: number, token, holder, since, milliseconds. Returns 'ok', or 'lost …' as taken() has it.
_RENEW = f"""{LEASE_FUNCTIONS}
local lease, fencing = unpack(KEYS)
local number, token, holder, since, ttl_ms = unpack(ARGV)
local other = taken(lease, fencing, number)
if other then return 'lost ' .. other end
redis.call('SET', fencing, number)
redis.call('SET', lease, string.format('%s:%s:%s:%s', number, since, token, holder), 'PX', ttl_ms)
return 'ok'
"""

# KEYS: lease. ARGV: number.
_RELEASE = f"""{LEASE_FUNCTIONS}
local held = read_lease(KEYS[1])
if held and held.number == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 'ok'
"""

# KEYS: lease, fencing, fenced. ARGV: number, '' for none; what is to be published. Returns 'ok', or 'lost …' as taken()
# has it.
_CHECK = f"""{LEASE_FUNCTIONS}
local other = taken(KEYS[1], KEYS[2], ARGV[1])
if not other then return 'ok' end
note_fenced(KEYS[3], ARGV[1], ARGV[2])
return 'lost ' .. other
"""

# KEYS: lease. Returns what describe() has of the lease that runs, or ''.
_SHOW = f"""{LEASE_FUNCTIONS}
local held = read_lease(KEYS[1])
return held and describe(held) or ''
"""


class Holder(NamedTuple):
    """Who holds a lease.

    Attributes:
        name: As the holder gave it.
        since_ms, until_ms: Unix milliseconds; it ends then unless it is renewed.
    """

    name: str
    since_ms: int
    until_ms: int


class Lease:
    """The right to publish in a namespace, until :meth:`release` or until ``ttl_s`` after the last :meth:`renew`.

    Safe to share between threads.

    Attributes:
        holder: Who holds it, as others are told.
        number: The fencing number; every later holder's is higher.
        ttl_s: Renew it several times within this.
    """

    def __init__(self, leases: "Leases", holder: str, number: int, ttl_s: float, token: str, since: str) -> None:
        self._leases = leases
        self._token = token
        self._since = since
        self.holder = holder
        self.number = number
        self.ttl_s = ttl_s

    def renew(self) -> None:
        """Hold it for another ``ttl_s``.

        A lease that expired, or that a restarted server has forgotten, is taken again if nobody else took it.

        Raises:
            LeaseLost: Somebody else holds it, or held it in between.
            FeatureStoreUnavailable: Redis gave no answer in time.
        """
        args = [str(self.number), self._token, self.holder, self._since, _milliseconds(self.ttl_s)]
        outcome, _, detail = self._leases.run("renew", args).partition(" ")
        if outcome != "ok":
            raise self._leases.lost(self.number, detail)

    def release(self) -> None:
        """Give it back at once; idempotent. Without an answer from Redis it expires by itself."""
        try:
            self._leases.run("release", [str(self.number)])
        except FeatureStoreUnavailable as error:
            _logger.info("the lease was not given back and expires within %g s: %s", self.ttl_s, error)


class Leases:
    """The lease of one namespace.

    Args:
        client: A client that returns bytes.
        prefix: What the names of the keys begin with.
        outage_timeout_s: How long an operation is tried while the server is away.
    """

    def __init__(self, client: redis.Redis, prefix: str, outage_timeout_s: float) -> None:
        self._client = client
        self._outage_timeout_s = outage_timeout_s
        self.keys = (f"{prefix}lease", f"{prefix}fencing")
        self._fenced = f"{prefix}fenced"
        scripts = {"acquire": _ACQUIRE, "renew": _RENEW, "release": _RELEASE, "check": _CHECK, "show": _SHOW}
        self._scripts: dict[str, Any] = {name: client.register_script(text) for name, text in scripts.items()}

    def acquire(self, holder: str, ttl_s: float) -> Lease:
        """Take the lease; see :meth:`feature_store.snapshots.SnapshotStore.acquire`."""
        if not holder or len(holder) > _LONGEST_HOLDER:
            raise ValueError(f"lease holder: {holder!r}, expected 1 … {_LONGEST_HOLDER} characters")
        if not 0.001 <= ttl_s <= LONGEST_LEASE_S:
            raise ValueError(f"lease ttl_s: {ttl_s}, expected 0.001 … {LONGEST_LEASE_S:g}")
        token = secrets.token_hex(8)  # tells a lease that we took, although the answer was lost, from another's
        outcome, _, detail = self.run("acquire", [token, holder, _milliseconds(ttl_s)]).partition(" ")
        if outcome != "ok":
            raise self.held(detail)
        number, since = detail.split(" ")
        return Lease(self, holder, int(number), ttl_s, token, since)

    def holder(self) -> Holder | None:
        """Who holds the lease now; None: nobody.

        Raises:
            FeatureStoreUnavailable: Redis gave no answer in time.
        """
        detail = self.run("show", [])
        if not detail:
            return None
        _, since, until, name = detail.split(" ", 3)
        return Holder(name, int(since), int(until))

    def check(self, fencing: int | None, name: str) -> None:
        """Check that this publisher may still publish ``name``; where it may not, that is noted in the store.

        Raises:
            LeaseHeld: There is no fencing number, and somebody holds the lease.
            LeaseLost: The number is not the one that may publish.
        """
        number = "" if fencing is None else str(fencing)
        outcome, _, detail = self.run("check", [number, name]).partition(" ")
        if outcome != "ok":
            raise self.refused(fencing, detail)

    def refused(self, fencing: int | None, detail: str) -> LeaseHeld | LeaseLost:
        """The error for what a script's ``taken`` returned."""
        return self.held(detail) if fencing is None else self.lost(fencing, detail)

    def held(self, detail: str) -> LeaseHeld:
        """The error for a lease of somebody else."""
        _, since, until, holder = detail.split(" ", 3)
        since_ms, until_ms = int(since), int(until)
        return LeaseHeld(
            f"Redis key {self.keys[0]} at {address(self._client)}: held by {holder} since {_utc(since_ms)}, until "
            f"{_utc(until_ms)} unless it is renewed, expected no other publisher in this namespace",
            holder=holder,
            since_ms=since_ms,
            until_ms=until_ms,
        )

    def lost(self, number: int, detail: str) -> LeaseLost:
        """The error for a lease that somebody else took over."""
        _, since, _, holder = detail.split(" ", 3)
        by = f"held by {holder} since {_utc(int(since))}" if holder else "another publisher has held it since"
        return LeaseLost(
            f"Redis key {self.keys[0]} at {address(self._client)}: {by}, expected the lease with number {number}: "
            f"it expired and another publisher took it"
        )

    def run(self, name: str, args: list[str]) -> str:
        """Run a script, trying again while the server is away."""
        keys = [*self.keys, self._fenced]
        call: Callable[[], bytes] = lambda: self._scripts[name](keys=keys, args=args)  # noqa: E731
        doing = f"the publisher's lease was asked for ({name})"
        answer = retry_during_outage(self._client, doing, call, FEATURE_STORE, self._outage_timeout_s)
        return answer.decode(errors="replace")


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))


def _utc(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms since 1970"
