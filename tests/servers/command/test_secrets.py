"""A tenant's secret in `env`, from the request that writes it to the program that has it, and its rotation."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from typing import Final

from tests.runs.faults import ScriptedModel
from tests.servers.command.ground import Ground, called, policy, publishing
from tests.service import Tenant

POLICY: Final = policy('template: command, server: probe, env: {TOKEN: "secret:tickets"}')


async def write(tenant: Tenant) -> str:
    """A new text of the secret."""
    text = secrets.token_urlsafe(24)
    response = await tenant.admin.put("/v1/secrets/tickets", json={"value": text})
    assert response.is_success, response.text
    assert text not in response.text
    return text


async def held(tenant: Tenant, model: ScriptedModel) -> tuple[str, str]:
    """The hash of what the program has, and which process it is."""
    digest, process = json.loads(await called(tenant, model, "act", words=["variable", "TOKEN"]))
    return digest, process


def hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def test_a_program_has_the_secret_of_its_tenant_and_within_a_second_of_a_rotation_the_new_one(
    ground: Ground, model: ScriptedModel
) -> None:
    tenant, other = [await ground.service.new_tenant(policy=None) for _ in range(2)]
    assert (await publishing(tenant, POLICY))["code"] == "secret_unavailable"
    first, of_another = await write(tenant), await write(other)
    for each in (tenant, other):
        await each.admin.publish(POLICY)
    before = await held(tenant, model)
    assert before[0] == hashed(first)
    assert (await held(other, model))[0] == hashed(of_another)
    await write(other)
    await asyncio.sleep(1)
    assert await held(tenant, model) == before  # the control: the same live server, after another tenant's rotation
    second = await write(tenant)
    await asyncio.sleep(1)
    after = await held(tenant, model)
    assert after[0] == hashed(second)
    assert after[1] != before[1]
    await tenant.admin.delete("/v1/secrets/tickets")
    await asyncio.sleep(1)
    model.calls("ours__act", words=["variable", "TOKEN"])
    assert (await tenant.user.ask("Which?")).json()["code"] == "server_unavailable"


async def test_what_the_program_says_of_its_secrets_old_and_new_is_shown_to_nobody(
    ground: Ground, model: ScriptedModel
) -> None:
    tenant = await ground.service.new_tenant(policy=None)
    texts = [await write(tenant)]
    await tenant.admin.publish(POLICY)
    told = [await called(tenant, model, "act", words=["environment"])]
    await called(tenant, model, "act", words=["complain", "TOKEN"])
    texts.append(await write(tenant))
    await asyncio.sleep(1)
    told.append(await called(tenant, model, "act", words=["environment"]))
    model.calls("ours__act", words=["complain", "TOKEN"])
    model.says(f"They are {texts}")
    told.append((await tenant.user.ask("Which?")).text)
    assert all("[redacted]" in each for each in told)
    stderr = await tenant.admin.get("/v1/servers/ours/stderr")
    assert stderr.text.count("TOKEN is [redacted]") == 2
    events = await tenant.admin.events()
    opened = [event["data"]["version"] for event in events if event["type"] == "secret.accessed"]
    assert opened == [1, 2]
    shown = [*told, stderr.text, json.dumps(events), json.dumps(model.bodies[:-1])]
    assert not [text for text in texts if text in str(shown)]
    assert all(text in str(ground.service.server_journal(tenant, "ours")) for text in texts)  # the control
