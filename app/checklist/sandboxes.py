"""Whether tool servers are held: attacks from inside a sandbox that is started for them, and at the egress relay."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from anyio import to_thread

from app.checklist.findings import Item, Verdict, failed, judged, passed, warned
from app.checklist.ground import Ground
from app.outbound.destinations import Refused, Rules
from app.outbound.grants import Grant, Proxy
from app.policies.paths import check_path
from app.sandbox import runtimes
from app.sandbox.contract import NOBODY, Profile, SandboxUnavailable
from app.sandbox.probe import probe
from app.servers.leases import Asked, Event
from app.servers.relay import EgressRelay, EgressUnavailable
from app.tenants import beneath

_PATIENCE_S: Final = 60  # the item's own time is shorter
_METADATA: Final = "169.254.169.254"
_NAME: Final = "metadata.checklist.invalid"
# From inside: what is reached of the host's loopback and of the metadata service.
_REACH: Final = """
import json, socket, sys
reached = []
for host, port in (("127.0.0.1", int(sys.argv[1])), ("169.254.169.254", 80), ("::1", int(sys.argv[1]))):
    try:
        socket.create_connection((host, port), timeout=1).close()
        reached.append(host)
    except OSError:
        pass
print(json.dumps(reached))
"""


async def _holds(ground: Ground) -> Verdict:
    """Attacked anew, whatever was found when the service started."""
    sandbox = ground.sandbox
    if sandbox.backend is None:
        return failed(sandbox.result.reason, sandbox.result.remedy)
    result = await probe(sandbox.backend)
    if not result:
        return failed(result.reason, result.remedy)
    if sandbox.name == "landlock":
        return warned("landlock holds, and hides less than bubblewrap does.", "Allow user namespaces: docs/sandbox.md.")
    return passed(f"{sandbox.name}: five attacks from inside were stopped.")


async def _limits(ground: Ground) -> Verdict:
    if ground.answering is None:
        return failed("No service answers that could say so.")
    if ground.answering.has_cgroup:
        return passed("Memory, processes and processor time of a server are bounded together.")
    return warned("There is no writable cgroup: memory is bounded for each process and not for a server as a whole.")


async def _reach(ground: Ground) -> Verdict:
    arrived: list[object] = []

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        arrived.append(writer.get_extra_info("peername"))
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        if not await _arrives(port, arrived):
            return failed("The listener of the check is not reached from outside of the sandbox either.")
        said = await _from_inside(ground, port)
    if said is None:
        return failed("No program starts in a sandbox.")
    faults = [f"a server without a network reaches {host}" for host in said] + ["a connection arrived"] * bool(arrived)
    return judged(faults, "A server without a network reached neither this host's loopback nor the metadata address.")


async def _arrives(port: int, arrived: list[object]) -> bool:
    """The control: without a sandbox it does."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.close()
    for _ in range(100):
        if arrived:
            arrived.clear()
            return True
        await asyncio.sleep(0.01)
    return False


async def _from_inside(ground: Ground, port: int) -> list[str] | None:
    """What the canary says it has reached; None where none ran."""
    python = runtimes.python()
    profile = Profile(
        argv=(python.interpreter, "-I", "-c", _REACH, str(port)),
        host_uid=NOBODY,
        mounts=python.mounts,
        files=python.files,
        environment=python.environment,
    )
    try:
        launch = ground.sandbox.launch(profile)
    except SandboxUnavailable:
        return None
    process = await asyncio.create_subprocess_exec(
        *launch.argv,
        env=launch.environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        output, _ = await process.communicate()
        return [str(host) for host in json.loads(output)]
    except (ValueError, TypeError):
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _metadata(ground: Ground) -> Verdict:
    """Asked of a relay by its number, and of the rules by a name that resolves to it, whatever networks are allowed."""
    faults = []
    networks = {str(each) for found in ground.settings.egress_private_networks.values() for each in found}

    async def resolve(_: str, __: int) -> list[str]:
        return [_METADATA]

    for private in ((), ("0.0.0.0/0",), tuple(networks)):
        with suppress(Refused):
            await Rules.of(private, ()).vetted(_NAME, 80, resolve=resolve, within_s=1)
            faults.append("a name may resolve to the metadata address")
    try:
        async with EgressRelay(path=ground.settings.egress_socket) as relay, _door(relay) as port:
            if (status := await _asked(port, f"{_METADATA}:80")) != 403:
                faults.append(f"the relay answered {status} for the metadata address")
    except EgressUnavailable:
        return failed("The egress relay is not there.", "Start `bulkhead egress`, or unset BULKHEAD_EGRESS_SOCKET.")
    return judged(sorted(set(faults)), "The relay refuses the metadata address, by number and by name.")


@asynccontextmanager
async def _door(relay: EgressRelay) -> AsyncIterator[int]:
    """The port of a door to a host that does not exist."""

    async def record(event: Event) -> None:
        if isinstance(event, Asked) and event.refused is None:
            raise OSError  # what is not recorded is not dialled

    grant = Grant("checklist", (Proxy(((_NAME, 80),)),))
    lease = await relay.grant(grant, record=record, on_lost=lambda: None, wait_s=_PATIENCE_S)
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(fileno=lease.channel) as channel:
            lease.channel = -1
            socket.send_fds(channel, [b"L"], [listener.fileno()])
            yield listener.getsockname()[1]
    finally:
        await lease.release()


async def _asked(port: int, target: str) -> int:
    """The status that CONNECT is answered with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        head = await reader.readline()
        return int(head.split()[1])
    except (IndexError, ValueError, OSError):
        return 0
    finally:
        writer.close()


async def _paths(_: Ground) -> Verdict:
    return await to_thread.run_sync(_climb, abandon_on_cancel=True)


def _climb() -> Verdict:
    """A folder with a file inside, one outside, and a link from one to the other."""
    with tempfile.TemporaryDirectory(prefix="bulkhead-checklist-") as name:
        folder = Path(name)
        (folder / "outside").write_text("outside")
        inside = folder / "inside"
        inside.mkdir()
        (inside / "file.md").write_text("inside")
        (inside / "link.md").symlink_to(folder / "outside")
        faults = [f"{what} was opened" for what, path in _ways(folder) if _opens(inside, path) == "outside"]
        if _opens(inside, ("file.md",)) != "inside":
            faults.append("a file inside is not opened")
    climbing = ("../outside", "/etc/passwd", "a/../../outside")
    faults += [f"a policy allows {path}" for path in climbing if check_path(path, allowed_extensions=None) is None]
    return judged(faults, "Links, absolute paths and paths that climb lead nowhere; a file inside is opened.")


def _ways(folder: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Past all checks of how a path is written: by its parts, as the kernel gets them."""
    return [
        ("a path that climbs", ("..", "outside")),
        ("a link", ("link.md",)),
        ("an absolute path", (str(folder / "outside"),)),
    ]


def _opens(folder: Path, parts: tuple[str, ...]) -> str | None:
    directory = os.open(folder, beneath.DIRECTORY)
    try:
        with beneath.open_file(directory, parts) as file:
            return file.read().decode()
    except (OSError, beneath.Refusal):
        return None
    finally:
        os.close(directory)


async def _quota(ground: Ground) -> Verdict:
    if ground.settings.workspace_quota == "volume":
        return warned("All tenants share the room of one volume: that is the operator's word.")
    refusal = await ground.quota_refusal()
    if refusal is None:
        return passed("Each tenant whose servers write has a volume with a bound.")
    return warned(f"No server may write to a workspace here: {refusal}.")


ITEMS: Final = (
    Item(
        "sandbox-holds",
        (3, 4, 15),
        "A sandbox withstands attacks from inside",
        "Run `bulkhead sandbox probe`, which says what helps here.",
        _holds,
    ),
    Item(
        "sandbox-limits",
        (6,),
        "A server's memory, processes and processor time are bounded",
        "Give the service a cgroup that it may write to: docs/sandbox.md.",
        _limits,
    ),
    Item(
        "sandbox-egress",
        (4, 12),
        "A server without a network reaches nothing",
        "Start no tool server here, and report this with the kernel and the container runtime.",
        _reach,
    ),
    Item(
        "metadata-refused",
        (4, 12),
        "No server reaches the cloud's metadata address",
        "Run the version as it was released: the relay's rules have been changed.",
        _metadata,
    ),
    Item(
        "path-canary",
        (3, 14),
        "A path lies inside its base",
        "Stop the service: files of other tenants can be read. Report this with the kernel and the file system.",
        _paths,
    ),
    Item(
        "workspace-quotas",
        (3,),
        "What servers write is bounded for each tenant",
        "Let the service mount volumes (BULKHEAD_WORKSPACE_QUOTA=image), or give each tenant a service of its own.",
        _quota,
    ),
)
