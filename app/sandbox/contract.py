"""What a sandbox is asked for and what it gives back: plain values, the same for every backend."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Protocol

from app.errors import Unavailable

_MIB = 1 << 20
NOBODY = 65534


class SandboxUnavailable(Unavailable):
    """Tool servers cannot be started safely on this machine."""

    code = "sandbox_unavailable"

    def __init__(self, detail: str | None = None, *, remedy: str = "") -> None:
        """`remedy` is for the operator's eyes only: it may name files of this host."""
        super().__init__(detail)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Mount:
    """A file or folder of the host, seen inside at `target`. Links in `source` are followed."""

    source: Path
    target: str
    writable: bool = False

    def __post_init__(self) -> None:
        _absolute((str(self.source), self.target))


@dataclass(frozen=True, slots=True)
class Limits:
    """Set on every process inside; bytes and seconds. Only `processes` (threads count) is for all together.

    `data_bytes` is RLIMIT_DATA: a limit on the address space breaks runtimes that reserve and never touch.
    `tmp_bytes` holds for /tmp and for /dev/shm, each; under Landlock it holds for neither.
    """

    data_bytes: int = 512 * _MIB
    file_bytes: int = 64 * _MIB
    open_files: int = 256
    processes: int = 64
    cpu_seconds: int = 900
    tmp_bytes: int = 32 * _MIB

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive")

    def rlimits(self) -> dict[str, int]:
        """By the names of the kernel."""
        return {
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_DATA": self.data_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.processes,
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """One program and all that it gets. What is not named here does not exist inside.

    `argv`, `working_directory` and mount targets are paths inside; later mounts may lie within earlier ones.
    `files` are small read-only texts by their path inside. `host_uid` is who the program is on the host when
    Bulkhead runs as root; otherwise it is Bulkhead's own user.
    """

    argv: tuple[str, ...]
    host_uid: int
    mounts: tuple[Mount, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    limits: Limits = field(default_factory=Limits)
    working_directory: str = "/tmp"  # noqa: S108  # the sandbox's own, which nobody else sees

    def __post_init__(self) -> None:
        if self.host_uid <= 0:
            raise ValueError("no program of a tenant runs as root")
        _absolute((*self.argv[:1], self.working_directory, *self.files))
        _without_nul((*self.argv, *self.environment, *self.environment.values()))


@dataclass(frozen=True, slots=True)
class Launch:
    """What to execute on the host, without a shell, as a child of the process that asked for it.

    It refuses to start under any other parent and ends when that parent does, so start it from a thread
    that lives as long as the server shall.
    """

    argv: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)


class Sandbox(Protocol):
    @property
    def name(self) -> str: ...

    def launch(self, profile: Profile) -> Launch: ...


def _absolute(paths: Iterable[str]) -> None:
    for path in paths:
        _without_nul((path,))
        if not path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise ValueError(f"not an absolute path: {path!r}")


def _without_nul(texts: Iterable[str]) -> None:
    """Refuse what could end an argument early and begin an option of the sandbox's own."""
    if any("\0" in text for text in texts):
        raise ValueError("NUL in an argument, an environment variable or a path")
