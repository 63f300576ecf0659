"""The template `fetch`: pages of the hosts that the policy names, by way of the egress relay and no other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from app.outbound.grants import Door, Proxy
from app.policies.decision import Denial
from app.policies.hosts import HostPort, check_url, parse_host
from app.policies.servers.fetch import FetchServer
from app.sandbox.contract import Profile
from app.servers import own
from app.servers.template import Place, Template

_SERVER: Final = Path(__file__).with_name("server.py")
# Where the server finds the relay's proxy, inside.
PROXY: Final[HostPort] = ("127.0.0.1", 3128)


def hosts(server: FetchServer) -> tuple[HostPort, ...]:
    """All that the relay may connect to for the server."""
    return tuple(parse_host(host) for host in server.allowed_hosts)


def check_call(server: FetchServer, _tool: str, arguments: Mapping[str, Any]) -> Denial | None:
    """What the template's own rules have against a call; asked before the server sees it."""
    return check_url(arguments.get("url"), allowed=hosts(server))


def doors(server: FetchServer, _secrets: Mapping[str, str]) -> Mapping[HostPort, Door]:
    """One proxy to all of its hosts."""
    return {PROXY: Proxy(hosts(server))}


def profile(server: FetchServer, place: Place) -> Profile:
    """The server holds no list of hosts, since it is not trusted to keep to one. Without a network it only lists."""
    options = (
        *("--proxy", f"http://{PROXY[0]}:{PROXY[1]}"),
        *("--max-response-size", str(server.max_response_size)),
        *(("--ca-file", own.CA_FILE) if place.ca_file else ()),
    )
    return own.profile(_SERVER, options, place, mounts=own.trusted(place))


TEMPLATE: Final = Template[FetchServer](profile=profile, check_call=check_call, doors=doors)
