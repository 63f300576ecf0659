"""Environments of the catalogue's servers: built once by the operator, never changed, and started only as built.

    <folder>/<entry>/<digest of the entry and its lock>/tree/...
    <folder>/<entry>/<digest of the entry and its lock>/record.json

The record is written last and names each file with its hash. Nothing is downloaded when a server starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

from app.errors import ConfigurationError
from app.sandbox import runtimes
from app.servers import locks, trees
from app.servers.catalogue import PROGRAM, Catalogue, EntryInvalid, NotInCatalogue, Source
from app.servers.errors import ServerUnavailable
from app.servers.template import Environment

INSIDE: Final = "/srv/server"
PACKAGES: Final = "packages"
_TREE: Final = "tree"
_RECORD: Final = "record.json"
_BUILDING: Final = ".building-"
_TIMEOUT_S: Final = 900
_NODE_FROM: Final = (24, 5)
# Imports what the first argument names and calls it, as the script that an installer writes would.
_RUN: Final = "import pkgutil, sys; run = sys.argv.pop(1); sys.argv.pop(0); sys.exit(pkgutil.resolve_name(run)())"


class InstallFailed(ConfigurationError):
    """The environment of a server could not be built."""


State = Literal["installed", "not installed", "changed since it was installed", "not valid"]


@dataclass(frozen=True, slots=True)
class Listed:
    """An entry and how far it is; `note` says what is wrong with it."""

    name: str
    state: State
    note: str = ""


class Installs:
    """What has been built of a catalogue, below `folder`."""

    def __init__(self, catalogue: Catalogue, folder: Path) -> None:
        self._catalogue = catalogue
        self._folder = folder
        self._checked: dict[Path, tuple[int, int]] = {}

    def install(self, name: str) -> bool:
        """Build what the entry says, unless it is there and sound; True where something was built.

        All or nothing, also when two do it at once. Raises NotInCatalogue, EntryInvalid and InstallFailed.
        """
        source = self._catalogue.read(name)
        home, place = self._folder / name, self._place(source)
        home.mkdir(parents=True, exist_ok=True)
        with _alone(home):
            for stale in home.glob(f"{_BUILDING}*"):  # of one that was killed
                shutil.rmtree(stale)
            if place.exists() and _difference(source, place) is None:
                return False
            self._build(source, home, place)
        return True

    def _build(self, source: Source, home: Path, place: Path) -> None:
        work = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=home))
        try:
            made = work / "made"
            tree = made / _TREE
            tree.mkdir(parents=True)
            (_build_python if source.entry.kind == "python" else _build_node)(source, work, tree)
            _put_program(source, tree)
            _argv(source, tree)  # raises InstallFailed where the program is not there
            _settle(tree)
            made.chmod(0o755)
            trees.write(made / _RECORD, source.digest, trees.record(tree))
            if place.exists():  # broken; who still runs in it loses it
                place.rename(work / "broken")
            made.rename(place)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def verify(self, name: str) -> str | None:
        """The first difference between what is there and what was installed, in words; None: there is none."""
        source = self._catalogue.read(name)
        return _difference(source, self._place(source))

    def states(self) -> list[Listed]:
        """All entries of the catalogue; what is installed is not read."""
        return [self._state(name) for name in self._catalogue.names()]

    def _state(self, name: str) -> Listed:
        try:
            source = self._catalogue.read(name)
        except (EntryInvalid, NotInCatalogue) as error:
            return Listed(name, "not valid", error.detail)
        if (self._place(source) / _RECORD).is_file():
            return Listed(name, "installed")
        is_older = any(path.parent.name != source.digest for path in (self._folder / name).glob(f"*/{_RECORD}"))
        return Listed(name, "changed since it was installed" if is_older else "not installed")

    def find(self, name: str) -> Environment:
        """What a server of the entry starts from; raise ServerUnavailable with what the operator does about it.

        Each file is hashed the first time; later on the record is trusted, as long as it is the same.
        """
        try:
            source = self._catalogue.read(name)
        except NotInCatalogue as error:
            raise ServerUnavailable(error.detail) from None
        except EntryInvalid:  # whose details are the operator's: `bulkhead servers list`
            raise ServerUnavailable(f"The entry {name!r} of the server catalogue is not valid.") from None
        place = self._place(source)
        if (fault := self._unsound(source, place)) is not None:
            raise ServerUnavailable(f"The server {name!r} {fault}: run `bulkhead servers install {name}`.")
        argv = _argv(source, place / _TREE)
        return Environment(place / _TREE, INSIDE, argv, None if source.is_built_in else source.entry)

    def _unsound(self, source: Source, place: Path) -> str | None:
        try:
            status = (place / _RECORD).stat()
        except OSError:
            return "is not installed as the catalogue has it"
        now = status.st_ino, status.st_mtime_ns
        if self._checked.get(place) != now:
            if _difference(source, place) is not None:
                return "is not what was installed"
            self._checked[place] = now
        return None

    def _place(self, source: Source) -> Path:
        return self._folder.resolve() / source.name / source.digest


def below(data_dir: Path, catalogue: Path | None) -> Installs:
    """The installations of a data directory; its catalogue lies in it, too, unless the operator keeps it elsewhere."""
    return Installs(Catalogue(catalogue or data_dir / "catalogue"), data_dir / "servers" / "installed")


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """One at a time for an entry; who comes second finds the work done."""
    descriptor = os.open(home / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _difference(source: Source, place: Path) -> str | None:
    recorded = trees.read(place / _RECORD, source.digest)
    if recorded is None:
        return "it is not installed as the catalogue has it"
    try:
        return trees.first_difference(place / _TREE, recorded)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _settle(tree: Path) -> None:
    try:
        trees.settle(tree)
    except trees.NotPlain as error:
        raise InstallFailed(f"The environment holds a link or a device, and was not kept: {error}.") from None


def _build_python(source: Source, work: Path, tree: Path) -> None:
    """With this very interpreter, wheels alone, so that nothing of a package runs; its hashes decide what comes."""
    packages = tree / PACKAGES
    packages.mkdir()
    wanted = locks.requirements(source.files["requirements.txt"].decode())
    if not wanted:
        return
    lock = work / "requirements.txt"
    lock.write_text("".join(f"{line}\n" for line in wanted))
    _run(
        (
            *(sys.executable, "-I", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"),
            *("--require-hashes", "--only-binary", ":all:", "--no-deps", "--no-user", "--ignore-installed"),
            *("--target", str(packages), "--requirement", str(lock)),
        ),
        work,
    )
    shutil.rmtree(packages / "bin", ignore_errors=True)  # scripts for an interpreter that is elsewhere inside


def _build_node(source: Source, work: Path, tree: Path) -> None:
    """No script of a package is run; its integrity decides what comes. Links to programs are not made: none is used."""
    node, npm = _node()
    for name in ("package.json", "package-lock.json"):
        (work / name).write_text(json.dumps(json.loads(source.files[name])))
    _run(
        (
            *(str(node), str(npm), "ci", "--ignore-scripts", "--omit=dev", "--no-bin-links", "--no-audit"),
            *("--no-fund", "--no-update-notifier", "--loglevel=error"),
        ),
        work,
    )
    modules = work / "node_modules"
    modules.mkdir(exist_ok=True)  # there is none without a package
    (modules / ".package-lock.json").unlink(missing_ok=True)
    modules.rename(tree / modules.name)


def _node() -> tuple[Path, Path]:
    """Node.js and the npm that came with it; raise InstallFailed where either is missing or too old."""
    node = Path(os.path.realpath(runtimes.installed_node()))
    folders = (node.parent.parent / "lib" / "node_modules", Path("/usr/share/nodejs"))  # the second is Debian's
    npm = next((path for folder in folders if (path := folder / "npm/bin/npm-cli.js").is_file()), None)
    if npm is None or not node.is_file():
        raise InstallFailed("There is no Node.js with npm here: install Node.js 24.5 or later, with its npm.")
    said = _run((str(node), "--version"), Path("/")).strip()
    version = tuple(int(part) for part in said.removeprefix("v").split(".")[:2] if part.isdigit())
    if version < _NODE_FROM:
        raise InstallFailed(f"The Node.js here is {said}: install 24.5 or later, since an older one takes no proxy.")
    return node, npm


def _run(argv: Sequence[str], folder: Path) -> str:
    """Its output; raise InstallFailed with the beginning and the end of what it complained of."""
    try:
        ran = subprocess.run(
            argv, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=False, text=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallFailed(f"{Path(argv[0]).name} did not run to its end: {type(error).__name__}.") from None
    if ran.returncode != 0:
        said = (ran.stderr or ran.stdout).strip().replace(str(folder), "").splitlines()
        # npm says first what is wrong, and then how it is used; pip warns first.
        complaint = (*said[:6], *said[6:][-6:])
        raise InstallFailed("Nothing was installed. The installer says:\n  " + "\n  ".join(complaint))
    return ran.stdout


def _put_program(source: Source, tree: Path) -> None:
    for name, content in source.files.items():
        if name.startswith(f"{PROGRAM}/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(content)


def _argv(source: Source, tree: Path) -> tuple[str, ...]:
    """What starts it, as paths inside, up to the arguments of the entry."""
    entry = source.entry
    if entry.kind == "python":
        python = runtimes.python().interpreter
        match entry.command.partition("/"):
            case ("python", _, _):
                return (python, "-I")
            case (folder, "/", _) if folder == PROGRAM:
                return (python, "-E", "-s", f"{INSIDE}/{entry.command}")  # what lies beside it is imported, too
        return (python, "-I", "-c", _RUN, _console_script(entry.command, tree / PACKAGES), entry.command)
    node = runtimes.node(runtimes.installed_node()).interpreter
    if entry.command == "node":
        return (node,)
    if entry.command.startswith(f"{PROGRAM}/"):
        return (node, f"{INSIDE}/{entry.command}")
    manifest = source.files["package.json"].decode()
    return (node, f"{INSIDE}/{_package_script(entry.command, locks.direct_packages(manifest), tree)}")


def _console_script(command: str, packages: Path) -> str:
    """What a console script of the packages calls, as `module:function`."""
    for distribution in metadata.distributions(path=[str(packages)]):
        for found in distribution.entry_points.select(group="console_scripts", name=command):
            return f"{found.module}:{found.attr}"
    raise InstallFailed(f"No package of the environment has the program {command!r}.")


def _package_script(command: str, packages: Sequence[str], tree: Path) -> Path:
    """The file of a package's program, of those that the entry itself names, as a path in the tree."""
    for package in packages:
        folder = tree / "node_modules" / package
        try:
            programs = json.loads((folder / "package.json").read_text()).get("bin", {})
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(programs, str):
            programs = {package.rpartition("/")[2]: programs}
        script = folder / str(programs.get(command, ""))
        if command in programs and script.resolve().is_relative_to(folder.resolve()) and script.is_file():
            return script.resolve().relative_to(tree.resolve())
    raise InstallFailed(f"No package of the environment has the program {command!r}.")
