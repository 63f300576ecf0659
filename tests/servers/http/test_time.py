"""A call has the seconds that the policy says, whatever the remote server does."""

from __future__ import annotations

import time

import pytest

from app.servers.errors import ToolTimedOut
from tests.servers.http.lab import Lab, declared, text_of
from tests.servers.http.villain import serving_villain
from tests.servers.site import Trust


async def test_a_call_ends_after_the_seconds_of_the_policy(lab: Lab, trust: Trust) -> None:
    async with serving_villain(trust.server) as villain:
        server = declared(villain.port, timeout_s=1)
        async with lab.started(server) as live:
            began = time.monotonic()
            assert "does not answer in time" in text_of(await live.call("act", {"what": "slow_body"}, timeout_s=10))
            assert 1 <= time.monotonic() - began < 8
        bound = "asyncio.timeout(min(seconds or self._timeout_s, self._timeout_s))"
        async with lab.started(server, script=lab.weakened(bound, "asyncio.timeout(None)")) as patient:
            with pytest.raises(ToolTimedOut):
                await patient.call("act", {"what": "slow_body"}, timeout_s=3)
