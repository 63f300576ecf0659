"""What is in the image, and what is not: read from its files, mounted beside us. Run by `make image-test`."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.image import containers
from tests.image.containers import ROOT, UID

_PROGRAMS: Final = ("usr/bin", "usr/sbin", "usr/local/bin", "usr/local/sbin", "bin", "sbin", "opt/venv/bin")
_OUTSIDE: Final = {"dev", "proc", "sys"}
# Names by which anybody could build, install, fetch or be given a shell.
_TOOLS: Final = re.compile(
    r"(ba|da|z|k|c|tc)?sh|busybox|pip[0-9.]*|uv|apt(-.*)?|dpkg(-.*)?|gcc(-.*)?|cc|[cg]\+\+|as|ld|make|perl.*|git|curl|"
    r"wget|nc|ncat|socat|ssh|sudo|su|mount|openssl|gdb|strace|vi|vim|tar|npm|node"
)


@pytest.fixture(scope="module")
def files() -> Iterator[Path]:
    """Its root folder."""
    with containers.mounted() as root:
        yield root


@pytest.fixture(scope="module")
def bill(files: Path) -> dict[str, Any]:
    """Its software bill of materials."""
    found: dict[str, Any] = json.loads((files / "usr/share/bulkhead/sbom.cdx.json").read_text())
    return found


def _walk(root: Path) -> Iterator[Path]:
    for folder, names, plain in os.walk(root):
        if Path(folder) == root:
            names[:] = [name for name in names if name not in _OUTSIDE]
        yield from (Path(folder) / name for name in (*names, *plain))


def test_the_only_programs_are_the_interpreter_and_ours(files: Path) -> None:
    found = {path.name for folder in _PROGRAMS for path in (files / folder).glob("*")}
    assert {name for name in found if not re.fullmatch(r"python[0-9.]*", name)} == {"bulkhead", "healthy", "ldconfig"}


def test_no_tool_lies_anywhere_else(files: Path) -> None:
    executable = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH
    plain = [path for path in _walk(files) if path.is_file() and not path.is_symlink()]
    tools = [path for path in plain if _TOOLS.fullmatch(path.name) and path.stat().st_mode & executable]
    assert [str(path.relative_to(files)) for path in tools] == []
    assert not any((files / "opt/venv/lib").glob("python3*/site-packages/pip"))
    assert not any(path.name == "ensurepip" for path in _walk(files))


def test_nothing_is_anybodys_to_change(files: Path) -> None:
    theirs, loose, raised = set(), [], []
    for path in _walk(files):
        status = path.lstat()
        if UID in {status.st_uid, status.st_gid}:
            theirs.add(str(path.relative_to(files)))
        elif not path.is_symlink() and status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
            loose.append(path)
        if stat.S_ISREG(status.st_mode) and status.st_mode & (stat.S_ISUID | stat.S_ISGID):
            raised.append(path)
    assert theirs == {"var/lib/bulkhead", "var/lib/bulkhead-heads", "run/bulkhead"}
    assert (loose, raised) == ([], [])


def test_nothing_of_the_checkout_is_there_that_does_not_run(files: Path) -> None:
    ours = {str(path.relative_to(files / "opt/bulkhead")) for path in (files / "opt/bulkhead").iterdir()}
    assert ours == {"LICENSE", "alembic.ini", "app", "migrations", "requirements"}
    assert {path.name for path in (files / "opt/bulkhead/requirements").iterdir()} == {"base.txt", "cloud.txt"}
    names = {path.name for path in _walk(files)}
    assert not names & {".git", ".env", "demo.env", "pip.conf", ".bulkhead", "Dockerfile", "Makefile"}
    assert not any(name.startswith(".env") for name in names)
    assert not (files / "run/secrets").exists() or not any((files / "run/secrets").iterdir())
    sources = {path.relative_to(ROOT) for path in (ROOT / "app").rglob("*.py")}
    missing = [path for path in sources if not (files / "opt/bulkhead" / path).is_file()]
    assert missing == [], "the image is older than this checkout"


def test_no_secret_of_the_build_is_in_it(files: Path) -> None:
    place = os.path.realpath(sys.prefix).encode()
    for path in (files / "opt/bulkhead").rglob("*"):
        assert not path.is_file() or place not in path.read_bytes()


def test_the_bill_is_valid_and_says_which_product_it_is_of(bill: dict[str, Any]) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = bill["metadata"]["component"]
    assert (told["name"], told["version"]) == (project["name"], project["version"])


def test_the_bill_lists_exactly_what_is_installed(files: Path, bill: dict[str, Any]) -> None:
    listed = {part["name"]: part["version"] for part in bill["components"] if part["purl"].startswith("pkg:pypi/")}
    packages = next((files / "opt/venv/lib").glob("python3*/site-packages"))
    installed = {_plain(each.metadata["Name"]): each.version for each in metadata.distributions(path=[str(packages)])}
    assert listed == installed
    system = {part["name"]: part["version"] for part in bill["components"] if part["purl"].startswith("pkg:deb/")}
    records = (files / "var/lib/dpkg/status").read_text().strip().split("\n\n")
    told = [dict(line.split(": ", 1) for line in record.splitlines() if ": " in line) for record in records]
    assert system == {each["Package"]: each["Version"] for each in told}
    assert len(listed) + len(system) == len(bill["components"])


def test_each_distribution_has_a_hash_of_the_lock(bill: dict[str, Any]) -> None:
    locked = _locked((ROOT / "requirements/cloud.txt").read_text())
    for part in (part for part in bill["components"] if part["purl"].startswith("pkg:pypi/")):
        version, hashes = locked[part["name"], part["version"]], {each["content"] for each in part["hashes"]}
        assert len(hashes) == 1, part["name"]
        assert hashes <= version, part["name"]


def _locked(text: str) -> dict[tuple[str, str], set[str]]:
    found: dict[tuple[str, str], set[str]] = {}
    for line in text.splitlines():
        if pin := re.match(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==(\S+)", line):
            last = _plain(pin[1]), pin[2]
            found[last] = set()
        if digest := re.search(r"--hash=sha256:([0-9a-f]{64})", line):
            found[last].add(digest[1])
    return found


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_licences_are_listed(files: Path, bill: dict[str, Any]) -> None:
    lines = (files / "usr/share/bulkhead/licenses.txt").read_text().splitlines()
    assert len(lines) == len(bill["components"])
    silent = [line.partition("\t")[0] for line in lines if "not said" in line]
    assert len(silent) < 20, silent
    assert (files / "opt/bulkhead/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_it_says_how_it_wants_to_run() -> None:
    told = containers.configuration()
    assert (told["User"], told["Entrypoint"], told["Cmd"]) == (f"{UID}:{UID}", ["bulkhead"], ["serve"])
    assert (told["StopSignal"], list(told["ExposedPorts"])) == ("SIGTERM", ["8000/tcp"])
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in told["Labels"].items()}
    assert (labels["licenses"], labels["title"]) == ("Apache-2.0", "Bulkhead")
    assert labels["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", labels["revision"])
    assert labels["base.name"] != ""
