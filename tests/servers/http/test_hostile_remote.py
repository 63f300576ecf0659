"""A remote server that means ill: each answer costs one call, nothing else is reached, and the bridge goes on."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from app.outbound.grants import Reverse
from app.servers.errors import ServerFailed
from app.servers.live import LiveServer
from tests.egress.stage import command
from tests.servers.hostile import settled
from tests.servers.http.lab import SECRET, Lab, declared, text_of
from tests.servers.http.villain import SAID, TOOL, Villain, serving_villain
from tests.servers.site import DOCS, Trust


@pytest.fixture(scope="module")
async def trap(trust: Trust) -> AsyncIterator[Villain]:
    """Where nobody may come."""
    async with serving_villain(trust.server) as villain:
        yield villain


@pytest.fixture(scope="module")
async def villain(trust: Trust, trap: Villain) -> AsyncIterator[Villain]:
    async with serving_villain(trust.server) as villain:
        villain.trap = trap.port
        yield villain


@pytest.fixture(scope="module")
async def shared(lab: Lab, villain: Villain) -> AsyncIterator[LiveServer]:
    """One bridge for all that it must outlive."""
    server = declared(villain.port, timeout_s=3, headers={"Authorization": "secret:remote"})
    async with lab.started(server, {"remote": SECRET}) as live:
        yield live


@pytest.fixture
def live(shared: LiveServer, villain: Villain) -> LiveServer:
    villain.requests.clear()
    return shared


async def act(live: LiveServer, what: str) -> tuple[bool, str]:
    result = await live.call("act", {"what": what}, timeout_s=10)
    return not result.isError, text_of(result)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("redirect", "307: redirects are not followed"),
        ("redirect_path", "307: redirects are not followed"),
        ("unauthorized", "401: it does not take the headers of the policy"),
        ("html", "neither JSON nor a stream"),
        ("accepted", "no JSON"),
        ("broken_500", "answers 500"),
        ("relay", "answers 503"),
        ("gzip", "compressed, unasked"),
        ("other_id", "answers another request"),
        ("true_id", "answers another request"),
        ("request", "answers another request"),
        ("junk", "no JSON"),
        ("utf16", "no JSON"),
        ("not_a_number", "no JSON"),
        ("surrogate", "no JSON"),
        ("deep", "no JSON"),
        ("batch", "no message"),
        ("wide", "more than 6000 values"),
        ("long", "more than 2097152 bytes"),
        ("null", "neither a result nor an error"),
        ("asks_much", "asks too much back"),
        ("ends", "ends without an answer"),
        ("silent", "does not answer in time"),
        ("slow_head", "does not answer in time"),
        ("slow_body", "does not answer in time"),
        ("endless_json", "more than 2097152 bytes"),
        ("endless_events", "more than 2097152 bytes"),
    ],
)
async def test_a_bad_answer_costs_one_call(
    live: LiveServer, villain: Villain, trap: Villain, what: str, reason: str
) -> None:
    is_good, text = await act(live, what)
    assert not is_good
    assert reason in text
    assert SAID not in text
    assert villain.sent < 16 << 20  # what lies in the buffers of two connections comes on top
    assert await act(live, "good") == (True, "done")
    assert trap.requests == []
    assert set(villain.lines) == {"POST /mcp HTTP/1.1"}


@pytest.mark.parametrize("what", ["closed", "refused"])
async def test_an_error_of_the_remote_server_means_nothing_but_that(live: LiveServer, what: str) -> None:
    """Its codes are not those by which the bridge says that it has gone, or why it may not serve."""
    assert await act(live, what) == (False, SAID)
    assert live.is_healthy


@pytest.mark.parametrize("what", ["asks", "others_first", "changed"])
async def test_of_a_stream_only_the_answer_counts(live: LiveServer, what: str) -> None:
    assert await act(live, what) == (True, "done")


async def test_what_is_asked_back_is_told_that_nobody_serves_it(live: LiveServer, villain: Villain) -> None:
    await act(live, "asks")
    _, (line, _, body) = villain.requests
    assert line == "POST /mcp HTTP/1.1"
    assert body == b'{"jsonrpc":"2.0","id":"s1","error":{"code":-32601,"message":"not served here"}}'


async def test_no_cookie_and_no_session_comes_from_a_call_to_the_next(live: LiveServer, villain: Villain) -> None:
    await act(live, "cookie")
    await act(live, "good")
    _, (_, head, _) = villain.requests
    assert b"cookie" not in head.lower()
    assert b"stolen" not in head


async def test_a_list_of_tools_that_has_changed_is_asked_for_again(lab: Lab, trust: Trust) -> None:
    async with serving_villain(trust.server) as villain, lab.started(declared(villain.port)) as live:
        assert await live.listed_anew(max_age_s=60) is None
        villain.tools = [TOOL | {"description": "Something else."}]
        await act(live, "changed")
        tools = await live.listed_anew(max_age_s=60)
    assert tools is not None
    assert tools[0].description == "Something else."


async def test_a_session_that_is_lost_is_begun_anew_and_no_call_is_made_twice(lab: Lab, trust: Trust) -> None:
    async with serving_villain(trust.server) as villain:
        villain.session = "one"
        async with lab.started(declared(villain.port)) as live:
            assert await act(live, "good") == (True, "done")
            villain.session = "two"
            is_good, text = await act(live, "good")
            assert (is_good, "ask again" in text) == (False, True)
            assert await act(live, "good") == (True, "done")
            assert live.is_healthy
    made = [body for _, _, body in villain.requests if b"tools/call" in body]
    assert len(made) == 3


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        ("unauthorized", "answers 401"),
        ("redirect", "redirects are not followed"),
        ("html", "neither JSON nor a stream"),
        ("refused", "answers with an error"),
        ("other_id", "answers another request"),
        ("good_but_odd", "names a session that is no id"),
    ],
)
async def test_why_it_does_not_start_is_told_in_words_of_ours(
    lab: Lab, trust: Trust, trap: Villain, greeting: str, reason: str
) -> None:
    async with serving_villain(trust.server) as villain:
        villain.trap, villain.greeting = trap.port, greeting
        if greeting == "good_but_odd":
            villain.greeting, villain.session = "good", "a b"
        server = declared(villain.port, headers={"Authorization": "secret:remote"})
        with pytest.raises(ServerFailed) as failed:
            async with lab.started(server, {"remote": SECRET}):
                pass
    assert reason in failed.value.detail.lower() or reason in failed.value.detail
    assert SAID not in failed.value.detail
    assert SECRET not in failed.value.detail
    assert trap.requests == []


# Controls: with one enforcement off, or both of two, the attack succeeds


async def test_another_path_takes_a_bridge_that_follows_and_a_door_without_its_bound(
    lab: Lab, villain: Villain
) -> None:
    """Two walls: each alone keeps the secret from `/admin`."""
    server, texts = declared(villain.port, headers={"Authorization": "secret:remote"}), {"remote": SECRET}
    following = lab.weakened("follow_redirects=False", "follow_redirects=True")
    reached = []
    for script, any_path in ((None, True), (following, False), (following, True)):
        villain.requests.clear()
        async with lab.started(server, texts, script=script, any_path=any_path) as live:
            await act(live, "redirect_path")
        reached.append("POST /admin HTTP/1.1" in villain.lines)
        refused = {asked.refused for asked in lab.asked if asked.refused}
        assert refused == ({"other_path"} if script and not any_path else set())
    assert reached == [False, False, True]


async def test_a_bridge_that_takes_any_answer_takes_another_calls(lab: Lab, villain: Villain) -> None:
    careless = lab.weakened(
        'if message.get("id") != number or type(message["id"]) is not type(number) or "method" in message:', "if False:"
    )
    async with lab.started(declared(villain.port), script=careless) as live:
        assert await act(live, "other_id") == (True, SAID)


async def test_a_bridge_without_a_bound_reads_on_and_on(lab: Lab, villain: Villain) -> None:
    greedy = lab.weakened("MOST_BYTES: Final = 2 << 20", "MOST_BYTES: Final = 1 << 40")
    async with lab.started(declared(villain.port, timeout_s=5), script=greedy) as live:
        assert "bytes" not in (await act(live, "endless_json"))[1]
    assert villain.sent > 32 << 20


async def test_a_name_that_moves_between_two_calls_leads_nowhere_else(lab: Lab, trust: Trust, tmp_path: Path) -> None:
    """Each connection asks once and dials what it was told: a second answer that is not public is refused."""
    async with (
        serving_villain(trust.server) as villain,
        serving_villain(trust.server, "127.0.0.2", villain.port) as trap,
    ):
        answers = [["127.0.0.1"]] * 4 + [["127.0.0.2"]]
        for private, reaches in ((("127.0.0.1/32",), False), (("127.0.0.0/8",), True)):
            order = command({DOCS: answers}, tmp_path)
            async with type(lab.relay)(command=order, ca_file=trust.ca_file) as relay:
                moved = Lab(lab.sandbox, relay, tmp_path)
                async with moved.started(declared(villain.port), private=private) as live:
                    assert await act(live, "good") == (True, "done")
                    is_good, text = await act(live, "good")
                    assert is_good is reaches
                    assert ("not public" in text) is not reaches
            assert bool(trap.requests) is reaches
            assert [asked.refused for asked in moved.asked if asked.refused] == ([] if reaches else ["not_public"])


async def test_what_a_remote_server_echoes_holds_the_secret_and_stderr_does_not(live: LiveServer, lab: Lab) -> None:
    """It knows the secret, so it may say it: taking it out of results is the gate's work, not the bridge's."""
    assert SECRET in (await act(live, "echo"))[1]
    path = lab.folder / "bridge.stderr"
    lines = await settled(lambda: path.read_text().splitlines())
    assert lines
    assert SECRET not in "\n".join(lines)


def test_no_repr_shows_a_header() -> None:
    assert SECRET not in repr(Reverse(DOCS, 443, (("Authorization", SECRET),), path="/mcp"))
