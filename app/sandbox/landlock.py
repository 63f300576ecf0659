"""The second backend, for where no namespace may be made: Landlock, a list of system calls, limits and a guard.

What it cannot do that bubblewrap can:
- There is no mount. Paths inside are rewritten to paths of the host in the arguments, the environment and the
  texts of a profile; a program that has a path built in does not find it. There is no /proc and no /dev/shm.
- /tmp is a folder of the host, private and removed in the end. A file in it is limited, their sum is not.
- What there is on the host may be asked by name: whether a file or a process exists, not what is in it.
- The limit on processes counts those of its user. Where Bulkhead is no root, that is every tenant's.
`tests/sandbox/known_openings.toml` holds what an attack makes of this.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import ClassVar, Final

from app.sandbox import orders, seccomp
from app.sandbox.contract import Launch, Profile, SandboxUnavailable

REMEDY: Final = (
    "run the service as a user who may read the interpreter and its packages and may write to the folder for "
    "temporary files; in a container, use a seccomp profile that allows the landlock system calls"
)
_CREATE_RULESET, _GIVE_VERSION = 444, 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in range(6))
_MAKE_DIR, _MAKE_REG, _MAKE_SYM = 1 << 7, 1 << 8, 1 << 12
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_READ = _EXECUTE | _READ_FILE | _READ_DIR
# Neither execution nor sockets, devices and pipes by name.
_WRITE = (
    (_READ_FILE | _READ_DIR | _WRITE_FILE | _TRUNCATE | _REFER)
    | (_REMOVE_DIR | _REMOVE_FILE)
    | (_MAKE_DIR | _MAKE_REG | _MAKE_SYM)
)
_OF_FILE = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
_TRUNCATION, _SCOPES = 3, 6  # the ABI that brought them


@dataclass(frozen=True, slots=True)
class Landlock:
    """Landlock as the kernel's `abi` has it."""

    name: ClassVar[str] = "landlock"
    abi: int

    def launch(self, profile: Profile) -> Launch:
        """A command that becomes the program.

        Raises SandboxUnavailable for a network, a scratch, and a mount within a writable one.
        """
        _refuse_what_takes_a_namespace(profile)
        _refuse_cover(profile)
        folder = Path(tempfile.gettempdir(), f"bulkhead-{os.urandom(8).hex()}")
        order = {
            "parent": os.getpid(),
            "become": profile.host_uid if os.geteuid() == 0 else None,
            "cgroup": [str(folder) for folder in profile.cgroup],
            "channel": None,
            "scratch": str(folder),
            "mounts": [(str(mount.source), mount.target, mount.writable) for mount in profile.mounts],
            "files": dict(profile.files),
            "environment": {"TMPDIR": "/tmp"} | dict(profile.environment),  # noqa: S108  # the private one
            "limits": profile.limits.rlimits(),
            "rights": _rights(self.abi),
            "system_calls": seccomp.program(profile.runtime, network=False, beside_others=True),
            "working_directory": profile.working_directory,
            "argv": profile.argv,
        }
        return replace(orders.launch("landlock_launcher", order), leaves=(folder,))


def built_in(*, abi: int | None = None, one_tenant: bool = False) -> Landlock:
    """The backend on this kernel, or as if it had another `abi`. Raises SandboxUnavailable with the remedy.

    `one_tenant`: all servers of this process are one tenant's, and so may signal each other.
    """
    abi = _abi() if abi is None else abi
    if abi < _TRUNCATION:
        raise SandboxUnavailable(f"Landlock ABI {abi} lets files be truncated", remedy="run Linux 6.2 or later")
    if abi < _SCOPES and not one_tenant:
        raise SandboxUnavailable(
            f"under Landlock ABI {abi} the servers of one tenant may signal those of another",
            remedy="run Linux 6.12 or later, or one process of the service for each tenant",
        )
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        raise SandboxUnavailable(
            "nothing tells which processes a server leaves behind", remedy="run a kernel with CONFIG_PROC_CHILDREN"
        )
    seccomp.program("python", network=False, beside_others=True)  # what cannot be compiled is told now
    return Landlock(abi)


def _abi() -> int:
    library = ctypes.CDLL(None, use_errno=True)
    version = int(
        library.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(_GIVE_VERSION))
    )
    if version >= 0:
        return version
    number = ctypes.get_errno()
    remedies = {
        errno.ENOSYS: ("this kernel has no Landlock", "run Linux 6.12 or later"),
        errno.EOPNOTSUPP: ("Landlock was not turned on at boot", "boot with landlock first in the list of lsm="),
    }
    reason, remedy = remedies.get(number, ("Landlock is refused to this process", REMEDY))
    raise SandboxUnavailable(reason, remedy=remedy)


def _rights(abi: int) -> dict[str, object]:
    """What the kernel shall refuse (files, TCP, signals and abstract sockets), and what of it each rule allows."""
    files = _REFER - 1 | _REFER | _TRUNCATE
    if abi >= 5:
        files |= _IOCTL_DEV
    tcp, scopes = (3 if abi >= 4 else 0), (3 if abi >= _SCOPES else 0)
    return {
        "handled": (files, tcp, scopes),
        "read": _READ,
        "write": _WRITE,
        "of_file": _OF_FILE,
        "folder": _READ_FILE | _READ_DIR,
        "file": _READ_FILE,
        "device": _READ_FILE | _WRITE_FILE,
    }


def _refuse_what_takes_a_namespace(profile: Profile) -> None:
    if profile.network is not None:
        raise SandboxUnavailable("Landlock cannot give a server a network of its own", remedy="use bubblewrap")
    if profile.scratch:
        raise SandboxUnavailable("Landlock cannot bound a folder that a server may write to", remedy="use bubblewrap")


def _refuse_cover(profile: Profile) -> None:
    """Whoever may write to a folder may write to all of it: a rule takes nothing away."""
    writable = [PurePosixPath(mount.target) for mount in profile.mounts if mount.writable]
    for target in _targets(profile):
        if any(outer in target.parents for outer in writable):
            raise SandboxUnavailable("Landlock cannot show anything within a writable folder", remedy="use bubblewrap")


def _targets(profile: Profile) -> Iterator[PurePosixPath]:
    yield from (PurePosixPath(mount.target) for mount in profile.mounts)
    yield from map(PurePosixPath, profile.files)
