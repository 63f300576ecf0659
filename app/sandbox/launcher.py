"""Becomes a sandbox: run as a script by what `Bubblewrap.launch` gave, with the standard library alone.

It does what must happen between the service and bubblewrap, and what no argument of bubblewrap can say:
- As root it first shows bubblewrap's sources at a place that the other user can reach (they may lie under a home
  of mode 0700), then turns into that user for good. From there root and an ordinary user go the same way.
- It ends with the service, even when that is killed before bubblewrap has begun to watch for it.
- It limits the first process inside before that goes on: set before bubblewrap, the limit on processes would
  count all that this user runs on the host.

The launcher of Landlock takes its first steps from here.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import json
import os
import resource
import signal
import stat
import sys
import time
from typing import Any, NoReturn

_CLONE_NEWNS = 0x20000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_STAGE = "/tmp"  # noqa: S108  # exists on every host (bubblewrap needs it too) and is covered for us alone
_PIPE_BYTES = 65536
_TIED_SECONDS = 10  # bounds a wait of some milliseconds where the kernel does not tell

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    order = begin()
    gate = _open_gate()
    if order["become"] is not None:
        _stage_all(order)
        become(order["become"])
    end_with(order["parent"])
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    report = _limit_first_process(order["limits"], gate)
    options = [*order["compartment"], *_root(order), "--info-fd", report, "--block-fd", str(gate)]
    os.set_inheritable(gate, True)
    # Secrets for the server pass through a pipe: arguments can be read by everyone on the host.
    arguments = ("bwrap", "--args", _pipe("\0".join(options).encode()), "--", *order["argv"])
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and it would be inherited
        signal.signal(ignored, signal.SIG_DFL)
    environment = {"LD_LIBRARY_PATH": order["libraries"]} if order["libraries"] else {}
    os.execve(order["binary"], arguments, environment)  # noqa: S606  # a shell is the last thing wanted


def begin() -> dict[str, Any]:
    """Let go of what is the service's; what it ordered."""
    order: dict[str, Any] = json.loads(os.environ["BULKHEAD_SANDBOX"])
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # a group that the guard may kill: not the service's
    return order


def _root(order: dict[str, Any]) -> list[str]:
    """The rest of bubblewrap's options: the minimal root, in the end read-only, and the system call filter."""
    options: list[str] = []
    for source, target, writable in order["mounts"]:
        options += ["--bind" if writable else "--ro-bind", source, target]
    for target, text in order["files"].items():
        options += ["--perms", "0444", "--file", _pipe(text.encode()), target]
    options += ["--remount-ro", "/", "--remount-ro", "/dev", "--chdir", order["working_directory"]]
    return [*options, "--seccomp", _pipe(base64.b64decode(order["system_calls"]))]


def _stage_all(order: dict[str, Any]) -> None:
    sources = [order["binary"], order["libraries"] or order["binary"], *(mount[0] for mount in order["mounts"])]
    order["binary"], libraries, *mounts = stage(sources, _STAGE)
    order["libraries"] = libraries if order["libraries"] else None
    order["mounts"] = [[place, *mount[1:]] for place, mount in zip(mounts, order["mounts"], strict=True)]


def stage(sources: list[str], folder: str) -> list[str]:
    """Bind every source below a `folder` of our own and tell where; nobody but us sees this."""
    check(_libc.unshare(_CLONE_NEWNS), "unshare")
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    # Pinned before the folder is covered: a source may lie there.
    pinned = [os.open(source, os.O_PATH | os.O_CLOEXEC) for source in sources]
    _mount("tmpfs", folder, _MS_NOSUID | _MS_NODEV, kind=b"tmpfs", data=b"mode=0711,size=1m")
    return [_bind(source, f"{folder}/{number}") for number, source in enumerate(pinned)]


def _bind(source: int, place: str) -> str:
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.mkdir(place)  # noqa: PTH102  # pathlib costs a third of the start of this script
    else:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    _mount(f"/proc/self/fd/{source}", place, _MS_BIND | _MS_REC)
    os.close(source)
    return place


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def end_with(parent: int) -> None:
    """Be killed when the parent dies; go now if it already has."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("sandbox: not started by the process that asked for it")


def _open_gate() -> int:
    """A pipe at which bubblewrap waits. It holds both ends, so that only a byte opens it, never a helper's death."""
    reading, writing = os.pipe()
    gate = os.open(f"/proc/self/fd/{reading}", os.O_RDWR | os.O_CLOEXEC)
    os.close(reading)
    os.close(writing)
    return gate


def _limit_first_process(limits: dict[str, int], gate: int) -> str:
    """Fork the guard, which waits for bubblewrap's report of its first process; the fd to report to."""
    report, reporting = os.pipe()
    launcher = os.getpid()
    if os.fork() == 0:
        os.close(reporting)
        _guard(launcher, report, gate, limits)
    os.close(report)
    os.set_inheritable(reporting, True)
    return str(reporting)


def _guard(launcher: int, report: int, gate: int, limits: dict[str, int]) -> NoReturn:
    """Limit the first process, open the gate, and watch until that process is tied to the life of the launcher.

    Bubblewrap ties it late, after all its mounts: killed before, it would leave a sandbox behind.
    """
    first = None
    is_tied = False
    try:
        os.setsid()  # outlives a kill of the launcher's group
        first = _reported_pid(report)
        _limit(first, limits)
        os.write(gate, b"\n")
        is_tied = _wait_until_tied(first, launcher)
    finally:  # whatever went wrong, nothing starts or stays, and this copy runs no other line
        if not is_tied or os.getppid() != launcher:
            _end(launcher, first)
        os._exit(0)


def _wait_until_tied(first: int, launcher: int) -> bool:
    """Bubblewrap's first process installs the filter right after it has asked to die with its parent."""
    filters = _filters(os.getpid())
    deadline = time.monotonic() + _TIED_SECONDS
    while _filters(first) <= filters and time.monotonic() < deadline:
        if os.getppid() != launcher:
            return False
        time.sleep(0.001)
    return True


def _filters(pid: int) -> int:
    """How many system call filters a process is under; before Linux 5.10 only whether it is under any."""
    with open(f"/proc/{pid}/status") as file:  # noqa: PTH123  # as above
        lines = dict(line.split(":", 1) for line in file)
    return int(lines.get("Seccomp_filters", lines["Seccomp"]))


def _end(launcher: int, first: int | None) -> None:
    """The group holds what bubblewrap has made until it enters a session of its own, after the gate."""
    for kill, target in ((os.killpg, launcher), (os.kill, first)):
        if target is not None:
            with contextlib.suppress(ProcessLookupError):
                kill(target, signal.SIGKILL)


def _reported_pid(report: int) -> int:
    text = b""
    while not text.rstrip().endswith(b"}"):
        chunk = os.read(report, 4096)
        if not chunk:
            raise EOFError
        text += chunk
    return int(json.loads(text)["child-pid"])


def _limit(pid: int, limits: dict[str, int]) -> None:
    for name, wanted in limits.items():
        which = getattr(resource, name)
        _, hard = resource.prlimit(pid, which)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.prlimit(pid, which, (value, value))


def _pipe(data: bytes) -> str:
    """The number of an inheritable fd that yields `data` and then ends."""
    if len(data) > _PIPE_BYTES:
        sys.exit("sandbox: a file or the list of arguments is too long")
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    os.set_inheritable(reading, True)
    return str(reading)


def _mount(source: str, target: str, flags: int, *, kind: bytes | None = None, data: bytes | None = None) -> None:
    done = _libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), data)
    check(done, "mount")


def prctl(option: int, value: int) -> None:
    done = _libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0)))
    check(done, "prctl")


def check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"sandbox: {error.strerror}")
