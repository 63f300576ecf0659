"""The egress relay: the one process through which tool servers reach a network. They have none of their own.

A sandbox hands out sockets that listen on its own loopback; the relay accepts there and dials here, what a grant
allows and nothing else. It reads no database and no environment, and keeps nothing. It is run as

    python -m app.egress --control FD     a child of the service, with one end of a SOCK_SEQPACKET pair
    python -m app.egress --listen PATH    for a service in another container: `bulkhead egress`

Protocol: one JSON object a packet (app/outbound/control.py), `do` is the service's, `is` the relay's.

    {"is": "ready"}                                          at once
    {"do": "grant", "id", "grant": grants.dumped()} + fd     the fd is a stream socket, over which the sandbox sends
                                                             the byte L and a listening socket for each door
    {"is": "granted", "id"} or {"is": "invalid", "id"}
    {"is": "asked", "id", "seq", "door", "host", "port", "addresses", "refused"}
                                                             `refused` is a reason or null; then the service must say
    {"do": "recorded", "seq"} or {"do": "unrecorded", "seq"} before the relay dials; unrecorded is not dialled
    {"is": "closed", "id", "seq", "address", "ended", "bytes_up", "bytes_down", "seconds"}
                                                             after each that was asked for and not refused, dialled or
                                                             not
    {"is": "refused_more", "id", "count"}                    refusals beyond those that were told one by one
    {"do": "revoke", "id"}, {"is": "revoked", "id"}          all is closed, all was told; the latter comes unasked
                                                             where a sandbox never started

When the control line ends, everything of it is closed at once.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import ctypes
import os
import resource
import signal
import socket
import ssl
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, Final

from app.outbound import destinations, grants
from app.outbound.allowances import Tenants
from app.outbound.control import Control, close_all
from app.outbound.doors import OpenGrant

_NOBODY: Final = 65534
_PR_SET_DUMPABLE: Final = 4
_RESOLVERS: Final = 128  # a tenant may hold eight, see grants.TENANT_LIMITS
_SPARE_FILES: Final = 64  # or a quarter: for the control line, doors and names


class Relay:
    """All grants of one control line."""

    def __init__(
        self, control: Control, *, resolve: destinations.Resolve, tls: ssl.SSLContext, tenants: Tenants
    ) -> None:
        self._control = control
        self._tenants = tenants
        self._resolve = resolve
        self._tls = tls
        self._numbers = count(1)
        self._open: dict[str, asyncio.Task[None]] = {}
        self._asked: dict[int, asyncio.Future[bool]] = {}

    async def serve(self) -> None:
        """Until the line ends or says what makes no sense."""
        try:
            await self._control.send({"is": "ready"})
            while True:
                await self._obey(*await self._control.receive())
                # Others have their turn, however much comes; and a grant has begun before it may be revoked.
                await asyncio.sleep(0)
        except (EOFError, OSError, ValueError, TypeError, KeyError) as error:
            if not isinstance(error, EOFError | OSError):
                sys.stderr.write(f"egress: the control line makes no sense: {type(error).__name__}\n")
        finally:
            self._control.shut()  # so that nobody waits to tell
            tasks = list(self._open.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._control.close()

    async def _obey(self, message: dict[str, Any], files: list[int]) -> None:
        match message:
            case {"do": "grant", "id": str(name), "grant": dict(raw)} if name not in self._open:
                await self._grant(name, raw, files)
            case {"do": "recorded" | "unrecorded" as answer, "seq": int(number)} if not files:
                asked = self._asked.get(number)
                if asked is not None and not asked.done():
                    asked.set_result(answer == "recorded")
            case {"do": "revoke", "id": str(name)} if not files:
                if name in self._open:
                    self._open[name].cancel()
                else:
                    await self._control.send({"is": "revoked", "id": name})
            case _:
                close_all(files)
                raise ValueError("unknown message")

    async def _grant(self, name: str, raw: dict[str, Any], files: list[int]) -> None:
        try:
            (channel,), grant = files, grants.loaded(raw)
        except (KeyError, TypeError, ValueError):
            close_all(files)
            await self._control.send({"is": "invalid", "id": name})
            return
        self._open[name] = asyncio.create_task(self._keep(name, grant, socket.socket(fileno=channel)))
        await self._control.send({"is": "granted", "id": name})

    async def _keep(self, name: str, grant: grants.Grant, channel: socket.socket) -> None:
        """Until it is revoked, or its sandbox never started; then the service hears that all is closed."""
        try:
            with channel, self._tenants.one(grant.tenant, grant.tenant_limits) as tenant:
                opened = OpenGrant(name, grant, line=self, resolve=self._resolve, tls=self._tls, tenant=tenant)
                await opened.run(channel)
        finally:
            del self._open[name]
            with contextlib.suppress(OSError):
                await self._control.send({"is": "revoked", "id": name})

    async def tell(self, message: dict[str, Any]) -> None:
        """Raises OSError once the service is gone."""
        await self._control.send(message)

    async def ask(self, message: dict[str, Any], *, within_s: float) -> tuple[int, bool]:
        """The connection's number, and whether the service has recorded it."""
        number = next(self._numbers)
        answer = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(within_s):
                await self._control.send({**message, "seq": number})
                return number, await answer
        except TimeoutError:
            return number, False
        finally:
            del self._asked[number]


async def control(descriptor: int, *, tls: ssl.SSLContext, resolve: destinations.Resolve) -> None:
    """Serve the one service that started this process."""
    tenants = Tenants(_prepared())
    await Relay(Control(socket.socket(fileno=descriptor)), resolve=resolve, tls=tls, tenants=tenants).serve()
    os._exit(0)  # without waiting for threads that still ask for a name


async def listen(path: Path, *, tls: ssl.SSLContext, resolve: destinations.Resolve) -> None:
    """Serve every service of this user that connects to a socket at `path`."""
    listener, user = _listening(path), os.getuid()
    tenants = Tenants(_prepared())  # of all lines: a service that comes again is no new allowance
    loop = asyncio.get_running_loop()
    relays: set[asyncio.Task[None]] = set()
    while True:
        try:
            end, _ = await loop.sock_accept(listener)
        except OSError:  # no file is free: a service that wants to come shall wait
            await asyncio.sleep(1)
            continue
        if _user_of(end) != user:
            end.close()
            continue
        relay = asyncio.create_task(Relay(Control(end), resolve=resolve, tls=tls, tenants=tenants).serve())
        relays.add(relay)
        relay.add_done_callback(relays.discard)


def _listening(path: Path) -> socket.socket:
    """One relay a path: what a dead one has left there is replaced, a living one is not."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        if other.connect_ex(str(path)) == 0:
            sys.exit("egress: another relay listens there")
    if path.is_socket():
        path.unlink()
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        sys.exit(f"egress: cannot listen at {path}: {error.strerror}")
    finally:
        os.umask(mask)
    listener.listen()
    listener.setblocking(False)
    return listener


def _user_of(end: socket.socket) -> int:
    _, user, _ = struct.unpack("3i", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)


def _prepared() -> int:
    """Threads for names, no more rights than it needs, and for how many connections, of two files each, it has room."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_RESOLVERS, "names"))
    # TLS wants it for every name; afterwards Python's own files may be out of reach.
    codecs.lookup("idna")
    if os.getuid() == 0:
        # Where root may not change its user, as in some containers, it has little left to lose.
        with contextlib.suppress(PermissionError):
            os.setgroups([])
            os.setresgid(_NOBODY, _NOBODY, _NOBODY)
            os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    # It holds secrets: nobody of the same user traces it or reads its memory.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    return (hard - max(_SPARE_FILES, hard // 4)) // 2


def main(resolve: destinations.Resolve = destinations.ask_system) -> None:
    """Run until the control line ends, or for ever."""
    parser = argparse.ArgumentParser(prog="egress")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--control", type=int)
    where.add_argument("--listen", type=Path)
    parser.add_argument("--ca", type=Path, help="who is trusted by reverse doors, as PEM")
    chosen = parser.parse_args()
    tls = ssl.create_default_context(cafile=chosen.ca)
    tls.set_alpn_protocols(["http/1.1"])
    if chosen.listen is not None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: an end that was asked for is no failure
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(listen(chosen.listen, tls=tls, resolve=resolve))
    else:
        asyncio.run(control(chosen.control, tls=tls, resolve=resolve))


if __name__ == "__main__":
    main()
