"""What the process that serves may do on its host, as the kernel tells it, and where it listens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final

import httpx
import psutil

from app.checklist.findings import Item, Verdict, failed, judged, passed, warned
from app.checklist.ground import Ground, is_local
from app.errors import HostNotTrusted

_PROC: Final = Path("/proc")
_PATIENCE_S: Final = 60  # the item's own time is shorter
_CAPABILITIES: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_MARKS: Final = (Path("/.dockerenv"), Path("/run/.containerenv"))
_WIDE: Final = 16  # bits: a network of more addresses is no list of hosts
_LINK: Final = 64  # bits: what one link of IPv6 has, such as that of the proxies


def _status(process: int) -> Mapping[str, str]:
    """What /proc says of a process; raise OSError."""
    text = (_PROC / str(process) / "status").read_text()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def is_container() -> bool:
    """Whether this is one, as far as it shows: engines leave a mark, or the root is theirs."""
    if any(mark.exists() for mark in _MARKS):
        return True
    mounts = (line.split() for line in (_PROC / "self" / "mountinfo").read_text().splitlines())
    return any(parts[4] == "/" and parts[parts.index("-") + 1] in {"overlay", "fuse-overlayfs"} for parts in mounts)


def _told(ground: Ground, faults: list[str], detail: str) -> Verdict:
    """A fault in a container that serves; outside of one, and in a demo, what somebody has to know."""
    is_deployed = is_container() and not ground.is_demo
    return judged(faults, detail, worst=failed if is_deployed else warned)


async def _user(ground: Ground) -> Verdict:
    if ground.process is None:
        return failed("No service runs here whose process could be looked at.")
    user = _status(ground.process)["Uid"].split()[1]
    return _told(ground, ["the service runs as root"] if user == "0" else [], f"The service runs as the user {user}.")


async def _rights(ground: Ground) -> Verdict:
    if ground.process is None:
        return failed("No service runs here whose process could be looked at.")
    status = _status(ground.process)
    faults = [] if status.get("NoNewPrivs") == "1" else ["it may gain rights (no_new_privs is not set)"]
    faults += [] if status.get("Seccomp") == "2" else ["no filter of system calls holds"]
    held = [name for name in _CAPABILITIES if int(status.get(name, "0"), 16)]
    faults += [f"it holds capabilities ({', '.join(held)})"] if held else []
    return _told(ground, faults, "No capabilities, no new rights, and a filter of system calls.")


async def _root(ground: Ground) -> Verdict:
    if ground.process is None:
        return failed("No service runs here whose process could be looked at.")
    mounts = (_PROC / str(ground.process) / "mountinfo").read_text().splitlines()
    roots = [line.split()[5].split(",") for line in mounts if line.split()[4] == "/"]
    is_read_only = bool(roots) and "ro" in roots[-1]
    return _told(ground, [] if is_read_only else ["its root file system can be written to"], "It is read-only.")


async def _ready(ground: Ground) -> Verdict:
    if ground.answering is None:
        return failed("Nothing answers where the settings say that the service is.")
    missing = ", ".join(ground.answering.missing)
    return judged([] if ground.answering.is_ready else [f"not ready: {missing or 'it ends'}"], "The service is ready.")


async def _listens(ground: Ground) -> Verdict:
    """Where its sockets really are; what others may reach needs TLS in front."""
    hosts = {ground.settings.host, *(host for host, _ in listening(ground.process))}
    beyond = sorted(host for host in hosts if not is_local(host))
    if not beyond:
        return passed("The service listens on this machine alone.")
    if ground.settings.tls_in_front:
        return passed(f"The service listens on {', '.join(beyond)}; a proxy with TLS in front is declared.")
    return failed(f"The service listens on {', '.join(beyond)} without TLS.")


def listening(process: int | None) -> set[tuple[str, int]]:
    """The addresses and ports of its sockets; nothing where that is not ours to see."""
    try:
        found = psutil.Process(process).net_connections("inet") if process is not None else []
    except psutil.Error:
        return set()
    return {(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN}


async def _hosts(ground: Ground) -> Verdict:
    """A page of another name must not reach the service through a browser."""
    answer = await _asked(ground, "/openapi.json", {"Host": "elsewhere.invalid"})
    if answer is None:
        return failed("Nothing answers where the settings say that the service is.")
    if answer.status_code < httpx.codes.BAD_REQUEST:
        return failed("The service answers whoever calls it by a name that is not its own.")
    if HostNotTrusted.code not in answer.text:
        return failed(f"It cannot be told: the service answered {answer.status_code}, and not because of the name.")
    return passed("A request for a name that is not the service's is refused.")


async def _docs(ground: Ground) -> Verdict:
    names = ground.settings.trusted_hosts
    answer = await _asked(ground, "/docs", {"Host": names[0] if names else "localhost"})
    if answer is None:
        return failed("Nothing answers where the settings say that the service is.")
    if answer.status_code == httpx.codes.NOT_FOUND:
        return passed("There is none.")
    if not answer.is_success:
        return failed(f"It cannot be told: the service answered {answer.status_code}.")
    if re.search(r"(src|href)=[\"']?(https?:)?//", answer.text):
        return failed("The page of the API loads what is on other hosts.", "Run the version as it was released.")
    if ground.is_open:
        return warned("The page of the API is shown beyond this machine, as far as what is in front passes it on.")
    return passed("The page of the API is for this machine alone, and loads nothing from elsewhere.")


async def _asked(ground: Ground, path: str, headers: Mapping[str, str]) -> httpx.Response | None:
    if ground.url is None:
        return None
    try:
        async with httpx.AsyncClient(base_url=ground.url, trust_env=False, timeout=_PATIENCE_S) as client:
            return await client.get(path, headers=headers)
    except httpx.TransportError:
        return None


async def _openings(ground: Ground) -> Verdict:
    """What lets calls go to this machine or to networks behind it."""
    settings = ground.settings
    faults = [
        f"BULKHEAD_{name.upper()} lets {what} be on this machine, over plain http"
        for name, what in (("model_loopback", "models"), ("jwks_loopback", "key sets that tenants name"))
        if getattr(settings, name)
    ]
    networks = [each for found in settings.egress_private_networks.values() for each in found]
    faults += [f"{each} is open to servers of tenants" for each in networks if _bits(each) > _WIDE]
    proxies = [each for each in settings.trusted_proxies if _bits(each) > (_WIDE if each.version == 4 else _LINK)]
    faults += [f"all of {each} is believed as a proxy" for each in proxies]
    return judged(faults, "Nothing on this machine, and no wide network, is open to what tenants name.", worst=warned)


def _bits(network: IPv4Network | IPv6Network) -> int:
    return network.max_prefixlen - network.prefixlen


_USER_FIX: Final = "Run the image as it is (user 10001), or the service as a user of its own."
ITEMS: Final = (
    Item("service-ready", (), "The service is ready", "See /readyz and the service's log.", _ready),
    Item("process-user", (11,), "The service does not run as root", _USER_FIX, _user),
    Item(
        "process-rights",
        (11,),
        "The service can gain no rights",
        "Drop all capabilities, set no-new-privileges, and name a seccomp profile, as the manifests in k8s/ do.",
        _rights,
    ),
    Item(
        "read-only-root",
        (11,),
        "The service's root file system is read-only",
        "Start the container with a read-only root, and volumes for the data directory and /tmp.",
        _root,
    ),
    Item(
        "listens-on",
        (12,),
        "Nobody reaches the service but over TLS",
        "Listen on loopback (BULKHEAD_HOST), or put a proxy with TLS in front and declare it (BULKHEAD_TLS_IN_FRONT).",
        _listens,
    ),
    Item(
        "trusted-hosts",
        (12,),
        "The service answers to its own names alone",
        "Set BULKHEAD_TRUSTED_HOSTS to the names by which callers know the service.",
        _hosts,
        is_local=True,
    ),
    Item(
        "docs-page",
        (12,),
        "The page of the API is not shown to the world",
        "Set BULKHEAD_API_DOCS=false.",
        _docs,
        is_local=True,
    ),
    Item(
        "openings",
        (4, 12),
        "No setting opens this machine or a wide network",
        "Unset what a demo or a test needed; name single hosts as networks of /32.",
        _openings,
    ),
)
