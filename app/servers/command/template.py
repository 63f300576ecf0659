"""The template `command`: a program of the platform's catalogue, from the environment that was installed for it.

The entry says what runs and how far a policy may go; the policy fills in what the entry leaves open. The program is
nobody's that we trust: what it may read, write and reach is the sandbox's and the relay's to say.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from app.errors import Fault
from app.outbound.grants import Door, Proxy
from app.policies.document import PolicyInvalid
from app.policies.hosts import HostPort, parse_host
from app.policies.sections import secret_name
from app.policies.servers.command import CommandServer
from app.sandbox import runtimes
from app.sandbox.contract import Limits, Mount, Profile, Scratch
from app.sandbox.runtimes import Runtime
from app.servers.catalogue import Entry
from app.servers.errors import ServerUnavailable
from app.servers.installs import PACKAGES
from app.servers.template import Environment, Place, Template, Workspace

WORKSPACE: Final = "/workspace"
# Where the program finds the relay's proxy, inside.
PROXY: Final[HostPort] = ("127.0.0.1", 3128)
_CA_FILE: Final = "/srv/ca.pem"
# Each library looks for one of them.
_PROXY_VARIABLES: Final = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
_CA_VARIABLES: Final = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
_MIB: Final = 1 << 20
_OF_THE_RUN: Final = Scratch(WORKSPACE, bytes=64 << 20, files=10_000)
_NARROWER: Final = ("tenant", "user", "run")


def faults(server: CommandServer, entry: Entry) -> list[Fault]:
    """What of a policy's section the entry does not allow, by its place in the section."""
    return [Fault(path, message) for path, message in _faults(server, entry)]


def _faults(server: CommandServer, entry: Entry) -> Iterator[tuple[str, str]]:
    yield from _parameter_faults(server, entry)
    yield from _variable_faults(server, entry)
    if entry.workspace == "none" and server.root is not None:
        yield "/root", f"{server.server} takes no workspace"
    if entry.workspace != "none" and server.root is None:
        yield "/root", f"{server.server} needs a workspace"
    if entry.workspace != "write" and not server.readonly:
        yield "/readonly", f"{server.server} may not write"
    allowed = () if entry.hosts == "any" else {parse_host(host) for host in entry.hosts}
    for host in server.allowed_hosts:
        if entry.hosts != "any" and parse_host(host) not in allowed:
            yield "/allowed_hosts", f"{server.server} may not reach {host}"
    if _NARROWER.index(server.isolation) < _NARROWER.index(entry.isolation):
        yield "/isolation", f"{server.server} must be isolated by {entry.isolation}"


def _parameter_faults(server: CommandServer, entry: Entry) -> Iterator[tuple[str, str]]:
    for name, value in server.parameters.items():
        parameter = entry.parameters.get(name)
        fault = parameter.fault(value) if parameter else f"is no parameter of {server.server}"
        if fault:
            yield f"/parameters/{name}", fault
    for name, parameter in entry.parameters.items():
        if parameter.default is None and name not in server.parameters:
            yield f"/parameters/{name}", "Field required"


def _variable_faults(server: CommandServer, entry: Entry) -> Iterator[tuple[str, str]]:
    for name in server.env.keys() - entry.env.keys():
        yield f"/env/{name}", f"is no variable of {server.server}"
    for name, need in entry.env.items():
        if need == "required" and name not in server.env:
            yield f"/env/{name}", "Field required"


def workspace(server: CommandServer) -> Workspace | None:
    """The workspace `root`, if it has one, but for a run's own, which the sandbox makes."""
    is_of_the_run = server.isolation == "run" and not server.readonly
    return None if server.root is None or is_of_the_run else Workspace(server.root, is_writable=not server.readonly)


def secrets(server: CommandServer) -> frozenset[str]:
    """Those that become variables of the program."""
    return frozenset(map(secret_name, server.env.values()))


def doors(server: CommandServer, _secrets: Mapping[str, str]) -> Mapping[HostPort, Door]:
    """One proxy to all of its hosts; without hosts there is no network."""
    hosts = tuple(map(parse_host, server.allowed_hosts))
    return {PROXY: Proxy(hosts)} if hosts else {}


def profile(server: CommandServer, place: Place) -> Profile:
    """Raise PolicyInvalid, with places in the section, for what the entry does not allow."""
    environment = place.environment
    if environment is None or environment.entry is None:
        raise ServerUnavailable(f"The server {server.server!r} has a template of its own: {server.server}.")
    entry = environment.entry
    if found := faults(server, entry):
        raise PolicyInvalid(faults=found)
    runtime = _runtime(entry, environment)
    ca_file = _ca_file(entry, place)
    return Profile(
        argv=(*environment.argv, *entry.arguments(server.parameters)),
        host_uid=place.host_uid,
        runtime=runtime.name,
        mounts=(
            *runtime.mounts,
            Mount(environment.folder, environment.target),
            *((Mount(ca_file, _CA_FILE),) if ca_file else ()),
            *((Mount(place.folder, WORKSPACE, writable=not server.readonly),) if place.folder else ()),
        ),
        scratch=(_OF_THE_RUN,) if server.root is not None and workspace(server) is None else (),
        files=runtime.files,
        environment={
            **runtime.environment,
            **_network_variables(server, entry, has_bundle=ca_file is not None),
            **{name: place.secrets[secret_name(reference)] for name, reference in server.env.items()},
        },
        limits=_limits(entry, runtime),
        working_directory=WORKSPACE if server.root is not None else "/tmp",  # noqa: S108  # the sandbox's own
        network=place.network,
    )


def _runtime(entry: Entry, environment: Environment) -> Runtime:
    if entry.kind == "node":
        return runtimes.node(runtimes.installed_node())
    return runtimes.python(environment.folder / PACKAGES)


def _limits(entry: Entry, runtime: Runtime) -> Limits:
    """The cgroup counts what is used; what one process may reserve is the runtime's to need."""
    memory = entry.limits.memory_mb * _MIB
    return replace(
        runtime.limits,
        memory_bytes=memory,
        data_bytes=max(runtime.limits.data_bytes, memory),
        processes=entry.limits.processes,
    )


def _ca_file(entry: Entry, place: Place) -> Path | None:
    """The operator's bundle; else that of this machine for Python, while Node.js has one built in."""
    if place.ca_file is not None:
        return place.ca_file.resolve()
    found = ssl.get_default_verify_paths().cafile if entry.kind == "python" else None
    return Path(found).resolve() if found else None


def _network_variables(server: CommandServer, entry: Entry, *, has_bundle: bool) -> dict[str, str]:
    """What tells the usual libraries of the proxy and of whom to trust. Whoever ignores it reaches nothing at all."""
    variables = dict.fromkeys(_CA_VARIABLES, _CA_FILE) if has_bundle else {}
    if entry.kind == "node" and has_bundle:
        variables["NODE_OPTIONS"] = "--use-openssl-ca"  # instead of those that are built in
    if server.allowed_hosts:
        variables |= dict.fromkeys(_PROXY_VARIABLES, f"http://{PROXY[0]}:{PROXY[1]}")
    return variables


TEMPLATE: Final = Template[CommandServer](
    profile=profile,
    workspace=workspace,
    secrets=secrets,
    doors=doors,
    environment=lambda server: server.server,
)
