"""Does this backend hold on this machine? Found out by an attack from inside, not by reading versions."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.sandbox import runtimes
from app.sandbox.contract import NOBODY, Launch, Mount, Profile, Sandbox, SandboxUnavailable

_SECONDS = 20
_CANARY, _FOLDER = "/opt/canary.py", "/opt/read-only"
# What forbids user namespaces to an ordinary user: a kernel setting, its forbidding value, the value that allows.
_SETTINGS = (
    ("user.max_user_namespaces", "0", "15000"),
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
)
_IN_A_CONTAINER = (
    "let the service create user namespaces: in a container, use a seccomp profile that allows unshare, clone, "
    "mount and pivot_root, and an unmasked /proc"
)
_STOP = "start no tool server on this machine, and report this with its kernel and container runtime"
_GVISOR = "the kernel is gVisor, under which no backend has been proven"


@dataclass(frozen=True, slots=True)
class Probe:
    """`reason` may be shown to anyone; `remedy` is the exact fix to make. Both empty when ok.

    `note` is what else an operator should know, also when ok.
    """

    ok: bool
    backend: str
    reason: str = ""
    remedy: str = ""
    note: str = ""

    def __bool__(self) -> bool:
        return self.ok


async def probe(sandbox: Sandbox, *, host_uid: int = NOBODY, proc: Path = Path("/proc"), remedy: str = "") -> Probe:
    """Run the canary inside. Ok only if it ran, and managed none of its attempts. Takes well under a second.

    `remedy` is for when no program starts; by default it is what allows namespaces.
    """
    note = _GVISOR if _is_gvisor(proc) else ""
    try:
        output, complaint = await _run_canary(sandbox, host_uid)
    except SandboxUnavailable as error:
        return Probe(ok=False, backend=sandbox.name, reason=error.detail, remedy=error.remedy, note=note)
    managed = _managed(output)
    if managed is None:
        reason = f"no program starts inside: {_without_paths(complaint)}"
        return Probe(ok=False, backend=sandbox.name, reason=reason, remedy=remedy or _remedy(proc), note=note)
    if managed:
        reason = "a program inside " + ", ".join(managed).replace("_", " ")
        return Probe(ok=False, backend=sandbox.name, reason=reason, remedy=_STOP, note=note)
    return Probe(ok=True, backend=sandbox.name, note=note)


async def _run_canary(sandbox: Sandbox, host_uid: int) -> tuple[bytes, str]:
    _check_temporary_folder()
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        with _bait() as folder:
            host = _bait_for_canary(folder) | {"port": server.sockets[0].getsockname()[1]}
            return await _run(sandbox.launch(_profile(folder, host, host_uid)))


def _check_temporary_folder() -> None:
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise SandboxUnavailable(
            "there is no folder for temporary files", remedy="mount a writable volume at /tmp"
        ) from error


def _profile(folder: Path, host: dict[str, Any], host_uid: int) -> Profile:
    python = runtimes.python()
    return Profile(
        argv=(python.interpreter, "-I", _CANARY, json.dumps(host).encode().hex(), _FOLDER),
        host_uid=host_uid,
        mounts=(
            *python.mounts,
            Mount(Path(__file__).with_name("canary.py"), _CANARY),
            Mount(folder / "open", _FOLDER),
        ),
        files=python.files,
        environment=python.environment,
    )


@contextlib.contextmanager
def _bait() -> Iterator[Path]:
    """A folder of which nothing but a sandbox keeps anyone: one file to read and one folder to write to."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-probe-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        (folder / "secret").write_text("bait")
        (folder / "secret").chmod(0o644)
        (folder / "open").mkdir()
        (folder / "open").chmod(0o777)
        yield folder


def _bait_for_canary(folder: Path) -> dict[str, Any]:
    started = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    return {"file": str(folder / "secret"), "pid": os.getpid(), "started": started}


async def _run(launch: Launch) -> tuple[bytes, str]:
    process = await asyncio.create_subprocess_exec(
        *launch.argv,
        env=launch.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_SECONDS):
            output, complaint = await process.communicate()
    except TimeoutError:
        return b"", f"nothing after {_SECONDS} seconds"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output, complaint.decode(errors="replace")


def _managed(output: bytes) -> list[str] | None:
    """What the canary managed; None if it did not get to tell."""
    try:
        return [str(name) for name in json.loads(output)["managed"]]
    except (ValueError, KeyError, TypeError):
        return None


def _without_paths(complaint: str) -> str:
    return re.sub(r"/\S+", "(path)", complaint.strip().rpartition("\n")[2]) or "it said nothing"


def _is_gvisor(proc: Path) -> bool:
    """Its kernel names itself, or by default the day that it has always named."""
    version = (proc / "version").read_text(encoding="utf-8") if (proc / "version").is_file() else ""
    return "gvisor" in version.lower() or "Sun Jan 10 15:06:54 PST 2016" in version


def _remedy(proc: Path) -> str:
    for name, forbidding, allowing in _SETTINGS:
        setting = proc / "sys" / name.replace(".", "/")
        if setting.is_file() and setting.read_text(encoding="ascii").strip() == forbidding:
            return f"sysctl -w {name}={allowing}"
    return _IN_A_CONTAINER
