"""The templates by the type of what a policy declares: no other module but the templates' own knows one from another.

A template is code: no tenant names a program, only what of it its server may do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.outbound.grants import Door, Proxy
from app.policies.decision import Denial
from app.policies.document import DeclaredServer, FetchServer, FilesystemServer
from app.policies.hosts import HostPort
from app.sandbox.contract import Network, Profile
from app.servers.fetch import template as fetch
from app.servers.filesystem import template as filesystem


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder of the host that a server needs; `is_writable` is about the server."""

    name: str
    is_writable: bool


@dataclass(frozen=True, slots=True)
class Place:
    """What a server is given of this machine.

    `folder` is that of its `workspace()`; `network` has a door for each of `doors()`, and without it a server starts
    and lists its tools but reaches nothing. `ca_file` is a PEM bundle of the authorities to trust, instead of the
    public ones.
    """

    host_uid: int
    folder: Path | None = None
    network: Network | None = None
    ca_file: Path | None = None


def check_call(declared: DeclaredServer, tool: str, arguments: Mapping[str, Any]) -> Denial | None:
    """What the template's own rules have against a call; asked before the server sees it."""
    match declared:
        case FilesystemServer():
            return filesystem.check_call(declared, tool, arguments)
        case FetchServer():
            return fetch.check_call(declared, arguments)


def workspace(declared: DeclaredServer) -> Workspace | None:
    """The folder that the server needs; None: it needs none, or the sandbox makes it an empty one of the run's."""
    match declared:
        case FilesystemServer():
            is_of_the_run = declared.isolation == "run" and not declared.readonly
            return None if is_of_the_run else Workspace(declared.root, is_writable=not declared.readonly)
        case FetchServer():
            return None


def doors(declared: DeclaredServer) -> Mapping[HostPort, Door]:
    """Where inside the server finds the egress relay, and what the relay does there; none: it has no network.

    The keys are for Network.listen, the values for the relay's grant, in the same order.
    """
    match declared:
        case FilesystemServer():
            return {}
        case FetchServer():
            return {fetch.PROXY: Proxy(fetch.hosts(declared))}


def profile(declared: DeclaredServer, place: Place) -> Profile:
    """What the sandbox is asked for, to run the server at that place."""
    match declared:
        case FilesystemServer():
            return filesystem.profile(declared, workspace=place.folder, host_uid=place.host_uid)
        case FetchServer():
            return fetch.profile(declared, host_uid=place.host_uid, network=place.network, ca_file=place.ca_file)
