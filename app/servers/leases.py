"""Doors of one tool server at the egress relay, and the record of each connection from its asking to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

import structlog

_log = structlog.get_logger()
_ANSWER_S: Final = 10
_PATIENCE: Final = 6  # times that long, for a relay that says other things meanwhile
_AGAIN_S: Final = (0.2, 1, 5, 20, 60)  # after what times the end of a connection is recorded again
_RECORD_S: Final = 8  # less than the relay waits: what it will not dial is not left recorded as dialled
_LAST_RECORDS_S: Final = 3  # for those under way when the doors are closed; they are written without us, too


@dataclass(frozen=True, slots=True)
class Asked:
    """A server asks for a connection. `refused` is why there is none; else `addresses` are about to be dialled.

    `host` is what the server said: text of an attacker, at most 253 characters.
    """

    connection: int
    door: int
    host: str
    port: int
    addresses: tuple[str, ...]
    refused: str | None


@dataclass(frozen=True, slots=True)
class Closed:
    """A recorded connection has ended; `address` is the one that answered, if one did."""

    connection: int
    address: str | None
    ended: str
    bytes_up: int
    bytes_down: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RefusedMore:
    """So many refusals were counted and not told one by one."""

    count: int


Event = Asked | Closed | RefusedMore
Record = Callable[[Event], Awaitable[None]]
"""Writes an event down, or raises: then what was asked for is not dialled."""


class Line(Protocol):
    """To the relay. `heard` is how often it has said something."""

    heard: int

    async def revoke(self, name: str) -> None: ...

    async def answer(self, number: int, *, is_recorded: bool) -> None: ...

    def cut(self) -> None: ...


@dataclass(slots=True, eq=False)
class Lease:
    """Doors of one server, until they are released or the relay is lost.

    `channel` is for `contract.Network`; once the server's process has been started, call `handed_over`.
    """

    channel: int
    _name: str
    _line: Line = field(repr=False)
    _record: Record = field(repr=False)
    _on_lost: Callable[[], None] = field(repr=False)
    _recording: set[asyncio.Task[None]] = field(default_factory=set, repr=False)
    _open: dict[int, tuple[float, asyncio.Task[None]]] = field(default_factory=dict, repr=False)
    _is_released: bool = False
    _gone: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def handed_over(self) -> None:
        """Close our copy of the channel. Safe to repeat."""
        if self.channel >= 0:
            os.close(self.channel)
            self.channel = -1

    async def release(self) -> None:
        """Close every connection and door; return when the last of them has been recorded. Safe to repeat."""
        self.handed_over()
        if not self._is_released:
            self._is_released = True
            await self._line.revoke(self._name)
        if not await self._is_gone():
            self._line.cut()
            await self._gone.wait()
        if self._recording:
            await asyncio.wait(self._recording, timeout=_LAST_RECORDS_S)

    async def _is_gone(self) -> bool:
        """A relay that is silent hangs, and is ended soon; one that is busy serves others, and gets more time.

        But not for ever: what was revoked must not stay connected.
        """
        for _ in range(_PATIENCE):
            heard = self._line.heard
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), _ANSWER_S)
                return True
            if self._line.heard == heard:
                break
        return False

    def gone(self) -> None:
        """Nothing of it is left in the relay. What it has not told the end of was lost with it."""
        now = asyncio.get_running_loop().time()
        for connection, (began, _) in list(self._open.items()):
            self.hear(Closed(connection, None, "lost", 0, 0, round(now - began, 3)))
        self._gone.set()
        if not self._is_released:
            self._on_lost()

    def hear(self, event: Event) -> None:
        """Record in a task of its own, so that a slow record holds up no other server."""
        _, opening = self._open.pop(event.connection, (0, None)) if isinstance(event, Closed) else (0, None)
        task = asyncio.create_task(self._recorded(event, after=opening), name="egress record")
        self._recording.add(task)
        task.add_done_callback(self._recording.discard)
        if isinstance(event, Asked) and event.refused is None:
            self._open[event.connection] = asyncio.get_running_loop().time(), task

    async def _recorded(self, event: Event, *, after: asyncio.Task[None] | None) -> None:
        if after is not None:
            await asyncio.wait({after})
        is_recorded = await self._is_recorded(event)
        if isinstance(event, Asked):
            await self._line.answer(event.connection, is_recorded=is_recorded)
            if event.refused is None:
                return  # it is not dialled, which is an end that is told
        for pause_s in _AGAIN_S:
            if is_recorded:
                return
            await asyncio.sleep(pause_s)
            is_recorded = await self._is_recorded(event)

    async def _is_recorded(self, event: Event) -> bool:
        try:
            async with asyncio.timeout(_RECORD_S):
                await self._record(event)
        except Exception as error:  # noqa: BLE001  whatever kept it from being recorded keeps it from being dialled
            _log.warning("egress.not_recorded", event_type=type(event).__name__, error=type(error).__name__)
            return False
        return True
