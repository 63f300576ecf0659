from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import pytest

from app.embedded.postgres import EmbeddedPostgres
from app.sandbox.choice import choose
from app.servers.live import LiveServer
from tests.servers.postgres.ground import HOST, Database, Front, Ground, Weak, declared, make_trust, running

# A shop: what may be read, what is blocked, and what lies elsewhere. Every value of a blocked table begins with nonce-.
SHOP = """
create schema reporting;
create schema private;
create table public.orders (id int primary key, customer text not null, total numeric(10, 2), placed timestamptz);
comment on table public.orders is 'What was ordered.';
insert into public.orders
  select n, 'customer ' || n, n * 1.5, '2025-01-01T00:00:00Z'::timestamptz + n * interval '1 day'
  from generate_series(1, 500) n;
create table public.users (id int primary key, email text, secret text);
insert into public.users select n, 'nonce-' || n || '@site.test', 'nonce-secret-' || n from generate_series(1, 50) n;
create table reporting.totals as select customer, total from public.orders;
create table private.notes (text text);
insert into private.notes values ('nonce-note');
create table public.scrap (id int);
insert into public.scrap values (1);
create role mighty superuser login password 'mighty-password';
create role leaky login password 'leaky' in role pg_read_all_data;
analyze;
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    yield from running(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="session")
async def database(cluster: EmbeddedPostgres) -> AsyncIterator[Database]:
    async with Database(cluster, "postgres").connected() as admin:
        await admin.execute("create database shop")
    shop = Database(cluster, "shop")
    await shop.run(SHOP)
    await shop.fit("reader", declared())
    yield shop
    await shop.close()


@pytest.fixture(scope="session")
async def ground(database: Database, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    folder = tmp_path_factory.mktemp("reports")
    ca_file, tls = make_trust(folder, HOST)
    front = Front(str(database.cluster._reachable_sockets() / ".s.PGSQL.5432"), tls)
    async with front.serving():
        yield Ground(await choose("bubblewrap"), database, front.port, ca_file, folder, tls)


@pytest.fixture(scope="session")
async def live(ground: Ground) -> AsyncIterator[LiveServer]:
    """The server as it is, for the policy of the guide."""
    async with ground.started() as live:
        yield live


@pytest.fixture(scope="session")
async def weak(ground: Ground) -> AsyncIterator[Weak]:
    async with replace(ground, can_weaken=True).started() as live:
        yield Weak(live)
