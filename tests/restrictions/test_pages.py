"""What holds the pages: the gate and the relay keep to the hosts of `fetch`, its server to the size of an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from app.outbound.grants import Proxy
from app.servers.fetch import template
from tests.attacks.hijacked import POLICY, Call
from tests.restrictions import off
from tests.restrictions.conftest import Ground
from tests.servers.site import LOCAL, SECRET
from tests.service import Tenant

DECLARED: Final = "site: {{template: fetch, {}}}"


async def tenant_with(ground: Ground, keys: str) -> Tenant:
    text = POLICY.replace("docs: {template: filesystem, root: docs}", DECLARED.format(keys))
    return await ground.service.new_tenant(policy=text.replace("docs__*", "site__*"))


def page(ground: Ground, path: str) -> Call:
    return Call("site__fetch", json.dumps({"url": f"https://{LOCAL}:{ground.site.port}{path}"}))


@pytest.mark.parametrize("is_relay_on", [True, False], ids=["relay", "no relay"])
async def test_a_host_that_is_not_listed_is_not_reached_past_the_gate_or_past_the_relay(
    ground: Ground, *, is_relay_on: bool
) -> None:
    with ExitStack() as down:
        if not is_relay_on:
            everywhere = Proxy(((LOCAL, ground.site.port),))
            down.enter_context(off.template("fetch", doors=lambda *_: {template.PROXY: everywhere}))
        tenant = await tenant_with(ground, "allowed_hosts: [docs.example.com]")
        before = len(ground.site.requests)
        denied = await ground.model.play(tenant, [page(ground, "/secret")])
        assert "(rule host)" in denied.heard
        assert len(ground.site.requests) == before
        down.enter_context(off.template("fetch", check_call=lambda *_: None))
        past_the_gate = await ground.model.play(tenant, [page(ground, "/secret")])
    assert (SECRET in past_the_gate.heard) is not is_relay_on
    assert (len(ground.site.requests) > before) is not is_relay_on
    refused = [event for event in await tenant.admin.events() if event["type"] == "egress.refused"]
    reasons = [event["data"]["reason"] for event in refused]
    assert reasons == (["not_listed"] if is_relay_on else [])


@contextmanager
def reading_on(folder: Path) -> Iterator[None]:
    """The server reads a page to its end."""
    bound, source = "if len(data) > most:", template._SERVER.read_text()
    assert source.count(bound) == 1
    program = folder / "server.py"
    program.write_text(source.replace(bound, "if False:"))
    program.chmod(0o644)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "_SERVER", program)
        yield


async def test_a_page_is_read_up_to_the_size_that_the_policy_says(ground: Ground, tmp_path: Path) -> None:
    keys = f"allowed_hosts: ['{LOCAL}:{ground.site.port}'], max_response_size: 1KB"
    tenant = await tenant_with(ground, keys)
    assert "x" * 1024 in (heard := (await ground.model.play(tenant, [page(ground, "/long")])).heard)
    assert "x" * 1025 not in heard
    with reading_on(tmp_path):
        control = await tenant_with(ground, keys)
        assert "x" * 50_000 in (await ground.model.play(control, [page(ground, "/long")])).heard
