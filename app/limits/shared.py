"""Moving windows in Valkey or Redis, for many processes: what app/limits/windows.py does, in one script of theirs.

`limits` reads the address and makes the connections. The clock is the server's, so that the processes' need not agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal

from limits.aio.storage import RedisStorage
from limits.errors import ConfigurationError as StorageUnusable
from limits.storage import storage_from_string

from app.errors import ConfigurationError
from app.limits.windows import CELLS, Bound, Standing, Verdict, bound

Order = Literal["take", "peek", "give_back"]
_Call = tuple[list[str], list[str | int]]
_PREFIX: Final = "bulkhead:limits"
_CHECKED: Final = bound("check", "storage", "100000/second")
# A window is a list, the newest first, of "moment places total": `total` counts all that were ever taken, so that the
# places in use are known from both ends.
_SCRIPT: Final = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local order, cells = ARGV[1], tonumber(ARGV[2])
local function read(entry)
  local at, places, total = string.match(entry, '(%S+) (%S+) (%S+)')
  return tonumber(at), tonumber(places), tonumber(total)
end
local function used(key)
  local newest, oldest = redis.call('lindex', key, 0), redis.call('lindex', key, -1)
  if not newest then return 0 end
  local _, _, total = read(newest)
  local _, places, first = read(oldest)
  return total - first + places
end
local function forget(key, till)
  local oldest = redis.call('lindex', key, -1)
  while oldest and read(oldest) <= till do
    redis.call('rpop', key)
    oldest = redis.call('lindex', key, -1)
  end
end
local function take(key, amount, span)
  local at, step = now, span / cells
  if amount > cells then at = math.ceil(now / step) * step end
  at = string.format('%.6f', at)
  local newest, places, total = redis.call('lindex', key, 0), 0, 0
  if newest then
    local same
    same, places, total = read(newest)
    if string.format('%.6f', same) == at then redis.call('lpop', key) else places = 0 end
  end
  redis.call('lpush', key, at .. ' ' .. (places + 1) .. ' ' .. string.format('%.0f', total + 1))
  redis.call('expire', key, span + math.ceil(step) + 1)
end
local function give_back(key)
  local newest = redis.call('lpop', key)
  if not newest then return end
  local at, places, total = read(newest)
  if places > 1 then
    redis.call('lpush', key, string.format('%.6f %d %.0f', at, places - 1, total - 1))
  end
end
local function reset(key, amount, span)
  local needed = math.max(1, used(key) - amount + 1)
  for place = 1, redis.call('llen', key) do
    local at, places = read(redis.call('lindex', key, -place))
    needed = needed - places
    if needed <= 0 then return at + span - now end
  end
  return span
end
local is_allowed = 1
for i, key in ipairs(KEYS) do
  forget(key, now - tonumber(ARGV[2 * i + 2]))
  if used(key) >= tonumber(ARGV[2 * i + 1]) then is_allowed = 0 end
end
for i, key in ipairs(KEYS) do
  if order == 'take' and is_allowed == 1 then take(key, tonumber(ARGV[2 * i + 1]), tonumber(ARGV[2 * i + 2])) end
  if order == 'give_back' then give_back(key) end
end
local answer = {is_allowed}
for i, key in ipairs(KEYS) do
  answer[2 * i] = used(key)
  answer[2 * i + 1] = string.format('%.6f', reset(key, tonumber(ARGV[2 * i + 1]), tonumber(ARGV[2 * i + 2])))
end
return answer
"""


class StorageFailed(Exception):
    """The client has met an error, of which this is the name: its own types are there only where it is."""


# What the script or the way to it can fail with.
FAILURES: Final = (StorageFailed, OSError, TimeoutError)


class SharedWindows:
    """Windows that all processes count together. Every method raises one of FAILURES where the storage does."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        """Connects at the first request. Raise ConfigurationError for what is no address of a storage."""
        url = url.replace("redis", "valkey", 1) if url.startswith("async+redis") else url
        # The client verifies a certificate, but not whose it is.
        tls = {"ssl_check_hostname": True} if url.startswith("async+valkeys:") else {}
        try:
            self._storage = storage_from_string(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, **tls)
        except (StorageUnusable, ValueError):
            raise ConfigurationError("BULKHEAD_LIMITS_URL is no address of a Valkey that `limits` knows.") from None
        if not isinstance(self._storage, RedisStorage):
            raise ConfigurationError("BULKHEAD_LIMITS_URL must begin with async+valkey:// or async+valkeys://.")
        # Of the one client that we have; the library's type is that of all of them.
        self._client: Any = getattr(self._storage.bridge, "get_connection")()  # noqa: B009  no attribute that its type knows
        self._script = self._client.register_script(_SCRIPT)

    async def take(self, bounds: Sequence[Bound]) -> Verdict:
        """Take a place in each window, or in none where one is full."""
        (verdict,) = await self.ask([("take", bounds)])
        return verdict

    async def peek(self, bounds: Sequence[Bound]) -> Verdict:
        """The same without taking one."""
        (verdict,) = await self.ask([("peek", bounds)])
        return verdict

    async def give_back(self, bounds: Sequence[Bound]) -> None:
        """Free the place that was taken last in each."""
        await self.ask([("give_back", bounds)])

    async def check(self) -> None:
        """Take a place in a window of our own, and give it back."""
        await self.take([_CHECKED])
        await self.give_back([_CHECKED])

    async def close(self) -> None:
        await self._client.aclose()

    async def ask(self, asked: Sequence[tuple[Order, Sequence[Bound]]]) -> list[Verdict]:
        """Each of these in turn and by itself, in one round trip."""
        calls = [_call(order, bounds) for order, bounds in asked]
        try:
            answers = [await self._script(*calls[0])] if len(calls) == 1 else await self._sent(calls)
        except self._storage.base_exceptions as error:
            raise StorageFailed(type(error).__name__) from None
        return [_verdict(bounds, answer) for (_, bounds), answer in zip(asked, answers, strict=True)]

    async def _sent(self, calls: Sequence[_Call]) -> list[Any]:
        """Fails where the storage does not have the script; asked for one alone, it gets it."""
        async with self._client.pipeline(transaction=False) as pipeline:
            for keys, words in calls:
                pipeline.evalsha(self._script.sha, len(keys), *keys, *words)
            answers: list[Any] = await pipeline.execute()
            return answers


def _call(order: Order, bounds: Sequence[Bound]) -> _Call:
    """Keys and words of the script."""
    numbers = [number for each in bounds for number in (each.amount, each.span_s)]
    return [f"{_PREFIX}:{each.key}" for each in bounds], [order, CELLS, *numbers]


def _verdict(bounds: Sequence[Bound], answer: Sequence[Any]) -> Verdict:
    is_allowed, *numbers = answer
    standings = zip(bounds, numbers[::2], numbers[1::2], strict=True)
    return Verdict(bool(is_allowed), tuple(Standing(each, int(used), float(reset)) for each, used, reset in standings))
