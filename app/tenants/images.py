"""File systems in a file: made, mounted and unmounted, and probed by really filling one. Only root can."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

# Not the environment's: root runs what it finds there.
_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_PROGRAM_SECONDS: Final = 900  # a copy of some gigabytes on a slow disk
_BUSY_SECONDS: Final = 5
# What a server wrote is never run by the kernel, never setuid and no device; a damaged image is not written on.
_OPTIONS: Final = "loop,nosuid,nodev,noexec,discard,noatime,errors=remount-ro"
_MIB: Final = 1 << 20
_UMOUNT_NOFOLLOW: Final = 8
_VOLUME: Final = (
    "or set BULKHEAD_WORKSPACE_QUOTA=volume, where the data directory lies on a file system with a size of its own,"
    " which all tenants then share"
)

_libc = ctypes.CDLL(None, use_errno=True)


class ImageFailed(Exception):
    """A program of the system failed; its words may name paths of the host."""


@dataclass(frozen=True, slots=True)
class Size:
    """Of a volume, its own tables included; `files` counts folders and links, too."""

    bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why this machine holds no quota. `reason` may be shown to tenants, `remedy` is the operator's."""

    reason: str
    remedy: str


def run(name: str, *arguments: str | Path, keep: Sequence[int] = ()) -> None:
    """Run a program of the system. It holds the locks `keep` as long as it works, whatever becomes of us."""
    program = shutil.which(name, path=_PATH)
    if program is None:
        raise ImageFailed(f"{name} is not installed")
    try:
        done = subprocess.run(
            [program, *arguments],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={"PATH": _PATH, "LC_ALL": "C"},
            pass_fds=keep,
            process_group=0,  # Ctrl-C is for us
            timeout=_PROGRAM_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ImageFailed(f"{name}: {error}") from error
    if done.returncode != 0:
        raise ImageFailed(f"{name}: {' '.join(done.stderr.split())[-400:]}")


def make(image: Path, size: Size, *, keep: Sequence[int] = ()) -> None:
    """An empty file system in a new sparse file: the host gives room as it is used, and gets it back."""
    with image.open("xb") as file:
        image.chmod(0o600)
        file.truncate(size.bytes)
    journal = 4 if size.bytes >= 512 * _MIB else 1  # MiB: as small as the size of its blocks allows
    lazily = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    options = ("-q", "-F", "-m", "0", "-N", str(size.files), "-J", f"size={journal}", "-E", lazily)
    run("mkfs.ext4", *options, image, keep=keep)


def mount(image: Path, folder: Path, *, keep: Sequence[int] = ()) -> None:
    """Two mounts of one image share its loop device, which goes with the last of them."""
    run("mount", "-t", "ext4", "-o", _OPTIONS, image, folder, keep=keep)


def unmount(folder: Path) -> None:
    """Never lazily: what still uses it would go on writing where nobody looks. Raise OSError where it stays busy."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while _libc.umount2(os.fsencode(folder), _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        if number != errno.EBUSY or time.monotonic() > deadline:
            raise OSError(number, os.strerror(number), str(folder))
        time.sleep(0.05)


def is_mounted(folder: Path) -> bool:
    try:
        return folder.stat().st_dev != folder.parent.stat().st_dev
    except FileNotFoundError:
        return False


def mounts_below(directory: Path) -> list[Path]:
    """Mount points in a folder, the deepest first."""
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    # The kernel writes what would break a line, such as a space, as \040.
    points = [Path(os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1"))) for line in lines]
    return sorted((point for point in points if directory in point.parents), reverse=True)


def unmount_below(directory: Path) -> None:
    """Raise OSError where one stays busy."""
    for point in mounts_below(directory):
        unmount(point)


def probe(folder: Path) -> Refusal | None:
    """Make, mount, fill and remove a small volume: what holds there holds for all of them."""
    if os.geteuid() != 0:
        return Refusal("quotas on workspaces need a service that runs as root", f"start as root; {_VOLUME}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="probe-", dir=folder) as place:
            return _probe_in(Path(place))
    except (ImageFailed, OSError) as error:
        remedy = f"{error}. Install mkfs.ext4 and mount, and allow loop devices and CAP_SYS_ADMIN; {_VOLUME}"
        return Refusal("no file system with a size of its own can be made here", remedy)


def _probe_in(place: Path) -> Refusal | None:
    size = Size(4 * _MIB, 64)
    image, folder = place / "image", place / "folder"
    folder.mkdir()
    make(image, size)
    mount(image, folder)
    try:
        with (folder / "big").open("wb", buffering=0) as big:
            files = ((folder / f"{number}").touch for number in count())
            chunks = (lambda: big.write(b"x" * _MIB) for _ in count())
            filled = is_mounted(folder) and _ends_full(files, 2 * size.files)
            filled = _ends_full(chunks, 2 * size.bytes // _MIB) and filled
    finally:
        unmount(folder)
    return None if filled else Refusal("a quota on workspaces does not hold here", _VOLUME.removeprefix("or "))


def _ends_full(acts: Iterable[Callable[[], object]], most: int) -> bool:
    """True where one of the first `most` acts finds no room."""
    try:
        for _, act in zip(range(most), acts, strict=False):
            act()
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        return True
    return False
