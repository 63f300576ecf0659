"""The service's side of the egress relay (app/egress.py): starts it, grants doors, records what goes through them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final, Self

import structlog

import app
from app.outbound.control import Control, close_all
from app.outbound.grants import Grant, dumped
from app.servers.errors import ServerUnavailable
from app.servers.leases import Asked, Closed, Event, Lease, Record, RefusedMore

_log = structlog.get_logger()
_ANSWER_S: Final = 10
_FIRST_BACKOFF_S: Final = 0.1
_LONGEST_BACKOFF_S: Final = 30
# Not -I: it would take away the folder that the package is in.
_PROGRAM: Final = (sys.executable, "-E", "-s", "-m", "app.egress")


class EgressUnavailable(ServerUnavailable):
    """The egress relay, which servers with a network need, is not there."""


class _Line:
    """A connected relay."""

    def __init__(self, control: Control, process: Process | None) -> None:
        self._control = control
        self._process = process
        self._names = count(1)
        self._leases: dict[str, Lease] = {}
        self._granting: dict[str, asyncio.Future[None]] = {}
        self.heard = 0  # how often

    async def grant(self, grant: Grant, *, record: Record, on_lost: Callable[[], None]) -> Lease:
        name = str(next(self._names))
        inside, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        lease = self._leases[name] = Lease(inside.detach(), name, self, record, on_lost)
        granted = self._granting[name] = asyncio.get_running_loop().create_future()
        try:
            with outside:
                await self._control.send({"do": "grant", "id": name, "grant": dumped(grant)}, outside.fileno())
            async with asyncio.timeout(_ANSWER_S):
                await granted
        except BaseException as error:
            lease.handed_over()  # which ends the grant at the other side, too
            self._leases.pop(name, None)
            if isinstance(error, OSError):
                self.cut()
            if isinstance(error, OSError | ValueError):  # or what is to be said is too long
                raise EgressUnavailable from None
            raise
        finally:
            del self._granting[name]
        return lease

    async def revoke(self, name: str) -> None:
        with contextlib.suppress(OSError):  # then nothing of it is left
            await self._control.send({"do": "revoke", "id": name})

    async def answer(self, number: int, *, is_recorded: bool) -> None:
        with contextlib.suppress(OSError):
            await self._control.send({"do": "recorded" if is_recorded else "unrecorded", "seq": number})

    def cut(self) -> None:
        """End the line: a relay that does not answer is none. It then closes all that came over the line."""
        self._control.shut()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def ready(self) -> None:
        """Raises EgressUnavailable where no relay answers."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                message, files = await self._control.receive()
        except (EOFError, OSError, ValueError):
            raise EgressUnavailable from None
        close_all(files)
        if message.get("is") != "ready":
            raise EgressUnavailable

    async def listen(self) -> None:
        """Until the relay is gone; then all leases are lost."""
        try:
            while True:
                message, files = await self._control.receive()
                close_all(files)
                self.heard += 1
                self._hear(message)
        except (EOFError, OSError):
            pass
        except (KeyError, TypeError, ValueError) as error:
            _log.error("egress.nonsense", error=type(error).__name__)
        finally:
            self._lose()

    def _hear(self, message: dict[str, Any]) -> None:
        kind, name = message.pop("is"), message.pop("id")
        granting = self._granting.get(name)
        lease = self._leases.get(name)
        if granting is not None and not granting.done():
            if kind == "granted":
                granting.set_result(None)
            else:
                granting.set_exception(EgressUnavailable("The egress relay does not take what it is asked for."))
        elif lease is not None and kind == "revoked":
            del self._leases[name]
            lease.gone()
        elif lease is not None:
            lease.hear(_event(kind, message))

    def _lose(self) -> None:
        for name, granting in self._granting.items():
            if not granting.done():
                granting.set_exception(EgressUnavailable())
                del self._leases[name]
        leases, self._leases = list(self._leases.values()), {}
        for lease in leases:
            lease.gone()

    async def end(self) -> None:
        """End the line, and the process if it is ours."""
        self._control.shut()
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), timeout=5)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        self._control.close()


class EgressRelay:
    """The relay of this process: a child of ours, or one that listens at `path`. It is started again when it dies.

    `command` replaces the program, for tests; `ca_file` is who is trusted by doors that speak TLS themselves.
    """

    def __init__(
        self, *, path: Path | None = None, ca_file: Path | None = None, command: Sequence[str] = _PROGRAM
    ) -> None:
        self._path = path
        self._command = (*command, *(("--ca", str(ca_file.absolute())) if ca_file is not None else ()))
        self._line: _Line | None = None
        self._changed = asyncio.Condition()
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Begin to start it; a grant waits for it."""
        self._keeper = asyncio.create_task(self._keep(), name="egress relay")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})

    @property
    def is_up(self) -> bool:
        return self._line is not None

    @property
    def pid(self) -> int | None:
        """Of our child, while there is one."""
        return self._line.pid if self._line is not None else None

    async def grant(self, grant: Grant, *, record: Record, on_lost: Callable[[], None], wait_s: float = 5) -> Lease:
        """Doors for one server that is about to start. Raises EgressUnavailable where no relay is there in time.

        `on_lost` is called when the relay has died with the lease: all its connections have ended, and the server
        has no network any more.
        """
        try:
            async with asyncio.timeout(wait_s), self._changed:
                await self._changed.wait_for(lambda: self.is_up)
                line = self._line
        except TimeoutError:
            raise EgressUnavailable from None
        if line is None:
            raise EgressUnavailable
        return await line.grant(grant, record=record, on_lost=on_lost)

    async def _keep(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            began = asyncio.get_running_loop().time()
            await self._serve_once()
            if asyncio.get_running_loop().time() - began > _LONGEST_BACKOFF_S:
                backoff_s = _FIRST_BACKOFF_S
            _log.warning("egress.lost", again_in_s=backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    async def _serve_once(self) -> None:
        try:
            line = await (self._connected(self._path) if self._path is not None else self._started())
        except OSError as error:
            _log.warning("egress.not_started", error=error.strerror)
            return
        try:
            with contextlib.suppress(EgressUnavailable):
                await line.ready()
                await self._set(line)
                await line.listen()
        finally:
            self._line = None
            await asyncio.shield(line.end())

    async def _set(self, line: _Line) -> None:
        async with self._changed:
            self._line = line
            self._changed.notify_all()

    async def _started(self) -> _Line:
        """With no environment, and in a session of its own: Ctrl-C is for the service, which then ends it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    *("--control", str(theirs.fileno())),
                    stdin=DEVNULL,
                    stdout=DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env={},
                    cwd=Path(app.__path__[0]).parent,
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        return _Line(Control(ours), process)

    async def _connected(self, path: Path) -> _Line:
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            end.connect(str(path))  # a unix socket that listens answers at once
            _check_user(end)
        except BaseException:
            end.close()
            raise
        return _Line(Control(end), None)


def _check_user(end: socket.socket) -> None:
    _, user, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise PermissionError(errno.EPERM, "another user listens there")


def _event(kind: str, message: dict[str, Any]) -> Event:
    """Raises TypeError, KeyError or ValueError for what is none."""
    number = message.pop("seq", 0)
    match kind:
        case "asked":
            return Asked(number, **{**message, "addresses": tuple(message["addresses"])})
        case "closed":
            return Closed(number, **message)
        case "refused_more":
            return RefusedMore(**message)
    raise ValueError("unknown message")
