"""The template `browser`: @playwright/mcp and a headless Chromium in one sandbox, by way of the egress relay alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from app.outbound.grants import Door, Proxy
from app.policies.decision import BuiltIn, Denial
from app.policies.hosts import HostPort, check_url, parse_host
from app.policies.servers.browser import BrowserServer
from app.sandbox import runtimes
from app.sandbox.contract import Mount, Profile, SandboxUnavailable
from app.sandbox.runtimes import Runtime
from app.servers.errors import ServerUnavailable
from app.servers.template import Environment, Place, Template

ENVIRONMENT: Final = "browser"
# Where the browser finds the relay's proxy, inside.
PROXY: Final[HostPort] = ("127.0.0.1", 3128)
_HERE: Final = Path(__file__).parent
_CHROMIUM: Final = Path("/usr/bin/chromium-headless-shell")
_AUTHORITIES: Final = "/srv/authorities.py"
_CA_FILE: Final = "/srv/ca.pem"
_SERVER: Final = "/srv/server.cjs"
# Beneath HOME, where NSS looks.
_TRUSTED: Final = "/tmp/.pki/nssdb"  # noqa: S108  # the sandbox's own, which nobody else sees
# Of one call. The rest of it is for the answer that it took too long, which the model can read.
_OF_THE_TIMEOUT: Final = 0.9
# Beyond it: for a browser that takes long to end. A server that is busy itself (a model may have it match a regular
# expression) keeps to no time at all, and is ended then.
_GRACE_S: Final = 2
# Not among them: those that run code in the server itself (browser_run_code_unsafe), take files from where it runs
# (browser_drop), give a picture, which no model is shown (browser_take_screenshot), or change what
# pages are told of the machine.
_TOOLS: Final = (
    *("browser_navigate", "browser_navigate_back", "browser_tabs", "browser_close", "browser_resize"),
    *("browser_snapshot", "browser_find", "browser_wait_for", "browser_console_messages"),
    *("browser_network_requests", "browser_network_request"),
    *("browser_click", "browser_hover", "browser_drag", "browser_type", "browser_press_key"),
    *("browser_fill_form", "browser_select_option", "browser_handle_dialog"),
    # Without paths, and so it only cancels: while a page asks for a file, nothing else works.
    "browser_file_upload",
)
# It runs whatever a page may, on the page; where pages may not, neither may it.
_WITH_JAVASCRIPT: Final = ("browser_evaluate",)
# Of each process: what one page can take. With less than three quarters of it a browser does not start.
_DATA_BYTES: Final = 1 << 30
_OF_THE_BROWSER: Final = (
    # WebRTC by the proxy or not at all; a datagram has no socket in the sandbox either.
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--renderer-process-limit=4",
)


def hosts(server: BrowserServer) -> tuple[HostPort, ...]:
    """All that the relay may connect to for the server."""
    return tuple(parse_host(host) for host in server.allowed_domains)


def tools(server: BrowserServer) -> tuple[str, ...]:
    """Those of @playwright/mcp that are offered."""
    return (*_TOOLS, *(_WITH_JAVASCRIPT if server.javascript else ()))


def check_call(server: BrowserServer, tool: str, arguments: Mapping[str, Any]) -> Denial | None:
    """What the template's own rules have against a call: on the URL that is asked for, not on what a page does then."""
    if tool not in tools(server):
        return Denial(BuiltIn.UNKNOWN_TOOL, "This tool of the browser is not offered.")
    if {"filename", "paths"} & arguments.keys():
        return Denial(BuiltIn.SCHEMA, "The browser neither takes nor keeps files.")
    if tool == "browser_navigate" or "url" in arguments:
        return check_url(arguments.get("url"), allowed=hosts(server))
    return None


def doors(server: BrowserServer, _secrets: Mapping[str, str]) -> Mapping[HostPort, Door]:
    """One proxy to all of its hosts."""
    return {PROXY: Proxy(hosts(server))}


def profile(server: BrowserServer, place: Place) -> Profile:
    """The server holds no list of hosts, since it is not trusted to keep to one. Without a network it only lists.

    The browser trusts the authorities of `ca_file` beside its maker's own.
    Raises ServerUnavailable, for an admin, with what the operator does about it.
    """
    if place.environment is None:
        raise ServerUnavailable(
            "There is no server for the browser: the operator runs `bulkhead servers install browser`."
        )
    node, browser = _runtimes()
    argv = (
        node.interpreter,
        _SERVER,
        place.environment.target,
        json.dumps(_settings(server, browser)),
    )
    wanted = Profile(
        argv=argv,
        host_uid=place.host_uid,
        runtime="chromium",
        mounts=(*dict.fromkeys((*node.mounts, *browser.mounts)), *_ours(place.environment)),
        files=browser.files,
        environment=node.environment,
        limits=replace(browser.limits, data_bytes=_DATA_BYTES),
        network=place.network,
    )
    return _trusting(wanted, place.ca_file.resolve()) if place.ca_file else wanted


def _runtimes() -> tuple[Runtime, Runtime]:
    try:
        return runtimes.node(runtimes.installed_node()), runtimes.chromium(_CHROMIUM)
    except SandboxUnavailable as error:
        raise ServerUnavailable(
            f"There is no browser here: {error.detail}. The operator does this: {error.remedy}."
        ) from None


def _settings(server: BrowserServer, browser: Runtime) -> dict[str, object]:
    """As app/servers/browser/server.cjs reads them."""
    return {
        "executable": browser.interpreter,
        "arguments": [*browser.arguments, *_OF_THE_BROWSER],
        "proxy": f"http://{PROXY[0]}:{PROXY[1]}",
        "javascript": server.javascript,
        "timeoutMs": int(server.timeout_s * 1000 * _OF_THE_TIMEOUT),
        "tools": tools(server),
    }


def _ours(environment: Environment) -> tuple[Mount, ...]:
    return Mount(_HERE / "server.cjs", _SERVER), Mount(environment.folder, environment.target)


def _trusting(wanted: Profile, ca_file: Path) -> Profile:
    """The same, after a moment of Python, which makes what the browser reads its authorities from."""
    python = runtimes.python()
    return replace(
        wanted,
        argv=(python.interpreter, "-I", _AUTHORITIES, _CA_FILE, _TRUSTED, *wanted.argv),
        mounts=(
            *dict.fromkeys((*python.mounts, *wanted.mounts)),
            Mount(_HERE / "authorities.py", _AUTHORITIES),
            Mount(ca_file, _CA_FILE),
        ),
        files={**python.files, **wanted.files},
        environment={**python.environment, **wanted.environment},
    )


TEMPLATE: Final = Template[BrowserServer](
    profile=profile,
    check_call=check_call,
    doors=doors,
    reaches_private=lambda server: not server.block_private_ips,
    environment=lambda _server: ENVIRONMENT,
    call_s=lambda server: server.timeout_s + _GRACE_S,
)
