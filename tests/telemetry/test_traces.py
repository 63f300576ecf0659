"""Traces as a collector sees them: whole, of one piece, without a text, and never in anybody's way."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import db_attributes, error_attributes, http_attributes
from pydantic import SecretStr

from app.telemetry import otlp
from app.telemetry.metrics import TRACE_SPANS
from app.telemetry.otlp import OtlpTracer
from app.telemetry.traces import NOTHING
from tests.runs.faults import ScriptedModel
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service
from tests.telemetry.collector import Collector, Span, collecting

STRANGER: Final = "00-11111111111111111111111111111111-2222222222222222-01"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with pytest.MonkeyPatch.context() as patch, collecting() as collector:
        patch.setattr(otlp, "_EVERY_S", 0.05)  # tests wait for what is sent
        yield collector


@pytest.fixture(scope="module")
async def traced(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, collector: Collector, scripted: ScriptedModel
) -> AsyncIterator[Service]:
    """A service that traces everything, and tells its model of it."""
    settings: dict[str, Any] = {
        "otlp_endpoint": collector.url,
        "otlp_headers": SecretStr("x-collector-key=only-for-it"),
        "trace_models": ("default",),
    }
    folder = tmp_path_factory.mktemp("traced")
    async with running_service(databases, folder, model=scripted.endpoint, **settings) as service:
        yield service


@pytest.fixture(scope="module")
async def telling(
    databases: Databases, tmp_path_factory: pytest.TempPathFactory, collector: Collector, scripted: ScriptedModel
) -> AsyncIterator[Service]:
    """A service whose traces hold texts, and whose model is told of none."""
    settings: dict[str, Any] = {"otlp_endpoint": collector.url, "trace_content": True}
    folder = tmp_path_factory.mktemp("telling")
    async with running_service(databases, folder, model=scripted.endpoint, **settings) as service:
        yield service


@pytest.fixture(scope="module")
async def tenant(traced: Service) -> Tenant:
    return await traced.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "a note"})


@pytest.fixture(scope="module")
async def other(telling: Service) -> Tenant:
    return await telling.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "a note"})


async def ask(tenant: Tenant, model: ScriptedModel, **headers: str) -> httpx.Response:
    """One query with one tool call."""
    model.calls("docs__read_file", path="note.md")
    model.says("It says: a note")
    answer = await tenant.user.post("/query", json={"query": "What does note.md say?"}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


@contextmanager
def sent_to_models(service: Service) -> Iterator[list[str | None]]:
    """The traceparent of each request that the service sends to a model inside the block."""
    sent: list[str | None] = []

    async def note(request: httpx.Request) -> None:
        sent.append(request.headers.get("traceparent"))

    hooks = service.app.state.outbound[0].event_hooks["request"]
    hooks.append(note)
    yield sent
    hooks.remove(note)


def one(spans: list[Span], name: str) -> Span:
    (found,) = [span for span in spans if span.name == name]
    return found


def children(spans: list[Span], parent: Span) -> list[str]:
    return sorted(span.name for span in spans if span.parent_id == parent.span_id)


async def test_a_query_is_one_tree_from_the_request_to_the_server_s_start(
    traced: Service, tenant: Tenant, model: ScriptedModel, collector: Collector
) -> None:
    await traced.end_servers(tenant)
    answer = await ask(tenant, model)
    run_id = answer.json()["run_id"]
    spans = await asyncio.to_thread(collector.of_run, run_id)
    request, agent = one(spans, "POST /query"), one(spans, "invoke_agent")
    tool, chats = one(spans, "execute_tool docs__read_file"), [s for s in spans if s.name == "chat scripted"]

    assert {span.trace_id for span in spans} == {request.trace_id}
    assert (request.kind, request.parent_id) == ("server", "")
    assert request.attributes["http.response.status_code"] == 200
    assert request.attributes["bulkhead.request.id"] == answer.headers["x-request-id"]
    assert request.attributes["bulkhead.tenant.id"] == agent.attributes["bulkhead.tenant.id"] == tenant.id
    assert answer.headers["traceparent"] == f"00-{request.trace_id}-{request.span_id}-01"
    assert agent.parent_id == request.span_id
    assert [chat.parent_id for chat in chats] == [agent.span_id] * 2
    assert [(chat.kind, chat.attributes["gen_ai.request.model"]) for chat in chats] == [("client", "scripted")] * 2
    assert all(chat.attributes["gen_ai.usage.output_tokens"] > 0 for chat in chats)
    assert tool.parent_id == agent.span_id
    assert tool.attributes["bulkhead.rule"] == "allow:docs__*"
    assert "app transaction" in children(spans, tool), "the decision's record"
    assert children(spans, agent).count("app transaction") == 2, "begin and finish"
    assert "platform transaction" in children(spans, request), "the key's look-up"
    assert not [span for span in spans if span.has_failed]

    (start,) = [s for s in collector.spans if s.name == "start_server docs" and (s.links[0][1] == tool.span_id)]
    assert start.trace_id != request.trace_id
    assert start.parent_id == ""
    assert tool.links == ((start.trace_id, start.span_id),)


async def test_a_server_s_start_that_two_runs_wait_for_belongs_to_neither_and_both_refer_to_it(
    traced: Service, model: ScriptedModel, collector: Collector
) -> None:
    tenant = await traced.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "a note"})
    await traced.end_servers(tenant)
    model.calls("docs__read_file", times=2, path="note.md")
    answers = await asyncio.gather(*(tenant.user.ask("What does note.md say?") for _ in range(2)))
    trees = [await asyncio.to_thread(collector.of_run, answer.json()["run_id"]) for answer in answers]
    tools = [span for tree in trees for span in tree if span.name.startswith("execute_tool")]
    starts = {link for tool in tools for link in tool.links}
    assert (len(tools), len(starts)) == (2, 1)
    assert not {trace_id for trace_id, _ in starts} & {tool.trace_id for tool in tools}


async def test_names_are_those_of_the_conventions(tenant: Tenant, model: ScriptedModel, collector: Collector) -> None:
    answer = await ask(tenant, model)
    spans = await asyncio.to_thread(collector.of_run, answer.json()["run_id"])
    modules = (gen_ai_attributes, db_attributes, error_attributes, http_attributes)
    known = {value for module in modules for name, value in vars(module).items() if name.isupper()}
    used = {name for span in spans for name in span.attributes if not name.startswith("bulkhead.")}
    assert used <= known
    operations = {span.attributes.get("gen_ai.operation.name") for span in spans} - {None}
    assert operations == {"invoke_agent", "chat", "execute_tool"}
    assert operations <= {each.value for each in gen_ai_attributes.GenAiOperationNameValues}


async def test_the_collector_gets_its_credential_and_no_text(
    tenant: Tenant, model: ScriptedModel, collector: Collector
) -> None:
    nonce = secrets.token_hex(12)
    answer = await _ask_with(tenant, model, nonce)
    spans = await asyncio.to_thread(collector.of_run, answer.json()["run_id"])
    assert len(spans) > 8, "the control: the run is there"
    assert not [body for body in collector.bodies if nonce.encode() in body]
    assert {sent["x-collector-key"] for sent in collector.headers} == {"only-for-it"}


async def test_texts_are_in_traces_where_the_operator_wants_them(
    other: Tenant, model: ScriptedModel, collector: Collector
) -> None:
    nonce = secrets.token_hex(12)
    answer = await _ask_with(other, model, nonce)
    spans = await asyncio.to_thread(collector.of_run, answer.json()["run_id"])
    holding = {name for span in spans for name, value in span.attributes.items() if nonce in str(value)}
    assert holding == {
        *("gen_ai.input.messages", "gen_ai.output.messages"),
        *("gen_ai.tool.call.arguments", "gen_ai.tool.call.result"),
    }


async def test_a_call_that_is_hard_to_write_down_fails_no_run(
    other: Tenant, model: ScriptedModel, collector: Collector
) -> None:
    model.calls("docs__read_file", path="note.md", tail=2**70)
    model.calls("docs__read_file", path={"deep": [1e999]})
    model.says("done")
    answer = await other.user.ask("What does note.md say?")
    assert (answer.status_code, answer.json()["answer"]) == (200, "done"), answer.text
    spans = await asyncio.to_thread(collector.of_run, answer.json()["run_id"])
    tools = [span.attributes["gen_ai.tool.call.arguments"] for span in spans if span.name.startswith("execute_tool")]
    assert str(2**70) in tools[0]


async def _ask_with(tenant: Tenant, model: ScriptedModel, nonce: str) -> httpx.Response:
    """One query with the nonce in it, in a file's name and text, in a tool's name, and in the answer."""
    name = f"{nonce}.md"
    await tenant.admin.put_file(name, nonce)
    model.calls("docs__read_file", path=name)
    model.calls(f"docs__{nonce}", path="x")
    model.says(f"It says {nonce}")
    answer = await tenant.user.ask(f"What does {name} say?")
    assert answer.status_code == 200, answer.text
    assert nonce in answer.json()["answer"]
    return answer


async def test_a_caller_s_trace_is_continued_and_told_to_a_model_that_the_operator_named(
    traced: Service, tenant: Tenant, model: ScriptedModel, collector: Collector
) -> None:
    with sent_to_models(traced) as sent:
        answer = await ask(tenant, model, traceparent=STRANGER)
    spans = await asyncio.to_thread(collector.of_run, answer.json()["run_id"])
    assert {span.trace_id for span in spans} == {"1" * 32}
    assert one(spans, "POST /query").parent_id == "2" * 16
    assert len(sent) == 2
    assert set(sent) == {f"00-{span.trace_id}-{span.span_id}-01" for span in spans if span.name == "chat scripted"}


async def test_a_model_that_was_not_named_is_told_no_trace(
    telling: Service, other: Tenant, model: ScriptedModel
) -> None:
    with sent_to_models(telling) as sent:
        answer = await ask(other, model)
    assert "traceparent" in answer.headers, "the control: there is one"
    assert sent == [None, None]


def tracer(collector: Collector, *, ratio: float = 1.0, trusts_callers: bool = False) -> OtlpTracer:
    return OtlpTracer(collector.url, headers={}, ratio=ratio, trusts_callers=trusts_callers, with_content=False)


async def test_a_stranger_neither_forces_a_trace_nor_keeps_one_from_being_made(collector: Collector) -> None:
    never, always = tracer(collector, ratio=0), tracer(collector)
    trusting = tracer(collector, ratio=0, trusts_callers=True)
    unsampled = STRANGER.removesuffix("01") + "00"
    assert not [i for i in range(500) if never.request("GET", {}, traceparent=f"00-{i + 1:032x}-{1:016x}-01").is_open]
    assert always.request("GET", {}, traceparent=unsampled).is_open
    assert trusting.request("GET", {}, traceparent=STRANGER).is_open, "the control"
    assert not trusting.request("GET", {}, traceparent=unsampled).is_open
    assert trusting.request("GET", {}, traceparent=None) is NOTHING
    for each in (never, always, trusting):
        await each.aclose()


@pytest.mark.parametrize(
    "header",
    [
        "",
        "00",
        "00-" + "0" * 32 + "-" + "2" * 16 + "-01",
        "00-" + "1" * 32 + "-" + "0" * 16 + "-01",
        "ff-" + "1" * 32 + "-" + "2" * 16 + "-01",
        "00-" + "A" * 32 + "-" + "2" * 16 + "-01",
        STRANGER + "\n",
        STRANGER + "-more",
        "00-" + "\u0661" * 32 + "-" + "2" * 16 + "-01",
    ],
)
async def test_a_traceparent_that_is_none_begins_a_trace_of_its_own(collector: Collector, header: str) -> None:
    own = tracer(collector)
    assert own.request("GET", {}, traceparent=header).trace_id not in ("1" * 32, "", "0" * 32)
    await own.aclose()


def spans_that_were(result: str) -> float:
    return float(TRACE_SPANS.labels(result)._value.get())


@pytest.mark.parametrize(("status", "delay_s"), [(500, 0), (307, 0), (200, 4)], ids=["fails", "redirects", "hangs"])
async def test_a_collector_in_trouble_delays_nobody_and_the_end_is_bounded(
    status: int, delay_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(otlp, "_SEND_S", 1.0)
    monkeypatch.setattr(otlp, "_CLOSE_S", 0.5)
    with collecting() as troubled:
        troubled.answer, troubled.delay_s = status, delay_s
        own = tracer(troubled)
        started, dropped = time.monotonic(), spans_that_were("dropped")
        for _ in range(5_000):
            own.request("GET", {}, traceparent=None).end()
        assert time.monotonic() - started < 3
        if delay_s:
            assert spans_that_were("dropped") - dropped > 0, "the queue has an end"
        started = time.monotonic()
        await own.aclose()
        assert time.monotonic() - started < 4
        # With the batch that is under way, and no more: a dozen others wait where it hangs.
        await asyncio.to_thread(own._outbox._thread.join, 5)
        assert not own._outbox._thread.is_alive()


async def test_a_span_is_bounded_and_is_over_when_it_has_ended() -> None:
    with collecting() as own_collector:
        own = tracer(own_collector)
        others = [own.request("other", {}, traceparent=None) for _ in range(30)]
        span = own.request("GET", {"text": "x" * 20_000, "count": 1}, traceparent=None)
        for other in others:
            span.link(other)
        span.fail("first")
        span.fail("second")
        span.end()
        span.note({"late": True})
        span.rename("late")
        span.end()
        assert not span.is_open
        await own.aclose()
    (sent,) = own_collector.spans
    assert (sent.name, sent.has_failed, len(sent.links)) == ("GET", True, 16)
    assert sent.attributes == {"text": "x" * 16_000, "count": 1, "error.type": "first"}
    assert sent.links[0] == (others[0].trace_id, others[0].span_id)


async def test_what_ends_while_a_batch_is_sent_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch costs as much as 150 spans, so a batch for each few would be most of what traces cost."""
    monkeypatch.setattr(otlp, "_EVERY_S", 0.3)
    with collecting() as slow:
        slow.delay_s = 0.02
        own = tracer(slow)
        for _ in range(100):
            own.request("GET", {}, traceparent=None).end()
            await asyncio.sleep(0.01)
        await own.aclose()
    assert len(slow.spans) == 100
    assert 1 < len(slow.bodies) <= 8


async def test_a_collector_that_is_not_there_loses_spans_and_nothing_else() -> None:
    own = OtlpTracer("http://127.0.0.1:9/v1/traces", headers={}, ratio=1, trusts_callers=False, with_content=False)
    failed = spans_that_were("failed")
    own.request("GET", {}, traceparent=None).end()
    await own.aclose()
    assert spans_that_were("failed") == failed + 1


SENDING: Final = """
import asyncio, json, sys
import app.settings
from app.telemetry import traces
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")], "no SDK without an endpoint"
from app.telemetry.otlp import OtlpTracer

async def main():
    tracer = OtlpTracer(sys.argv[1], headers={}, ratio=1, trusts_callers=False, with_content=False)
    with traces.entered(tracer.request("one", {"text": "x" * 100}, traceparent=None)):
        with traces.span("two"):
            pass
    await tracer.aclose()

asyncio.run(main())
"""


def test_the_environment_changes_nothing_behind_the_settings() -> None:
    hostile = {
        "OTEL_SDK_DISABLED": "true",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_TRACES_EXPORTER": "none-such",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-smuggled=1",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        "OTEL_PROPAGATORS": "none-such",
        "OTEL_PYTHON_CONTEXT": "none-such",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=smuggled",
        "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "none-such",
        "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "0",
        "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "1",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    with collecting() as collector:
        command = [sys.executable, "-c", SENDING, collector.url]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd()), **hostile}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    assert sorted(span.name for span in collector.spans) == ["one", "two"]
    assert one(collector.spans, "one").attributes["text"] == "x" * 100
    assert not [sent for sent in collector.headers if "x-smuggled" in sent]
    assert not [body for body in collector.bodies if b"smuggled" in body]
