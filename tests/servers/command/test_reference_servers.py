"""Servers of others, unchanged, from a lock to a governed call: the catalogue, an install, a policy, a query."""

from __future__ import annotations

from typing import Any, Final

import pytest
from anyio import to_thread

from tests.runs.faults import ScriptedModel
from tests.servers.command.ground import Ground, called, policy, publishing
from tests.servers.site import LOCAL, SECRET

# The service is started, and the server is installed, once and not once a worker.
FILES: Final = "template: command, server: files, root: docs"


async def test_a_server_of_npm_reads_the_workspace_and_nothing_outside_of_it(
    reference: Ground, model: ScriptedModel
) -> None:
    tenant = await reference.service.new_tenant(policy=policy(FILES), files={"note.md": "the tide is at six"})
    assert "the tide is at six" in await called(tenant, model, "read_text_file", path="/workspace/note.md")
    assert "denied" in await called(tenant, model, "read_text_file", path="/etc/passwd")
    tools = (await tenant.user.get("/v1/me")).json()["tools"]
    assert {tool["name"] for tool in tools} == {"ours__read_text_file", "ours__write_file"}  # those of the entry


async def test_where_the_policy_says_readonly_it_cannot_write_although_it_has_no_such_option(
    reference: Ground, model: ScriptedModel
) -> None:
    tenant = await reference.service.new_tenant(policy=policy(FILES), files={"note.md": "ours"})
    said = await called(tenant, model, "write_file", path="/workspace/note.md", content="theirs")
    assert "EROFS" in said or "EACCES" in said, said
    assert (await tenant.admin.get("/v1/workspaces/docs/files/note.md")).text == "ours"
    await tenant.admin.publish(policy(f"{FILES}, readonly: false"))  # the control: no other wall is in the way
    assert "Successfully" in await called(tenant, model, "write_file", path="/workspace/note.md", content="theirs")
    assert (await tenant.admin.get("/v1/workspaces/docs/files/note.md")).text == "theirs"


def reaching(server: str, *hosts: str) -> str:
    return policy(f"template: command, server: {server}, allowed_hosts: [{', '.join(hosts)}]")


@pytest.mark.parametrize("server", ["probe", pytest.param("pages", marks=pytest.mark.long)])
async def test_a_program_reaches_the_hosts_of_the_policy_by_way_of_the_relay_and_no_other(
    ground: Ground, model: ScriptedModel, server: str
) -> None:
    await to_thread.run_sync(ground.installs.install, server)
    url, before = f"https://{LOCAL}:{ground.site.port}/secret", len(ground.site.requests)
    calls: dict[str, tuple[str, dict[str, Any]]] = {
        "probe": ("act", {"words": ["get", url]}),
        "pages": ("fetch", {"url": url, "raw": True}),  # a server of PyPI
    }
    tool, arguments = calls[server]
    tenant = await ground.service.new_tenant(policy=reaching(server, "docs.example.com"))
    assert SECRET not in await called(tenant, model, tool, **arguments)
    assert len(ground.site.requests) == before
    refused = [event for event in await tenant.admin.events() if event["type"] == "egress.refused"]
    assert [event["data"]["reason"] for event in refused] == ["not_listed"]
    await tenant.admin.publish(reaching(server, f"{LOCAL}:{ground.site.port}"))  # the control
    assert SECRET in await called(tenant, model, tool, **arguments)
    if server == "pages":
        assert "user-agent: bulkhead-test/1.0" in ground.site.requests[-1].lower()


@pytest.mark.parametrize(
    ("declared", "path"),
    [
        ("server: probe, parameters: {agent: --proxy-url}", "/servers/ours/parameters/agent"),
        ("server: probe, parameters: {agent: $(id)}", "/servers/ours/parameters/agent"),
        ("server: probe, parameters: {other: x}", "/servers/ours/parameters/other"),
        ("server: probe, root: docs", "/servers/ours/root"),
        ("server: files", "/servers/ours/root"),
        ("server: files, root: docs, allowed_hosts: [a.example]", "/servers/ours/allowed_hosts"),
    ],
)
async def test_what_the_entry_does_not_allow_is_told_at_publish_at_its_place(
    reference: Ground, declared: str, path: str
) -> None:
    tenant = await reference.service.new_tenant(policy=None)
    answer = await publishing(tenant, policy(f"template: command, {declared}"))
    assert (answer["status"], answer["code"]) == (422, "policy_invalid")
    assert [fault["path"] for fault in answer["errors"]] == [path]


@pytest.mark.parametrize(("name", "said"), [("none-such", "no entry 'none-such'"), ("browser", "browser")])
async def test_a_policy_names_no_program_that_is_not_in_the_operators_catalogue(
    ground: Ground, name: str, said: str
) -> None:
    tenant = await ground.service.new_tenant(policy=None)
    answer = await publishing(tenant, policy(f"template: command, server: {name}"))
    assert (answer["status"], answer["code"]) == (503, "server_unavailable")
    assert said in answer["detail"]
    assert str(ground.service.data_dir) not in str(answer)


async def test_only_what_is_installed_as_the_catalogue_has_it_starts(reference: Ground, model: ScriptedModel) -> None:
    folder = reference.catalogue / "files" / "server.toml"
    tenant = await reference.service.new_tenant(policy=policy(FILES), files={"note.md": "text"})
    before = folder.read_text()
    folder.write_text(f"{before}# changed\n")
    try:
        answer = await publishing(tenant, policy(FILES))
    finally:
        folder.write_text(before)
    assert (answer["status"], answer["code"]) == (503, "server_unavailable")
    assert "run `bulkhead servers install files`" in answer["detail"]
    assert "text" in await called(tenant, model, "read_text_file", path="/workspace/note.md")  # the control
