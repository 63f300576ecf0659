"""What a program needs around it inside: an interpreter, its packages, the loader and the system's libraries."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from app.sandbox.contract import Mount, SandboxUnavailable

_BASE = "/opt/python"
_VENV = "/opt/venv"
# Where the ABI of each platform says that the loader is; every dynamic program names it.
_LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}


@dataclass(frozen=True, slots=True)
class Runtime:
    """A part of a Profile: `interpreter` is its path inside, the rest goes into the fields of the same name."""

    interpreter: str
    mounts: tuple[Mount, ...]
    files: Mapping[str, str]
    environment: Mapping[str, str]


@cache
def python() -> Runtime:
    """This very interpreter with this very set of packages, read-only, as a virtual environment at a fixed path.

    A virtual environment, since that is the one layout in which every distribution's Python looks for packages
    in the same place and ignores those of the system and of the user.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Runtime(
        interpreter=f"{_VENV}/bin/python",
        mounts=(*_libraries(), *_interpreter(version), *_packages(version)),
        files={f"{_VENV}/pyvenv.cfg": f"home = {_BASE}/bin\ninclude-system-site-packages = false\n"},
        environment={
            "HOME": "/tmp",  # noqa: S108  # the sandbox's own, which nobody else sees
            "LANG": "C.UTF-8",
            "LD_LIBRARY_PATH": f"{_BASE}/lib",
            "PATH": f"{_VENV}/bin",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TZ": "UTC",
        },
    )


def _libraries() -> Iterator[Mount]:
    """Only folders of shared libraries: neither /usr/bin nor /usr/share nor anything of /etc."""
    multiarch = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    for folder in (f"/usr/lib/{multiarch}", f"/lib/{multiarch}", "/usr/lib64", "/lib64"):
        if Path(folder).is_dir():
            yield Mount(Path(folder), folder)
    loader = _LOADERS.get(platform.machine())
    if loader is None:
        raise SandboxUnavailable(f"no sandbox on {platform.machine()}", remedy="run on x86_64 or aarch64")
    if not Path(loader).parent.name.startswith("lib64"):
        yield Mount(Path(loader), loader)
    zones = Path("/usr/share/zoneinfo")
    if zones.is_dir():
        yield Mount(zones, str(zones))


def _interpreter(version: str) -> Iterator[Mount]:
    executable = Path(os.path.realpath(sys.executable))
    yield Mount(executable, f"{_BASE}/bin/{version}")
    yield Mount(executable, f"{_VENV}/bin/python")
    standard = Path(sysconfig.get_path("stdlib"))
    yield Mount(standard, f"{_BASE}/{standard.relative_to(sys.base_prefix)}")
    shared = Path(sysconfig.get_config_var("LIBDIR") or "/", sysconfig.get_config_var("INSTSONAME") or "")
    if shared.is_file() and ".so" in shared.name:
        yield Mount(shared, f"{_BASE}/lib/{shared.name}")


def _packages(version: str) -> Iterator[Mount]:
    pure, binary = Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("platlib"))
    yield Mount(pure, f"{_VENV}/lib/{version}/site-packages")
    if not binary.samefile(pure):
        yield Mount(binary, f"{_VENV}/{sys.platlibdir}/{version}/site-packages")
    standard = Path(sysconfig.get_path("stdlib"))
    if (standard / "site-packages").is_dir():
        # Whatever else its owner installed beside this interpreter is nobody's business inside.
        target = standard.relative_to(sys.base_prefix) / "site-packages"
        yield Mount(pure, f"{_BASE}/{target}")
