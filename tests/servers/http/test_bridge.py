"""The bridge to a remote server that means well: what goes out, what comes back, and what stays unknown inside."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from app.auth import tokens
from app.auth.jwks import parse_jwks
from app.auth.tokens import Claims, TrustedIssuer
from app.errors import AppError
from app.keyring import Keyring, new_entry
from app.outbound.grants import Reverse
from app.policies.servers.http import HttpServer
from app.scopes import Role
from app.servers.errors import ServerFailed, ServerUnavailable
from app.servers.http import template
from app.servers.identity import META_KEY, Identities, OnBehalf
from app.servers.live import LiveServer
from tests.servers.http.lab import SECRET, Good, Lab, declared, serving_good, text_of
from tests.servers.site import DOCS, Trust

WITH_SECRET: dict[str, Any] = {"headers": {"Authorization": "Bearer secret:remote", "X-Team": "blue"}}


@pytest.fixture(scope="module")
async def good(trust: Trust) -> AsyncIterator[Good]:
    async with serving_good(trust.server) as remote:
        yield remote


@pytest.fixture(autouse=True)
def nothing_yet(good: Good) -> None:
    good.requests.clear()


async def call(live: LiveServer, tool: str, **arguments: Any) -> str:
    return text_of(await live.call(tool, arguments, timeout_s=20))


async def test_calls_reach_the_one_url_in_one_session_with_the_headers_of_the_policy(lab: Lab, good: Good) -> None:
    async with lab.started(declared(good.port, **WITH_SECRET), {"remote": SECRET}) as live:
        assert {"add", "told"} <= {tool.name for tool in live.tools}
        sums = await asyncio.gather(*(call(live, "add", a=number, b=1) for number in range(4)))
        assert sums == ["1", "2", "3", "4"]
    assert {path for _, path, _ in good.requests} == {"/mcp"}
    assert set(good.headers("authorization")) == {f"Bearer {SECRET}"}
    assert set(good.headers("x-team")) == {"blue"}
    assert set(good.headers("host")) == {f"{DOCS}:{good.port}"}
    first, *later = good.headers("mcp-session-id")
    assert first is None
    assert len(set(later)) == 1
    assert later[0]
    assert good.requests[-1][0] == "DELETE"  # the session ends with the bridge
    assert {asked.refused for asked in lab.asked} == {None}
    assert len(lab.asked) == len(good.requests)


async def test_a_remote_server_that_answers_in_json_is_understood(lab: Lab, trust: Trust) -> None:
    async with serving_good(trust.server, json_response=True) as remote, lab.started(declared(remote.port)) as live:
        assert await call(live, "add", a=1, b=2) == "3"


async def test_what_the_remote_server_asks_back_is_refused_and_the_call_goes_on(lab: Lab, good: Good) -> None:
    async with lab.started(declared(good.port)) as live:
        assert await call(live, "ask") == "refused"
    assert good.refusals == ["not served here"]
    # The control: a bridge that plays along gets it to go on.
    answer = '{"role": "assistant", "content": {"type": "text", "text": "x"}, "model": "m"}'
    lenient = lab.weakened(
        'return _failure(asked, NO_SUCH_METHOD, "not served here")',
        f'return {{"jsonrpc": "2.0", "id": asked["id"], "result": {answer}}}',
    )
    async with lab.started(declared(good.port), script=lenient) as live:
        assert await call(live, "ask") == "answered"


DUMP = """
import http.client, json, sys
hello = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
    "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "x", "version": "1"}}}
remote = http.client.HTTPConnection("127.0.0.1", 3129, timeout=10)
headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
remote.request("POST", "/mcp", json.dumps(hello), headers)
answer = remote.getresponse().read()
out = sys.stdout.buffer
out.write(b"answered %d " % len(answer))
for name in ("environ", "cmdline", "mountinfo"):
    out.write(open(f"/proc/self/{name}", "rb").read())
memory = open("/proc/self/mem", "rb", 0)
for line in open("/proc/self/maps"):
    span, rights, *_ = line.split()
    start, end = (int(part, 16) for part in span.split("-"))
    if "r" in rights and end < 1 << 47:
        try:
            memory.seek(start)
            out.write(memory.read(end - start))
        except OSError:
            pass
"""


async def test_whatever_runs_in_the_bridges_place_cannot_find_the_secret(lab: Lab, good: Good, tmp_path: Path) -> None:
    """Not in its environment, its arguments or its memory, after a request that went out with it."""
    script = tmp_path / "dump.py"
    script.write_text(DUMP)
    script.chmod(0o644)
    server = declared(good.port, **WITH_SECRET)
    needle, marker = SECRET.encode(), b"a-marker-of-the-control"
    async with lab.granted(server, {"remote": SECRET}) as lease:
        launch = lab.launch(server, lease, script=script, environment={"MARKER": marker.decode()})
        ran = await asyncio.to_thread(
            subprocess.run,
            launch.argv,
            env=launch.environment,
            pass_fds=launch.pass_fds,
            capture_output=True,
            timeout=30,
        )
    assert ran.stdout.startswith(b"answered "), ran.stderr
    assert good.headers("authorization") == [f"Bearer {SECRET}"]
    assert needle not in ran.stdout
    assert ran.stdout.count(marker) > 1  # the control: what it does have is found, in its memory too


# Identities

PLATFORM = "https://agents.example.com"


def whom() -> OnBehalf:
    return OnBehalf(uuid4(), uuid4(), Role.USER, uuid4())


def claims_of(identities: Identities, token: str, audience: str) -> Claims:
    keys = parse_jwks(json.dumps(identities.public_jwks()).encode())
    return tokens.verify(token, TrustedIssuer(PLATFORM, audience, keys), now=datetime.now(UTC), max_lifetime_s=61)


@pytest.fixture
def identities() -> Identities:
    return Identities(Keyring.parse(f"{new_entry('k2')},{new_entry('k1')}"), PLATFORM)


async def test_each_call_carries_whom_it_is_made_for_and_no_result_shows_it(
    lab: Lab, good: Good, identities: Identities
) -> None:
    server = declared(good.port, identity=True)
    people = [whom(), whom()]
    async with lab.started(server, identify=identities.signer("remote", server)) as live:
        said = [text_of(await live.call("told", {}, timeout_s=20, whom=each)) for each in people]
        assert said == ["[redacted]"] * 2
        # The control: it says what it is told, and only what Bulkhead has told it is taken out.
        assert text_of(await live._make("told", {}, {META_KEY: "a.b.c"}, 20)) == "a.b.c"
    seen = [token for token in good.headers("bulkhead-identity") if token not in {None, "a.b.c"}]
    assert len(seen) == 2
    assert len(set(seen)) == 2
    for token, each in zip(map(str, seen), people, strict=True):
        claims = claims_of(identities, token, f"https://{DOCS}:{good.port}").claims
        assert claims == {
            "iss": PLATFORM,
            "aud": f"https://{DOCS}:{good.port}",
            "sub": str(each.user_id),
            "tenant": str(each.tenant_id),
            "role": "user",
            "run_id": str(each.run_id),
            "tool": "told",
            "iat": claims["iat"],
            "exp": claims["iat"] + 60,
            "jti": claims["jti"],
        }


async def test_a_model_cannot_write_an_identity_or_a_header(lab: Lab, good: Good) -> None:
    forged = {META_KEY: "eyJ.forged.token"}
    async with lab.started(declared(good.port)) as live:
        await live.call("take", {"_meta": forged, "headers": {"Bulkhead-Identity": "x"}}, timeout_s=20)
        assert set(good.headers("bulkhead-identity")) == {None}
        # The control: in the envelope, where only Bulkhead writes, it is sent.
        await live._make("take", {}, forged, 20)
    assert "eyJ.forged.token" in good.headers("bulkhead-identity")


async def test_a_call_for_nobody_is_not_made_where_the_policy_wants_an_identity(
    lab: Lab, good: Good, identities: Identities
) -> None:
    server = declared(good.port, identity=True)
    async with lab.started(server, identify=identities.signer("remote", server)) as live:
        before = len(good.requests)
        with pytest.raises(ValueError, match="whom"):
            await live.call("told", {}, timeout_s=20)
        assert len(good.requests) == before


def test_an_identity_needs_the_platforms_own_url() -> None:
    keyring = Keyring.parse(new_entry("k1"))
    server = declared(8443, identity=True)
    with pytest.raises(ServerUnavailable, match="BULKHEAD_PUBLIC_URL"):
        Identities(keyring, None).signer("remote", server)
    assert Identities(keyring, None).signer("remote", declared(8443)) is None
    assert Identities(keyring, PLATFORM).signer("remote", server) is not None


def test_keys_rotate_with_the_root_keys_and_the_old_ones_still_verify() -> None:
    first, second = new_entry("k1"), new_entry("k2")
    server, each = declared(8443, identity=True), whom()
    old, new = (Identities(Keyring.parse(keys), PLATFORM) for keys in (f"{first},{second}", f"{second},{first}"))
    assert {key["kid"] for key in old.public_jwks()["keys"]} == {key["kid"] for key in new.public_jwks()["keys"]}
    for signing, verifying in ((old, new), (new, old)):
        sign = signing.signer("remote", server)
        assert sign is not None
        assert claims_of(verifying, sign(each, "told"), f"https://{DOCS}:8443").subject == str(each.user_id)
    sign = old.signer("remote", server)
    assert sign is not None
    with pytest.raises(AppError):
        claims_of(Identities(Keyring.parse(second), PLATFORM), sign(each, "told"), f"https://{DOCS}:8443")
    assert "d" not in {name for key in old.public_jwks()["keys"] for name in key}


# The door


def test_a_secret_that_is_no_header_is_refused_and_not_repeated() -> None:
    server = declared(8443, **WITH_SECRET)
    for text in ("s3cret\r\nX-Other: x", "s3cret\n", " s3cret", "s3crét", "", "s3c" + "x" * 8_189):
        with pytest.raises(ServerFailed) as refused:
            template.doors(server, {"remote": text})
        assert "s3c" not in refused.value.detail
        assert "'remote'" in refused.value.detail


def test_headers_that_no_server_would_read_are_refused_before_the_relay_hears_of_them() -> None:
    several = {f"X-{number}": "secret:remote" for number in range(3)}
    texts = {"remote": "x" * 8_000}
    with pytest.raises(ServerFailed, match="more than 16384 bytes"):
        template.doors(declared(8443, headers=several), texts)
    del several["X-0"]
    assert template.doors(declared(8443, headers=several), texts)  # the control


def test_its_door_leads_to_one_path_of_one_host() -> None:
    ((_, door),) = template.doors(declared(8443, **WITH_SECRET), {"remote": SECRET}).items()
    assert isinstance(door, Reverse)
    assert (door.host, door.port, door.path) == (DOCS, 8443, "/mcp")
    assert dict(door.headers) == {"Authorization": f"Bearer {SECRET}", "X-Team": "blue"}
    assert template.TEMPLATE.secrets(declared(8443, **WITH_SECRET)) == {"remote"}


@pytest.mark.parametrize("twice", [("X-Key", "x-key"), ("X-Key", "X_Key")])
def test_a_header_is_added_once(twice: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="twice"):
        Reverse(DOCS, 443, tuple((name, "v") for name in twice))


@pytest.mark.parametrize("name", ["Content_Length", "Transfer_Encoding", "HOST", "Keep-Alive", "Bulkhead-Egress"])
def test_a_header_of_the_connection_is_not_added(name: str) -> None:
    with pytest.raises(ValueError, match="may be added"):
        Reverse(DOCS, 443, ((name, "v"),))


def test_the_section_is_a_model_of_its_own() -> None:
    assert HttpServer(template="http", url="https://a.example/mcp").timeout_s == 25
