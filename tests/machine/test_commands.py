"""The other commands, beside a machine that runs and against databases that others provide."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from app.checklist.upkeep import supported
from app.db import DatabaseUrls
from app.embedded.postgres import EmbeddedPostgres
from app.keyring import new_entry
from app.tenants import images
from tests.machine.machines import ROOT, Machine, Up
from tests.service import Databases, new_client


async def test_the_printed_token_names_a_user_of_the_demo_to_the_service(running: Up) -> None:
    token = (await running.machine.run("token", "kim")).output.strip()
    async with new_client(running.machine.env["BULKHEAD_URL"], token) as caller:
        me = (await caller.get("/v1/me")).json()
    assert (me["tenant_id"], me["role"]) == (running.machine.env["BULKHEAD_DEMO_TENANT"], "user")


async def test_a_second_start_on_the_same_directory_is_refused_and_the_first_goes_on(running: Up) -> None:
    second = await running.machine.run("up")
    assert second.status == 1
    assert (
        second.complaint == f"bulkhead: Bulkhead runs already on {running.machine.directory}: `make down` stops it.\n"
    )
    async with running.caller() as user:
        assert (await user.get("/v1/me")).is_success


async def test_metrics_answer_to_the_token_of_the_demo_alone(running: Up) -> None:
    async with running.caller("BULKHEAD_METRICS_TOKEN") as scraper, running.caller() as user:
        assert "mcp_requests_total" in (await scraper.get("/metrics")).text
        assert (await user.get("/metrics")).status_code == 401


async def test_a_request_is_in_the_log_and_nothing_is_said_beside_it(running: Up) -> None:
    async with running.caller() as user:
        answer = await user.ask("What does welcome.md say?")
    assert answer.is_success
    said = f'"request_id": "{answer.headers["x-request-id"]}"'
    await running.until(lambda: any(said in line and '"http.request"' in line for line in running.printed.splitlines()))
    assert running.complaint == ""
    assert running.troubles == []
    assert '"route": "/v1/tenants"' not in running.printed, "nobody has asked for the demo's own requests"


async def test_an_exception_shows_wherever_it_is_said(tmp_path: Path) -> None:
    """The control of every "no troubles" here."""
    program = "import structlog; from app.telemetry import logs; logs.configure('info')\n"
    program += "structlog.get_logger().error('bad', exc_info=LookupError())\n1 / 0"
    crashed = Machine(tmp_path / "none", command=(sys.executable, "-c")).spawn(program)
    assert await crashed.ended() == 1
    logged, told = crashed.troubles
    assert json.loads(logged)["exception"] == "builtins.LookupError"
    assert told == "Traceback (most recent call last):"


async def test_a_busy_port_is_said_before_anything_is_started(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        up = await machine.run("up", PORT=str(port))
    assert up.status == 1
    assert up.complaint == (
        f"bulkhead: Port {port} of 127.0.0.1 is in use. Stop what uses it, or set BULKHEAD_PORT to another.\n"
    )
    assert not (machine.directory / "postgres").exists()


async def test_an_address_that_is_not_here_is_said(machine: Machine) -> None:
    up = await machine.run("up", HOST="192.0.2.1")
    assert up.status == 1
    assert "Cannot listen on 192.0.2.1" in up.complaint
    assert "Set BULKHEAD_HOST or BULKHEAD_PORT" in up.complaint


async def test_a_reset_deletes_what_up_has_made(machine: Machine) -> None:
    started = machine.spawn("up")
    await started.says("Bulkhead starts")
    await started.until((machine.directory / "platform.env").exists)
    assert (await machine.run("reset", "--yes")).status == 0
    assert await started.ended() == 0
    assert not machine.directory.exists()
    assert await machine.is_empty()


async def test_neither_up_nor_reset_touches_a_directory_that_holds_what_is_not_ours(machine: Machine) -> None:
    machine.directory.mkdir()
    thesis = machine.directory / "thesis.txt"
    thesis.write_text("years of work")
    up, reset = await machine.run("up"), await machine.run("reset", "--yes")
    assert (up.status, reset.status) == (1, 1)
    assert "holds what Bulkhead did not make: set BULKHEAD_DATA_DIR" in up.complaint
    assert "was not made by Bulkhead" in reset.complaint
    assert list(machine.directory.iterdir()) == [thesis]


async def test_a_directory_that_cannot_be_used_is_said(machine: Machine) -> None:
    machine.directory.write_text("a file")
    up = await machine.run("up")
    assert up.status == 1
    assert up.complaint.startswith(f"bulkhead: {machine.directory} cannot be used (File exists): set BULKHEAD_DATA_DIR")


async def test_a_directory_that_takes_no_file_is_said(machine: Machine) -> None:
    (machine.directory / "up.lock").mkdir(parents=True)
    up = await machine.run("up")
    assert (up.status, up.complaint) == (
        1,
        f"bulkhead: {machine.directory} cannot be used (Is a directory): set BULKHEAD_DATA_DIR to another directory.\n",
    )


async def test_down_and_token_say_that_nothing_runs(machine: Machine) -> None:
    assert (await machine.run("down")).output == f"Nothing runs on {machine.directory}.\n"
    token = await machine.run("token")
    assert (token.status, token.complaint) == (
        1,
        "bulkhead: The development issuer is part of the demo: `make up` starts it.\n",
    )


# Where a line of the table says so, and not on every machine.
_WHERE: Final[dict[str, Callable[[dict[str, Any]], bool]]] = {
    "every": lambda _: True,
    "where it runs as root": lambda _: os.geteuid() == 0,
    "where no volume can be made": lambda ready: images.probe(Path(ready["folder"])) is not None,
    "where bubblewrap cannot start": lambda ready: ready["sandbox_detail"]["backend"] != "bubblewrap",
    "where no cgroup can be written to": lambda ready: not ready["sandbox_detail"]["cgroup"]["available"],
    "where the pins are old": lambda _: time.time() - (ROOT / "requirements/base.txt").stat().st_mtime > 90 * 86_400,
    "where its Python is old": lambda _: supported(sys.version_info[:2], datetime.now(UTC).date()).status != "pass",
}


async def test_the_doctor_warns_of_a_fresh_demo_as_the_page_says_and_of_nothing_else(
    running: Up, tmp_path: Path
) -> None:
    found = await running.machine.run("doctor", "--json", "--patience", "60")
    items = json.loads(found.output)["items"]
    assert [item for item in items if item["status"] == "fail"] == []
    assert (found.status, found.complaint) == (0, "")
    told = {item["id"]: item["detail"] for item in items}
    assert told["secret-providers"] == "No secret is bound to a provider."
    assert told["issuers-reached"] == "No issuer names a key set."
    assert told["workers"].endswith("Alive: 1 worker.")
    async with running.caller() as user:
        ready = (await user.get("/readyz")).json() | {"folder": str(tmp_path)}
    section = (
        (ROOT / "docs/checklist.md").read_text().partition("## What a fresh demo warns of\n")[2].partition("\n## ")[0]
    )
    table = [[cell.strip() for cell in line.split("|")[1:3]] for line in section.splitlines() if line.startswith("| `")]
    warned = {item["id"] for item in items if item["status"] == "warn"}
    assert warned == {item.strip("`") for item, where in table if _WHERE[where](ready)}
    for secret in running.machine.env.values():
        assert len(secret) < 20 or secret.startswith("http") or secret not in found.output
    assert str(running.machine.directory) not in found.output


async def test_the_sandbox_is_probed_on_demand(machine: Machine) -> None:
    assert (await machine.run("sandbox", "probe")).output == "bubblewrap: holds\n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PORT": "eighty"}, "BULKHEAD_PORT: Input should be a valid integer"),
        ({"MODEL_TIMEOUT_S": "0"}, "BULKHEAD_MODEL_TIMEOUT_S: Input should be greater than 0"),
        (
            {"DATABASE_APP_URL": "postgresql+asyncpg://a:hunter2@/b"},
            "valid: BULKHEAD_DATABASE_APP_URL, BULKHEAD_DATABASE_PLATFORM_URL and BULKHEAD_DATABASE_SEALER_URL go",
        ),
        *(
            (
                {f"DATABASE_{role}_URL": "postgresql://a:hunter2@/b"},
                f"valid: BULKHEAD_DATABASE_{role}_URL: must begin with postgresql+asyncpg://.",
            )
            for role in ("OWNER", "APP", "PLATFORM", "SEALER")
        ),
        ({"MODEL_BASE_URL": "not-a-url"}, "BULKHEAD_MODEL_BASE_URL: String should match"),
        ({"MODEL_PRICES": "{hunter2"}, "valid: BULKHEAD_MODEL_PRICES: is not JSON."),
        ({"SANDBOX_UIDS": "9000-8000"}, "valid: BULKHEAD_SANDBOX_UIDS must be"),
        ({"PROT": "hunter2"}, "There is no setting BULKHEAD_PROT"),
        ({"ROOT_KEYS": "k1:hunter2"}, "BULKHEAD_ROOT_KEYS: key 'k1' is not 32 random bytes"),
        (
            {"ROOT_KEYS": "k1:hunter2", "EGRESS_PRIVATE_NETWORKS": '{"ftech": ["10.0.0.0/8"]}'},
            "BULKHEAD_EGRESS_PRIVATE_NETWORKS: there is no template ftech",
        ),
        ({}, "Set BULKHEAD_DATABASE_APP_URL, BULKHEAD_DATABASE_PLATFORM_URL, BULKHEAD_DATABASE_SEALER_URL"),
    ],
)
async def test_a_setting_that_is_wrong_or_missing_is_named_without_its_value(
    machine: Machine, settings: dict[str, str], said: str
) -> None:
    if "ROOT_KEYS" in settings:  # read after the others
        unused = "postgresql+asyncpg://nobody@127.0.0.1:1/none"
        settings |= {f"DATABASE_{role}_URL": unused for role in ("APP", "PLATFORM", "SEALER")}
        settings |= {"MODEL_API_KEY": "any"}
    serve = await machine.run("serve", **settings)
    assert serve.status == 1
    assert said in serve.complaint
    assert serve.complaint.count("\n") == 1
    assert "hunter2" not in serve.complaint


@pytest.mark.parametrize("line", ["BULKHEAD_PORT 8001hunter2", "BULKHEAD_PORT", "BULKHEAD_HOST='hunter2"])
async def test_a_line_of_the_env_file_that_would_be_lost_is_named_without_its_text(machine: Machine, line: str) -> None:
    good = "# a comment\n\nexport BULKHEAD_LOG_LEVEL='debug'\nBULKHEAD_MODEL_PRICES='{\n}'\n"
    file = machine.directory.parent / ".env"
    file.write_text(good)
    assert "Nothing runs" in (await machine.run("down")).output, "the control"
    file.write_text(f"{good}\n{line}\n")
    down = await machine.run("down")
    assert (down.status, down.complaint) == (1, "bulkhead: Line 7 of .env is not NAME=value.\n")


async def test_a_key_id_of_no_use_is_refused(machine: Machine) -> None:
    refused = await machine.run("root-key", "--key-id", "A B")
    assert (refused.status, refused.output) == (1, "")
    assert refused.complaint.startswith("bulkhead: 'A B' is no key id: it has at most 32 lower-case letters")
    assert (await machine.run("root-key", "--key-id", "a-b")).output.startswith("a-b:")


async def test_the_command_has_its_name_and_its_version(machine: Machine) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (await machine.run("--version")).output == f"bulkhead {version}\n"
    assert "Usage: bulkhead root-key" in (await machine.run("root-key", "--help")).output


def _external(urls: DatabaseUrls, **settings: str) -> dict[str, str]:
    return {
        "DATABASE_OWNER_URL": urls.owner or "",
        "DATABASE_APP_URL": urls.app,
        "DATABASE_PLATFORM_URL": urls.platform,
        "DATABASE_SEALER_URL": urls.sealer,
        "ROOT_KEYS": new_entry("k1"),
        **settings,
    }


@pytest.mark.long
async def test_an_external_database_is_set_up_and_served_with_a_model_only(
    machine: Machine, databases: Databases
) -> None:
    machine.settings = _external(await asyncio.to_thread(databases))
    assert "no admin yet" in (await machine.run("serve", MODEL_API_KEY="any")).complaint
    first = await machine.run("admin", "bootstrap")
    assert "BULKHEAD_MODEL_API_KEY" in (await machine.run("serve")).complaint

    async with _served(machine) as url, new_client(url, first.output.strip()) as admin:
        assert (await admin.get("/v1/me")).json()["role"] == "platform_admin"
        assert (await admin.get("/readyz")).json()["ready"] is True
    assert await machine.is_empty()


async def test_an_external_database_gets_one_admin(machine: Machine, databases: Databases) -> None:
    machine.settings = _external(await asyncio.to_thread(databases))
    first, second = await machine.run("admin", "bootstrap"), await machine.run("admin", "bootstrap")
    assert (first.status, second.status) == (0, 1)
    assert first.output.startswith("bh_")
    assert "has an admin already" in second.complaint


@asynccontextmanager
async def _served(machine: Machine) -> AsyncIterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = machine.spawn("serve", MODEL_API_KEY="any", PORT=str(port))
    await serve.until(lambda: '"serving"' in serve.printed)
    yield f"http://127.0.0.1:{port}"
    assert await serve.interrupt() == 0
    assert all(json.loads(line)["event"] for line in serve.printed.splitlines()), "a log for machines, and nothing else"
    assert serve.complaint == ""


async def test_a_database_without_a_schema_is_said(machine: Machine, postgres: EmbeddedPostgres) -> None:
    machine.settings = _external(await asyncio.to_thread(postgres.provision, "without_a_schema"), MODEL_API_KEY="any")
    for command in (("admin", "bootstrap"), ("doctor",), ("serve",)):
        refused = await machine.run(*command)
        assert refused.status == 1
        assert refused.complaint.endswith("bulkhead: The database has no schema: run `bulkhead migrate`.\n")


async def test_a_database_of_another_version_is_left_alone(machine: Machine, databases: Databases) -> None:
    urls = await asyncio.to_thread(databases)
    engine = create_async_engine(urls.owner or "")
    async with engine.begin() as connection:
        await connection.execute(
            text("update alembic_version set version_num = 'from_tomorrow', works_from = 'from_tomorrow'")
        )
    await engine.dispose()
    machine.settings = _external(urls, MODEL_API_KEY="any")
    for command in ("serve", "migrate"):
        refused = await machine.run(command)
        assert refused.status == 1
        assert "from_tomorrow" in refused.complaint
        assert refused.complaint.count("\n") == 1


async def test_a_database_that_does_not_answer_is_said_without_its_password(machine: Machine, tmp_path: Path) -> None:
    url = f"postgresql+asyncpg://someone:hunter2@/bulkhead?host={tmp_path}"
    machine.settings = _external(DatabaseUrls(url, url, url, url), MODEL_API_KEY="any")
    for command in (("up",), ("admin", "bootstrap")):
        refused = await machine.run(*command)
        assert refused.status == 1
        assert refused.complaint.startswith("bulkhead: The database cannot be used: ")
        assert not re.search(r"class|sqlalchemy|psycopg|asyncpg", refused.complaint)
        assert "hunter2" not in refused.complaint
        assert refused.complaint.count("\n") == 1


async def test_the_sql_of_the_roles_is_printed_for_a_prefix(machine: Machine) -> None:
    roles = await machine.run("db", "roles", "--prefix", "acme")
    assert roles.status == 0
    for purpose in ("owner", "app", "platform", "sealer"):
        assert f"CREATE ROLE acme_{purpose} LOGIN NOSUPERUSER NOBYPASSRLS" in roles.output
