"""A service that is asked to end: it takes no more, and gives what is under way some time."""

from __future__ import annotations

import asyncio
from pathlib import Path

from app.serving import drain
from tests.service import DEFAULT_MODEL_POLICY, Databases, running_service
from tests.slow_model import slow_model

DRAIN_S = 2


async def test_what_ends_in_time_is_answered_and_the_rest_is_cancelled(databases: Databases, tmp_path: Path) -> None:
    async with (
        slow_model() as (model, endpoint),
        running_service(databases, tmp_path, model=endpoint) as service,
    ):
        tenant = await service.new_tenant(policy=DEFAULT_MODEL_POLICY, files={"note.md": "hello"})
        asked = {query: asyncio.create_task(tenant.user.ask(query)) for query in ("in time", "too slow")}
        async with asyncio.timeout(20):
            await asyncio.gather(*(model.turns[query].arrived.wait() for query in asked))
        draining = asyncio.create_task(drain(service.app.state, DRAIN_S))
        await asyncio.sleep(0)
        refused = await tenant.user.ask("too late")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert (await service.platform.get("/readyz")).status_code == 503
        assert (await service.platform.get("/healthz")).is_success
        model.turns["in time"].released.set()
        assert (await asked["in time"]).json()["status"] == "succeeded"
        await draining
        cancelled = (await asked["too slow"]).json()
        assert (cancelled["status"], cancelled["code"]) == (409, "cancelled")
        run = (await tenant.user.get(f"/v1/runs/{cancelled['run_id']}")).json()
        assert (run["status"], run["cancel_cause"]) == ("cancelled", "shutdown")
