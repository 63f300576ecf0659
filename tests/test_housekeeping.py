"""The regular work goes on whatever goes wrong in it, and where it does not, the service says so."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from structlog.testing import capture_logs

from app import housekeeping
from app.auth.keys import mint
from app.embedded.postgres import EmbeddedPostgres
from tests.service import Databases, Service, running_service

_COUNTS: Final = text("""
select type, actor_id, sum(cast(cast(body as jsonb)->'data'->>'count' as int)),
    bool_and(exists (select from audit_chain where event_id = audit_events.id))
from audit_events where type in ('auth.failed', 'auth.succeeded', 'error.raised') group by type, actor_id
""")


@pytest.fixture
async def kept(databases: Databases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr(housekeeping, "_EVERY_S", 0.02)
    async with running_service(databases, tmp_path) as service:
        yield service


async def ready(service: Service) -> tuple[int, Any]:
    answer = await service.platform.get("/readyz")
    return answer.status_code, answer.json()["background"]


async def test_a_chore_that_fails_stops_neither_the_others_nor_the_next_round(
    kept: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, done = kept.app.state, []

    def fail() -> None:
        done.append("evict")
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "a name of a process")

    async def flush() -> None:
        done.append("flush")
        raise LookupError

    with monkeypatch.context() as patch:
        patch.setattr(state.pool, "evict", fail)
        patch.setattr(state.authenticator, "flush_failures", flush)
        keeping = asyncio.create_task(
            housekeeping.keep_house(state.pool, state.authenticator, state.platform, state.outbox)
        )
        async with asyncio.timeout(5):
            while done.count("flush") < 5:  # noqa: ASYNC110  a loop tells nobody of its rounds
                await asyncio.sleep(0.01)
        assert done.count("evict") >= 5
        assert not keeping.done()
        keeping.cancel()
    assert await ready(kept) == (200, True)


@pytest.mark.parametrize("name", ["watch", "housekeeping"])
async def test_the_service_is_not_ready_once_one_of_its_loops_has_died(kept: Service, name: str) -> None:
    assert await ready(kept) == (200, True)
    dead = next(task for task in kept.app.state.background if task.get_name() == name)
    dead.cancel()
    await asyncio.wait({dead})
    assert await ready(kept) == (503, False)


async def test_what_is_counted_at_the_end_is_recorded_and_sealed(
    databases: Databases, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """The minute and the hour are not over, and no process knows their counts but the one that ends."""
    async with running_service(databases, tmp_path) as service:
        tenant = await service.new_tenant(policy=None)
        stranger = await service.client(mint().text)
        used = [(await tenant.user.get("/v1/me")).status_code for _ in range(7)]
        failed = [(await stranger.get("/v1/me")).status_code for _ in range(4)]
        assert (used, failed) == ([200] * 7, [401] * 4)
        await service.sql("alter table issuers rename to elsewhere")
        assert [(await tenant.admin.get("/v1/issuers")).status_code for _ in range(3)] == [503] * 3
        await service.sql("alter table elsewhere rename to issuers")
    engine = create_async_engine(postgres.url("postgres", make_url(service.urls.app).database or ""))
    async with engine.connect() as connection:
        told = (await connection.execute(_COUNTS)).all()
    await engine.dispose()
    counts: Counter[str] = Counter()
    for kind, actor_id, count, _ in told:
        counts[kind] += count if kind != "auth.succeeded" or str(actor_id) == tenant.user_id else 0
    assert counts == {"auth.succeeded": 7, "auth.failed": 4, "error.raised": 3}
    assert all(is_sealed for *_, is_sealed in told)


async def test_counts_that_the_database_does_not_take_at_the_end_are_told(kept: Service) -> None:
    tenant = await kept.new_tenant(policy=None)
    for _ in range(4):
        await tenant.user.get("/v1/me")
    authenticator = kept.app.state.authenticator
    await kept.sql("alter table audit_events rename to elsewhere")
    try:
        with capture_logs() as logged:
            await authenticator.finish()
    finally:
        await kept.sql("alter table elsewhere rename to audit_events")
    (told,) = [line for line in logged if line["event"] == "audit.counts_lost"]
    assert (told["log_level"], told["failures"], told["uses"] >= 3) == ("error", 0, True)
