"""What every attack is made with. An attack returns when it has succeeded and raises OSError when it was refused."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any, Final

Ground = dict[str, Any]
Attack = Callable[[Ground], object]
ATTACKS: Final[dict[str, Attack]] = {}
# Why an attack may fail bare, and then counts as not proven; all others must succeed bare everywhere.
DEPENDS: Final[dict[str, str]] = {}
# These want more than one run among the others: a network of their own, or a service that dies.
APART: Final[set[str]] = set()

libc: Final = ctypes.CDLL(None, use_errno=True)
MACHINE: Final = os.uname().machine
# The same on every architecture from 424 on; the older ones by machine.
_OLDER: Final = {
    "x86_64": {
        "acct": 163,
        "add_key": 248,
        "bpf": 321,
        "clock_settime": 227,
        "execveat": 322,
        "fanotify_init": 300,
        "finit_module": 313,
        "io_setup": 206,
        "kcmp": 312,
        "kexec_load": 246,
        "keyctl": 250,
        "memfd_secret": 447,
        "mq_open": 240,
        "name_to_handle_at": 303,
        "open_by_handle_at": 304,
        "perf_event_open": 298,
        "pivot_root": 155,
        "process_vm_readv": 310,
        "process_vm_writev": 311,
        "quotactl": 179,
        "seccomp": 317,
        "settimeofday": 164,
        "swapon": 167,
        "syslog": 103,
        "userfaultfd": 323,
        "vmsplice": 278,
    },
    "aarch64": {
        "acct": 89,
        "add_key": 217,
        "bpf": 280,
        "clock_settime": 112,
        "execveat": 281,
        "fanotify_init": 262,
        "finit_module": 273,
        "io_setup": 0,
        "kcmp": 272,
        "kexec_load": 104,
        "keyctl": 219,
        "memfd_secret": 447,
        "mq_open": 180,
        "name_to_handle_at": 264,
        "open_by_handle_at": 265,
        "perf_event_open": 241,
        "pivot_root": 41,
        "process_vm_readv": 270,
        "process_vm_writev": 271,
        "quotactl": 60,
        "seccomp": 277,
        "settimeofday": 170,
        "swapon": 224,
        "syslog": 116,
        "userfaultfd": 282,
        "vmsplice": 75,
    },
}
NUMBERS: Final = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "pidfd_open": 434,
    "clone3": 435,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "cachestat": 451,
    "listmount": 458,
    **_OLDER[MACHINE],
}
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x4000000, 0x10000000, 0x40000000


def attack(function: Attack) -> Attack:
    ATTACKS[function.__name__] = function
    return function


def attack_where(depends_on: str, *, is_apart: bool = False) -> Callable[[Attack], Attack]:
    """An attack that some machine refuses anyone, and on what that depends."""

    def register(function: Attack) -> Attack:
        DEPENDS[function.__name__] = depends_on
        return attack_apart(function) if is_apart else attack(function)

    return register


def attack_apart(function: Attack) -> Attack:
    APART.add(function.__name__)
    return attack(function)


def checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def call(name: str, *arguments: Any) -> int:
    return checked(int(libc.syscall(NUMBERS[name], *arguments)))


def holds_nonce(text: bytes, ground: Ground) -> None:
    if ground["nonce"].encode() not in text:
        raise FileNotFoundError


def in_a_child(function: Callable[[], object]) -> None:
    """Refused when it was refused there, or when it was ended."""
    child = os.fork()
    if child == 0:
        try:
            function()
        except OSError as refusal:
            os._exit(refusal.errno or 1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise PermissionError(abs(status), "refused or ended in a child")


def become_all_mighty(more: int = 0) -> None:
    """Every capability there is, over a namespace of one's own: what a kernel's rarer calls are reached with."""
    try:
        checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | more))
    except OSError:
        return  # the call that is attacked is tried all the same
    checked(libc.mount(None, b"/", None, 0x44000, None))  # private: nothing reaches the host's mounts


def tiny_program() -> bytes:
    """An executable that needs no library and says, in its exit status, whose rights it has."""
    if MACHINE == "x86_64":
        # The system calls geteuid and exit, the one's result into the other.
        machine, code = 62, bytes.fromhex("b86b0000000f0589c7b83c0000000f05")
    else:
        machine, code = 183, bytes.fromhex("e81580d2010000d4a80b80d2010000d4")
    base, head = 0x400000, 120
    size = head + len(code)
    number = ctypes.c_uint64
    fields = (number(base + head), number(64), number(0))
    entry = b"".join(map(bytes, fields))
    elf = b"\x7fELF\2\1\1" + bytes(9) + b"\2\0" + machine.to_bytes(2, "little") + b"\1\0\0\0" + entry
    elf += bytes(4) + b"\x40\0\x38\0\1\0" + bytes(6)
    segment = b"\1\0\0\0\5\0\0\0" + b"".join(bytes(number(n)) for n in (0, base, base, size, size, 0x1000))
    return elf + segment + code
