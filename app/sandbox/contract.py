"""What a sandbox is asked for and what it gives back: plain values, the same for every backend."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, Literal, Protocol, get_args

from app.errors import Unavailable

RuntimeName = Literal["python", "node", "chromium"]

NOBODY: Final = 65534
_MIB = 1 << 20
_MOST_DOORS = 253  # the kernel's SCM_MAX_FD
_LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
# Mounted in every sandbox, /tmp among them.
_OURS = ("/", "/proc", "/dev", "/dev/shm", "/tmp")  # noqa: S108  # names inside


class SandboxUnavailable(Unavailable):
    """Tool servers cannot be started safely on this machine."""

    code = "sandbox_unavailable"

    def __init__(self, detail: str | None = None, *, remedy: str = "") -> None:
        """`remedy` is what the operator does about it. /readyz shows it to anyone: no file of this host is named."""
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
class Scratch:
    """An empty writable folder inside, with room for so many bytes and so many files. It is gone with the server."""

    target: str
    bytes: int
    files: int

    def __post_init__(self) -> None:
        _absolute((self.target,))
        if self.target.startswith("//") or self.target != str(PurePosixPath(self.target)):
            raise ValueError(f"not the plain form of a path: {self.target!r}")
        _positive(self, "bytes", "files")


@dataclass(frozen=True, slots=True)
class Network:
    """Loopback addresses inside whose connections somebody outside accepts.

    `channel` is an fd of this process: one end of a connected pair of stream sockets. Over it come the listening
    sockets, in the order of `listen`, in one message (the byte `L`, the sockets as SCM_RIGHTS); then it is closed.
    Its end without a message means that the program has never started; a message does not mean that it has. The
    launcher sends (`doors.py`): neither the channel nor the sockets are ever inside.
    """

    channel: int
    listen: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if self.channel < 0:
            raise ValueError("the channel is no open file")
        if not 0 < len(self.listen) <= _MOST_DOORS:
            raise ValueError(f"1 to {_MOST_DOORS} addresses fit into one message")
        _unique(self.listen)
        for address, port in self.listen:
            if ipaddress.ip_address(address) not in _LOOPBACK or not 0 < port < 1 << 16:
                raise ValueError(f"not an address of the sandbox's own: {address}:{port}")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, seconds, numbers. Set on every process inside, but for those that are named here.

    `processes` (threads count), `memory_bytes` and `cpus` are for all processes of a server together; the last two
    hold where a cgroup is writable (`Profile.cgroup`).
    `data_bytes` is RLIMIT_DATA: a limit on the address space breaks runtimes that reserve and never touch.
    `tmp_bytes` and `tmp_files` hold for /tmp and for /dev/shm, each; under Landlock they hold for neither.
    """

    data_bytes: int = 512 * _MIB
    file_bytes: int = 64 * _MIB
    open_files: int = 64
    processes: int = 64
    cpu_seconds: int = 900
    tmp_bytes: int = 32 * _MIB
    tmp_files: int = 10_000
    memory_bytes: int = 1024 * _MIB
    cpus: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, *self.__slots__)

    def rlimits(self) -> dict[str, int]:
        """By the names of the kernel."""
        return {
            "RLIMIT_CORE": 0,
            "RLIMIT_CPU": self.cpu_seconds,
            "RLIMIT_DATA": self.data_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_STACK": 8 * _MIB,  # RLIMIT_DATA does not count it, and it is asked for again at each exec
        }


@dataclass(frozen=True, slots=True)
class Profile:
    """One program and all that it gets. What is not named here does not exist inside.

    `argv`, `working_directory` and targets are paths inside; later mounts may lie within earlier ones, a scratch
    within any of them. `files` are small read-only texts by their path inside. `host_uid` is who the program is on
    the host when Bulkhead runs as root; otherwise it is Bulkhead's own user. `runtime` is which list of system
    calls it may make. `cgroup` are folders of control groups, one a hierarchy, that all its processes join.
    """

    argv: tuple[str, ...]
    host_uid: int
    mounts: tuple[Mount, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    limits: Limits = field(default_factory=Limits)
    working_directory: str = "/tmp"  # noqa: S108  # the sandbox's own, which nobody else sees
    scratch: tuple[Scratch, ...] = ()
    network: Network | None = None
    runtime: RuntimeName = "python"
    cgroup: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.host_uid <= 0:
            raise ValueError("no program of a tenant runs as root")
        if not self.argv:
            raise ValueError("there is no program to run")
        if self.runtime not in get_args(RuntimeName):
            raise ValueError(f"there is no list of system calls for {self.runtime!r}")
        _absolute((*self.argv[:1], self.working_directory, *self.files, *map(str, self.cgroup)))
        _without_nul((*self.argv, *self.environment, *self.environment.values()))
        self._check_scratch()

    def _check_scratch(self) -> None:
        targets = [scratch.target for scratch in self.scratch]
        _unique((*_OURS, *targets))
        for mount in self.mounts:
            if any(PurePosixPath(mount.target).is_relative_to(target) for target in targets):
                raise ValueError(f"{mount.target} would be covered by a scratch")


@dataclass(frozen=True, slots=True)
class Launch:
    """What to execute on the host, without a shell, as a child of the process that asked for it.

    It refuses to start under any other parent and ends when that parent does, so start it from a thread
    that lives as long as the server shall. It inherits `pass_fds` beside the standard streams.
    `leaves` are folders of the host that it removes at its end; it cannot when all its processes are killed at once.
    """

    argv: tuple[str, ...]
    environment: dict[str, str] = field(repr=False)
    pass_fds: tuple[int, ...] = ()
    leaves: tuple[Path, ...] = ()


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


def _positive(limits: object, *names: str) -> None:
    for name in names:
        if not getattr(limits, name) > 0:
            raise ValueError(f"{name} must be positive")


def _unique(values: Sequence[object]) -> None:
    if len(set(values)) < len(values):
        raise ValueError("the same path or address twice")
