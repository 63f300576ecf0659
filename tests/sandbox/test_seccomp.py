"""What each list of system calls lets through, asked of the kernel, and what is in none of them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pyseccomp
import pytest

from app.sandbox import seccomp
from app.sandbox.contract import RuntimeName

RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
LISTS = [(runtime, network, beside) for runtime in RUNTIMES for network in (False, True) for beside in (False, True)]
# Other processes, the kernel itself, mounts, keys, programs in no file, users, clocks, and ways around the filter.
NEVER = """
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease kcmp pidfd_getfd
    mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr
    unshare setns bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
    keyctl add_key request_key memfd_create memfd_secret personality seccomp
    kexec_load kexec_file_load init_module finit_module delete_module reboot swapon swapoff acct syslog vhangup
    quotactl settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname iopl ioperm modify_ldt
    name_to_handle_at open_by_handle_at fanotify_init lookup_dcookie
    setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset
    chown fchown lchown fchownat setxattr lsetxattr fsetxattr mknod mknodat
    mbind set_mempolicy migrate_pages move_pages remap_file_pages vmsplice splice tee
    shmget shmat shmctl semget semop msgget msgsnd mq_open
    sched_setaffinity sched_setscheduler sched_setattr sched_setparam ioprio_set
    clone3
"""
# For them the kernel is asked, below: what they may do depends on their arguments.
DECIDED = {"clone", "socket", "socketpair", "setsockopt", "ioctl", "prctl", "mmap"}
# Those which an architecture has under another name alone.
OLD_ON_X86_64 = """
    access alarm arch_prctl chmod creat dup2 epoll_create epoll_wait eventfd fork futimesat getdents getpgrp
    inotify_init link lstat mkdir open pause pipe poll readlink rename rmdir select signalfd stat symlink time
    unlink utime utimes vfork
"""
TRY = Path(__file__).with_name("system_calls.py")


def filtered(
    runtime: RuntimeName, *, network: bool, attempts: dict[str, list[object]], bare: bool = False
) -> dict[str, int]:
    """What the kernel says to each attempt, by its name: 0, or the number of an error."""
    numbers = {call: pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call) for call, *_ in attempts.values()}
    order: dict[str, object] = {
        "filter": None if bare else seccomp.program(runtime, network=network).hex(),
        "attempts": {name: [numbers[call], *arguments] for name, (call, *arguments) in attempts.items()},
    }
    said: dict[str, int] = json.loads(made_calls(order).stdout)
    return said


def made_calls(order: dict[str, object]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-S", str(TRY)]
    return subprocess.run(command, input=json.dumps(order), capture_output=True, text=True, timeout=30, check=False)


def names(runtime: RuntimeName, *, network: bool, beside: bool) -> set[str]:
    return {rule.call for rule in seccomp.allowed(runtime, network=network, beside_others=beside)}


@pytest.mark.parametrize(("runtime", "network", "beside"), LISTS)
def test_no_list_holds_what_none_needs(runtime: RuntimeName, network: bool, beside: bool) -> None:  # noqa: FBT001  # a parameter
    rules = list(seccomp.allowed(runtime, network=network, beside_others=beside))
    outright = [rule.call for rule in rules if not rule.arguments]
    assert not set(NEVER.split()) & {rule.call for rule in rules}
    assert not DECIDED & set(outright)
    assert len(outright) == len(set(outright))


def test_only_a_list_with_a_network_makes_connections() -> None:
    for runtime in RUNTIMES:
        without, having = (names(runtime, network=network, beside=False) for network in (False, True))
        assert having - without == {"socket", "connect", "bind", "listen", "accept", "accept4"}
        assert not without - having


def test_beside_others_a_list_only_loses() -> None:
    for runtime in RUNTIMES:
        alone, beside = (
            {rule.call for rule in seccomp.allowed(runtime, network=False, beside_others=beside) if not rule.arguments}
            for beside in (False, True)
        )
        assert beside < alone
        assert {"chmod", "utimensat", "setpriority", "prlimit64"} <= alone - beside


def test_every_name_is_a_call_of_both_architectures_or_known_to_be_of_one() -> None:
    listed = set().union(*(names(runtime, network=True, beside=False) for runtime in RUNTIMES))
    missing = {
        arch: {name for name in listed if pyseccomp.resolve_syscall(arch, name) < 0}
        for arch in (pyseccomp.Arch.X86_64, pyseccomp.Arch.AARCH64)
    }
    # A libseccomp that is older than a call does not know it on either; then the filter refuses it.
    unknown = missing[pyseccomp.Arch.X86_64]
    assert unknown <= {"epoll_pwait2", "futex_waitv", "faccessat2", "close_range", "openat2"}
    assert missing[pyseccomp.Arch.AARCH64] - unknown == set(OLD_ON_X86_64.split())


# --- asked of the kernel: refused by the filter, and not bare

X32, GETPID = 0x40000000, 39
SIGCHLD, NEW_USER = 17, 0x10000000
PRIVATE, ANONYMOUS, SHARED = 2, 0x20, 1
REFUSED: dict[str, list[object]] = {
    "a user namespace": ["clone", NEW_USER | SIGCHLD, 0, 0, 0, 0],
    **{
        f"a {name} namespace": ["clone", NEW_USER | flag | SIGCHLD, 0, 0, 0, 0]
        for name, flag in {
            "mount": 0x20000,
            "cgroup": 0x2000000,
            "uts": 0x4000000,
            "ipc": 0x8000000,
            "pid": 0x20000000,
            "network": 0x40000000,
        }.items()
    },
    "shared memory in no file": ["mmap", 0, 4096, 3, SHARED | ANONYMOUS, -1, 0],
    "the same, validated": ["mmap", 0, 4096, 3, 3 | ANONYMOUS, -1, 0],
    "a stack that grows down": ["mmap", 0, 4096, 3, PRIVATE | ANONYMOUS | 0x100, -1, 0],
    "huge pages": ["mmap", 0, 4096, 3, PRIVATE | ANONYMOUS | 0x40000, -1, 0],
    "a program that filters a socket": ["setsockopt", "pair", 1, 26, "program", 16],
    "a TCP with its own TLS": ["setsockopt", "tcp", 6, 31, "buffer", 4],
    "adopting orphans": ["prctl", 36, 1, 0, 0, 0],
    "hiding from the host": ["prctl", 4, 0, 0, 0, 0],
    "datagrams in a pair": ["socketpair", 1, 2, 0, "buffer"],
    "a program in no file": ["memfd_create", "buffer", 0],
    "asking for keys": ["keyctl", 0, -3, 0],
    "an io_uring": ["io_uring_setup", 1, 0],
}
ALLOWED: dict[str, list[object]] = {
    "a process": ["clone", SIGCHLD, 0, 0, 0, 0],
    "memory": ["mmap", 0, 4096, 3, PRIVATE | ANONYMOUS, -1, 0],
    "a reservation": ["mmap", 0, 1 << 30, 0, PRIVATE | ANONYMOUS | 0x4000, -1, 0],
    "a stack": ["mmap", 0, 4096, 3, PRIVATE | ANONYMOUS | 0x20000, -1, 0],
    "a file, shared": ["mmap", 0, 4096, 3, SHARED, "file", 0],
    "a file, private": ["mmap", 0, 4096, 3, PRIVATE, "file", 0],
    "a pair": ["socketpair", 1, 1 | 0x80800, 0, "buffer"],
    "a name": ["prctl", 15, "buffer", 0, 0, 0],
    "a socket's buffer": ["setsockopt", "pair", 1, 7, "buffer", 4],
}


@pytest.fixture(scope="module")
def bare() -> dict[str, int]:
    return filtered("python", network=True, attempts=REFUSED | ALLOWED, bare=True)


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_arguments_decide(runtime: RuntimeName, bare: dict[str, int], *, network: bool) -> None:
    inside = filtered(runtime, network=network, attempts=REFUSED | ALLOWED)
    assert {name: inside[name] for name in REFUSED} == dict.fromkeys(REFUSED, errno.EPERM)
    assert {name: inside[name] for name in ALLOWED} == dict.fromkeys(ALLOWED, 0)
    assert errno.EPERM not in bare.values()


def test_libc_is_told_to_make_processes_by_the_call_whose_arguments_can_be_seen() -> None:
    attempt: dict[str, list[object]] = {"clone3": ["clone3", 0, 0]}
    assert filtered("python", network=False, attempts=attempt) == {"clone3": errno.ENOSYS}
    assert filtered("python", network=False, attempts=attempt, bare=True) != {"clone3": errno.ENOSYS}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="no other architecture has such numbers")
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_call_by_the_number_of_another_abi_ends_the_program(runtime: RuntimeName) -> None:
    """The same call has two numbers, and a list of names holds the one of its own architecture alone."""
    order: dict[str, object] = {
        "filter": seccomp.program(runtime, network=True).hex(),
        "attempts": {"x32": [X32 | GETPID]},
    }
    assert made_calls(order).returncode == -signal.SIGSYS
    assert made_calls(order | {"filter": None}).returncode == 0
    assert made_calls(order | {"attempts": {"x86-64": [GETPID]}}).returncode == 0


INET, INET6, STREAM, NON_BLOCKING = 2, 10, 1, 0x80800
SOCKETS: dict[str, list[object]] = {
    f"{family} {kind} {protocol}": ["socket", family, kind, protocol]
    # What the kernel cuts off must not decide: the families once more, with a bit that it does not look at.
    for family in (*range(48), *(1 << 32 | low for low in (1, INET, INET6, 16)))
    for kind in (*range(1, 7), 10, STREAM | NON_BLOCKING)
    for protocol in (0, 1, 6, 17, 132, 262)
}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_socket_is_tcp_in_a_network_of_its_own_or_nothing(runtime: RuntimeName) -> None:
    def made(said: dict[str, int]) -> set[tuple[int, ...]]:
        return {tuple(map(int, name.split())) for name, error in said.items() if error == 0}

    bare = made(filtered(runtime, network=True, attempts=SOCKETS, bare=True))
    tcp = {
        (family, kind, protocol)
        for family, kind, protocol in bare
        if family & 0xFFFFFFFF in {INET, INET6} and kind & ~NON_BLOCKING == STREAM and protocol in {0, 6}
    }
    assert (INET, STREAM, 0) in tcp
    assert {(1, 1, 0), (INET, 2, 0)} < bare - tcp
    inside = made(filtered(runtime, network=True, attempts=SOCKETS))
    assert {each for each in tcp if each[0] <= 0xFFFFFFFF} <= inside <= tcp
    assert made(filtered(runtime, network=False, attempts=SOCKETS)) == set()


def test_programs_take_a_family_that_is_refused_for_one_that_the_kernel_lacks() -> None:
    attempts: dict[str, list[object]] = {"unix": ["socket", 1, 1, 0], "netlink": ["socket", 16, 3, 0]}
    for network in (False, True):
        assert filtered("python", network=network, attempts=attempts) == dict.fromkeys(attempts, errno.EAFNOSUPPORT)
