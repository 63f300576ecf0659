"""The locks of a catalogue's entries: each package in one version and with its hash, or the entry is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

# One package of a requirements file, its continued lines joined. Nothing else is taken: neither an option, which could
# name another index or turn the checking of hashes off, nor an address, nor a file.
_PINNED: Final = re.compile(
    r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9._, -]+\])?==[A-Za-z0-9.!+_-]+"
    r"( *;[A-Za-z0-9_.'\"<>=!()~, ]+?)?( +--hash=sha256:[0-9a-f]{64})+"
)
_INTEGRITY: Final = re.compile(r"sha512-[A-Za-z0-9+/]{86}==")
_VERSION: Final = re.compile(r"[0-9][A-Za-z0-9.+-]{0,99}")
# As registries have it. A shorter address of some hosts is that of a repository, for which no hash is checked.
_RESOLVED: Final = re.compile(r"https://[^#?\s]+/-/[^#?/\s]+\.tgz")
_NAME: Final = r"(@[A-Za-z0-9_][A-Za-z0-9._-]*/)?[A-Za-z0-9_][A-Za-z0-9._-]*"
_PATH: Final = re.compile(rf"node_modules/{_NAME}(/node_modules/{_NAME})*")
# What comes from a registry: a range of versions, or that of another package. Of all else, which is a repository, an
# address, an archive or a folder, npm checks no hash, whatever the lock says.
_RANGE: Final = re.compile(rf"(npm:{_NAME}@)?(?!\.|.*\.(tgz|tar|tar\.gz)$)[A-Za-z0-9_.^~<>=|*+ -]*", re.IGNORECASE)
_RANGES: Final = ("dependencies", "devDependencies", "optionalDependencies", "peerDependencies")


def requirement_faults(text: str) -> list[str]:
    """What is wrong with a requirements.txt; a comment and an empty line are not."""
    return [
        f"requirements.txt: {line[:60]!r} is no package in one version with its sha256 hashes"
        for line in requirements(text)
        if not _PINNED.fullmatch(line)
    ]


def requirements(text: str) -> list[str]:
    """Its packages, each on one line and without comments. What is installed is this and not the text itself: an
    installer may read that in another encoding, or see an end of a comment where we see none.
    """
    found, begun = [], ""
    for line in text.splitlines():
        is_comment = line.lstrip().startswith("#")
        begun += " " + (line.removesuffix("\\") if not is_comment else "")
        if is_comment or not line.endswith("\\"):
            found.append(begun)
            begun = ""
    joined = (" ".join(line.partition(" #")[0].split()) for line in (*found, begun))
    return [line for line in joined if line]


def package_faults(manifest: str, lock: str) -> list[str]:
    """What is wrong with a package.json and its package-lock.json."""
    try:
        wanted, locked = json.loads(manifest), json.loads(lock)
    except (ValueError, RecursionError):
        return ["package.json and package-lock.json must be JSON"]
    if not isinstance(wanted, dict) or not isinstance(locked, dict):
        return ["package.json and package-lock.json must be objects"]
    packages = locked.get("packages")
    if locked.get("lockfileVersion") not in {2, 3} or not isinstance(packages, dict):
        return ["package-lock.json: must be of version 2 or 3, with packages"]
    return [
        *_manifest_faults(wanted),
        *(fault for path, entry in packages.items() for fault in _entry_faults(path, entry)),
    ]


def direct_packages(manifest: str) -> list[str]:
    """The packages that a package.json names itself: whose programs an entry may start."""
    wanted = json.loads(manifest).get("dependencies", {})
    return sorted(wanted) if isinstance(wanted, dict) else []


def _manifest_faults(wanted: dict[str, Any]) -> Iterator[str]:
    # That the two fit each other, npm checks. A workspace would be a folder of ours and no package.
    for key in ("workspaces", "overrides"):
        if key in wanted:
            yield f"package.json: {key} are not installed"
    yield from (f"package.json: {fault}" for fault in _range_faults(wanted))


def _entry_faults(path: str, entry: object) -> Iterator[str]:
    if not isinstance(entry, dict) or not (path == "" or _PATH.fullmatch(path)):
        yield f"package-lock.json: {path[:60]!r} is no package"
        return
    faults = _range_faults(entry) if path == "" else (*_package_faults(entry), *_range_faults(entry))
    yield from (f"package-lock.json: {path or 'the entry'} {fault}" for fault in faults)


def _package_faults(entry: dict[str, Any]) -> Iterator[str]:
    if entry.get("link"):
        yield "is a link"
    if not re.fullmatch(_NAME, str(entry.get("name", "a"))):
        yield "has another name"
    if not _VERSION.fullmatch(str(entry.get("version", ""))):
        yield "is in no one version"
    # npm checks no hash that is not there. It may say that there is none, because the package is in the archive of
    # another: but where it is not, npm gets it.
    if not _INTEGRITY.fullmatch(str(entry.get("integrity", ""))):
        yield "has no sha512 integrity"
    if "resolved" in entry and not _RESOLVED.fullmatch(str(entry["resolved"])):
        yield "does not come from a registry"
    # The list in its archive is installed then, and not what this lock says.
    if entry.get("hasShrinkwrap"):
        yield "brings a lock of its own"


def _range_faults(entry: dict[str, Any]) -> Iterator[str]:
    for key in _RANGES:
        wanted = entry.get(key, {})
        if not isinstance(wanted, dict):
            yield f"{key} is no list of packages"
            continue
        for name, spec in wanted.items():
            if not isinstance(spec, str) or not _RANGE.fullmatch(spec):
                yield f"{key}: {name[:60]!r} is in no range of versions"
