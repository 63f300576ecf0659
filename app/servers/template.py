"""What a template is: code of ours that turns a section of a policy into a program, its place and its bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from app.outbound.grants import Door
from app.policies.decision import Denial
from app.policies.hosts import HostPort
from app.sandbox.contract import Network, Profile
from app.servers.catalogue import Entry

Declared = TypeVar("Declared")


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder of the host that a server needs; `is_writable` is about the server."""

    name: str
    is_writable: bool


@dataclass(frozen=True, slots=True)
class Environment:
    """What `bulkhead servers install` has built: a folder of the host, and the program of it to start.

    `argv` are paths and arguments inside, where `folder` is seen at `target`. `entry` is what the operator's catalogue
    says of it; what comes with a template has none.
    """

    folder: Path
    target: str
    argv: tuple[str, ...]
    entry: Entry | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """What a server is given of this machine.

    `folder` is that of its `workspace`; `network` has a door for each of `doors`, and without it a server starts
    and lists its tools but reaches nothing. `ca_file` is a PEM bundle of the authorities to trust, instead of the
    public ones. `secrets` are the texts of those that it needs, by name. `environment` is the one that it names.
    """

    host_uid: int
    folder: Path | None = None
    network: Network | None = None
    ca_file: Path | None = None
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    environment: Environment | None = None


@dataclass(frozen=True)  # with slots a generic one cannot be made in Python 3.11
class Template(Generic[Declared]):
    """What of a template differs from the others; each function is asked with the server's section.

    - `profile`: what the sandbox is asked for, to run the server at that place.
    - `check_call`: what the template's own rules have against a call; asked before the server sees it.
    - `workspace`: the folder that it needs; None: it needs none, or the sandbox makes it an empty one of the run's.
    - `secrets`: the names of the tenant's secrets that it needs.
    - `doors`: where inside the server finds the egress relay, and what the relay does there, given the texts of its
      secrets by name; none: it has no network. The keys are for Network.listen, the values for the relay's grant, in
      the same order. ServerFailed where a secret's text is of no use.
    - `reaches_private`: whether it may reach the networks that the operator allows its template; None: it may where
      there are any, True: it does not start without.
    - `environment`: the name of the installed environment that it starts from.
    - `call_s`: the seconds of one call after which the server is ended, whatever time it keeps to itself.
    - `is_ours`: the program inside is ours, so that what it says of why it will not start is told to an admin.
    """

    profile: Callable[[Declared, Place], Profile]
    check_call: Callable[[Declared, str, Mapping[str, Any]], Denial | None] = lambda _declared, _tool, _arguments: None
    workspace: Callable[[Declared], Workspace | None] = lambda _declared: None
    secrets: Callable[[Declared], frozenset[str]] = lambda _declared: frozenset()
    doors: Callable[[Declared, Mapping[str, str]], Mapping[HostPort, Door]] = lambda _declared, _secrets: {}
    reaches_private: Callable[[Declared], bool | None] = lambda _declared: None
    environment: Callable[[Declared], str | None] = lambda _declared: None
    call_s: Callable[[Declared], float] = lambda _declared: float("inf")
    is_ours: bool = False
