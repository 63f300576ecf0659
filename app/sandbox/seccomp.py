"""Which system calls a program inside may make: a list of what it needs, refused is everything else.

An allow list, since a library older than the kernel cannot name the newest calls in a deny list. What a call is asked
to do counts too, where the kernel shows that to a filter: not behind a pointer.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, Final, NamedTuple

from app.sandbox.contract import RuntimeName, SandboxUnavailable

# What every runtime needs. Names that an architecture does not have (aarch64 has no `open`, no `fork`) are skipped on
# it. Not among them, for any runtime: memfd_create, which makes programs that are in no file.
_SHARED: Final = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
    open openat openat2 creat access faccessat faccessat2 stat lstat fstat newfstatat statx statfs fstatfs
    readlink readlinkat getcwd chdir fchdir getdents getdents64 umask flock fsync fdatasync sync_file_range
    truncate ftruncate fallocate fadvise64 readahead copy_file_range sendfile
    rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat mkdir mkdirat rmdir
    chmod fchmod fchmodat utime utimes utimensat futimesat
    getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
    dup dup2 dup3 pipe pipe2 poll ppoll select pselect6
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
    timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4
    munmap mprotect mremap madvise msync mincore brk membarrier
    futex futex_waitv set_robust_list get_robust_list set_tid_address rseq arch_prctl
    sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
    getcpu getpriority setpriority
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigpending rt_sigtimedwait rt_sigqueueinfo
    sigaltstack restart_syscall pause alarm setitimer getitimer
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times
    getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups capget
    getpgid getpgrp setpgid getsid setsid kill tkill tgkill pidfd_open pidfd_send_signal
    fork vfork execve execveat wait4 waitid exit exit_group
    getrlimit setrlimit prlimit64 getrusage sysinfo uname getrandom
    sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown getsockopt getsockname getpeername
"""
# With a network of its own: what a client and a server of TCP need.
_NETWORK: Final = "connect bind listen accept accept4"
# What was seen to be refused and not to be missed stays refused. V8 asks for keys to guard its code (pkey_alloc), libuv
# for io_uring and netlink (os.networkInterfaces() fails), chromium for memfd_create: it takes files in /tmp instead,
# whose size is bounded.
_ADDED: Final[dict[RuntimeName, str]] = {
    "python": "",
    "node": "",
    # Instances are few, and counted for all of a user of the host together: no others get the calls.
    "chromium": "inotify_init inotify_init1 inotify_add_watch inotify_rm_watch",
}
# Without namespaces the rest of the host is in reach by name. These ask nothing of Landlock before they change a
# file's mode or times, watch a folder, make a process slow, take its limits away or wait for its end.
_REACH_OUT: Final = """
    chmod fchmod fchmodat utime utimes utimensat futimesat
    inotify_init inotify_init1 inotify_add_watch inotify_rm_watch
    getxattr lgetxattr listxattr llistxattr setpriority prlimit64 pidfd_open
"""

_WORD = 0xFFFFFFFF  # the kernel reads most arguments as 32 bits: more than that must not decide
_AF_UNIX, _AF_INET, _AF_INET6 = 1, 2, 10
_SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_FLAGS = 1, 5, 0x80800  # flags: SOCK_CLOEXEC, SOCK_NONBLOCK
_IPPROTO_DEFAULT, _IPPROTO_TCP = 0, 6  # not MPTCP, SCTP or SMC, which are streams too
# CLONE_NEW{TIME,NS,CGROUP,UTS,IPC,USER,PID,NET}
_NEW_NAMESPACE = 0x80 | 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA = 15, 16, 0x53564D41
_FIONREAD, _FIONBIO, _FIOCLEX, _FIONCLEX = 0x541B, 0x5421, 0x5451, 0x5450
_TCGETS, _TIOCGWINSZ = 0x5401, 0x5413  # "is this a terminal?"; TIOCSTI and TIOCLINUX would type into one
# fcntl: DUPFD, {GET,SET}{FD,FL,LK}, SETLKW, DUPFD_CLOEXEC, GETPIPE_SZ, OFD_{GETLK,SETLK,SETLKW}.
# Not SETLEASE, for whose end the host would wait before it opens a file, NOTIFY, nor SETPIPE_SZ: pipes are bounded
# for all of a user of the host together.
_FILE_COMMANDS: Final = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032, 36, 37, 38)
# The kind of a mapping, and what it may not be at the same time.
_MAP_SHARED, _MAP_PRIVATE, _MAP_SHARED_VALIDATE, _MAP_DROPPABLE, _MAP_TYPE = 1, 2, 3, 8, 0x0F
_MAP_ANONYMOUS, _MAP_GROWSDOWN, _MAP_HUGETLB = 0x20, 0x100, 0x40000
# Options of a socket, by level. Not SO_ATTACH_FILTER and SO_ATTACH_BPF, nor TCP_ULP: each is a machine of the
# kernel's own.
_SOCKET_OPTIONS: Final = {
    # SOL_SOCKET: REUSEADDR, BROADCAST (Go sets it on every socket), SNDBUF, RCVBUF, KEEPALIVE, LINGER, REUSEPORT,
    # PASSCRED, RCVTIMEO, SNDTIMEO
    1: (2, 6, 7, 8, 9, 13, 15, 16, 20, 21),
    0: (1, 24),  # IP: TOS, BIND_ADDRESS_NO_PORT
    # TCP: NODELAY, CORK, KEEP{IDLE,INTVL,CNT}, DEFER_ACCEPT, QUICKACK, USER_TIMEOUT, FASTOPEN, NOTSENT_LOWAT
    6: (1, 3, 4, 5, 6, 9, 12, 18, 23, 25),
    41: (26, 67),  # IPv6: V6ONLY, TCLASS
}


class Rule(NamedTuple):
    """A call that is allowed if each argument named by its position, less what the mask leaves out, is the value."""

    call: str
    arguments: dict[int, tuple[int, int]] = {}  # noqa: RUF012  # never changed; position: (mask, value)


@cache
def program(runtime: RuntimeName, *, network: bool, beside_others: bool = False) -> bytes:
    """A BPF program for this machine, which lets a program of this runtime make the calls of its list.

    `network`: TCP in a network namespace of its own. `beside_others`: processes that are none of the program's can be
    named, so it may change only its own limits and priority. Raises SandboxUnavailable where libseccomp is missing.
    """
    library = _libseccomp()
    rules = library.SyscallFilter(library.ERRNO(errno.EPERM))
    rules.set_attr(library.Attr.CTL_OPTIMIZE, 2)  # a tree, not a walk through the list on every call
    for call, arguments in allowed(runtime, network=network, beside_others=beside_others):
        if library.resolve_syscall(library.Arch.NATIVE, call) >= 0:
            conditions = (library.Arg(at, library.MASKED_EQ, *wanted) for at, wanted in arguments.items())
            rules.add_rule(library.ALLOW, call, *conditions)
    # Its flags lie behind a pointer, where no filter sees them: libc falls back to clone.
    rules.add_rule(library.ERRNO(errno.ENOSYS), "clone3")
    for condition in _other_families(library) if network else ((),):
        rules.add_rule(library.ERRNO(errno.EAFNOSUPPORT), "socket", *condition)
    return _compiled(rules)


def allowed(runtime: RuntimeName, *, network: bool, beside_others: bool = False) -> Iterator[Rule]:
    """All that the program lets through."""
    calls = _SHARED.split() + _ADDED[runtime].split() + (_NETWORK.split() if network else [])
    refused = set(_REACH_OUT.split()) if beside_others else set()
    yield from (Rule(call) for call in calls if call not in refused)
    yield Rule("clone", {0: (_NEW_NAMESPACE, 0)})
    yield from _memory()
    yield from _sockets(network=network)
    yield from _by_number("prctl", 0, (_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA))
    yield from _by_number("fcntl", 1, _FILE_COMMANDS)
    yield from _by_number("ioctl", 1, (_TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIOCLEX, _FIONCLEX))
    if beside_others:
        yield Rule("prlimit64", {0: (_WORD, 0)})
        yield Rule("setpriority", {0: (_WORD, 0), 1: (_WORD, 0)})


def _memory() -> Iterator[Rule]:
    """Memory that RLIMIT_DATA counts, and files. It counts neither memory that is shared nor a stack that grows down.

    No runtime needs either: they share memory by files, which the size of /dev/shm and /tmp bounds. Huge pages come
    from a store that all of the host has together.
    """
    for kind in (_MAP_PRIVATE, _MAP_DROPPABLE):
        yield Rule("mmap", {3: (_MAP_TYPE | _MAP_GROWSDOWN | _MAP_HUGETLB, kind)})
    for kind in (_MAP_SHARED, _MAP_SHARED_VALIDATE):
        yield Rule("mmap", {3: (_MAP_TYPE | _MAP_GROWSDOWN | _MAP_HUGETLB | _MAP_ANONYMOUS, kind)})


def _sockets(*, network: bool) -> Iterator[Rule]:
    """Event loops wake themselves through a pair; a unix socket that could be connected to anything is never made.

    One for datagrams could send them to any address, without being connected.
    """
    kinds = _WORD & ~_SOCK_FLAGS
    for kind in (_SOCK_STREAM, _SOCK_SEQPACKET):
        yield Rule("socketpair", {0: (_WORD, _AF_UNIX), 1: (kinds, kind)})
    for level, names in _SOCKET_OPTIONS.items():
        for name in names:
            yield Rule("setsockopt", {1: (_WORD, level), 2: (_WORD, name)})
    if network:
        for family in (_AF_INET, _AF_INET6):
            for protocol in (_IPPROTO_DEFAULT, _IPPROTO_TCP):
                yield Rule("socket", {0: (_WORD, family), 1: (kinds, _SOCK_STREAM), 2: (_WORD, protocol)})


def _by_number(call: str, position: int, numbers: Iterable[int]) -> Iterator[Rule]:
    yield from (Rule(call, {position: (_WORD, number)}) for number in numbers)


def _other_families(library: Any) -> Iterator[tuple[Any]]:
    """Conditions for all but IPv4 and IPv6: of one that the kernel does not have, a program makes no error."""
    yield (library.Arg(0, library.LT, _AF_INET),)
    yield from ((library.Arg(0, library.EQ, family),) for family in range(_AF_INET + 1, _AF_INET6))
    yield (library.Arg(0, library.GT, _AF_INET6),)


def _compiled(rules: Any) -> bytes:
    with os.fdopen(os.memfd_create("filter"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _libseccomp() -> Any:
    try:
        # Imported here because it looks for the C library at import, and fails there without it.
        import pyseccomp  # noqa: PLC0415
    except (ImportError, RuntimeError) as error:
        raise SandboxUnavailable(
            "the system call filter cannot be made: libseccomp is missing",
            remedy="install libseccomp: apt-get install libseccomp2",
        ) from error
    return pyseccomp
