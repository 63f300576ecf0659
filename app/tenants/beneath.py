"""Opening what somebody names, beneath a directory that somebody hostile may be filling with traps.

A path is resolved by the kernel from an open directory and follows no link; what was opened is then judged
by its descriptor. Nothing is looked at by name first and opened later, so there is nothing to swap.

Standard library only: the filesystem server, which imports nothing of `app`, has this same file beside it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BufferedReader, BufferedWriter
from itertools import islice

MAX_DEPTH = 32
MAX_PATH_BYTES = 1024
MAX_NAME_BYTES = 255
STAGED = ".bulkhead-"  # what is half written has a name that no path may speak

# Without O_NONBLOCK the mere opening of a FIFO waits for ever; O_NOCTTY: a terminal must not become ours.
READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NAME_ONLY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Refusal(Exception):
    """What was asked for is refused; the message holds no path and may be shown to anybody."""


class BadPath(Refusal):
    """The path is not written as a path has to be."""


class Missing(Refusal):
    """There is nothing by that name."""


class Exists(Refusal):
    """There is something by that name already."""


class NotOrdinary(Refusal):
    """It is a link, a device or something else that is not an ordinary file or folder."""


class TooBig(Refusal):
    """It is larger than a file may be."""


class TooMany(Refusal):
    """There are more files and folders than can be looked at."""


class NotPermitted(Refusal):
    """It may not be read or changed."""


class NoRoom(Refusal):
    """There is no room for it."""


class Failed(Refusal):
    """It could not be done."""


_OTHER = (Failed, "it could not be done")
_REASONS: dict[int | None, tuple[type[Refusal], str]] = {
    errno.ENOENT: (Missing, "there is nothing by that name"),
    errno.EEXIST: (Exists, "there is something by that name already"),
    errno.ENOTEMPTY: (Exists, "the folder is not empty"),
    errno.ELOOP: (NotOrdinary, "links are not followed"),
    errno.EXDEV: (NotOrdinary, "the path leads outside"),
    errno.ENOTDIR: (NotOrdinary, "a part of the path is not a folder"),
    errno.EISDIR: (NotOrdinary, "that is a folder"),
    errno.ENXIO: (NotOrdinary, "that is not an ordinary file"),
    errno.ENAMETOOLONG: (BadPath, "the path is too long"),
    errno.EACCES: (NotPermitted, "that is not permitted"),
    errno.EPERM: (NotPermitted, "that is not permitted"),
    errno.EROFS: (NotPermitted, "nothing can be changed here"),
    errno.EFBIG: (TooBig, "that is larger than a file may be"),
    errno.ENOSPC: (NoRoom, "there is no room left"),
    errno.EDQUOT: (NoRoom, "there is no room left"),
}


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what the operating system says, which may name a host path, into a Refusal, which does not."""
    try:
        yield
    except OSError as error:
        kind, reason = _REASONS.get(error.errno, _OTHER)
        raise kind(reason) from None


def split(path: str) -> tuple[str, ...]:
    """The names that lead to `path`; none for ".". A file has one spelling only, so a rule on paths holds."""
    if path == ".":
        return ()
    if fault := _fault_of_path(path):
        raise BadPath(fault)
    parts = tuple(path.split("/"))
    for name in parts:
        if fault := _fault_of_name(name):
            raise BadPath(fault)
    return parts


def split_file(path: str) -> tuple[str, ...]:
    """As `split`, at least one name long."""
    parts = split(path)
    if not parts:
        raise BadPath("the path names a folder, not a file")
    return parts


def is_speakable(parts: Sequence[str]) -> bool:
    try:
        split("/".join(parts))
    except BadPath:
        return False
    return True


def _fault_of_path(path: str) -> str | None:
    if path.startswith("/"):
        return "the path must be relative"
    if "\\" in path:
        return "a backslash is not allowed in a path"
    if not path.isprintable():
        return "control and invisible characters are not allowed in a path"
    if _length(path) > MAX_PATH_BYTES or path.count("/") >= MAX_DEPTH:
        return "the path is too long or too deep"
    return None


def _fault_of_name(name: str) -> str | None:
    if name in {"", "."}:
        return "the path has an empty part; write it without '//', './' and a last '/'"
    if name == "..":
        return "'..' is not allowed in a path"
    if name[-1] in " .":
        return "a name must not end in a dot or a space"
    if _length(name) > MAX_NAME_BYTES:
        return "a name in the path is too long"
    if name.startswith(STAGED):
        return f"names that begin with '{STAGED}' are reserved"
    return None


def _length(text: str) -> int:
    # Printable text holds no lone surrogates, so this cannot fail after the check for them.
    return len(text.encode())


def open_at(directory: int, parts: Sequence[str], flags: int) -> int:
    """A descriptor of what `parts` lead to, through no link, mount point or ".."; raises OSError."""
    try:
        return _open_in_kernel(directory, parts, flags)
    except OSError as error:
        # Older kernels do not know openat2, and a seccomp filter may refuse it.
        if error.errno not in {errno.ENOSYS, errno.EPERM}:
            raise
    return _open_stepwise(directory, parts, flags)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


_OPENAT2 = 437  # the same number on every architecture
_NO_XDEV, _NO_MAGICLINKS, _NO_SYMLINKS, _BENEATH = 0x01, 0x02, 0x04, 0x08
_RESOLVE = _NO_XDEV | _NO_MAGICLINKS | _NO_SYMLINKS | _BENEATH
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


def _open_in_kernel(directory: int, parts: Sequence[str], flags: int) -> int:
    how = _OpenHow(flags, 0, _RESOLVE)
    path = ctypes.c_char_p(os.fsencode("/".join(parts) or "."))
    descriptor = _syscall(
        ctypes.c_long(_OPENAT2),
        ctypes.c_long(directory),
        path,
        ctypes.byref(how),
        ctypes.c_size_t(ctypes.sizeof(how)),
    )
    if descriptor < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(descriptor)


def _open_stepwise(directory: int, parts: Sequence[str], flags: int) -> int:
    current = os.open(".", DIRECTORY, dir_fd=directory)
    *above, last = parts or (".",)
    try:
        for name in above:
            current = _step(current, name, DIRECTORY)
        return _step(current, last, flags)
    except BaseException:
        os.close(current)
        raise


def _step(current: int, name: str, flags: int) -> int:
    """Open `name` in `current` and close `current`, which stays open when this fails."""
    if name == ".." or "/" in name:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    opened = os.open(name, flags | os.O_NOFOLLOW, dir_fd=current)
    if os.fstat(opened).st_dev != os.fstat(current).st_dev:
        os.close(opened)
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    os.close(current)
    return opened


@contextmanager
def opened_directory(directory: int, parts: Sequence[str]) -> Iterator[int]:
    descriptor = open_at(directory, parts, DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_file(directory: int, parts: Sequence[str]) -> BufferedReader:
    """An ordinary file, open for reading. Raises Refusal and OSError."""
    descriptor = open_at(directory, parts, READ)
    try:
        check_ordinary(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def status(directory: int, parts: Sequence[str]) -> os.stat_result:
    """What is known of a name, a link's own status included, without opening what it stands for."""
    descriptor = open_at(directory, parts, NAME_ONLY)
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def check_ordinary(found: os.stat_result) -> None:
    check_regular(found)
    check_single_name(found)


def check_regular(found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise NotOrdinary("that is a folder")
    if not stat.S_ISREG(found.st_mode):
        raise NotOrdinary("that is not an ordinary file")


def check_single_name(found: os.stat_result) -> None:
    # Its other name may lie outside, and nothing tells where.
    if found.st_nlink != 1:
        raise NotOrdinary("the file has more than one name (a hard link)")


_LATEST = 253_402_300_799  # the last second of 9999: a file may claim to be younger, a datetime cannot


@dataclass(frozen=True, slots=True)
class Entry:
    parts: tuple[str, ...]
    status: os.stat_result

    @property
    def path(self) -> str:
        return "/".join(self.parts)

    @property
    def modified(self) -> datetime:
        return datetime.fromtimestamp(min(max(self.status.st_mtime, 0), _LATEST), UTC)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode) and is_speakable(self.parts)

    @property
    def is_file(self) -> bool:
        """True for an ordinary file that a path can name."""
        try:
            check_ordinary(self.status)
        except Refusal:
            return False
        return is_speakable(self.parts)


def scan(directory: int, parts: tuple[str, ...], *, limit: int) -> list[Entry]:
    """What lies in one folder, sorted, traps and unspeakable names included; TooMany above `limit`."""
    with opened_directory(directory, parts) as folder:
        with os.scandir(folder) as found:
            names = sorted(entry.name for entry in islice(found, limit + 1))
        if len(names) > limit:
            raise TooMany("there are too many files and folders")
        return list(_entries(folder, parts, names))


def _entries(folder: int, parts: tuple[str, ...], names: list[str]) -> Iterator[Entry]:
    for name in names:
        with suppress(FileNotFoundError):
            yield Entry((*parts, name), os.stat(name, dir_fd=folder, follow_symlinks=False))


def walk(directory: int, start: tuple[str, ...] = (), *, limit: int) -> Iterator[Entry]:
    """Everything below a folder down to MAX_DEPTH, at most `limit` entries, then TooMany."""
    waiting = [start]
    while waiting:
        parts = waiting.pop()
        try:
            entries = scan(directory, parts, limit=limit)
        except OSError:
            if parts == start:
                raise
            continue  # the tree changes while we walk: this one went, or became a link
        yield from entries
        limit -= len(entries)
        if len(parts) + 1 < MAX_DEPTH:
            waiting += [entry.parts for entry in reversed(entries) if stat.S_ISDIR(entry.status.st_mode)]


def make_directories(directory: int, parts: Sequence[str], *, owner: int | None = None) -> int:
    """A descriptor of the folder that `parts` lead to, made where it is missing."""
    current = open_at(directory, (), DIRECTORY)
    try:
        for name in parts:
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=current)
            deeper = open_at(current, (name,), DIRECTORY)
            os.close(current)
            current = deeper
            give(current, owner)
    except BaseException:
        os.close(current)
        raise
    return current


def give(descriptor: int, owner: int | None) -> None:
    """Hand what root has made to `owner`; an ordinary user can give nothing away and keeps it."""
    made_by_us = os.fstat(descriptor).st_uid == os.geteuid() == 0
    if owner is not None and made_by_us:
        os.fchown(descriptor, owner, owner)


@contextmanager
def staged(directory: int) -> Iterator[tuple[str, BufferedWriter]]:
    """A new file and its name in `directory`, to be renamed to where it belongs; else it is removed."""
    with staged_name(directory) as name, open_new(directory, name) as file:
        yield name, file


@contextmanager
def staged_name(directory: int) -> Iterator[str]:
    """A name for what will be renamed to where it belongs; whatever still has it at the end is removed."""
    name = f"{STAGED}{os.urandom(12).hex()}"
    try:
        yield name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=directory)


def open_new(directory: int, name: str) -> BufferedWriter:
    return os.fdopen(os.open(name, CREATE, 0o600, dir_fd=directory), "wb")
