"""Whatever a model endpoint answers, the run ends once, clearly and on the record, and the next query works."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import certifi
import pytest
from llmock.scenarios import Delay, Fail, ToolFault

from tests.runs.agent.breaking_tls import BreakingModel, Fault, breaking_model
from tests.runs.faults import (
    MODEL_KEY,
    RawModel,
    ScriptedModel,
    assert_ended,
    assert_next_works,
    calling,
    completion,
    journal,
    response,
)
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service

_CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
_ZIPPED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope"
)
_HUGE_USAGE = {"prompt_tokens": 10**30, "completion_tokens": 1, "total_tokens": 10**30}


@pytest.fixture(scope="module")
async def breaking(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[BreakingModel]:
    async with breaking_model(tmp_path_factory.mktemp("breaking")) as model:
        yield model


@pytest.fixture(scope="module")
async def ground(
    scripted: ScriptedModel, breaking: BreakingModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    settings: dict[str, Any] = {"model_retries": 1, "model_timeout_s": 1}
    folder = tmp_path_factory.mktemp("scripted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certifi, "where", lambda: str(breaking.trusted.certificate))  # all public authorities
        async with running_service(databases, folder, model=scripted.endpoint, **settings) as service:
            yield service


@pytest.fixture(scope="module")
async def tenant(ground: Service) -> Tenant:
    return await ground.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "a note"})


@pytest.fixture(scope="module")
async def breaking_tenant(ground: Service, breaking: BreakingModel) -> Tenant:
    url = f"https://127.0.0.1:{breaking.port}/v1"
    entry = {"name": "breaking", "base_url": url, "models": ["small"], "credential": MODEL_KEY}
    await ground.platform.make("/v1/platform/models", json=entry)
    async with asyncio.timeout(5):
        while "breaking" not in (await ground.platform.get("/v1/models")).text:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0.05)
    policy = DEFAULT_MODEL_POLICY.replace("default", "breaking")
    return await ground.new_tenant(policy=policy, files={"note.md": "a note"})


@pytest.fixture(scope="module")
async def raw_tenant(
    raw: RawModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Tenant]:
    folder = tmp_path_factory.mktemp("raw")
    async with running_service(databases, folder, model=raw.endpoint, model_retries=0, model_timeout_s=1) as service:
        yield await service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "a note"})


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
async def test_an_endpoint_that_refuses_ends_the_run_and_is_named_by_status_alone(
    tenant: Tenant, model: ScriptedModel, status: int
) -> None:
    model.state.scenarios.add(Fail(status, message="the endpoint's own words", times=None))
    answer = await tenant.user.ask("Are you there?")
    await assert_ended(tenant, answer, status=502, state="failed", code="model_failed")
    assert str(status) in answer.json()["detail"]
    assert "own words" not in answer.text
    model.state.scenarios.clear()
    await assert_next_works(tenant)


@pytest.mark.parametrize("status", [429, 500])
async def test_one_refusal_is_retried(tenant: Tenant, model: ScriptedModel, status: int) -> None:
    model.state.scenarios.add(Fail(status, retry_after=0.1))
    await assert_ended(tenant, await tenant.user.ask("Are you there?"), status=200, state="succeeded", code=None)
    assert len(model.bodies) == 2


async def test_an_endpoint_that_does_not_answer_in_time(tenant: Tenant, model: ScriptedModel) -> None:
    model.state.scenarios.add(Delay(3, times=2))
    answer = await tenant.user.ask("Are you there?")
    await assert_ended(tenant, answer, status=502, state="failed", code="model_failed")
    assert "in time" in answer.json()["detail"]
    await assert_next_works(tenant)


async def test_cut_off_tool_arguments_end_the_run_and_reach_no_server(
    ground: Service, tenant: Tenant, model: ScriptedModel
) -> None:
    before = await journal(ground, tenant)
    model.calls("docs__read_file", path="note.md")
    model.state.scenarios.add(ToolFault("malformed_arguments"))
    answer = await tenant.user.ask("Read it.")
    await assert_ended(tenant, answer, status=502, state="failed", code="model_failed")
    assert await journal(ground, tenant) == before
    await assert_next_works(tenant)


async def test_a_tool_that_was_never_offered_is_denied_and_the_run_goes_on(
    tenant: Tenant, model: ScriptedModel
) -> None:
    model.calls("docs__read_file", path="note.md")
    model.state.scenarios.add(ToolFault("unknown_tool"))
    model.says("then not")
    answer = await tenant.user.ask("Read it.")
    run = await assert_ended(tenant, answer, status=200, state="succeeded", code=None)
    assert [call["decision"] for call in run["tool_calls"]] == ["denied"]
    assert run["answer"] == "then not"


async def test_no_message_to_the_model_carries_a_traceback_or_a_path_of_the_host(
    ground: Service, tenant: Tenant, model: ScriptedModel
) -> None:
    model.calls("docs__read_file", path="missing.md")
    model.calls("docs__nothing", path="missing.md")
    model.calls("docs__read_file", wrong=1)
    await tenant.user.ask("Read it.")
    told = str([message for body in model.bodies for message in body["messages"] if message["role"] == "tool"])
    assert "missing.md" in str(model.bodies)
    assert "Traceback" not in told
    assert str(ground.data_dir) not in told
    assert "docs__write" not in told  # nor a hint at what else there is


@pytest.mark.parametrize(
    ("answered", "why"),
    [
        pytest.param(response(b"<html>busy</html>", kind="text/html"), "not a chat completion", id="a page"),
        pytest.param(response(b'{"choices": [{"mess'), "not a chat completion", id="half of the JSON"),
        pytest.param(response(b""), "not a chat completion", id="nothing"),
        pytest.param(response(b"\xff\xfe\x00"), "not a chat completion", id="no text"),
        pytest.param(response(b"[" * 100_000), "not a chat completion", id="deep"),
        pytest.param(response([]), "not a chat completion", id="a list"),
        pytest.param(response("text"), "not a chat completion", id="a string"),
        pytest.param(response({}), "not a chat completion", id="an empty object"),
        pytest.param(response({"choices": None}), "not a chat completion", id="choices null"),
        pytest.param(response({"choices": []}), "not a chat completion", id="no choice"),
        pytest.param(response({"choices": [{}]}), "not a chat completion", id="an empty choice"),
        pytest.param(response({"choices": [[]]}), "not a chat completion", id="a choice that is a list"),
        pytest.param(response({"choices": "text"}), "not a chat completion", id="choices of text"),
        pytest.param(response({"error": {"message": "own words"}}), "", id="an error with status 200"),
        pytest.param(response(completion(message={"role": "user"})), "", id="a user's message"),
        pytest.param(response(completion(message={"role": 5, "content": "x"})), "", id="a role of no kind"),
        pytest.param(response(completion(message={"content": 5})), "", id="a number for text"),
        pytest.param(response(completion(message={"content": {"a": 1}})), "", id="an object for text"),
        pytest.param(response(completion("")), "empty", id="empty text"),
        pytest.param(response(completion("  \n")), "empty", id="blank text"),
        pytest.param(response(completion(message={"tool_calls": "text"})), "", id="tool calls of text"),
        pytest.param(response(completion(message={"tool_calls": [5]})), "", id="a tool call of no kind"),
        pytest.param(response(calling({"a": 1}, "{}")), "", id="a tool with an object for a name"),
        pytest.param(response(calling("docs__read_file", "{not json")), "not JSON", id="arguments that are not JSON"),
        pytest.param(response(calling("docs__read_file", "[1]")), "", id="arguments of a list"),
        pytest.param(response(calling("docs__read_file", "[" * 100_000)), "", id="deep arguments"),
        pytest.param(response(calling("docs__read_file", 5)), "", id="arguments of a number"),
        pytest.param(response(completion("half"), more=50), "broke off", id="a truncated body"),
        pytest.param(_CHUNKED + b'10\r\n{"choices": [{"m', "broke off", id="a truncated stream of chunks"),
        pytest.param(_ZIPPED, "", id="a body that is not what its encoding says"),
        pytest.param(b"", "broke off", id="a connection that is closed"),
        pytest.param(b"SSH-2.0-OpenSSH_9.6\r\n", "broke off", id="another protocol"),
        pytest.param(response(b"", status="302 Found\r\nLocation: http://169.254.169.254/"), "302", id="a redirect"),
        pytest.param(5.0, "in time", id="silence"),
        pytest.param(response(completion("x", usage=_HUGE_USAGE)), "", id="a usage beyond all numbers"),
    ],
)
async def test_an_answer_that_is_none_ends_the_run(
    raw: RawModel, raw_tenant: Tenant, answered: bytes | float, why: str
) -> None:
    raw.script = [answered]
    answer = await raw_tenant.user.ask("Are you there?")
    await assert_ended(raw_tenant, answer, status=502, state="failed", code="model_failed")
    assert why in answer.json()["detail"]
    assert "own words" not in answer.text
    await assert_next_works(raw_tenant)


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
async def test_tls_that_breaks_is_a_broken_connection_and_a_wrong_certificate_is_not_asked_again(
    breaking: BreakingModel, breaking_tenant: Tenant, fault: Fault
) -> None:
    before, breaking.faults = breaking.connections, [fault] * (1 if fault is Fault.UNTRUSTED else 2)
    answer = await breaking_tenant.user.ask("Are you there?")
    await assert_ended(breaking_tenant, answer, status=502, state="failed", code="model_failed")
    assert answer.json()["detail"] == "The model endpoint could not be reached, or broke off."
    assert breaking.faults == []
    assert breaking.connections - before == (1 if fault is Fault.UNTRUSTED else 2)
    await assert_next_works(breaking_tenant)


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        pytest.param("docs__read_file", '{"path": "a\\u0000.md"}', id="a NUL"),
        pytest.param("docs__read_file", '{"path": NaN}', id="not a number"),
        pytest.param("docs__read_file", '{"path": 1e999}', id="infinity"),
        pytest.param("docs__read_file", '{"__entity": {"type": "Tool", "id": "x"}}', id="a reference"),
        pytest.param("docs__read_file", '{"path": ' + "[" * 200 + "]" * 200 + "}", id="deep"),
        pytest.param("docs__read_file", "{}", id="none"),
        pytest.param("docs__read_file", "", id="empty"),
        pytest.param("docs__read_file", "null", id="null"),
        pytest.param("docs__\u0000", "{}", id="a NUL in the name"),
        pytest.param("", "{}", id="an empty name"),
        pytest.param(None, "{}", id="no name"),
        pytest.param("x" * 5_000, "{}", id="a long name"),
        pytest.param("docs__read_file\n", '{"path": "note.md"}', id="a name with a line break"),
        pytest.param("DOCS__READ_FILE", '{"path": "note.md"}', id="a name in capitals"),
    ],
)
async def test_a_strange_call_is_denied_on_the_record_and_the_run_goes_on(
    raw: RawModel, raw_tenant: Tenant, asked: Any, arguments: str
) -> None:
    raw.script = [response(calling(asked, arguments)), response(completion("then not"))]
    answer = await raw_tenant.user.ask("Read it.")
    run = await assert_ended(raw_tenant, answer, status=200, state="succeeded", code=None)
    assert [call["decision"] for call in run["tool_calls"]] == ["denied"]
    assert run["answer"] == "then not"
    events = await raw_tenant.admin.events(run_id=run["run_id"])
    assert [event["data"]["decision"] for event in events if event["type"] == "tool.decided"] == ["denied"]


async def test_arguments_that_are_no_unicode_are_denied_and_end_the_run(raw: RawModel, raw_tenant: Tenant) -> None:
    raw.script = [response(calling("docs__read_file", '{"path": "\\ud800.md"}'))]
    answer = await raw_tenant.user.ask("Read it.")
    run = await assert_ended(raw_tenant, answer, status=502, state="failed", code="model_failed")
    assert "Unicode" in answer.json()["detail"]
    assert [call["decision"] for call in run["tool_calls"]] == ["denied"]
    await assert_next_works(raw_tenant)


@pytest.mark.parametrize("call_id", [None, "", "call_1\u0000", "x" * 10_000])
async def test_a_strange_call_id_is_answered_all_the_same(raw: RawModel, raw_tenant: Tenant, call_id: Any) -> None:
    called = calling("docs__read_file", '{"path": "note.md"}', call_id=call_id)
    raw.script = [response(called), response(completion("read"))]
    answer = await raw_tenant.user.ask("Read it.")
    run = await assert_ended(raw_tenant, answer, status=200, state="succeeded", code=None)
    assert [call["decision"] for call in run["tool_calls"]] == ["allowed"]


async def test_a_text_with_a_nul_is_an_answer(raw: RawModel, raw_tenant: Tenant) -> None:
    raw.script = [response(completion("a\u0000b \U0001f600"))]
    answer = await raw_tenant.user.ask("Are you there?")
    run = await assert_ended(raw_tenant, answer, status=200, state="succeeded", code=None)
    assert run["answer"] == "a\u0000b \U0001f600"
