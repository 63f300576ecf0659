"""A query that is sent twice with the same Idempotency-Key is one run, and is answered alike from its record."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
from llmock.scenarios import Fail

from tests.idempotency.test_once import age, as_owner, keyed, same
from tests.runs.faults import ScriptedModel
from tests.service import DEFAULT_MODEL_POLICY, Client, Databases, Service, Tenant, running_service

_REPLAYED: Final = "idempotency-replayed"
_REFUSED: Final = "../../etc/passwd; rm -rf /"


@pytest.fixture(scope="module")
async def scripted_service(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("asking")
    async with running_service(
        databases, folder, model=scripted.endpoint, model_retries=0, queue_wait_s=0.2
    ) as running:
        yield running


@pytest.fixture(scope="module")
async def tenant(scripted_service: Service) -> Tenant:
    """Whose policy lets one tool be called once somebody has approved it."""
    policy = DEFAULT_MODEL_POLICY.replace('["docs__*"]', '["docs__*"], approve: [docs__list_directory]')
    return await scripted_service.new_tenant(policy=policy, files={"note.md": "a note"})


async def ask(client: Client, key: str, query: str = "What?", path: str = "/query", **extra: Any) -> httpx.Response:
    return await keyed(client, path, key, json={"query": query, **extra})


async def runs_of(client: Client) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await client.get("/v1/runs", params={"limit": 200})).json()["items"]
    return items


def done(model: ScriptedModel) -> None:
    model.calls("docs__read_file", path="note.md", text="I look.")
    model.calls("docs__read_file", path="/etc/passwd")
    model.calls("docs__delete_everything", path="note.md")
    model.says("It is a note. \u2603")


def out_of_steps(model: ScriptedModel) -> None:
    model.calls("docs__read_file", path="note.md", times=None)


@pytest.mark.parametrize("script", [done, out_of_steps])
async def test_an_answer_is_the_same_to_the_byte(tenant: Tenant, model: ScriptedModel, script: Any) -> None:
    script(model)
    before = len(await runs_of(tenant.user))
    first = await ask(tenant.user, script.__name__)
    asked = len(model.bodies)
    second = await ask(tenant.user, script.__name__, path="/v1/query")
    assert first.status_code == 200
    assert _REPLAYED not in first.headers
    assert same(first, second)
    assert len(model.bodies) == asked, "the model was not asked again"
    assert len(await runs_of(tenant.user)) == before + 1
    model.state.reset()
    script(model)
    unkeyed = (await tenant.user.ask("What?")).json()
    assert unkeyed["run_id"] != first.json()["run_id"], "control: without a key it is another run"
    for part in ("run_id", "duration_ms"):
        assert cleaned(unkeyed, part) != first.json()
    assert cleaned(unkeyed, "run_id", "duration_ms") == cleaned(first.json(), "run_id", "duration_ms")


def cleaned(value: Any, *names: str) -> Any:
    """Without what differs between two runs."""
    if isinstance(value, list):
        return [cleaned(item, *names) for item in value]
    if isinstance(value, dict):
        return {name: cleaned(item, *names) for name, item in value.items() if name not in names}
    return value


def told(answer: httpx.Response) -> tuple[Any, ...]:
    body = answer.json()
    return answer.status_code, body["code"], body["run_id"], body["detail"]


async def test_a_refusal_that_is_recorded_is_told_again(tenant: Tenant, model: ScriptedModel) -> None:
    answers = [await ask(tenant.user, "refused", _REFUSED) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert told(answers[0]) == told(answers[1])
    assert "screening rule '" in answers[1].json()["detail"]
    assert [_REPLAYED in answer.headers for answer in answers] == [False, True]
    in_background = [await ask(tenant.user, "refused", _REFUSED, "/v1/runs") for _ in range(2)]
    assert told(in_background[0]) == told(in_background[1])
    assert in_background[0].json()["run_id"] != answers[0].json()["run_id"], "the key is of its route"
    assert model.bodies == []


async def test_a_failure_that_is_recorded_is_told_again(tenant: Tenant, model: ScriptedModel) -> None:
    model.state.scenarios.add(Fail(401, times=None))
    first = await ask(tenant.user, "failed")
    model.state.reset()
    second = await ask(tenant.user, "failed")
    assert told(first)[:2] == (502, "model_failed")
    assert told(first) == told(second)
    assert "401" in second.json()["detail"]
    assert (await ask(tenant.user, "another")).status_code == 200, "control: another key asks anew"


async def test_a_key_for_another_query_is_refused(tenant: Tenant) -> None:
    assert (await ask(tenant.user, "mismatch")).status_code == 200
    other = await ask(tenant.user, "mismatch", "Another?")
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_mismatch")
    assert (await ask(tenant.user, "mismatch", conversation=secrets.token_hex(16))).status_code == 422


async def test_what_left_no_run_leaves_the_key_free(scripted_service: Service, model: ScriptedModel) -> None:
    tenant = await scripted_service.new_tenant(policy=None)
    refused = [await ask(tenant.user, "free")]
    await tenant.admin.publish(DEFAULT_MODEL_POLICY.replace("100000/minute", "2/hour"))
    auditor, _, _ = await scripted_service.new_user(tenant.id, "auditor")
    refused.append(await ask(auditor, "free"))
    refused.append(await keyed(tenant.user, "/query", "free", json={"query": ""}))
    assert [answer.status_code for answer in refused] == [409, 403, 422]
    assert (await ask(tenant.user, "free")).status_code == 200
    limited = await ask(tenant.user, "later")
    assert (limited.status_code, limited.json()["code"]) == (429, "rate_limited")
    kept = await as_owner(scripted_service, tenant, "select key from idempotency_keys")
    assert [row.key for row in kept] == ["free"]
    assert len(model.bodies) == 1


async def test_keys_are_bounded_as_queries_are(scripted_service: Service, tenant: Tenant, model: ScriptedModel) -> None:
    body = {"user_id": tenant.user_id, "name": "bounded", "rate": "3/hour"}
    client = await scripted_service.client((await tenant.admin.make("/v1/keys", json=body))["key"])
    answers = await asyncio.gather(*(ask(client, f"bounded-{n}", _REFUSED) for n in range(40)))
    assert sorted({answer.status_code for answer in answers}) == [422, 429]
    kept = "select key from idempotency_keys where key like 'bounded-%'"
    assert len(await as_owner(scripted_service, tenant, kept)) == 3
    assert (await ask(client, "bounded-0", _REFUSED)).status_code == 429, "sending again is counted, too"
    assert model.bodies == []


async def test_nobody_else_gets_anything_of_it(scripted_service: Service, tenant: Tenant, model: ScriptedModel) -> None:
    secret = secrets.token_hex(8)
    model.says(secret)
    other = await scripted_service.new_tenant(policy=DEFAULT_MODEL_POLICY)
    colleague, _, _ = await scripted_service.new_user(tenant.id)
    first = await ask(tenant.user, "guessed")
    assert secret in first.text
    for client in (other.user, colleague, tenant.admin):
        answer = await ask(client, "guessed")
        assert answer.status_code == 200
        assert secret not in answer.text
        assert answer.json()["run_id"] != first.json()["run_id"]
    assert secret not in (await ask(tenant.user, "guessed", path="/v1/runs")).text, "nor another route"
    assert secret in (await ask(tenant.user, "guessed")).text, "control: it is there for who asked"


async def test_a_key_counts_for_a_day(scripted_service: Service, tenant: Tenant) -> None:
    first = await ask(tenant.user, "aged")
    await age(scripted_service, tenant, "aged")
    second = await ask(tenant.user, "aged")
    assert (second.status_code, _REPLAYED in second.headers) == (200, False)
    assert second.json()["run_id"] != first.json()["run_id"]
    assert same(second, await ask(tenant.user, "aged"))


@pytest.mark.parametrize("keys", [["a", "b"], ["a", "a"], ["a b"], ["\xe9"], ["x" * 256], [""]])
async def test_what_is_no_key_begins_nothing(tenant: Tenant, keys: list[str], model: ScriptedModel) -> None:
    headers = [(b"Idempotency-Key", key.encode("latin-1")) for key in keys]
    for path in ("/query", "/v1/runs"):
        answer = await tenant.user.post(path, headers=headers, json={"query": "What?"})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), answer.text
    assert model.bodies == []


@pytest.mark.parametrize("key", ["k%0d%0aX-Injected:%201", "'; drop table runs; --", "../../other", "{0}${jndi:x}"])
async def test_a_key_is_only_a_name(tenant: Tenant, key: str) -> None:
    key = key.replace(" ", "+")
    first, second = await ask(tenant.user, key), await ask(tenant.user, key)
    assert same(first, second)
    assert "x-injected" not in second.headers


async def test_a_run_whose_texts_are_gone_is_told_without_them(
    scripted_service: Service, tenant: Tenant, model: ScriptedModel
) -> None:
    model.says("a text to be forgotten")
    first = await ask(tenant.user, "forgotten")
    run_id = first.json()["run_id"]
    forget = "delete from contents where run_id = "  # as the deletion of its conversation does
    await as_owner(scripted_service, tenant, f"{forget}'{run_id}'")
    second = await ask(tenant.user, "forgotten")
    assert second.json() == first.json() | {"answer": None}


async def test_what_waits_for_an_approval_is_told_so_for_good(
    scripted_service: Service, tenant: Tenant, model: ScriptedModel
) -> None:
    model.calls("docs__list_directory", path=".")
    model.says("There is a note.")
    first = await ask(tenant.user, "waiting")
    run_id = first.json()["run_id"]
    assert (first.status_code, first.json()["code"]) == (202, "approval_required")
    assert first.headers["location"] == f"/v1/runs/{run_id}"
    assert same(first, await ask(tenant.user, "waiting"))
    run = (await tenant.user.get(first.headers["location"])).json()
    assert (run["status"], run["kind"], len(run["approvals"])) == ("waiting_approval", "background", 1)
    await tenant.user.make(f"/v1/approvals/{run['approvals'][0]}/approve", json={})
    await scripted_service.app.state.runs.work(UUID(tenant.id), UUID(run_id))
    run = (await tenant.user.get(first.headers["location"])).json()
    assert (run["status"], run["answer"], run["attempt"], run["approvals"]) == ("succeeded", "There is a note.", 2, [])
    assert same(first, await ask(tenant.user, "waiting"))
