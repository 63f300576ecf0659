"""The platform's catalogue of tool servers: what may be started at all, each entry a folder with its lock.

The platform's admin writes it. A tenant names an entry and fills in what the entry leaves open, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, field_validator, model_validator

from app.errors import ConfigurationError
from app.policies.patterns import compile_pattern
from app.policies.sections import Expression, Hosts, Section
from app.policies.servers.command import EntryName, ParameterName, ParameterValue, VariableName
from app.servers import locks

BUILT_IN: Final = Path(__file__).parent
PROGRAM: Final = "program"
_MANIFEST: Final = "server.toml"
_LOCKS: Final = {"python": ("requirements.txt",), "node": ("package.json", "package-lock.json")}
_MAX_FILE_BYTES: Final = 16 << 20
_MAX_FILES: Final = 200
_PLACEHOLDER: Final = re.compile(r"\{([a-z][a-z0-9_]{0,31})\}")
# They run what they are told to, or fetch it first. None of them is inside either.
_REFUSED: Final = """
    sh bash dash ash zsh ksh csh tcsh fish busybox env xargs sudo su pwsh perl ruby php
    npx npm pnpm yarn corepack uv uvx pip pip3 pipx poetry deno bun tsx ts-node
"""
_MODULE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")
_SCRIPT: Final = re.compile(r"(?!.*/\.\.?/)node_modules/[A-Za-z0-9@._/-]+\.[cm]?js")
# They decide what an interpreter loads, or whom its traffic goes through.
_RESERVED: Final = re.compile(
    r"(LD|PYTHON|NODE|NPM|OPENSSL|SSL|BASH)_.*|PYTHON.*|.*_PROXY|(CURL|REQUESTS)_CA_BUNDLE|PATH|HOME|LANG|TZ|TMPDIR|ENV"
)

Argument = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=2000)]
Command = Annotated[str, StringConstraints(pattern=r"^(program/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class EntryInvalid(ConfigurationError):
    """The entry of the server catalogue is not valid."""


class NotInCatalogue(ConfigurationError):
    """There is no such entry in the server catalogue."""


class Parameter(Section):
    """What a policy may put in the place of an argument: a text that all of `pattern` matches, or one of `enum`."""

    pattern: Expression | None = None
    enum: Annotated[tuple[ParameterValue, ...], Field(min_length=1, max_length=200)] | None = None
    default: ParameterValue | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.pattern is None) == (self.enum is None):
            raise ValueError("must have either a pattern or an enum")
        if self.default is not None and (fault := self.fault(self.default)):
            raise ValueError(f"default {fault}")
        return self

    def fault(self, value: str) -> str | None:
        """What is wrong with a value. One that begins with - could be an option: only a pattern that does, too, or an
        enum lets it be.
        """
        if self.enum is not None:
            return None if value in self.enum else f"must be one of {', '.join(self.enum)}"
        pattern = self.pattern or ""
        if value.startswith("-") and not pattern.removeprefix("^").startswith("-"):
            return "must not begin with -"
        return None if compile_pattern(pattern).fullmatch(value) else f"must match {pattern}"


class EntryLimits(Section):
    """Of all processes of a server together; `timeout_s` is of one call, and the platform's own holds as well."""

    memory_mb: int = Field(default=512, ge=64, le=4096)
    processes: int = Field(default=64, ge=8, le=256)
    timeout_s: int = Field(default=60, ge=1, le=600)


class Entry(Section):
    """server.toml. `hosts`, `workspace`, `env` and `isolation` bound what a policy may say of the server."""

    kind: Literal["python", "node"]
    command: Command
    args: Annotated[tuple[Argument, ...], Field(max_length=64)] = ()
    parameters: dict[ParameterName, Parameter] = Field(default={}, max_length=32)
    workspace: Literal["none", "read", "write"] = "none"
    hosts: Hosts | Literal["any"] = ()
    env: dict[VariableName, Literal["required", "optional"]] = Field(default={}, max_length=32)
    isolation: Literal["tenant", "user", "run"] = "tenant"
    limits: EntryLimits = EntryLimits()
    tools: Annotated[tuple[str, ...], Field(min_length=1, max_length=500)] | None = None

    @field_validator("env")
    @classmethod
    def _none_of_ours(cls, env: Mapping[str, str]) -> Mapping[str, str]:
        for name in env:
            if _RESERVED.fullmatch(name):
                raise ValueError(f"{name} is not an entry's to set")
        return env

    @model_validator(mode="after")
    def _check(self) -> Self:
        for fault in (self._command_fault(), self._placeholder_fault()):
            if fault:
                raise ValueError(fault)
        return self

    def _command_fault(self) -> str | None:
        first, second = (*self.args, "", "")[:2]
        if self.command.lower().partition(".")[0] in _REFUSED.split():
            return f"{self.command} is not started: name a program of the environment"
        if self.command not in {"python", "node"}:
            return None
        if self.command != self.kind:
            return f"an environment of {self.kind} has no {self.command}"
        if self.kind == "python":
            return None if first == "-m" and _MODULE.fullmatch(second) else "python takes -m and a module first"
        return None if _SCRIPT.fullmatch(first) else "node takes a script below node_modules/ first"

    def _placeholder_fault(self) -> str | None:
        named = set()
        for argument in self.args:
            found = _PLACEHOLDER.fullmatch(argument)
            if found is None and _PLACEHOLDER.search(argument):
                return f"{argument}: a parameter is a whole argument"
            if found is not None:
                named.add(found[1])
        if odd := sorted(named ^ set(self.parameters)):
            return f"{', '.join(odd)}: each parameter is declared, and stands in args"
        return None

    def arguments(self, values: Mapping[str, str]) -> list[str]:
        """The arguments with these values, or the defaults, in the places of the parameters; KeyError for one missing.

        Each stays one argument, whatever is in it.
        """
        return [self._value(found[1], values) if (found := _PLACEHOLDER.fullmatch(a)) else a for a in self.args]

    def _value(self, name: str, values: Mapping[str, str]) -> str:
        value = values.get(name, self.parameters[name].default)
        if value is None:
            raise KeyError(name)
        return value


@dataclass(frozen=True, slots=True)
class Source:
    """An entry as it was read at one moment: `files` are all of its folder that an installation takes."""

    name: str
    entry: Entry
    files: Mapping[str, bytes] = field(repr=False)
    is_built_in: bool = False

    @property
    def digest(self) -> str:
        """What an installation is known by: these very files, for this interpreter on this kind of machine."""
        digest = hashlib.sha256(f"{self.entry.kind} {sys.implementation.cache_tag} {platform.machine()}".encode())
        for name, content in sorted(self.files.items()):
            digest.update(b"\0" + name.encode() + b"\0" + hashlib.sha256(content).digest())
        return digest.hexdigest()[:32]


class Catalogue:
    """The entries in `folder`, and those that come with a template of Bulkhead, which none of the folder replaces."""

    def __init__(self, folder: Path, *, built_in: Path = BUILT_IN) -> None:
        self._folder = folder
        self._built_in = built_in

    def names(self) -> list[str]:
        """All entries, valid or not."""
        own = self._folder.glob(f"*/{_MANIFEST}") if self._folder.is_dir() else ()
        shipped = self._built_in.glob(f"*/environment/{_MANIFEST}")
        return sorted({path.parent.name for path in own} | {path.parent.parent.name for path in shipped})

    def read(self, name: str) -> Source:
        """Raise NotInCatalogue, or EntryInvalid with all that is wrong."""
        if not _is_name(name):
            raise NotInCatalogue(f"{name[:60]!r} is no name of an entry: a-z, 0-9 and -, beginning with a letter.")
        shipped = self._built_in / name / "environment"
        is_built_in = (shipped / _MANIFEST).is_file()
        folder = shipped if is_built_in else self._folder / name
        if not (folder / _MANIFEST).is_file():
            raise NotInCatalogue(f"There is no entry {name!r} in the server catalogue.")
        try:
            files = _files(folder)
        except OSError as error:
            raise _invalid(name, [f"{error.strerror}"]) from None
        entry, faults = _parsed(files)
        if entry is None or faults:
            raise _invalid(name, faults)
        return Source(name, entry, files, is_built_in)


def _is_name(name: str) -> bool:
    try:
        TypeAdapter(EntryName).validate_python(name, strict=True)
    except ValidationError:
        return False
    return True


def _invalid(name: str, faults: list[str]) -> EntryInvalid:
    return EntryInvalid(f"The entry {name!r} of the server catalogue is not valid: {'; '.join(faults)}.")


def _files(folder: Path) -> dict[str, bytes]:
    """The manifest, the locks, and all of `program/`; of nothing else is taken notice."""
    names = {_MANIFEST, *(name for lock in _LOCKS.values() for name in lock)}
    own = [path for path in folder.iterdir() if path.name in names]
    programs = sorted((folder / PROGRAM).rglob("*")) if (folder / PROGRAM).is_dir() else []
    # What running it beside the catalogue leaves is no part of it.
    wanted = [path for path in (*own, *programs) if "__pycache__" not in path.parts and not path.is_dir()]
    if len(wanted) > _MAX_FILES or sum(path.lstat().st_size for path in wanted) > _MAX_FILE_BYTES:
        raise OSError(0, f"more than {_MAX_FILES} files or {_MAX_FILE_BYTES} bytes")
    if any(path.is_symlink() or not path.is_file() for path in wanted):
        raise OSError(0, "a link, or no file")
    return {str(path.relative_to(folder)): path.read_bytes() for path in wanted}


def _parsed(files: Mapping[str, bytes]) -> tuple[Entry | None, list[str]]:
    """The entry, and everything that is wrong with it and with its lock."""
    try:
        data = tomllib.loads(files[_MANIFEST].decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        return None, [f"{_MANIFEST}: {error}"]
    try:
        # Through JSON, because pydantic's strict mode takes a list for a tuple only there.
        entry = Entry.model_validate_json(json.dumps(data, default=str))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, each['loc'])) or _MANIFEST}: {_message(each['msg'])}" for each in error.errors()]
        return None, faults
    return entry, [*_lock_faults(entry, files), *_program_faults(entry, files)]


def _message(text: str) -> str:
    return text.removeprefix("Value error, ")


def _lock_faults(entry: Entry, files: Mapping[str, bytes]) -> list[str]:
    missing = [name for name in _LOCKS[entry.kind] if name not in files]
    if missing:
        return [f"{name} is missing" for name in missing]
    try:
        texts = [files[name].decode() for name in _LOCKS[entry.kind]]
    except UnicodeDecodeError:
        return ["a lock is not UTF-8"]
    return locks.requirement_faults(texts[0]) if entry.kind == "python" else locks.package_faults(texts[0], texts[1])


def _program_faults(entry: Entry, files: Mapping[str, bytes]) -> list[str]:
    is_missing = entry.command.startswith(f"{PROGRAM}/") and entry.command not in files
    return [f"{entry.command} is missing"] if is_missing else []
