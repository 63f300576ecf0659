"""Which system calls a program inside may make: a list of what it needs, refused is everything else.

An allow list, since a library older than the kernel cannot name the newest calls in a deny list.
"""

from __future__ import annotations

import errno
import os
from typing import Any

from app.sandbox.contract import SandboxUnavailable

# Names that an architecture does not have (aarch64 has no `open`, no `fork`) are skipped on it.
PYTHON = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
    open openat openat2 creat access faccessat faccessat2 stat lstat fstat newfstatat statx statfs fstatfs
    readlink readlinkat getcwd chdir fchdir getdents getdents64 umask flock fsync fdatasync sync_file_range
    truncate ftruncate fallocate fadvise64 readahead copy_file_range sendfile
    rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat mkdir mkdirat rmdir
    chmod fchmod fchmodat utime utimes utimensat futimesat
    getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr
    dup dup2 dup3 pipe pipe2 fcntl poll ppoll select pselect6
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2
    timerfd_create timerfd_settime timerfd_gettime signalfd signalfd4 inotify_init1 inotify_add_watch inotify_rm_watch
    mmap munmap mprotect mremap madvise msync mincore brk membarrier
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
    sendto recvfrom sendmsg recvmsg sendmmsg recvmmsg shutdown getsockopt setsockopt getsockname getpeername
"""
# Without namespaces the rest of the host is in reach by name. These ask nothing of Landlock before they change a
# file's mode or times, watch a folder, make a process slow or take its limits away.
_REACH_OUT = """
    chmod fchmod fchmodat utime utimes utimensat futimesat inotify_init1 inotify_add_watch inotify_rm_watch
    getxattr lgetxattr listxattr llistxattr setpriority prlimit64
"""
BESIDE_OTHERS = " ".join(call for call in PYTHON.split() if call not in _REACH_OUT.split())

_WORD = 0xFFFFFFFF  # the kernel reads these arguments as 32 bits: more than that must not decide
_AF_UNIX = 1
_SOCK_STREAM, _SOCK_SEQPACKET, _SOCK_FLAGS = 1, 5, 0x80800  # flags: SOCK_CLOEXEC, SOCK_NONBLOCK
# CLONE_NEW{TIME,NS,CGROUP,UTS,IPC,USER,PID,NET}
_NEW_NAMESPACE = 0x80 | 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
_PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA = 15, 16, 0x53564D41
_FIONREAD, _FIONBIO, _FIOCLEX, _FIONCLEX = 0x541B, 0x5421, 0x5451, 0x5450
_TCGETS, _TIOCGWINSZ = 0x5401, 0x5413  # "is this a terminal?"; TIOCSTI and TIOCLINUX would type into one


def compile_filter(calls: str, *, is_beside_others: bool = False) -> bytes:
    """A BPF program for this machine: `calls`, separated by blanks, and a few whose arguments make them harmless.

    `is_beside_others`: processes that are none of the program's can be named, so it may change only its own limits
    and priority. Raises SandboxUnavailable where libseccomp is missing.
    """
    library = _libseccomp()
    rules = library.SyscallFilter(library.ERRNO(errno.EPERM))
    rules.set_attr(library.Attr.CTL_OPTIMIZE, 2)  # a tree, not a walk through the list on every call
    for call in calls.split():
        if library.resolve_syscall(library.Arch.NATIVE, call) >= 0:
            rules.add_rule(library.ALLOW, call)
    _allow_by_argument(library, rules)
    if is_beside_others:
        _allow_for_itself(library, rules)
    # Its flags lie behind a pointer, where no filter sees them: libc falls back to clone.
    rules.add_rule(library.ERRNO(errno.ENOSYS), "clone3")
    rules.add_rule(library.ERRNO(errno.EAFNOSUPPORT), "socket")
    with os.fdopen(os.memfd_create("filter"), "w+b") as file:
        rules.export_bpf(file)
        file.seek(0)
        return file.read()


def _allow_by_argument(library: Any, rules: Any) -> None:
    def allow(call: str, position: int, *values: int, mask: int = _WORD) -> None:
        for value in values:
            rules.add_rule(library.ALLOW, call, library.Arg(position, library.MASKED_EQ, mask, value))

    allow("clone", 0, 0, mask=_NEW_NAMESPACE)
    # Event loops wake themselves through a pair; a socket that could be connected to anything is never made.
    # One for datagrams could send them to any address, without being connected.
    for kind in (_SOCK_STREAM, _SOCK_SEQPACKET):
        pair = library.Arg(0, library.MASKED_EQ, _WORD, _AF_UNIX)
        rules.add_rule(library.ALLOW, "socketpair", pair, library.Arg(1, library.MASKED_EQ, _WORD & ~_SOCK_FLAGS, kind))
    allow("prctl", 0, _PR_SET_NAME, _PR_GET_NAME, _PR_SET_VMA)
    allow("ioctl", 1, _TCGETS, _TIOCGWINSZ, _FIONREAD, _FIONBIO, _FIOCLEX, _FIONCLEX)


def _allow_for_itself(library: Any, rules: Any) -> None:
    def zero(position: int) -> Any:
        return library.Arg(position, library.MASKED_EQ, _WORD, 0)

    rules.add_rule(library.ALLOW, "prlimit64", zero(0))
    rules.add_rule(library.ALLOW, "setpriority", zero(0), zero(1))


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
