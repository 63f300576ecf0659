"""Nothing outlives what it belongs to: connections their grant, the relay its service, leases their relay."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from app.outbound.grants import Forward, Grant, Proxy
from app.servers.relay import EgressRelay, EgressUnavailable
from tests.egress.stage import HERE, LOOPBACK, command, doors, hand_out, settled
from tests.egress.test_limits import taking
from tests.outbound.origin import NAME, Origin


async def _nothing(_: object) -> None:
    pass


async def _is_ended(end: asyncio.StreamReader) -> bool:
    """Ended or reset, and not one byte more."""
    try:
        return await asyncio.wait_for(end.read(), 5) == b""
    except ConnectionError:
        return True


def _files(relay: EgressRelay) -> int:
    """How many the relay has open; its own user may not look, since it is not dumpable."""
    assert relay.pid is not None
    return psutil.Process(relay.pid).num_fds() if os.getuid() == 0 else 0


def _is_refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


async def test_release_closes_every_connection_and_door_and_records_it(relay: EgressRelay) -> None:
    async with taking() as (port, taken):
        async with doors(relay, Forward(NAME, port)) as opened:
            reader, writer = await opened.connect()
            outer_reader, _ = await asyncio.wait_for(taken.get(), 5)
            await opened.lease.release()
            assert [closed.ended for closed in opened.closed] == ["revoked"]
            assert await asyncio.wait_for(reader.read(), 5) == b""
            assert await asyncio.wait_for(outer_reader.read(), 5) == b""
            assert _is_refused(opened.ports[0])
            writer.close()
        assert opened.losses == []


async def test_a_sandbox_that_never_starts_leaves_nothing(relay: EgressRelay) -> None:
    before = _files(relay)
    losses: list[bool] = []
    grant = Grant("tenant", (Forward(NAME, 1),))
    lease = await relay.grant(grant, record=_nothing, on_lost=lambda: losses.append(True))
    assert _files(relay) in {before + 1, 0}
    lease.handed_over()  # and the other copy is closed with it: nobody had inherited it
    await settled(lambda: losses)
    assert _files(relay) == before
    await lease.release()


async def test_sockets_that_were_not_agreed_are_not_served(relay: EgressRelay, plain: Origin) -> None:
    async def outcome(*numbers: int, data: bytes = b"L") -> list[bool]:
        losses: list[bool] = []
        grant = Grant("tenant", (Forward(NAME, plain.port),), private_networks=LOOPBACK)
        lease = await relay.grant(grant, record=_nothing, on_lost=lambda: losses.append(True))
        with socket.socket(fileno=os.dup(lease.channel)) as channel:
            socket.send_fds(channel, [data], numbers)
        lease.handed_over()
        await asyncio.sleep(0.2)
        await lease.release()
        return losses

    with (
        socket.create_server(("127.0.0.1", 0)) as agreed,
        socket.create_server(("0.0.0.0", 0)) as everywhere,  # noqa: S104 - what must not be served
        socket.socket() as not_listening,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        open(os.devnull) as file,  # noqa: ASYNC230, PTH123 - a device that answers at once
    ):
        good = agreed.fileno()
        assert await outcome(good) == []  # the control
        assert await outcome(good, data=b"x") == [True]
        assert await outcome(good, good) == [True]
        for other in (everywhere, not_listening, datagrams, file):
            assert await outcome(other.fileno()) == [True]


async def test_when_the_relay_is_killed_its_leases_are_lost_and_it_comes_back(tmp_path: Path) -> None:
    async with taking() as (port, taken), EgressRelay(command=command(HERE, tmp_path)) as relay:
        async with doors(relay, Forward(NAME, port)) as opened:
            reader, writer = await opened.connect()
            outer_reader, _ = await asyncio.wait_for(taken.get(), 5)
            assert relay.pid is not None
            os.kill(relay.pid, signal.SIGKILL)
            await settled(lambda: opened.losses)
            for end in (reader, outer_reader):
                assert await _is_ended(end)
            assert _is_refused(opened.ports[0])
            writer.close()
        async with doors(relay, Forward(NAME, port)) as again:
            _, writer = await again.connect()
            await asyncio.wait_for(taken.get(), 5)
            writer.close()
        assert again.losses == []


async def test_a_relay_that_hangs_is_ended_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.servers.leases._ANSWER_S", 0.5)
    async with EgressRelay(command=command(HERE, tmp_path)) as relay:
        grant = Grant("tenant", (Proxy(((NAME, 443),)),))
        lease = await relay.grant(grant, record=_nothing, on_lost=lambda: None)
        assert relay.pid is not None
        hanging = psutil.Process(relay.pid)
        hanging.suspend()
        await lease.release()
        await settled(lambda: not hanging.is_running() and relay.is_up, within_s=15)
        assert relay.pid != hanging.pid


async def test_without_a_relay_nothing_is_granted() -> None:
    async with EgressRelay(command=(sys.executable, "-c", "raise SystemExit(1)")) as relay:
        with pytest.raises(EgressUnavailable):
            await relay.grant(Grant("tenant", (Forward(NAME, 1),)), record=_nothing, on_lost=lambda: None, wait_s=0.5)


SERVICE = """
import asyncio, json, sys
from app.servers.relay import EgressRelay
from app.outbound.grants import Forward, Grant
from tests.egress.stage import LOOPBACK, hand_out

async def main(port, command):
    async def record(event):
        pass
    async with EgressRelay(command=command) as relay:
        grant = Grant("tenant", (Forward("service.test", port),), private_networks=LOOPBACK)
        lease = await relay.grant(grant, record=record, on_lost=lambda: None, wait_s=20)
        print(json.dumps([relay.pid, *hand_out(lease, 1)]), flush=True)
        await asyncio.sleep(60)

asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
"""


async def test_when_the_service_is_killed_nothing_is_left(tmp_path: Path) -> None:
    async with taking() as (port, taken):
        service = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", SERVICE, str(port), *command(HERE, tmp_path)), stdout=subprocess.PIPE
        )
        assert service.stdout is not None
        pid, door = json.loads(await asyncio.wait_for(service.stdout.readline(), 20))
        relay = psutil.Process(pid)
        reader, writer = await asyncio.open_connection("127.0.0.1", door)
        outer_reader, _ = await asyncio.wait_for(taken.get(), 5)
        service.kill()
        await service.wait()
        for end in (reader, outer_reader):
            assert await _is_ended(end)
        await settled(lambda: not relay.is_running())
        assert _is_refused(door)
        writer.close()


async def test_the_relay_is_light_and_keeps_no_right_and_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BULKHEAD_ROOT_KEYS", "k1:secret")
    async with EgressRelay(command=command(HERE, tmp_path)) as relay:
        await settled(lambda: relay.is_up, within_s=10)
        assert relay.pid is not None
        process, about = psutil.Process(relay.pid), Path(f"/proc/{relay.pid}")
        if os.getuid() == 0:
            assert set(process.uids()) == {65534}
        assert "CapEff:\t0000000000000000" in await asyncio.to_thread((about / "status").read_text)
        if os.getuid() == 0:  # it is not dumpable: nobody else reads this
            assert b"secret" not in await asyncio.to_thread((about / "environ").read_bytes)
        assert process.memory_info().rss < 60_000_000


async def _listening(path: Path, folder: Path) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(*command(HERE, folder), "--listen", str(path))
    await settled(path.exists, within_s=10)
    return process


async def test_a_relay_of_its_own_serves_by_a_socket_and_outlives_a_service(tmp_path: Path, plain: Origin) -> None:
    path = tmp_path / "egress.sock"
    process = await _listening(path, tmp_path)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        door = Proxy(((NAME, plain.port),))
        async with EgressRelay(path=path) as first, doors(first, door) as opened:
            assert await opened.status(NAME, plain.port) == 200
            async with EgressRelay(path=path) as second, doors(second, door) as others:
                assert await others.status(NAME, plain.port) == 200
                await first.close()
                await settled(lambda: opened.losses)
                await settled(lambda: _is_refused(opened.ports[0]))
                assert await others.status(NAME, plain.port) == 200
    finally:
        process.kill()
        await process.wait()
    again = await _listening(path, tmp_path)  # over the socket that the dead one has left
    again.kill()
    await again.wait()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
async def test_a_relay_serves_its_own_user_alone(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _open_to_all(Path(folder))
        await _asked_by_two(Path(folder, "egress.sock"), tmp_path)


def _open_to_all(path: Path) -> None:
    """So that only who asks decides."""
    path.chmod(0o777)


async def _asked_by_two(path: Path, folder: Path) -> None:
    process = await _listening(path, folder)
    _open_to_all(path)
    try:
        code = (
            "import os, socket, sys; os.setuid(int(sys.argv[2]));"
            "end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); end.connect(sys.argv[1]);"
            "sys.exit(0 if end.recv(100) else 1)"
        )
        for user, expected in [(1234, 1), (0, 0)]:
            asking = await asyncio.create_subprocess_exec("/usr/bin/python3", "-c", code, str(path), str(user))
            assert await asyncio.wait_for(asking.wait(), 10) == expected
    finally:
        process.kill()
        await process.wait()


async def test_nonsense_on_the_control_line_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "egress.sock"
    process = await _listening(path, tmp_path)
    try:
        for nonsense in (b"{", b"[]", b'{"do": "dance"}', b'{"do": "grant", "id": "1"}', b"x" * 70_000):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
                end.settimeout(5)
                end.connect(str(path))
                assert b"ready" in await asyncio.to_thread(end.recv, 100)
                end.send(nonsense)
                assert await asyncio.to_thread(end.recv, 100) == b""
        async with EgressRelay(path=path) as relay:  # and no other
            lease = await relay.grant(Grant("tenant", (Forward(NAME, 1),)), record=_nothing, on_lost=lambda: None)
            hand_out(lease, 1)
            await lease.release()
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 10) == 0, "asked to end, it ends clean"
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
