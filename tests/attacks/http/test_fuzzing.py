"""Schemathesis, with all its checks, on a real service: what is not in the description does not happen."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from fastapi import FastAPI

from app.listening import bound, listening, url_of
from tests.service import Databases, Service, Tenant, running_service

HERE: Final = Path(__file__).parent
SEED: Final = 20261123


@dataclass(frozen=True, slots=True)
class Report:
    """What Schemathesis has found."""

    failures: list[str]
    whole: dict[str, Any]
    text: str

    @property
    def cases(self) -> int:
        """How many requests it has made up."""
        return int(self.whole["test_cases"]["generated"])


@dataclass(frozen=True, slots=True)
class Ground:
    """A service of its own: nobody else could work beside whoever disables all tenants."""

    service: Service
    tenant: Tenant
    folder: Path

    async def fuzz(self, *arguments: str, url: str | None = None, caller: str | None = None) -> Report:
        """Run Schemathesis in a process of its own."""
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "fuzzing.toml")),
            *("run", f"{url or self.service.url}/openapi.json", "--seed", str(SEED), "--no-color"),
            *("--continue-on-failure", "--generation-database", "none", "--max-response-time", "30"),
            *("--report", "json", "--report-json-path", str(report), *arguments),
            cwd=self.folder,
            env=self._environment(caller),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            text = (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert report.exists(), text
        whole = json.loads(report.read_text())
        failures = [f"{failure['title']}: {failure['operations']}" for failure in whole["failures"]]
        return Report(failures + [str(error) for error in whole["errors"]], whole, text)

    def _environment(self, caller: str | None) -> dict[str, str]:
        callers = {"platform": self.service.platform, "admin": self.tenant.admin, "user": self.tenant.user}
        keys = {name: client.headers["Authorization"].split()[1] for name, client in callers.items()}
        made = {
            "FUZZING_KEYS": json.dumps(keys | {"metrics": self.service.metrics_token}),
            "FUZZING_OWN": json.dumps(self.own),
            "SCHEMATHESIS_HOOKS": "fuzzing_hooks",
            "PYTHONPATH": str(HERE),
            "NO_PROXY": "127.0.0.1",
            "HOME": str(self.folder),
            "PATH": os.environ["PATH"],
        }
        return made | ({"FUZZING_AS": caller} if caller else {})

    @property
    def own(self) -> list[str]:
        """The ids of the callers, and of what they belong to."""
        return [self.tenant.id, self.tenant.user_id, self.tenant.user_key_id, *self.others]

    others: tuple[str, ...] = ()


@pytest.fixture(scope="module")
async def ground(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Ground]:
    async with running_service(databases, tmp_path_factory.mktemp("fuzzed")) as service:
        tenant = await service.new_tenant(files={"note.md": "hello"})
        listed = [
            (await client.get(path, params={"limit": 200})).json()["items"]
            for client in (tenant.admin, service.platform)
            for path in ("/v1/users", "/v1/keys")
        ]
        others = tuple(row["id"] for rows in listed for row in rows)
        yield Ground(service, tenant, tmp_path_factory.mktemp("schemathesis"), others)


def told(name: str, report: Report) -> None:
    """What a reader of the test's output wants to know."""
    sys.stdout.write(f"{name}: {report.cases} requests, seed {SEED}, {report.whole['operations']}\n")


async def test_each_operation_does_what_its_description_says(ground: Ground) -> None:
    report = await ground.fuzz("--phases", "fuzzing", "-n", "1")
    told("sample", report)
    assert report.failures == [], report.text
    assert report.whole["operations"]["tested"] == report.whole["operations"]["total"] > 90
    assert report.cases > 90
    assert (await ground.tenant.admin.get("/v1/me")).is_success, "its keys held to the end"


@pytest.mark.long
@pytest.mark.timeout(480)
@pytest.mark.parametrize("phase", ["coverage", "fuzzing", "stateful"])
@pytest.mark.parametrize("caller", ["admin", "user", "platform"])
async def test_whoever_asks_for_whatever(ground: Ground, caller: str, phase: str) -> None:
    report = await ground.fuzz("--phases", phase, "-n", "20", caller=caller)
    told(f"{caller}, {phase}", report)
    assert report.failures == [], report.text
    assert report.cases > 100


def careless() -> FastAPI:
    """The control: a service with a fault for each of three checks."""
    app = FastAPI()

    async def fail(number: int) -> int:
        return 1 // (number - number)

    async def refuse() -> httpx.Response:
        raise AssertionError

    app.add_api_route("/fails", fail)
    app.add_api_route("/open", lambda: {"a": 1}, response_model=None)
    return app


@pytest.mark.long
async def test_schemathesis_finds_what_is_wrong_with_a_careless_service(ground: Ground) -> None:
    with bound("127.0.0.1", 0) as listener:
        async with listening(careless(), listener):
            report = await ground.fuzz("--phases", "fuzzing", "-n", "1", url=url_of(listener))
    assert any(found.startswith("Server error") for found in report.failures), report.text
