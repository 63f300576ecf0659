"""What once let an item pass while the thing itself was broken. The control is that nothing of it is found before."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import pytest
from pydantic import SecretStr

from app.checklist import running
from app.checklist.findings import Finding
from app.checklist.ground import CHECKOUT, Ground
from app.checklist.items import ITEMS
from app.embedded.postgres import EmbeddedPostgres
from tests.checklist.ground import At, ground_of
from tests.service import Service, Tenant

BY_ID: Final = {item.id: item for item in ITEMS}
# Every tenant's rows to every tenant, and none without one.
_TO_ANY_TENANT: Final = (
    "create policy deceived on users for select to bulkhead_app"
    " using (coalesce(current_setting('app.tenant_id', true), '') <> '')"
)


@pytest.fixture
async def at(
    service: Service, tenant: Tenant, postgres: EmbeddedPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[At]:
    async with AsyncExitStack() as stack, ground_of(service) as ground:
        yield At(ground, service, tenant, postgres, tmp_path, monkeypatch, stack)


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant()


async def found(item: str, ground: Ground) -> Finding:
    (finding,) = await running.run([BY_ID[item]], ground, within_s=60)
    return finding


async def _heir(at: At) -> Ground:
    await at.sql_until("create role deceived_heir bypassrls", undo="drop role deceived_heir")
    await at.sql_until("grant deceived_heir to bulkhead_app", undo="revoke deceived_heir from bulkhead_app")
    return at.ground


async def _files(at: At) -> Ground:
    grant = "pg_read_server_files {} bulkhead_sealer"
    await at.sql_until(f"grant {grant.format('to')}", undo=f"revoke {grant.format('from')}")
    return at.ground


async def _other_tenants(at: At) -> Ground:
    await at.sql_until(_TO_ANY_TENANT, undo="drop policy deceived on users")
    return at.ground


async def _too_many(at: At) -> Ground:
    return await at.answers(429, "{}")


async def _another_name(at: At) -> Ground:
    return await at.answers(400, "{}")


async def _proxy(at: At) -> Ground:
    return at.set(tls_in_front=True)


async def _owner_for_oneself(at: At) -> Ground:
    return at.set(database_owner_url=SecretStr("postgresql+asyncpg://owner:0123456789@db.example/bulkhead"))


async def _private_network(at: At) -> Ground:
    return at.set(trusted_proxies=(ip_network("10.0.0.0/8"),))


async def _sdk(at: At) -> Ground:
    """As in the image, which installs the lock of the clouds' SDKs."""
    folder = at.folder / "requirements"
    folder.mkdir()
    shutil.copy(CHECKOUT / "requirements" / "base.txt", folder)
    (folder / "cloud.txt").write_text("pytest==0.0.1 \\\n    --hash=sha256:00\n")
    return replace(at.ground, checkout=at.folder)


@pytest.mark.parametrize(
    ("item", "status", "words", "make"),
    [
        ("database-roles", "fail", "the role app has BYPASSRLS", _heir),
        ("database-roles", "fail", "the role sealer reaches the files or programs of the database's server", _files),
        ("row-security", "fail", "users shows rows of other tenants to a tenant", _other_tenants),
        ("trusted-hosts", "fail", "the service answered 429, and not because of the name", _too_many),
        ("docs-page", "fail", "the service answered 429", _too_many),
        ("docs-page", "fail", "the service answered 400", _another_name),
        ("docs-page", "warn", "is shown beyond this machine", _proxy),
        ("owner-apart", "warn", "BULKHEAD_DATABASE_OWNER_URL is set where this runs", _owner_for_oneself),
        ("openings", "warn", "all of 10.0.0.0/8 is believed as a proxy", _private_network),
        ("dependencies-pinned", "fail", "pytest is ", _sdk),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
async def test_what_is_broken_is_found(
    at: At, item: str, status: str, words: str, make: Callable[[At], Awaitable[Ground]]
) -> None:
    before: Any = await found(item, at.ground)
    assert before.status == "pass", before.detail
    after = await found(item, await make(at))
    assert (after.status, words in after.detail) == (status, True), after.detail


async def test_a_proxys_own_network_and_a_page_that_is_not_there_are_nothing_to_say(at: At) -> None:
    ground = at.set(trusted_proxies=(ip_network("10.1.0.0/16"), ip_network("fd00:1::/64")))
    assert (await found("openings", ground)).status == "pass"
    assert (await found("docs-page", await at.answers(404, "{}"))).status == "pass"


async def test_a_stranger_at_the_services_port_is_not_sent_the_token(at: At) -> None:
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 401 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(hear, "127.0.0.1", 0) as server:
        ground = replace(at.ground, url=f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        token = at.service.metrics_token.encode()
        for process in (None, os.getppid()):
            verdict = await found("metrics-token", replace(ground, process=process))
            assert (verdict.status, "it was not sent the token" in verdict.detail) == ("fail", True)
        assert len(heard) == 2
        assert not any(token in each for each in heard)
        verdict = await found("metrics-token", ground)
        assert "answered 401 without the token and 401 with it" in verdict.detail
        assert token in heard[-1], "the control: this process is the service's"
