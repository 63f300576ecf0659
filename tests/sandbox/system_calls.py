"""Run as a script, bare or under a filter: makes the system calls that it reads, and says what came of each.

It reads JSON: the filter in hexadecimal, or null; and by any name a call's number and its arguments. The name of an
object below stands for its address or its fd. It prints JSON: 0 or the number of an error, by the same names.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import tempfile

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2
libc = ctypes.CDLL(None, use_errno=True)


class Program(ctypes.Structure):
    """struct sock_fprog"""

    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))


def program(code: bytes) -> tuple[Program, object]:
    buffer = ctypes.create_string_buffer(code, len(code))
    return Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p)), buffer


def checked(result: int) -> int:
    if result != 0:
        raise OSError(ctypes.get_errno(), "no filter")
    return result


def go_under(code: bytes) -> None:
    wanted, _buffer = program(code)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))))
    checked(libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(MODE_FILTER), ctypes.byref(wanted)))


def outcome(number: int, arguments: list[int]) -> int:
    ctypes.set_errno(0)
    parent = os.getpid()
    libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments))
    if os.getpid() != parent:  # a process that a call has made
        os._exit(0)
    return ctypes.get_errno()


def main() -> None:
    order = json.load(sys.stdin)
    return_all, _code = program((0x7FFF000000000006).to_bytes(8, sys.byteorder))
    with tempfile.TemporaryFile() as file, socket.socket() as tcp:
        one, other = socket.socketpair()
        file.truncate(4096)
        buffer = ctypes.create_string_buffer((1).to_bytes(4, sys.byteorder), 64)
        objects = {
            "file": file.fileno(),
            "pair": one.fileno(),
            "tcp": tcp.fileno(),
            "buffer": ctypes.addressof(buffer),
            "program": ctypes.addressof(return_all),
        }
        if order["filter"] is not None:
            go_under(bytes.fromhex(order["filter"]))
        said = {
            name: outcome(number, [objects.get(argument, argument) for argument in arguments])
            for name, (number, *arguments) in order["attempts"].items()
        }
        one.close()
        other.close()
    print(json.dumps(said))  # noqa: T201  # it is what this is for


if __name__ == "__main__":
    main()
