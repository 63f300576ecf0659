"""The line between the service and its egress relay: JSON objects, each a packet, with open files beside them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

MAX_BYTES: Final = 64 * 1024
_MAX_FILES: Final = 16

Message = Mapping[str, Any]


class Control:
    """One end of a connected pair of SOCK_SEQPACKET sockets, which keep messages and their files together."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._end = end
        self._turn = asyncio.Lock()

    async def send(self, message: Message, *files: int) -> None:
        """Raises OSError once the other side is gone, ValueError for a message that is too long."""
        data = json.dumps(message).encode()
        if len(data) > MAX_BYTES:
            raise ValueError("the message is too long")
        async with self._turn:
            while not self._sent(data, files):
                loop = asyncio.get_running_loop()
                await _signalled(self._end, loop.add_writer, loop.remove_writer)

    def _sent(self, data: bytes, files: tuple[int, ...]) -> bool:
        try:
            if files:
                socket.send_fds(self._end, [data], files)
            else:
                self._end.send(data)
        except BlockingIOError:
            return False
        return True

    async def receive(self) -> tuple[dict[str, Any], list[int]]:
        """Raises EOFError once the other side is gone, ValueError for what is no message.

        Where no number was free for a file, the message comes without files: it costs that message alone.
        """
        data, files, is_whole = await _received(self._end, most=MAX_BYTES)
        if not is_whole:
            close_all(files)
            files = []
        message = json.loads(data)
        if not isinstance(message, dict):
            close_all(files)
            raise ValueError("not a message")  # noqa: TRY004  one kind for whatever is no message
        return message, files

    def shut(self) -> None:
        """End the line for both sides; whoever waits to send or to receive hears of it."""
        with contextlib.suppress(OSError):
            self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """To be called once nobody waits."""
        self._end.close()


async def received(end: socket.socket, *, most: int) -> tuple[bytes, list[int]]:
    """The next bytes of a non-blocking unix socket and the files that came with them, which are the caller's to close.

    Raises EOFError at the end, ValueError where something was cut off.
    """
    data, files, is_whole = await _received(end, most=most)
    if not is_whole:
        close_all(files)
        raise ValueError("cut off")
    return data, files


async def _received(end: socket.socket, *, most: int) -> tuple[bytes, list[int], bool]:
    """Beside bytes and files: whether these are all files that were sent."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data, files, flags, _ = socket.recv_fds(end, most, _MAX_FILES, socket.MSG_CMSG_CLOEXEC)
            break
        except BlockingIOError:
            await _signalled(end, loop.add_reader, loop.remove_reader)
        except ConnectionError:
            raise EOFError from None
    if data and not flags & socket.MSG_TRUNC:
        return data, files, not flags & socket.MSG_CTRUNC
    close_all(files)
    raise ValueError("cut off") if data else EOFError


def close_all(files: list[int]) -> None:
    for file in files:
        os.close(file)


async def _signalled(
    end: socket.socket, watch: Callable[..., object], unwatch: Callable[[socket.socket], object]
) -> None:
    signal = asyncio.Event()
    watch(end, signal.set)
    try:
        await signal.wait()
    finally:
        if end.fileno() >= 0:
            unwatch(end)
