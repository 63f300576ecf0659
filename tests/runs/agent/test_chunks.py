"""What a model streams is the turn that it would have answered at one go, whatever the pieces, and tells no secret."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from itertools import accumulate
from typing import Any, Final
from uuid import UUID

import pytest

from app.runs.agent import chunks
from app.runs.agent.chunks import BrokenOff, NoCompletion, assembled
from app.runs.events.deltas import Deltas
from app.runs.redaction import Redactor
from app.secrets.known import KnownTexts
from tests.runs.faults import RawModel, assert_next_works, completion, response
from tests.service import DEFAULT_MODEL_POLICY, Databases, Service, Tenant, running_service

TENANT: Final = UUID(int=7)
USAGE: Final = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
DONE: Final = b"data: [DONE]\n\n"
STREAM: Final = {"Accept": "text/event-stream"}


def piece(delta: dict[str, Any] | None = None, *, finish: str | None = None, **more: Any) -> bytes:
    """One event of a stream."""
    head = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "raw"}
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps(head | {"choices": choices} | more).encode() + b"\n\n"


def said(*texts: str, usage: dict[str, int] | None = USAGE) -> list[bytes]:
    """A whole stream of a text."""
    told = [piece({"role": "assistant", "content": ""}), *(piece({"content": each}) for each in texts)]
    return [*told, piece({}, finish="stop"), *([piece(usage=usage)] if usage else []), DONE]


def called(*arguments: str) -> list[bytes]:
    """A whole stream of a tool call, whose arguments come in pieces."""
    begun = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "docs__read_file", "arguments": ""}}
    more = [piece({"tool_calls": [{"index": 0, "function": {"arguments": each}}]}) for each in arguments]
    return [
        piece({"role": "assistant", "content": None, "tool_calls": [begun]}),
        *more,
        piece({}, finish="tool_calls"),
        piece(usage=USAGE),
        DONE,
    ]


async def in_parts(data: bytes, size: int) -> AsyncIterator[bytes]:
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]


async def put_together(data: bytes, *, size: int = 1 << 20) -> tuple[Any, str]:
    """The completion, and what was heard as it came."""
    heard: list[str] = []
    completed = await assembled(in_parts(data, size), heard.append)
    return completed, "".join(heard)


# Pieces


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
async def test_a_text_in_pieces_is_the_message_that_it_would_have_been(size: int) -> None:
    whole, heard = await put_together(b"".join(said("Grüße, ", "\U0001f600", " and more")), size=size)
    assert heard == whole["choices"][0]["message"]["content"] == "Grüße, \U0001f600 and more"
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["total_tokens"] == USAGE["total_tokens"]


async def test_a_tool_call_in_pieces_is_one_call() -> None:
    whole, heard = await put_together(b"".join(called('{"pa', 'th": "no', 'te.md"}')))
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "docs__read_file"
    assert json.loads(call["function"]["arguments"]) == {"path": "note.md"}
    assert heard == ""


async def test_halves_of_a_character_are_put_together() -> None:
    halves = [piece({"content": "\ud83d"}), piece({"content": "\ude00"})]
    whole, _ = await put_together(b"".join([*said()[:1], *halves, *said()[1:]]))
    assert whole["choices"][0]["message"]["content"] == "\U0001f600"


async def test_a_role_that_comes_with_each_piece_or_never_is_the_assistants() -> None:
    repeated = [piece({"role": "assistant", "content": "a"}), piece({"role": "assistant", "content": "b"}, finish="x")]
    never = [piece({"content": "a"}), piece({"content": "b"}, finish="x")]
    for stream in (repeated, never):
        whole, _ = await put_together(b"".join(stream))
        message = whole["choices"][0]["message"]
        assert (message["role"], message["content"]) == ("assistant", "ab")


async def test_what_comes_after_the_last_piece_is_not_there() -> None:
    whole, heard = await put_together(b"".join([*said("yes"), piece({"content": " and no"})]))
    assert heard == whole["choices"][0]["message"]["content"] == "yes"


async def test_a_stream_without_a_usage_has_none() -> None:
    whole, _ = await put_together(b"".join(said("yes", usage=None)))
    assert whole.get("usage") is None


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param([], id="nothing"),
        pytest.param([DONE], id="only the end"),
        pytest.param([b"data: {\n\n", DONE], id="half of the JSON"),
        pytest.param([b"data: 5\n\n", DONE], id="a number"),
        pytest.param([b'data: "\xff"\n\n', DONE], id="no text"),
        pytest.param([b"data: " + b"[" * 100_000 + b"\n\n", DONE], id="deep"),
        pytest.param([b'data: {"error": {"message": "own words"}}\n\n', DONE], id="an error"),
        pytest.param([piece({"content": "a"}), b'data: {"error": {"message": "x"}}\n\n'], id="an error amid"),
        pytest.param([piece(choices="text"), DONE], id="choices of text"),
        pytest.param([piece(choices=[5]), DONE], id="a choice of no kind"),
        pytest.param([piece(choices=[{"index": 5, "delta": {}}]), DONE], id="a choice too far"),
        pytest.param([piece({"tool_calls": [{"function": {"arguments": "x"}}]}), DONE], id="a call without a place"),
        pytest.param([piece({"tool_calls": [5]}), DONE], id="a call of no kind"),
        pytest.param([piece({"tool_calls": [{"index": 10**9}]}), DONE], id="a call too far"),
        pytest.param([b"data: " + b"x" * (5 << 20)], id="a line without end"),
    ],
)
async def test_a_stream_that_is_none_is_one_error(stream: list[bytes]) -> None:
    with pytest.raises(NoCompletion):
        await put_together(b"".join(stream), size=1 << 16)


async def test_a_stream_that_ends_before_the_model_was_done_is_broken_off() -> None:
    with pytest.raises(BrokenOff):
        await put_together(b"".join(said("half of")[:2]))


async def test_a_stream_without_end_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_MAX_PIECES", 1_500)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield piece({"tool_calls": []}) * 1_000

    with pytest.raises(NoCompletion):
        await assembled(endless(), lambda _text: None)


# Secrets


def redacting(*secrets: str) -> Redactor:
    known = KnownTexts()
    for secret in secrets:
        known.add(TENANT, secret)
    return Redactor(["/data/of/ours"], of_tenant=known.redact, open_from=known.open_from)


def heard_by(pieces: list[str], *secrets: str) -> list[tuple[int, str]]:
    told: list[tuple[int, str]] = []
    deltas = Deltas(lambda offset, text: told.append((offset, text)), redacting(*secrets), TENANT)
    deltas.begin()
    for each in pieces:
        deltas.say(each)
    deltas.end()
    return told


@pytest.mark.parametrize("size", range(1, 12))
@pytest.mark.parametrize(
    "spoken",
    [
        "it is hunter2-secret, yes",
        "aGg hunter2-secret-and-its-tail hunter2-secret-and",
        "xyz-hunter2-secret",
        "hunter2 hunter2-secre",
        "in /data/of/ours/x or /data/of/our",
        "\U0001f600 hunter2-secret",
    ],
)
def test_a_secret_that_comes_in_pieces_is_never_told(spoken: str, size: int) -> None:
    secrets = ("hunter2-secret", "hunter2-secret-and-its-tail", "xyz-hun")
    told = heard_by([spoken[at : at + size] for at in range(0, len(spoken), size)], *secrets)
    whole = "".join(text for _, text in told)
    assert "hunter2-secret" not in whole
    assert "/data/of/ours" not in whole
    assert whole == redacting(*secrets).for_tenant(TENANT, spoken)
    assert [offset for offset, _ in told] == list(accumulate((len(text) for _, text in told[:-1]), initial=0))


def test_without_holding_back_the_pieces_would_tell_it() -> None:
    """The control: each piece by itself holds no secret."""
    known = KnownTexts()
    known.add(TENANT, "hunter2-secret")
    redact = Redactor([], of_tenant=known.redact)  # which does not know how secrets begin
    told: list[str] = []
    deltas = Deltas(lambda _offset, text: told.append(text), redact, TENANT)
    for each in ("hunter2", "-secret"):
        deltas.say(each)
    assert "".join(told) == "hunter2-secret"


def test_what_is_no_beginning_of_a_secret_is_told_at_once() -> None:
    assert heard_by(["The answer", " is h"], "hunter2-secret") == [(0, "The answer"), (10, " is "), (14, "h")]


def test_a_text_that_looks_like_a_secret_for_ever_is_muted() -> None:
    told = heard_by(["a" * 50_000] * 6, "a" * 7_000)
    assert sum(len(text) for _, text in told) < 10_000


# Runs


@pytest.fixture(scope="module")
async def ground(
    raw: RawModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    folder = tmp_path_factory.mktemp("streaming")
    async with running_service(databases, folder, model=raw.endpoint, model_retries=1, model_timeout_s=1) as service:
        yield service


@pytest.fixture(scope="module")
async def tenant(ground: Service) -> Tenant:
    return await ground.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "a note"})


def streaming(events: list[bytes]) -> bytes:
    return response(b"".join(events), kind="text/event-stream")


async def followed(tenant: Tenant, query: str = "Are you there?") -> list[dict[str, Any]]:
    """The events of a query, as they were streamed."""
    async with tenant.user.stream("POST", "/query", json={"query": query}, headers=STREAM) as answer:
        assert answer.status_code == 200, await answer.aread()
        return [json.loads(line.removeprefix("data: ")) async for line in answer.aiter_lines() if line[:5] == "data:"]


def text_of(events: list[dict[str, Any]]) -> str:
    """What a client has put together: a delta at offset 0 begins the turn anew."""
    turns: dict[int, str] = {}
    for event in events:
        if event["type"] == "message.delta":
            turn, offset = event["data"]["turn"], event["data"]["offset"]
            assert offset <= len(turns.get(turn, ""))
            turns[turn] = turns.get(turn, "")[:offset] + (event["text"] or "")
    return turns[max(turns)] if turns else ""


async def test_a_streamed_run_tells_all_that_happens_in_order(raw: RawModel, tenant: Tenant) -> None:
    raw.script = [streaming(called('{"path": ', '"note.md"}')), streaming(said("It says: ", "a note"))]
    events = await followed(tenant)
    kinds = [event["type"] for event in events if event["type"] != "message.delta"]
    assert kinds == [
        *("run.started", "usage", "tool.requested", "tool.decided", "tool.finished", "usage", "run.finished"),
    ]
    assert [event["sequence"] for event in events] == list(range(1, len(events) + 1))
    assert text_of(events) == "It says: a note"
    run = (await tenant.user.get(f"/v1/runs/{events[0]['run_id']}")).json()
    assert (run["status"], run["answer"]) == ("succeeded", "It says: a note")
    assert run["usage"] == {"input_tokens": 6, "output_tokens": 4}


async def test_an_endpoint_that_does_not_stream_works(raw: RawModel, tenant: Tenant) -> None:
    raw.script = [response(completion("at one go"))]
    events = await followed(tenant)
    assert text_of(events) == "at one go"
    assert events[-1]["data"]["status"] == "succeeded"


async def test_a_turn_that_is_tried_again_begins_again(raw: RawModel, tenant: Tenant) -> None:
    raw.script = [streaming(said("first ", "half")[:2]), streaming(said("second"))]
    events = await followed(tenant)
    assert text_of(events) == "second"
    assert events[-1]["data"]["status"] == "succeeded"


@pytest.mark.parametrize(
    "answered",
    [
        pytest.param([streaming([b'data: {"error": {"message": "own words"}}\n\n'])], id="an error in the stream"),
        pytest.param([streaming(said("x")[:2])] * 2, id="broken off twice"),
        pytest.param([response(b"busy", status="500 x")] * 2, id="a status"),
        pytest.param([5.0, 5.0], id="silence"),
        pytest.param([response(b"{", kind="application/json")], id="no stream and no JSON"),
        pytest.param([streaming(said())], id="an empty answer"),
    ],
)
async def test_a_stream_that_fails_ends_the_run_as_an_answer_would(
    raw: RawModel, tenant: Tenant, answered: list[bytes | float]
) -> None:
    raw.script = list(answered)
    events = await followed(tenant)
    assert events[-1]["type"] == "run.finished"
    assert (events[-1]["data"]["status"], events[-1]["data"]["code"]) == ("failed", "model_failed")
    assert "own words" not in str(events)
    raw.script = []
    await assert_next_works(tenant)
