"""What a server does to those beside it: to the host that opens its files, and to a server with the same addresses."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.sandbox.contract import Mount, Network
from app.tenants import beneath
from tests.sandbox.ground import NONCE, UID, Ground
from tests.sandbox.programs import backend, profile, run

# Swaps what two names lead to, a file and a folder, as fast as it can.
SWAP = """
import os, sys, time
os.chdir("/workspace")
secret = sys.argv[1]
until = time.monotonic() + 20
os.mkdir("inner"); open("inner/secret.txt", "w").write("mine"); os.rename("inner", "folder")
print("up", flush=True)
number = 0
while time.monotonic() < until and not os.path.exists("stop"):
    number += 1
    os.symlink(secret, "fresh"); os.rename("fresh", "door")
    os.rename("folder", "aside"); os.symlink(os.path.dirname(secret), "folder")
    open("fresh", "w").write("mine"); os.rename("fresh", "door")
    os.unlink("folder"); os.rename("aside", "folder")
"""
CALL = """
import socket, sys
for host in sys.argv[1:]:
    try:
        with socket.create_connection((host, 3128), timeout=2) as calling:
            print(calling.recv(99).decode())
    except OSError as error:
        print(error.strerror)
"""


@contextlib.contextmanager
def hostile(code: str, workspace: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A server with a workspace that it may write, until the test is over."""
    mount = Mount(workspace, "/workspace", writable=True)
    launch = backend("bubblewrap").launch(profile("-c", code, *arguments, mounts=(mount,)))
    process = subprocess.Popen(
        launch.argv, env=launch.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            yield process
        finally:
            (workspace / "stop").touch()
            process.stdin.close()


@pytest.fixture
def workspace(folder: Path) -> Path:
    made = folder / f"workspace-{time.monotonic_ns()}"
    made.mkdir()
    os.chown(made, UID, -1)
    return made


@pytest.mark.parametrize("names", [("door",), ("folder", "secret.txt")], ids=["a file", "a folder"])
def test_the_host_never_follows_what_a_server_swaps_while_it_opens(
    names: tuple[str, ...], workspace: Path, ground: Ground
) -> None:
    here = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY)

    def carefully() -> str:
        with beneath.refusals(), beneath.open_file(here, names) as file:
            return file.read().decode()

    def carelessly() -> str:
        path = workspace.joinpath(*names)
        if any(part.is_symlink() for part in (path, path.parent)):
            raise FileNotFoundError
        return path.read_text()

    with hostile(SWAP, workspace, ground.bare["secret"]):
        assert _read(carefully, seconds=1.5) == {"mine"}
        # The control: whoever looks first and opens then has lost.
        assert NONCE in _read(carelessly, seconds=10, until=NONCE)
    os.close(here)


def _read(look: Callable[[], str], *, seconds: float, until: str = "") -> set[str]:
    """Every text that was seen; nothing and a part of it are those that were being written."""
    seen: set[str] = set()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and (not until or until not in seen):
        with contextlib.suppress(OSError, beneath.Refusal):
            seen.add(look())
    return seen - {""}


def test_a_server_is_never_answered_at_anothers_door() -> None:
    """Both have a door at one address at one time; the control is a door of the host's, where anybody comes in."""
    with _opened("of the other", callers=1) as other, _opened("mine", callers=3) as mine:
        waits = f"print('up', flush=True); input()\n{CALL}"
        waiting = backend("bubblewrap").launch(profile("-c", waits, "127.0.0.1", network=other))
        neighbour = subprocess.Popen(
            waiting.argv,
            env=waiting.environment,
            pass_fds=waiting.pass_fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with neighbour:
            assert neighbour.stdin is not None
            assert neighbour.stdout is not None
            assert neighbour.stdout.readline() == "up\n"
            addresses = ("127.0.0.1", "127.0.0.2", "0.0.0.0", "::ffff:127.0.0.1", "::1")  # noqa: S104  # to dial
            ran = run(backend("bubblewrap").launch(profile("-c", CALL, *addresses, network=mine)))
            neighbour.stdin.write("\n")
            neighbour.stdin.close()
            assert neighbour.stdout.read() == "of the other\n"
    assert ran.stdout.splitlines() == ["mine", "Connection refused", "mine", "mine", "Connection refused"]


@contextlib.contextmanager
def _opened(answer: str, *, callers: int) -> Iterator[Network]:
    ours, theirs = socket.socketpair()
    thread = threading.Thread(target=_answer, args=(ours, answer, callers), daemon=True)
    thread.start()
    with ours:
        with theirs:
            yield Network(theirs.fileno(), (("127.0.0.1", 3128),))
        thread.join(10)
    assert not thread.is_alive()


def _answer(channel: socket.socket, answer: str, callers: int) -> None:
    _, control, *_ = channel.recvmsg(16, socket.CMSG_SPACE(64))
    for _, _, packed in control:
        for number in array.array("i", packed):
            with socket.socket(fileno=number) as door:
                door.settimeout(20)
                for _ in range(callers):
                    with door.accept()[0] as caller:
                        caller.sendall(answer.encode())
