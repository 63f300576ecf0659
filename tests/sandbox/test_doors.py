"""A server's own network: nothing but loopback, and the doors in it that only somebody outside can open."""

from __future__ import annotations

import array
import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.sandbox import landlock
from app.sandbox.contract import Network, SandboxUnavailable, Scratch
from tests.sandbox.ground import UID, Ground, Start
from tests.sandbox.programs import altered, backend, family, profile, run

DOORS = (("127.0.0.2", 443), ("127.0.0.3", 5432), ("127.0.0.2", 80))
# Says what it hears at each door, and what it is.
KNOCK = """
import os, socket
for address in [("127.0.0.2", 443), ("127.0.0.3", 5432), ("127.0.0.2", 80)]:
    with socket.create_connection(address, timeout=5) as knocking:
        print(knocking.recv(9).decode())
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print({status[name].strip() for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")})
print(sorted(os.listdir("/proc/self/fd"))[:-1])
"""
EXPECTED = ["door 0", "door 1", "door 2", "{'0000000000000000'}", "['0', '1', '2']"]
REACH = """
import socket, sys
for address in sys.argv[1:]:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=2)
    except OSError as error:
        print(error.strerror)
    else:
        print("reached")
"""


@dataclass
class Doors:
    """The outer end: every door says its number to whoever knocks."""

    inner: socket.socket
    sent: list[bytes]
    thread: threading.Thread

    @property
    def channel(self) -> int:
        return self.inner.fileno()

    def message(self) -> list[bytes]:
        """What came over the channel until every copy of its inner end was closed."""
        self.thread.join(10)
        assert not self.thread.is_alive()
        return self.sent


@contextlib.contextmanager
def opened() -> Iterator[Doors]:
    ours, theirs = socket.socketpair()
    sent: list[bytes] = []
    held: list[socket.socket] = []
    thread = threading.Thread(target=_answer, args=(ours, sent, held), daemon=True)
    thread.start()
    with ours:
        with theirs:
            yield Doors(theirs, sent, thread)
        thread.join(10)
    for door in held:
        with contextlib.suppress(OSError):
            door.shutdown(socket.SHUT_RDWR)  # wakes its thread
        door.close()


def _answer(channel: socket.socket, sent: list[bytes], held: list[socket.socket]) -> None:
    while True:
        data, control, *_ = channel.recvmsg(16, socket.CMSG_SPACE(64))
        if not data:
            return
        sent.append(data)
        for _, _, packed in control:
            held += [socket.socket(fileno=number) for number in array.array("i", packed)]
        for number, door in enumerate(held):
            threading.Thread(target=_say, args=(door, number), daemon=True).start()


def _say(door: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):
        while True:
            with door.accept()[0] as knocking:
                knocking.sendall(f"door {number}".encode())


@pytest.fixture(params=["service_as_we_are", "service_as_ordinary_user"])
def service(request: pytest.FixtureRequest) -> Start:
    start: Start = request.getfixturevalue(request.param)
    return start


def test_doors_come_in_their_order_below_port_1024_too_and_leave_nothing_inside(service: Start) -> None:
    with opened() as doors:
        ran = service(_order(KNOCK, doors), (doors.channel,))
        assert ran.stdout.splitlines() == EXPECTED, ran.stderr
    assert doors.message() == [b"L"]


def _order(code: str, doors: Doors, *arguments: str) -> dict[str, object]:
    return {
        "backend": "bubblewrap",
        "arguments": ["-c", code, *arguments],
        "host_uid": UID,
        "mounts": [],
        "limits": {},
        "network": [doors.channel, DOORS],
    }


def test_reaches_nothing_of_the_hosts_network(service: Start, ground: Ground) -> None:
    elsewhere = [f"127.0.0.1:{ground.bare['tcp']}", f"::1:{ground.bare['tcp6']}", "169.254.169.254:80", "192.0.2.1:80"]
    for address in elsewhere[:2]:  # the control
        host, port = address.rsplit(":", 1)
        socket.create_connection((host, int(port)), timeout=2).close()
    with opened() as doors:
        ran = service(_order(REACH, doors, *elsewhere), (doors.channel,))
    assert ran.stdout.splitlines() == ["Connection refused"] * 2 + ["Network is unreachable"] * 2


def test_two_servers_with_the_same_addresses_do_not_meet() -> None:
    with opened() as first, opened() as second:
        for doors in (first, second):
            launch = backend("bubblewrap").launch(profile("-c", KNOCK, network=Network(doors.channel, DOORS)))
            assert run(launch).stdout.splitlines() == EXPECTED


def test_the_channel_ends_while_the_program_runs() -> None:
    """Whoever starts it has closed his copy; bubblewrap's and the guard's would keep it open."""
    with opened() as doors:
        launch = backend("bubblewrap").launch(
            profile("-c", "print('up', flush=True); input()", network=Network(doors.channel, DOORS))
        )
        with subprocess.Popen(
            launch.argv,
            env=launch.environment,
            pass_fds=launch.pass_fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            doors.inner.close()
            assert process.stdout.readline() == b"up\n"
            assert doors.message() == [b"L"]
            programs = family(process.pid)
            sockets = [link for each in programs for link in _open_files(each.pid) if link.startswith("socket:")]
            process.stdin.close()
        assert len(programs) == 3
        assert sockets == []


def _open_files(pid: int) -> list[str]:
    return [str(file.readlink()) for file in Path(f"/proc/{pid}/fd").iterdir()]


def test_a_program_that_cannot_start_says_nothing_over_the_channel() -> None:
    with opened() as doors:
        launch = backend("bubblewrap").launch(
            profile("-c", "pass", network=Network(doors.channel, DOORS), cgroup=(Path("/absent"),))
        )
        assert run(launch).returncode == 1
    assert doors.message() == []


def test_no_program_starts_without_the_network_that_it_was_to_have() -> None:
    with opened() as doors:
        launch = backend("bubblewrap").launch(profile("-c", "print('ran')", network=Network(doors.channel, DOORS)))
        taken = altered(launch, listen=[*DOORS, DOORS[0]])
        assert (run(taken).returncode, run(launch).stdout) == (1, "ran\n")


def test_landlock_refuses_by_name_what_takes_a_namespace() -> None:
    sandbox = landlock.built_in()
    with opened() as doors, pytest.raises(SandboxUnavailable, match="network"):
        sandbox.launch(profile("-c", "pass", network=Network(doors.channel, DOORS)))
    with pytest.raises(SandboxUnavailable, match="folder"):
        sandbox.launch(profile("-c", "pass", scratch=(Scratch("/cache", 1 << 20, 10),)))
