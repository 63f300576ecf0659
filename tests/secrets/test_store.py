"""What a process holds of secrets: whose, for how long, and what ends it."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from app.keyring import new_entry
from app.secrets import sealing
from app.secrets import store as store_module
from app.secrets.contract import SecretUnavailable
from app.secrets.providers.reading import Outcome
from app.secrets.store import TenantSecrets
from tests.secrets.ground import Ground, NewStore, Scripted, resolve, write
from tests.service import Tenant
from tests.test_docs import event_fields

SHARED = {"provider": "environment", "variable": "BULKHEAD_SECRET_SHARED"}


async def until(holds: Callable[[], bool], *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, "it has not happened in time"
        await asyncio.sleep(0.02)


async def refusal(store: TenantSecrets, tenant: Tenant, name: str = "key") -> str:
    with pytest.raises(SecretUnavailable) as refused:
        await resolve(store, tenant, name)
    return refused.value.detail


async def as_owner(ground: Ground, tenant: Tenant, statement: str, **values: Any) -> None:
    """What only somebody with the database in hands can do."""
    engine = create_async_engine(ground.service.urls.owner or "")
    async with engine.begin() as connection:
        await connection.execute(text("select set_config('app.tenant_id', :id, true)"), {"id": tenant.id})
        await connection.execute(text(statement), values)
    await engine.dispose()


async def test_the_first_that_is_missing_is_named_and_nothing_else(ground: Ground) -> None:
    tenant = await ground.new_tenant()
    await write(tenant, "there", "some-text")
    with pytest.raises(SecretUnavailable) as refused:
        await resolve(ground.store, tenant, "there", "none", "nowhere")
    assert refused.value.detail == "There is no secret 'none'."
    assert (await resolve(ground.store, tenant)).texts == {}


async def test_two_tenants_with_one_name_share_no_text(ground: Ground) -> None:
    first, second = await ground.new_tenant(), await ground.new_tenant()
    await write(first, "key", "text-of-the-first")
    assert (await resolve(ground.store, first, "key")).texts["key"] == "text-of-the-first"
    assert "no secret" in await refusal(ground.store, second)
    assert ground.store.redact(UUID(first.id), "a text-of-the-first") == "a [redacted]"
    assert ground.store.redact(UUID(second.id), "a text-of-the-first") == "a text-of-the-first"


# Rotation


@pytest.mark.parametrize("change", ["write", "delete", "rebind"])
async def test_a_change_ends_what_was_started_with_the_old_text_within_a_second(ground: Ground, change: str) -> None:
    tenant = await ground.new_tenant()
    if change == "rebind":
        await ground.bind(tenant, "key", **SHARED)
    else:
        await write(tenant, "key", "first-text")
    before = await resolve(ground.store, tenant, "key")
    await asyncio.sleep(0.7)
    assert before.is_current(), "the control: without a change it goes on"
    if change == "write":
        await write(tenant, "key", "second-text")
    elif change == "delete":
        await tenant.admin.delete("/v1/secrets/key")
    else:
        await ground.bind(tenant, "key", **SHARED)
    await until(lambda: not before.is_current(), within_s=1)
    if change == "write":
        now = await resolve(ground.store, tenant, "key")
        assert (now.texts["key"], now.is_current()) == ("second-text", True)
    elif change == "delete":
        assert "no secret" in await refusal(ground.store, tenant)


async def test_who_asks_just_after_a_change_is_given_the_new_text(ground: Ground, new_store: NewStore) -> None:
    store, tenant = new_store(), await ground.new_tenant()  # nobody tells this store of changes
    await write(tenant, "key", "first-text")
    assert (await resolve(store, tenant, "key")).texts["key"] == "first-text"
    await write(tenant, "key", "second-text")
    assert (await resolve(store, tenant, "key")).texts["key"] == "second-text"


async def test_an_admin_who_changes_a_secret_ends_the_servers_that_nobody_uses(ground: Ground) -> None:
    tenant = await ground.new_tenant()
    generation = "select generation from tenants where id = :id"
    ((before,),) = await ground.service.sql(generation, role="platform", id=tenant.id)
    await write(tenant, "key", "first-text")
    ((after,),) = await ground.service.sql(generation, role="platform", id=tenant.id)
    assert after > before


# Providers that change, fail, and come back


async def bound(ground: Ground, new_store: NewStore, *, ttl_s: float) -> tuple[Tenant, TenantSecrets, Scripted]:
    tenant, provider = await ground.new_tenant(), Scripted()
    await ground.bind(tenant, "key", **SHARED)
    return tenant, new_store(ttl_s=ttl_s, providers={"environment": provider}), provider


async def keeping(store: TenantSecrets, act: Callable[[], Any]) -> None:
    task = asyncio.create_task(store.keep())
    try:
        await act()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_text_that_stays_the_same_is_read_again_and_goes_on(ground: Ground, new_store: NewStore) -> None:
    tenant, store, provider = await bound(ground, new_store, ttl_s=0.4)
    held = await resolve(store, tenant, "key")

    async def act() -> None:
        for _ in range(20):
            assert held.is_current()
            await asyncio.sleep(0.1)

    await keeping(store, act)
    assert provider.asked >= 3


async def test_a_text_that_a_provider_rotates_ends_the_old_one(ground: Ground, new_store: NewStore) -> None:
    tenant, store, provider = await bound(ground, new_store, ttl_s=0.4)
    held = await resolve(store, tenant, "key")
    provider.text = "second-text"

    async def act() -> None:
        await until(lambda: not held.is_current(), within_s=3)

    await keeping(store, act)
    assert (await resolve(store, tenant, "key")).texts["key"] == "second-text"
    assert store.redact(UUID(tenant.id), "first-text second-text") == "[redacted] [redacted]"


async def test_while_a_provider_does_not_answer_the_old_text_goes_on_for_as_long_again_and_no_longer(
    ground: Ground, new_store: NewStore
) -> None:
    tenant, store, provider = await bound(ground, new_store, ttl_s=0.5)
    held, begun = await resolve(store, tenant, "key"), time.monotonic()
    provider.text = Outcome.UNAVAILABLE
    await asyncio.sleep(0.6)
    assert (await resolve(store, tenant, "key")).texts["key"] == "first-text"
    await until(lambda: not held.is_current(), within_s=1)
    assert time.monotonic() - begun >= 1
    assert "does not answer" in await refusal(store, tenant)


@pytest.mark.parametrize("outcome", [Outcome.DENIED, Outcome.MISSING, Outcome.UNUSABLE])
async def test_where_a_provider_says_no_the_old_text_ends_at_once(
    ground: Ground, new_store: NewStore, outcome: Outcome
) -> None:
    tenant, store, provider = await bound(ground, new_store, ttl_s=0.3)
    held = await resolve(store, tenant, "key")
    provider.text = outcome
    await asyncio.sleep(0.35)
    detail = await refusal(store, tenant)
    assert not held.is_current()
    assert "BULKHEAD_SECRET_SHARED" not in detail


async def test_many_who_ask_at_once_are_one_question_and_a_failure_is_not_asked_for_again_and_again(
    ground: Ground, new_store: NewStore
) -> None:
    tenant, store, provider = await bound(ground, new_store, ttl_s=300)
    provider.text = Outcome.UNAVAILABLE
    for _ in range(2):
        await asyncio.gather(*(refusal(store, tenant) for _ in range(20)))
    assert provider.asked == 1
    await ground.bind(tenant, "key", **SHARED)
    provider.text = "first-text"
    found = await asyncio.gather(*(resolve(store, tenant, "key") for _ in range(20)))
    assert {secret.texts["key"] for secret in found} == {"first-text"}
    assert provider.asked == 2


async def test_who_gives_up_waiting_ends_nobody_elses_question(ground: Ground, new_store: NewStore) -> None:
    tenant, store, _ = await bound(ground, new_store, ttl_s=300)
    first = asyncio.create_task(resolve(store, tenant, "key"))
    second = asyncio.create_task(resolve(store, tenant, "key"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).texts["key"] == "first-text"


async def test_a_provider_that_hangs_is_given_up(
    ground: Ground, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_READ_S", 0.2)

    class Hanging:
        async def read(self, _locator: object) -> str:
            await asyncio.sleep(60)
            return ""

    tenant = await ground.new_tenant()
    await ground.bind(tenant, "key", **SHARED)
    assert "does not answer" in await refusal(new_store(providers={"environment": Hanging()}), tenant)


@pytest.mark.parametrize("odd", ["", "a\0bcdefg", "\ud800bcdefg", "x" * 8193], ids=["empty", "nul", "half", "long"])
async def test_what_a_provider_gives_is_a_bounded_text(ground: Ground, new_store: NewStore, odd: str) -> None:
    tenant, store, provider = await bound(ground, new_store, ttl_s=300)
    provider.text = odd
    assert "cannot be used" in await refusal(store, tenant)


async def test_a_provider_that_is_not_there_is_told_as_such(ground: Ground, new_store: NewStore) -> None:
    tenant, store = await ground.new_tenant(), new_store()
    await ground.bind(tenant, "key", **SHARED)
    assert "not set up" in await refusal(store, tenant)


# The record


async def test_each_reading_is_on_the_record_without_text_or_locator(ground: Ground, new_store: NewStore) -> None:
    tenant, store, provider = await bound(ground, new_store, ttl_s=300)
    value = provider.text = f"v{secrets.token_hex(12)}"
    for _ in range(3):
        await resolve(store, tenant, "key")
    provider.text = Outcome.DENIED
    await ground.bind(tenant, "key", **SHARED)
    await refusal(store, tenant)
    events = [event for event in await tenant.admin.events() if event["type"] == "secret.accessed"]
    expected = {"name": "key", "provider": "environment"}
    assert [event["data"] for event in events] == [
        expected | {"version": 1, "outcome": "read"},
        expected | {"version": 2, "outcome": "denied"},
    ]
    assert all(set(event["data"]) == event_fields()["secret.accessed"] for event in events)
    assert value not in str(await tenant.admin.events())


@asynccontextmanager
async def unrecorded(ground: Ground, tenant: Tenant) -> AsyncIterator[None]:
    """Inside the block no event can be written."""
    revoke = f"revoke insert on audit_events from {ground.service.urls.app_role}"
    await as_owner(ground, tenant, revoke)
    try:
        yield
    finally:
        await as_owner(ground, tenant, revoke.replace("revoke", "grant").replace(" from ", " to "))


async def test_what_cannot_be_recorded_is_not_given(ground: Ground, new_store: NewStore) -> None:
    tenant, store = await ground.new_tenant(), new_store()
    await write(tenant, "key", "some-text")
    async with unrecorded(ground, tenant):
        with pytest.raises(DBAPIError, match="permission denied"):
            await resolve(store, tenant, "key")
    assert (await resolve(store, tenant, "key")).texts["key"] == "some-text"


async def test_a_provider_is_not_asked_again_and_again_for_what_cannot_be_recorded(
    ground: Ground, new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = Scripted("some-text")
    tenant, store = await ground.new_tenant(), new_store(providers={"environment": provider})
    await ground.bind(tenant, "key", **SHARED)
    async with unrecorded(ground, tenant):
        for refused in (DBAPIError, SecretUnavailable, SecretUnavailable):
            with pytest.raises(refused):
                await resolve(store, tenant, "key")
    assert provider.asked == 1
    monkeypatch.setattr(store_module, "_RETRY_S", 0)  # the control: ten seconds later
    assert (await resolve(store, tenant, "key")).texts["key"] == "some-text"
    assert provider.asked == 2


# The seal


@pytest.mark.parametrize("is_bound", [True, False], ids=["attack", "control"])
async def test_a_seal_that_was_put_into_another_row_does_not_open(
    ground: Ground, new_store: NewStore, monkeypatch: pytest.MonkeyPatch, *, is_bound: bool
) -> None:
    """The control: were the seals not bound to their places, the other's text would come out."""
    if not is_bound:
        monkeypatch.setattr(sealing, "_place", lambda *_place: b"anywhere")
    tenant, store = await ground.new_tenant(), new_store()
    await write(tenant, "key", "text-of-the-key")
    await write(tenant, "other", "text-of-the-other")
    swap = "update secrets s set sealed = o.sealed from secrets o where s.name = 'key' and o.name = 'other'"
    await as_owner(ground, tenant, swap)
    if is_bound:
        assert "cannot be used" in await refusal(store, tenant)
    else:
        assert (await resolve(store, tenant, "key")).texts["key"] == "text-of-the-other"


async def test_an_old_seal_does_not_open_as_a_newer_version(ground: Ground, new_store: NewStore) -> None:
    tenant, store = await ground.new_tenant(), new_store()
    await write(tenant, "key", "first-text")
    await as_owner(ground, tenant, "create table kept as select sealed from secrets where name = 'key'")
    await write(tenant, "key", "second-text")
    await as_owner(ground, tenant, "update secrets set sealed = (select sealed from kept) where name = 'key'")
    await as_owner(ground, tenant, "drop table kept")
    assert "cannot be used" in await refusal(store, tenant)


async def test_a_root_key_may_be_rotated_and_an_unknown_one_opens_nothing(ground: Ground, new_store: NewStore) -> None:
    tenant = await ground.new_tenant()
    await write(tenant, "key", "some-text")
    own = ground.service.app.state.settings.root_keys.get_secret_value()
    both = new_store(root_keys=f"{new_entry('k2')},{own}")
    assert (await resolve(both, tenant, "key")).texts["key"] == "some-text"
    assert "cannot be used" in await refusal(new_store(root_keys=new_entry("k2")), tenant)


async def test_what_a_library_raises_is_told_to_nobody(
    ground: Ground, new_store: NewStore, capfd: pytest.CaptureFixture[str]
) -> None:
    value = f"v{secrets.token_hex(12)}"

    class Odd:
        async def read(self, _locator: object) -> str:
            raise LookupError(value)

    tenant = await ground.new_tenant()
    await ground.bind(tenant, "key", **SHARED)
    detail = await refusal(new_store(providers={"environment": Odd()}), tenant)
    said = [detail, *capfd.readouterr(), str(await tenant.admin.events())]
    assert "LookupError" in said[1] + said[2], "the log has its kind"
    assert [place for place in said if value in place or "BULKHEAD_SECRET_SHARED" in place] == []
