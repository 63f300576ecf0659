"""`bulkhead up` from its first start to its last process: nothing is lost that was answered, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import stat

import httpx
import psutil
import pytest

from tests.machine.machines import Machine, Up
from tests.service import DEFAULT_MODEL_POLICY
from tests.slow_model import slow_model

_NAMES = {
    "BULKHEAD_URL",
    "BULKHEAD_API_KEY",
    "BULKHEAD_ADMIN_KEY",
    "BULKHEAD_OTHER_API_KEY",
    "BULKHEAD_PLATFORM_KEY",
    "BULKHEAD_METRICS_TOKEN",
}


async def _put_and_ask(up: Up, name: str, text: str) -> dict[str, object]:
    async with up.caller("BULKHEAD_ADMIN_KEY") as admin, up.caller() as user:
        await admin.put_file(name, text)
        response = await user.ask(f"What does {name} say?")
        assert response.status_code == 200, response.text
        run: dict[str, object] = response.json()
    return run


async def test_a_first_start_answers_and_a_second_keeps_the_data(
    machine: Machine,
) -> None:
    first = machine.spawn("up")
    await first.ready()
    assert stat.S_IMODE((machine.directory / "demo.env").stat().st_mode) == 0o600
    assert machine.env.keys() >= _NAMES
    nonce = secrets.token_hex(16)
    run = await _put_and_ask(first, "fresh.md", f"The word is {nonce}.")
    assert nonce in str(run["answer"])
    # The control of every "nothing is left" here: the parts are found by the same search while they run.
    assert machine.names() >= {"postgres", "bwrap"}
    keys = machine.env
    assert await first.interrupt() == 0
    assert await machine.is_empty()
    assert first.troubles == []

    second = machine.spawn("up")
    await second.ready()
    assert {**machine.env, "BULKHEAD_URL": ""} == {**keys, "BULKHEAD_URL": ""}
    async with second.caller() as user:
        kept = (await user.get(f"/v1/runs/{run['run_id']}")).json()
        assert nonce in kept["answer"]
        assert nonce in (await user.ask("What does fresh.md say?")).json()["answer"]
    assert (await machine.run("down")).status == 0
    assert await second.ended() == 0
    assert await machine.is_empty()


@pytest.mark.long  # tests/faults kill processes of a service
async def test_a_run_that_dies_with_its_process_is_interrupted_at_the_next_start_and_its_events_are_there(
    machine: Machine,
) -> None:
    async with slow_model() as (model, endpoint):
        machine.settings = {
            "MODEL_BASE_URL": endpoint.base_url,
            "MODEL_API_KEY": endpoint.api_key,
            "MODEL_NAMES": "slow",
            "MODEL_LOOPBACK": "true",
            "POLICY_MAX_REQUESTS": "900000/minute",
            "POLICY_MAX_TENANT_REQUESTS": "900000/minute",
        }
        up = machine.spawn("up")
        await up.ready()
        async with up.caller("BULKHEAD_ADMIN_KEY") as admin, up.caller() as user:
            await admin.put_file("note.md", "a note")
            await admin.publish(DEFAULT_MODEL_POLICY.replace("default}", "default, name: slow}"))
            asking = asyncio.create_task(user.ask("hold"))
            async with asyncio.timeout(20):
                await model.turns["hold"].arrived.wait()
            tree = up.kill_tree()
            assert len(tree) > 5
            with pytest.raises(httpx.TransportError):
                await asking
        assert await machine.is_empty()
        assert not {process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}

        again = machine.spawn("up")
        await again.ready()
        async with again.caller("BULKHEAD_ADMIN_KEY") as admin:
            run = await _ended_run(admin)
            events = [event["type"] for event in await admin.events(run_id=run["run_id"])]
        assert (run["status"], run["code"]) == ("interrupted", "interrupted")
        assert events == [
            "query.received",
            "query.screened",
            "run.started",
            "tool.decided",
            "tool.finished",  # as unknown: its outcome waited for a commit that never came
            "run.finished",
        ]
        assert await again.interrupt() == 0
    assert await machine.is_empty()


async def _ended_run(admin: httpx.AsyncClient) -> dict[str, str]:
    async with asyncio.timeout(15):
        while True:
            run: dict[str, str] = (await admin.get("/v1/runs")).json()["items"][0]
            if run["status"] != "running":
                return run
            await asyncio.sleep(0.2)


@pytest.mark.long
async def test_what_outlives_a_kill_of_the_command_alone_is_taken_over_or_ended(machine: Machine) -> None:
    up = machine.spawn("up")
    await up.ready()
    nonce = secrets.token_hex(16)
    await _put_and_ask(up, "kept.md", nonce)
    up.process.kill()
    up.process.wait(10)
    assert machine.names() == {"postgres"}  # and no sandbox

    again = machine.spawn("up")
    await again.ready()
    async with again.caller() as user:
        assert nonce in (await user.ask("What does kept.md say?")).json()["answer"]
    again.process.kill()
    again.process.wait(10)
    assert (await machine.run("down")).output == "Stopped; the data stays.\n"
    assert await machine.is_empty()


async def test_ctrl_c_at_any_moment_of_a_start_ends_it_cleanly_and_the_next_start_works(machine: Machine) -> None:
    postgres = machine.directory / "postgres"
    moments = [
        machine.directory / "up.lock",
        postgres / "secret",
        postgres / "data" / "postmaster.pid",
        machine.directory / "workspaces",
    ]
    for moment in moments:
        up = machine.spawn("up")
        await up.says("Bulkhead starts")
        await up.until(moment.exists)
        os.killpg(up.process.pid, signal.SIGINT)
        await asyncio.sleep(0.1)
        if up.process.poll() is None:  # the impatient press it again
            os.killpg(up.process.pid, signal.SIGINT)
        assert (await up.ended(), up.complaint) == (0, ""), moment
        assert await machine.is_empty()
    last = machine.spawn("up")
    await last.ready()
    assert await last.interrupt(signal.SIGHUP) == 0
    assert await machine.is_empty()
