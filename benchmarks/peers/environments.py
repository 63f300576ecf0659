"""The peers' packages, each in a virtual environment of its own below .venv/peers, from pins with hashes."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.subjects import ROOT

PINS: Final = Path(__file__).parent
_FOLDER: Final = ROOT / ".venv" / "peers"
_INSTALL: Final = ("-m", "pip", "install", "-qq", "--disable-pip-version-check", "--only-binary", ":all:", "--no-deps")
_NEWEST: Final = 14


class Lacking(Exception):
    """This machine has not what a peer needs; it is left out, and the report says so."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Of one peer; `package` is the one that its version is of, `minor` the least Python 3 that it runs on."""

    name: str
    package: str
    minor: int = 11

    @property
    def version(self) -> str:
        """As pinned."""
        found = re.search(rf"^{re.escape(self.package)}==(\S+)", self._pins.read_text(), re.MULTILINE)
        assert found is not None, self._pins
        return found[1]

    def program(self, name: str) -> str:
        """A program of its."""
        return str(_FOLDER / self.name / "bin" / name)

    def build(self) -> None:
        """Make it, unless it is there with these pins. Raises Lacking."""
        stamp = _FOLDER / self.name / f"pins-{hashlib.sha256(self._pins.read_bytes()).hexdigest()[:16]}"
        if stamp.exists():
            return
        python = self._python()
        print(f"Installing {self._pins.relative_to(ROOT)} into .venv/peers/{self.name}; once, about a minute.")
        try:
            subprocess.run([python, "-m", "venv", "--clear", str(stamp.parent)], check=True)
            subprocess.run([self.program("python"), *_INSTALL, "--require-hashes", "-r", str(self._pins)], check=True)
        except subprocess.CalledProcessError as error:
            raise Lacking(f"{self.name} {self.version} could not be installed") from error
        stamp.touch()

    @property
    def _pins(self) -> Path:
        return PINS / f"{self.name}.txt"

    def _python(self) -> str:
        """Ours wherever it will do, so that Python is the same for all."""
        if sys.version_info >= (3, self.minor):
            return sys.executable
        for candidate in _interpreters(self.minor):
            if _is_sound(candidate, self.minor):
                return candidate
        raise Lacking(f"{self.name} {self.version} needs Python 3.{self.minor} with venv, and there is none here")


def _interpreters(least: int) -> Iterator[str]:
    """On the path, where a shim of pyenv may be empty, and then pyenv's own."""
    for minor in range(least, _NEWEST + 1):
        if found := shutil.which(f"python3.{minor}"):
            yield found
        yield from map(str, (Path.home() / ".pyenv" / "versions").glob(f"3.{minor}.*/bin/python3.{minor}"))


def _is_sound(python: str, minor: int) -> bool:
    """An interpreter is asked, not believed."""
    asked = f"import ensurepip, sys; sys.exit(sys.version_info < (3, {minor}))"
    return subprocess.run([python, "-c", asked], capture_output=True, check=False).returncode == 0


AGNO: Final = Environment("agno", "agno")
LITELLM: Final = Environment("litellm", "litellm")
AEGRA: Final = Environment("aegra", "aegra-api", minor=12)
