"""Becomes a program under Landlock: run by what `Landlock.launch` gave, with the standard library alone.

Three processes, since there is no namespace whose end would take everything inside along:
- The launcher is what the service has started. It ends with the service and hands on how the program ended.
- The guard adopts what the program leaves behind, and kills all of it when the program or the launcher ends.
- The program. Its limits, rules and filter are set by itself, just before it begins.
Should the guard be killed, what it had falls to the launcher, which then does the same.
"""

# pathlib would cost a third of the start.
# ruff: noqa: PTH101, PTH104, PTH106, PTH108, PTH123

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import signal
import stat
import struct
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from app.sandbox import launcher, layout
else:
    import launcher
    import layout

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP = 1, 4, 22
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 36, 38
_SECCOMP_MODE_FILTER = 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_RULE_PATH_BENEATH = 1
_STAGE = "/run"  # exists on every host; covered for us alone
_WATCHED = {signal.SIGCHLD, signal.SIGTERM}

_libc = ctypes.CDLL(None, use_errno=True)


def start() -> NoReturn:
    launcher.complaining(main)


def main() -> NoReturn:
    order = launcher.begin()
    if order["become"] is not None:
        _stage(order)
        launcher.become(order["become"])
    launcher.end_with(order["parent"])
    launcher.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    launcher.prctl(_PR_SET_DUMPABLE, 0)  # hides the order in our environment from our own user
    launcher.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    folder = order["scratch"]
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    ourselves = os.getpid()
    guard = os.fork()
    if guard == 0:
        _guard(order, folder, launcher_pid=ourselves)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)
    _, status = os.waitpid(guard, 0)
    _end_descendants()
    _remove(folder)
    sys.exit(_exit_code(status))


def _stage(order: dict[str, Any]) -> None:
    """As root, show the sources where the other user can reach them; without the right to, they must be anyway."""
    try:
        launcher.unshare(launcher.CLONE_NEWNS)
        staged = launcher.stage([source for source, _, _ in order["mounts"]], _STAGE)
    except PermissionError:
        return
    order["mounts"] = [[place, *mount[1:]] for place, mount in zip(staged, order["mounts"], strict=True)]


# --- the guard


def _guard(order: dict[str, Any], folder: str, *, launcher_pid: int) -> NoReturn:
    code = 1
    try:
        os.setsid()  # outlives a kill of the launcher's group
        launcher.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        launcher.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == launcher_pid:
            code = _run(order, folder)
    except OSError as error:
        _complain(error)
    finally:  # whatever went wrong, nothing stays, and this copy runs no other line
        try:
            _end_descendants()
            _remove(folder)
        finally:
            os._exit(code)


def _run(order: dict[str, Any], folder: str) -> int:
    """The exit code of the program, once it or the launcher has ended."""
    root = layout.plan(order)
    rewrite = layout.Rewriter(root, folder)
    ruleset = _ruleset(order["rights"], folder, layout.lay(root, folder, rewrite))
    order["limits"]["RLIMIT_NPROC"] += _processes_of(os.getuid())
    guard = os.getpid()
    program = os.fork()
    if program == 0:
        _become_program(order, rewrite, ruleset, guard=guard)
    return _watch(program)


def _watch(program: int) -> int:
    """Reap until one of the two ends: the kernel tells of the launcher's death by SIGTERM."""
    while signal.sigwait(_WATCHED) == signal.SIGCHLD:
        ended = -1
        while ended != 0:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended == program:
                return _exit_code(status)
    return 1


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _end_descendants() -> None:
    """Kill until there is nothing left to wait for. No deadline: to give up would be to let it go.

    Only children are killed, since whatever a dead child leaves behind becomes a child of ours.
    """
    with contextlib.suppress(ChildProcessError):
        while True:
            for child in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0] != 0:
                pass
            os.sched_yield()


def _children() -> list[int]:
    """Read at once: a search of /proc would never catch up with a process that is always one fork ahead."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(word) for word in file.read().split()]


def _remove(folder: str) -> None:
    """Remove the folder, which may be gone. Folders move up first: a program may nest them deeper than a path goes."""
    while os.path.lexists(folder):
        for inner in _paths(folder):
            if _is_folder(inner):
                _empty(inner, folder)
            else:
                os.unlink(inner)
        _remove_if_empty(folder)


def _empty(path: str, folder: str) -> None:
    os.chmod(path, 0o700)
    for inner in _paths(path):
        if _is_folder(inner):
            os.chmod(inner, 0o700)
            os.rename(inner, f"{folder}/.moved-{os.urandom(8).hex()}")
        else:
            os.unlink(inner)
    _remove_if_empty(path)


def _paths(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.path


def _is_folder(path: str) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)


def _remove_if_empty(folder: str) -> None:
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise


# --- the program


def _become_program(order: dict[str, Any], rewrite: layout.Rewriter, ruleset: int, *, guard: int) -> NoReturn:
    try:
        os.setsid()
        launcher.end_with(guard)
        _limit(order["limits"])
        os.chdir(rewrite(order["working_directory"]))
        argv = [rewrite(word) for word in order["argv"]]
        environment = {name: rewrite(value) for name, value in order["environment"].items()}
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        launcher.default_signals()
        _call(_RESTRICT_SELF, ruleset, 0)
        _filter(order["system_calls"])
        os.execve(argv[0], argv, environment)  # noqa: S606  # a shell is the last thing wanted
    except OSError as error:
        _complain(error)
    finally:
        os._exit(1)


def _limit(limits: dict[str, int]) -> None:
    for name, wanted in limits.items():
        which = getattr(resource, name)
        _, hard = resource.getrlimit(which)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(which, (value, value))


def _processes_of(uid: int) -> int:
    """Threads of a user on this host: the limit counts them all, not only those of the program."""
    return sum(_threads(entry.name, uid) for entry in os.scandir("/proc") if entry.name.isdecimal())


def _threads(pid: str, uid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", "rb") as file:  # a process names itself as it likes, in any bytes
            lines = dict(line.partition(b":")[::2] for line in file.read().split(b"\n"))
    except OSError:  # it has ended meanwhile, or is hidden from us: not to count it makes the limit no wider
        return 0
    return int(lines[b"Threads"]) if int(lines[b"Uid"].split()[0]) == uid else 0


def _ruleset(rights: dict[str, Any], folder: str, rules: Iterable[layout.Rule]) -> int:
    """A ruleset that allows the folder of links, its rules and harmless devices, and nothing else that it handles."""
    attributes = struct.pack("QQQ", *rights["handled"])
    ruleset = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    for rule in rules:
        allowed = rights["write"] if rule.is_writable else rights["read"]
        _allow(ruleset, rule.path, allowed, of_file=rights["of_file"])
    _allow(ruleset, folder, rights["folder"])
    _allow(ruleset, "/dev/null", rights["device"])
    for device in ("/dev/random", "/dev/urandom"):  # not /dev/zero: mapped as shared, it is memory that nothing counts
        _allow(ruleset, device, rights["file"])
    return ruleset


def _allow(ruleset: int, path: str, rights: int, *, of_file: int = -1) -> None:
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    if not stat.S_ISDIR(os.fstat(opened).st_mode):
        rights &= of_file
    _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", rights, opened), 0)
    os.close(opened)


def _filter(program: bytes) -> None:
    """Allow the system calls of a BPF program only; a `struct sock_fprog` says where it lies."""
    text = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(text))
    done = _libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), described, None, None)
    launcher.check(done, "seccomp")


def _call(number: int, *arguments: Any) -> int:
    wide = [ctypes.c_size_t(word) if isinstance(word, int) else word for word in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *wide))
    launcher.check(min(result, 0), "landlock")
    return result


def _complain(error: OSError) -> None:
    os.write(2, f"sandbox: {error.strerror}\n".encode())
