"""Becomes a sandbox: run by what `Bubblewrap.launch` gave, with the standard library alone.

It does what must happen between the service and bubblewrap, and what no argument of bubblewrap can say:
- It makes the network namespace, and in it the listening sockets of a server with a network (`doors.py`).
- It mounts folders that are bounded in bytes and in files, and shows bubblewrap's sources at a place that the other
  user can reach (they may lie under a home of mode 0700). As an ordinary user it does so in a user namespace.
- As root it then turns into the other user for good.
- It ends with the service, even when that is killed before bubblewrap has begun to watch for it.
- It limits the first process inside before that goes on: set before bubblewrap, the limit on processes would
  count all that this user runs on the host.

The launcher of Landlock takes its first steps from here. Every start of a server waits for the imports: what the
standard library makes pleasant (json, signal, contextlib, typing) takes longer than all of bubblewrap.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

CLONE_NEWNS, _CLONE_NEWUSER, _CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_SIGKILL, _SIGPIPE, _SIGXFSZ = 9, 13, 25
_STAGE = "/tmp"  # noqa: S108  # exists on every host (bubblewrap needs it too) and is covered for us alone
_TIED_SECONDS = 10  # bounds a wait of some milliseconds where the kernel does not tell

_libc = ctypes.CDLL(None, use_errno=True)


def start() -> NoReturn:
    complaining(main)


def complaining(main: Callable[[], NoReturn]) -> NoReturn:
    """No path of the host is in the complaint: others than the operator may read it."""
    try:
        main()
    except OSError as error:
        sys.exit(f"sandbox: {error.strerror}")


def main() -> NoReturn:
    order = begin()
    gate = _open_gate()
    _enter_namespaces(order)
    _stage_all(order)
    if order["become"] is not None:
        become(order["become"])
    end_with(order["parent"])
    prctl(_PR_SET_NO_NEW_PRIVS, 1)
    report = _limit_first_process(order["limits"], gate)
    options = [*order["compartment"], *_root(order), "--info-fd", report, "--block-fd", str(gate)]
    os.set_inheritable(gate, True)
    # Secrets for the server pass through a file of no name: arguments can be read by everyone on the host.
    arguments = ("bwrap", "--args", _file("\0".join(options).encode()), "--", *order["argv"])
    default_signals()
    environment = {"LD_LIBRARY_PATH": order["libraries"]} if order["libraries"] else {}
    os.execve(order["binary"], arguments, environment)  # noqa: S606  # a shell is the last thing wanted


def begin() -> dict[str, Any]:
    """Join the control groups and let go of what is the service's; what it ordered."""
    order: dict[str, Any] = marshal.loads(bytes.fromhex(os.environ["BULKHEAD_SANDBOX"]))  # noqa: S302  # the service's
    for folder in order["cgroup"]:
        _write(f"{folder}/cgroup.procs", "0")
    _write("/proc/self/oom_score_adj", "500")  # where memory runs out, a server goes before the service
    kept = 2 if order["channel"] is None else order["channel"]
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)  # a group that the guard may kill: not the service's
    return order


def _enter_namespaces(order: dict[str, Any]) -> None:
    """A mount namespace and a network namespace, without which no server starts: it would be in the host's."""
    user, group = os.geteuid(), os.getegid()
    is_root = order["become"] is not None
    unshare(CLONE_NEWNS | _CLONE_NEWNET | (0 if is_root else _CLONE_NEWUSER))
    if not is_root:  # who has all rights in the namespaces, until bubblewrap begins, and is the same user
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
    if order["channel"] is not None:
        if TYPE_CHECKING:
            from app.sandbox import doors  # noqa: PLC0415  # only a server with a network waits for its imports
        else:
            import doors  # noqa: PLC0415  # the same
        doors.hand_out(order["channel"], order["listen"])


def _root(order: dict[str, Any]) -> list[str]:
    """The rest of bubblewrap's options: the minimal root, in the end read-only, and the system call filter."""
    options: list[str] = []
    for source, target, writable in order["mounts"]:
        options += ["--bind" if writable else "--ro-bind", source, target]
    for target, text in order["files"].items():
        options += ["--perms", "0444", "--file", _file(text.encode()), target]
    options += ["--remount-ro", "/", "--chdir", order["working_directory"]]
    return [*options, "--seccomp", _file(order["system_calls"])]


def _stage_all(order: dict[str, Any]) -> None:
    """Replace each source by the place where it is staged."""
    binary, libraries = order["binary"], order["libraries"] or order["binary"]
    places = stage([binary, libraries, *(mount[0] for mount in order["mounts"])], _STAGE, owner=order["become"])
    order["binary"], libraries, *mounts = places
    order["libraries"] = libraries if order["libraries"] else None
    order["mounts"] = [(place, *mount[1:]) for place, mount in zip(mounts, order["mounts"], strict=True)]


def stage(sources: list[str | tuple[int, int]], folder: str, *, owner: int | None = None) -> list[str]:
    """Show every source below a `folder` of our own and tell where; nobody but us sees this.

    A source is a path, or how many bytes and files an empty folder of the owner has room for.
    """
    _mount("none", "/", _MS_REC | _MS_PRIVATE)
    # Pinned before the folder is covered: a source may lie there.
    pinned = [os.open(each, os.O_PATH | os.O_CLOEXEC) if isinstance(each, str) else each for each in sources]
    _mount("tmpfs", folder, _MS_NOSUID | _MS_NODEV, "mode=0711,size=1m")
    places = [f"{folder}/{number}" for number in range(len(pinned))]
    for source, place in zip(pinned, places, strict=True):
        if isinstance(source, int):
            _bind(source, place)
        else:
            _make_room(place, *source, owner)
    return places


def _bind(source: int, place: str) -> None:
    if stat.S_ISDIR(os.fstat(source).st_mode):
        os.mkdir(place)  # noqa: PTH102  # pathlib costs a third of the start
    else:
        os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    _mount(f"/proc/self/fd/{source}", place, _MS_BIND | _MS_REC)
    os.close(source)


def _make_room(place: str, size: int, files: int, owner: int | None) -> None:
    uid, gid = (os.geteuid(), os.getegid()) if owner is None else (owner, owner)
    os.mkdir(place)  # noqa: PTH102  # as above
    options = f"mode=0700,size={size},nr_inodes={files},uid={uid},gid={gid}"
    _mount("tmpfs", place, _MS_NOSUID | _MS_NODEV, options)


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def end_with(parent: int) -> None:
    """Be killed when the parent dies; go now if it already has."""
    prctl(_PR_SET_PDEATHSIG, _SIGKILL)
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
            try:  # noqa: SIM105  # contextlib is among what takes too long to import
                kill(target, _SIGKILL)
            except ProcessLookupError:
                pass


def _reported_pid(report: int) -> int:
    text = b""
    while not text.rstrip().endswith(b"}"):
        chunk = os.read(report, 4096)
        if not chunk:
            raise EOFError
        text += chunk
    number = text.partition(b'"child-pid":')[2].split(b",", 1)[0]  # of JSON, which would take a third of the start
    return int(number.strip(b" \n}"))


def _limit(pid: int, limits: dict[str, int]) -> None:
    for name, wanted in limits.items():
        which = getattr(resource, name)
        _, hard = resource.prlimit(pid, which)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.prlimit(pid, which, (value, value))


def _file(data: bytes) -> str:
    """The number of an inheritable fd that yields `data` and then ends.

    A file and no pipe: what the pipes of a user hold is bounded for all of them together.
    """
    file = os.memfd_create("order", 0)
    os.write(file, data)
    os.lseek(file, 0, os.SEEK_SET)
    return str(file)


def default_signals() -> None:
    """Python ignores these, and what it becomes would inherit that."""
    for number in (_SIGPIPE, _SIGXFSZ):
        _libc.signal(number, None)


def unshare(flags: int) -> None:
    check(_libc.unshare(flags), "unshare")


def _mount(source: str, target: str, flags: int, options: str | None = None) -> None:
    kind, data = (b"tmpfs", options.encode()) if options is not None else (None, None)
    check(_libc.mount(source.encode(), target.encode(), kind, ctypes.c_ulong(flags), data), "mount")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123  # as above
        file.write(text)


def prctl(option: int, value: int) -> None:
    done = _libc.prctl(option, *map(ctypes.c_ulong, (value, 0, 0, 0)))
    check(done, "prctl")


def check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
