"""Rolling upgrades: this code serves on a schema that has been expanded, and refuses one that has been contracted."""

from __future__ import annotations

import ast
import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app import migration
from app.db import DatabaseUrls
from app.errors import ConfigurationError
from tests.runs.faults import ended_run
from tests.service import Databases, Service, running_service

MIGRATIONS: Final = Path(__file__).resolve().parents[1] / "migrations"
FIRST: Final = "0015"
HEAD: Final = str(migration.head())
# What a later release may add, so that old code goes on: nothing that the old code must know, write or leave alone.
EXPANSION: Final = """
    op.execute("alter table runs add column mood text")
    op.execute("alter table users add column since timestamptz not null default now()")
    op.execute("create table moods (tenant_id uuid primary key, mood text not null)")
    op.execute("create index ix_runs_mood on runs (tenant_id, mood)")
"""
SYNTHETIC: Final = """\
from alembic import op

revision = 'tomorrow'
down_revision = {head!r}
branch_labels = None
depends_on = None
{declaration}


def upgrade():
    {body}


def downgrade():
    pass
"""


def further(urls: DatabaseUrls, folder: Path, *, declaration: str, body: str = "pass") -> None:
    """Upgrade to a release of tomorrow, which has one more migration."""
    scripts = shutil.copytree(MIGRATIONS, folder / "migrations")
    source = SYNTHETIC.format(head=HEAD, declaration=declaration, body=body.strip())
    (scripts / "versions" / "tomorrow.py").write_text(source)
    command.upgrade(_config(urls, scripts), "head")


def _config(urls: DatabaseUrls, scripts: Path) -> Config:
    config = Config(attributes={"urls": urls})
    config.set_main_option("script_location", str(scripts))
    return config


def upgraded(databases: Databases, folder: Path, **told: str) -> Callable[[], DatabaseUrls]:
    """Databases of tomorrow."""

    def make() -> DatabaseUrls:
        urls = databases()
        further(urls, folder, **told)
        return urls

    return make


@pytest.fixture(scope="module")
async def service(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """This code, on a schema that the next release has expanded; with a worker."""
    folder = tmp_path_factory.mktemp("tomorrow")
    newer = upgraded(databases, folder, declaration=f"works_from = {HEAD!r}", body=EXPANSION)
    async with running_service(newer, folder / "data", works=True) as running:
        yield running


async def test_this_code_serves_and_works_on_a_schema_that_was_expanded(service: Service) -> None:
    assert await _told(service.urls) == ("tomorrow", HEAD)
    tenant = await service.new_tenant(files={"welcome.md": "hello from yesterday"})
    run = (await tenant.user.ask("What does welcome.md say?")).json()
    assert "hello from yesterday" in run["answer"]
    assert run["tool_calls"]
    accepted = await tenant.user.make("/v1/runs", json={"query": "What does welcome.md say?"})
    assert (await ended_run(tenant, accepted["run_id"], within_s=30))["status"] == "succeeded"
    await service.sql("select mood from runs")  # it is tomorrow's


async def test_this_code_does_not_start_on_a_schema_that_was_contracted(databases: Databases, tmp_path: Path) -> None:
    """The same release, but for its word."""
    contracted = upgraded(databases, tmp_path, declaration="works_from = 'tomorrow'", body=EXPANSION)
    with pytest.raises(ConfigurationError, match="works with code from tomorrow on; this is code of"):
        async with running_service(contracted, tmp_path / "data"):
            pass


async def test_a_migration_that_says_nothing_works_with_its_own_code_alone(
    databases: Databases, tmp_path: Path
) -> None:
    urls = await asyncio.to_thread(upgraded(databases, tmp_path, declaration=""))
    assert await _told(urls) == ("tomorrow", "tomorrow")
    # The way back says what worked before.
    await asyncio.to_thread(command.downgrade, _config(urls, tmp_path / "migrations"), HEAD)
    assert await _told(urls) == (HEAD, floors()[HEAD])


async def _told(urls: DatabaseUrls) -> tuple[str, str]:
    """What the schema says of itself."""
    engine = create_async_engine(urls.platform)
    try:
        async with engine.connect() as connection:
            row = (await connection.execute(text("select version_num, works_from from alembic_version"))).one()
    finally:
        await engine.dispose()
    return row.version_num, row.works_from


@pytest.mark.parametrize(
    ("version", "works_from", "says"),
    [
        (HEAD, HEAD, None),
        (HEAD, None, None),
        ("tomorrow", FIRST, None),
        ("tomorrow", HEAD, None),
        ("tomorrow", "later", "works with code from later on"),
        ("tomorrow", None, "works with code from tomorrow on"),
        ("0014", None, "`bulkhead migrate`"),
        (None, None, "`bulkhead migrate`"),
    ],
)
def test_a_schema_is_refused_by_what_it_says_of_itself(
    version: str | None, works_from: str | None, says: str | None
) -> None:
    reason = migration.refusal(version, works_from)
    assert reason is None if says is None else says in str(reason)


# What each migration declares


def modules() -> list[ModuleType]:
    """The migrations, the first one first."""
    scripts = ScriptDirectory(str(MIGRATIONS))
    return [script.module for script in scripts.walk_revisions()][::-1]


def floors() -> dict[str, str]:
    """Of each migration that knows of the rule, the oldest code that works on what it leaves."""
    return {module.revision: module.works_from for module in modules() if module.revision >= FIRST}


def faults(declared: list[tuple[str, str | None]]) -> Iterator[str]:
    """What is wrong with what migrations declare, in their order."""
    order, oldest = [revision for revision, _ in declared], ""
    for revision, works_from in declared:
        if works_from is None:
            yield f"{revision} declares nothing"
        elif works_from not in order or order.index(works_from) > order.index(revision):
            yield f"{revision} works from {works_from}, which does not come before it"
        elif oldest and order.index(works_from) < order.index(oldest):
            yield f"{revision} works from {works_from}, but the one before it from {oldest} on"
        oldest = works_from or oldest


def test_every_migration_declares_with_which_code_it_works() -> None:
    declared = [(each.revision, getattr(each, "works_from", None)) for each in modules() if each.revision >= FIRST]
    assert list(faults(declared)) == []


def test_a_migration_that_declares_nothing_or_nonsense_is_found() -> None:
    assert list(faults([("1", "1"), ("2", None)])) == ["2 declares nothing"]
    assert list(faults([("1", "1"), ("2", "3"), ("3", "3")])) == ["2 works from 3, which does not come before it"]
    assert list(faults([("1", "1"), ("2", "2"), ("3", "1")])) == ["3 works from 1, but the one before it from 2 on"]


# Columns and tables that are gone, or have another name or fewer values.
CONTRACTIONS: Final = re.compile(
    r"drop_(column|table|constraint)|rename_table|new_column_name|nullable=False"
    r"|\b(drop (table|column|function|trigger|policy|view)|rename (to|column)|set not null|revoke)\b",
    re.IGNORECASE,
)


def contractions(source: str) -> list[str]:
    """What its upgrade takes away, and old code may miss."""
    (upgrade,) = [
        node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "upgrade"
    ]
    return [match[0] for match in CONTRACTIONS.finditer(ast.unparse(upgrade))]


def test_what_takes_something_away_says_that_it_contracts() -> None:
    """Or names what it takes away and nobody misses, as a function that it makes anew."""
    known = [module for module in modules() if module.revision >= FIRST]
    for before, module in pairwise(known):
        if module.works_from == before.works_from:
            source = Path(str(module.__file__)).read_text()
            assert contractions(source) == getattr(module, "harmless", []), module.revision


def test_what_takes_something_away_is_found() -> None:
    assert contractions(SYNTHETIC.format(head="1", declaration="", body=EXPANSION.strip())) == []
    for body in ("op.drop_column('runs', 'code')", 'op.execute("alter table runs rename column code to reason")'):
        assert contractions(SYNTHETIC.format(head="1", declaration="", body=body))
