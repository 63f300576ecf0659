"""A policy with a browser, through the whole service: published, asked, recorded, and one run's cookies its own."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from app.servers.template import Environment
from tests.runs.faults import ScriptedModel
from tests.servers.browser.ground import LOCAL, Site, site_in
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, running_service


@pytest.fixture(scope="module")
async def site(environment: Environment, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    async with site_in(tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture(scope="module")
async def browsing(
    site: Site,
    environment: Environment,
    scripted: ScriptedModel,
    databases: Databases,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Service]:
    data_dir = tmp_path_factory.mktemp("service")
    shutil.copytree(environment.folder.parents[2], data_dir / "servers" / "installed", symlinks=True)
    networks = {"browser": ("127.0.0.0/8", "::1/128")}
    settings: dict[str, Any] = {"server_ca_file": site.ca_file, "egress_private_networks": networks}
    async with running_service(databases, data_dir, model=scripted.endpoint, **settings) as running:
        yield running


def policy(site: Site, **keys: str) -> str:
    more = "".join(f", {key}: {value}" for key, value in keys.items())
    declared = f'web: {{template: browser, allowed_domains: ["{LOCAL}:{site.allowed.port}"]{more}}}'
    text = DEFAULT_MODEL_POLICY.replace("docs: {template: filesystem, root: docs}", declared)
    return text.replace('"docs__*"', '"web__*"')


async def visit(user: Client, model: ScriptedModel, *urls: str) -> str:
    """In one run; what the model was told of the last page."""
    for url in urls:
        model.calls("web__browser_navigate", url=url)
    model.says("done")
    answer = await user.ask("Look at it.")
    assert answer.status_code == 200, answer.text
    told: str = model.bodies[-1]["messages"][-1]["content"]
    return told


async def test_a_page_is_read_and_recorded_and_no_cookie_of_one_run_is_in_another(
    browsing: Service, site: Site, model: ScriptedModel
) -> None:
    tenant = await browsing.new_tenant(policy=policy(site, block_private_ips="false"))
    other, _, _ = await browsing.new_user(tenant.id)
    nonce = secrets.token_hex(16)
    cookie, page = (site.url(path, LOCAL) for path in (f"/cookie/{nonce}", "/page"))
    assert "written by a script" in await visit(tenant.user, model, cookie, page)
    assert nonce in site.allowed.requests[-1]  # the control: within a run it is sent
    for user in (other, tenant.user):
        site.allowed.requests.clear()
        assert "written by a script" in await visit(user, model, page)
        assert not any(nonce in head for head in site.allowed.requests)
    went = [event for event in await tenant.admin.events() if event["type"].startswith("egress.")]
    assert {event["type"] for event in went} <= {"egress.opened", "egress.closed"}  # nobody else was asked for
    opened = [event for event in went if event["type"] == "egress.opened"]
    assert {(event["data"]["server"], event["data"]["host"]) for event in opened} == {("web", LOCAL)}
    assert len({event["run_id"] for event in opened}) == 3


async def test_the_model_is_offered_nothing_that_reads_files_or_runs_code(
    browsing: Service, site: Site, model: ScriptedModel
) -> None:
    tenant = await browsing.new_tenant(policy=policy(site, block_private_ips="false"))
    model.calls("web__browser_run_code_unsafe", code="async page => process.env")
    model.calls("web__browser_navigate", url="file:///etc/passwd")
    model.calls("web__browser_snapshot", filename="a.yml")
    told = await visit(tenant.user, model, "https://elsewhere.example/")
    offered = {tool["function"]["name"] for tool in model.bodies[-1]["tools"]}
    assert "web__browser_navigate" in offered
    assert not offered & {f"web__browser_{name}" for name in ("run_code_unsafe", "drop", "install", "take_screenshot")}
    rules = [event["data"]["rule"] for event in await tenant.admin.events() if event["type"] == "tool.decided"]
    assert rules == ["unknown_tool", "url", "schema", "host"], told


async def test_private_addresses_are_blocked_also_where_the_operator_allows_them(
    browsing: Service, site: Site, model: ScriptedModel
) -> None:
    tenant = await browsing.new_tenant(policy=policy(site))
    before = site.arrived()
    assert "ERR_TUNNEL_CONNECTION_FAILED" in await visit(tenant.user, model, site.url("/page", LOCAL))
    assert site.arrived() == before
    reasons = [event["data"]["reason"] for event in await tenant.admin.events() if event["type"] == "egress.refused"]
    assert set(reasons) == {"not_public"}


async def test_what_this_machine_does_not_have_is_told_at_publish(
    service: Service, site: Site, environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of the service of all tests, for which nothing is installed and no network is allowed."""
    tenant = await service.new_tenant(policy=None)
    assert "bulkhead servers install browser" in await refusal(tenant.admin, policy(site))
    place = service.data_dir / "servers" / "installed" / "browser"
    await asyncio.to_thread(shutil.copytree, environment.folder.parents[1], place)
    try:
        said = await refusal(tenant.admin, policy(site, block_private_ips="false"))
        assert "BULKHEAD_EGRESS_PRIVATE_NETWORKS" in said
        monkeypatch.setattr("app.servers.browser.template._CHROMIUM", tmp_path / "chromium-headless-shell")
        assert "apt-get install" in await refusal(tenant.admin, policy(site))
    finally:
        await asyncio.to_thread(shutil.rmtree, place)


async def refusal(admin: Client, text: str) -> str:
    text = text.replace("use: default", "use: rehearsal")  # which that service has
    version = (await admin.make("/v1/policies", content=text.encode()))["version"]
    refused = await admin.post(f"/v1/policies/{version}/publish", json={})
    assert refused.status_code == 503, refused.text
    assert refused.json()["code"] == "server_unavailable"
    detail: str = refused.json()["detail"]
    return detail
