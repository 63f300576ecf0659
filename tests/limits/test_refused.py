"""Floods past a rate: answered from memory, as they would be answered anyway, for a second at most."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from uuid import UUID

import httpx
import pytest
from prometheus_client import REGISTRY
from sqlalchemy import event
from starlette.requests import Request
from starlette.types import Receive, Scope, Send
from structlog.testing import capture_logs

from app.limits import rates
from app.limits import refused as module
from app.limits.refused import AFTER, FOR_S, LOOK_S, Refusals
from app.limits.windows import Standing, Verdict, bound
from app.problems import rate_limited
from tests.limits.test_rates import PASSED, QUICK, quick
from tests.service import Client, Service

COUNTED: Final = (
    ("bulkhead_limiter_decisions_total", {"limit": "user", "decision": "refused"}),
    ("mcp_security_violations_total", {"type": "rate_limit"}),
    ("mcp_requests_total", {"user": "all", "status": "rate_limited"}),
    ("http_requests_total", {"method": "POST", "handler": "/query", "status": "4xx"}),
)


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flood that a slow machine does not interrupt."""
    monkeypatch.setattr(module, "FOR_S", 600)
    monkeypatch.setattr(module, "_APART_S", 600)


def counts() -> list[float]:
    return [REGISTRY.get_sample_value(name, labels) or 0 for name, labels in COUNTED]


@contextmanager
def asked_of(database: Any) -> Iterator[list[str]]:
    """The looks at a credential: what the platform role reads of keys."""
    statements: list[str] = []
    drivers: set[Any] = set()

    def note(asked: Any) -> None:
        statements.extend([asked.query] if "from api_keys" in asked.query else [])

    def watch(connection: Any, *_rest: Any) -> None:
        """By the driver: SQLAlchemy sees none of them."""
        drivers.add(connection.driver_connection)
        connection.driver_connection.add_query_logger(note)

    engine = database._engine.sync_engine
    event.listen(engine, "checkout", watch)
    try:
        yield statements
    finally:
        event.remove(engine, "checkout", watch)
        for driver in drivers:
            driver.remove_query_logger(note)


async def refuse(user: Client, times: int) -> list[httpx.Response]:
    answers = [await user.ask("hello") for _ in range(times)]
    assert [answer.status_code for answer in answers] == [429] * times
    return answers


@pytest.mark.usefixtures("long")
async def test_a_flood_asks_no_database_and_is_counted_as_ever(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("1/hour"))
    assert (await tenant.user.ask("hello")).status_code == PASSED
    with asked_of(service.app.state.platform) as statements, capture_logs() as lines:
        before = counts()
        await refuse(tenant.user, AFTER)
        assert len(statements) == AFTER  # the control
        assert len([line for line in lines if line["event"] == "http.request"]) == AFTER
        assert [now - then for now, then in zip(counts(), before, strict=True)] == [AFTER] * len(COUNTED)
        statements.clear()
        lines.clear()
        before = counts()
        await refuse(tenant.user, 30)
        assert statements == []
        assert [line for line in lines if line["event"] in ("http.request", "security.violation")] == []
        assert [now - then for now, then in zip(counts(), before, strict=True)] == [30] * len(COUNTED)
    refusals = [found for found in await tenant.admin.events() if found["type"] == "rate_limit.exceeded"]
    assert 1 <= len(refusals) <= 2  # two where the minute changed in between


@pytest.mark.usefixtures("long")
async def test_it_is_the_answer_that_would_be_given_anyway(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("1/hour"))
    await tenant.user.ask("hello")
    *_, looked_up, remembered = await refuse(tenant.user, AFTER + 1)
    assert remembered.headers.keys() == looked_up.headers.keys()
    moving = {"date", "x-request-id", "retry-after", "ratelimit-reset", "x-ratelimit-reset"}
    for name in remembered.headers.keys() - moving:
        assert remembered.headers[name] == looked_up.headers[name], name
    reset_s = int(remembered.headers["retry-after"])
    assert 1 <= reset_s <= int(looked_up.headers["retry-after"]) <= 3600
    assert remembered.headers["ratelimit-reset"] == str(reset_s)
    assert abs(int(remembered.headers["x-ratelimit-reset"]) - time.time() - reset_s) <= 30
    ids = [answer.json()["request_id"] for answer in (looked_up, remembered)]
    assert ids == [answer.headers["x-request-id"] for answer in (looked_up, remembered)]
    assert len({str(UUID(each)) for each in ids}) == 2
    assert remembered.json() == looked_up.json() | {"request_id": ids[1]}


@pytest.mark.usefixtures("long")
async def test_nobody_else_is_refused_and_nothing_else(service: Service) -> None:
    tenant, other = [await service.new_tenant(policy=quick("1/hour")) for _ in range(2)]
    colleague, _, _ = await service.new_user(tenant.id)
    await tenant.user.ask("hello")
    await refuse(tenant.user, AFTER + 5)
    assert (await colleague.ask("hello")).status_code == PASSED
    assert (await other.user.ask("hello")).status_code == PASSED
    assert (await tenant.user.get("/v1/me")).status_code == 200


@pytest.mark.usefixtures("long")
async def test_other_requests_are_refused_from_memory_too(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    tenant = await service.new_tenant(policy=QUICK)
    monkeypatch.setattr(service.app.state.admission, "_api_rate", "2/hour")
    statuses = [(await tenant.user.get("/v1/me")).status_code for _ in range(2 + AFTER)]
    assert statuses == [200] * 2 + [429] * AFTER
    with asked_of(service.app.state.platform) as statements:
        answers = [await tenant.user.get(path) for path in ("/v1/me", "/v1/runs", "/v1/me")]
        assert [answer.status_code for answer in answers] == [429] * 3
        assert statements == []
        assert (await tenant.user.ask("hello")).status_code == PASSED
        assert len(statements) == 1  # the control
        assert (await tenant.user.get("/healthz")).status_code == 200
        assert (await tenant.user.get("/openapi.json")).status_code == 200


async def test_another_policy_and_a_revoked_key_are_seen_after_a_moment(service: Service) -> None:
    tenant = await service.new_tenant(policy=quick("1/hour"))
    await tenant.user.ask("hello")
    await refuse(tenant.user, AFTER + 1)
    await tenant.admin.publish(quick("2/hour"))
    assert await status_after_refusals(tenant.user) == PASSED
    await refuse(tenant.user, AFTER + 1)
    assert (await tenant.admin.delete(f"/v1/keys/{tenant.user_key_id}")).is_success
    assert await status_after_refusals(tenant.user) == 401


async def status_after_refusals(user: Client) -> int:
    for _ in range(200):
        if (status := (await user.ask("hello")).status_code) != 429:
            return status
        await asyncio.sleep(0.1)
    return 429


class Inner:
    """What lies behind the memory: it refuses whoever comes while it is full, and counts them."""

    def __init__(self, *, rate: str = "5/minute", reset_s: float = 60, state: dict[str, str] | None = None) -> None:
        self.asked = 0
        self.is_full = True
        limit = bound("user", "tenant/user", rate)
        standing = Standing(limit, limit.amount, reset_s)
        self.verdict = Verdict(is_allowed=False, standings=(standing,))
        self._state = {"user_id": "user"} if state is None else state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        scope["state"] |= self._state
        if self.is_full:
            await rate_limited(Request(scope), rates.exceeded(self.verdict))(scope, receive, send)


class Ground:
    """The memory over it, with a clock of the test's own."""

    def __init__(self, inner: Inner) -> None:
        self.now = 1000.0
        self.inner = inner
        self.refusals = Refusals(inner, clock=lambda: self.now)

    async def ask(self, authorization: str = "Bearer key", *, path: str = "/query", times: int = 1) -> int:
        """How many of these came through; nobody's body is read."""
        before = self.inner.asked
        for _ in range(times):
            head = [(b"authorization", authorization.encode())]
            scope = {"type": "http", "method": "POST", "path": path, "headers": head, "state": {}}
            await self.refusals(scope, _unread, self._sent)
        return self.inner.asked - before

    async def _sent(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            assert message["status"] == 429
            self.retry_after = int(re.findall(rb"\d+", dict(message["headers"])[b"retry-after"])[0])


async def _unread() -> Any:
    raise AssertionError("the body was read")


async def test_only_the_refusals_of_a_flood_are_remembered_and_for_a_second_at_most() -> None:
    ground = Ground(Inner())
    assert await ground.ask(times=AFTER + 5) == AFTER
    ground.now += FOR_S / 2 - 0.01
    assert await ground.ask() == 0
    assert ground.retry_after == 60  # what is left of it, rounded up
    ground.now += 0.01
    assert await ground.ask(times=5) == 1  # looked up once, and remembered again
    ground.now += FOR_S
    assert await ground.ask(times=5) == 1
    ground.now += 3
    assert await ground.ask(times=AFTER + 5) == AFTER  # it had stopped


async def test_who_asks_slowly_is_looked_at_each_time() -> None:
    ground = Ground(Inner())
    for _ in range(3 * AFTER):
        assert await ground.ask() == 1
        ground.now += 2


async def test_a_place_that_becomes_free_may_be_taken_at_once() -> None:
    ground = Ground(Inner(reset_s=0.2))
    assert await ground.ask(times=AFTER + 5) == AFTER
    ground.now += 0.21
    assert await ground.ask() == 1


@pytest.mark.parametrize(("rate", "at_once"), [("5/minute", 1), ("600/minute", 1), ("100/second", 10)])
async def test_when_it_is_over_a_few_at_a_time_are_looked_up(rate: str, at_once: int) -> None:
    inner = Inner(rate=rate)
    ground = Ground(inner)
    await ground.ask(times=AFTER)
    ground.now += FOR_S / 2
    inner.is_full = False  # places are free by now
    assert [await ground.ask(times=30), await ground.ask(times=30)] == [at_once, 0]
    ground.now += LOOK_S + 0.001
    assert await ground.ask(times=30) == at_once
    ground.now += FOR_S / 2
    assert await ground.ask(times=30) == 30  # a second after its last refusal it is as everybody


async def test_a_credential_is_the_same_however_it_is_spelt() -> None:
    ground = Ground(Inner())
    await ground.ask(times=AFTER)
    assert [await ground.ask(each) for each in ("bearer key", "BEARER   key ", "Bearer kex", "Basic key")] == [
        0,
        0,
        1,
        1,
    ]


async def test_what_an_address_is_refused_is_not_remembered_of_a_credential() -> None:
    ground = Ground(Inner(state={}))  # the credential was not accepted
    assert await ground.ask(times=3 * AFTER) == 3 * AFTER


async def test_the_memory_is_bounded_and_holds_no_credential(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    ground = Ground(Inner())
    for number in range(9):
        await ground.ask(f"Bearer secret-{number}", times=AFTER)
    assert len(ground.refusals._floods) == 3
    assert "secret" not in repr(ground.refusals._floods)
    assert await ground.ask("Bearer secret-8") == 0
    assert await ground.ask("Bearer secret-0") == 1


async def test_the_log_tells_of_those_that_had_no_line() -> None:
    ground = Ground(Inner())
    with capture_logs() as lines:
        await ground.ask(times=AFTER + 20)
        ground.now += FOR_S / 2
        await ground.ask(times=2)
        assert [(line["event"], line["refused"]) for line in lines] == [("limiter.flood", 20)]
