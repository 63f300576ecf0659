"""The programs of the pages work, block after block, each that has a comment `tested` above it.

Here they run on a service of the test's own; tests/machine/test_walkthrough.py starts one as the pages say.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import pytest
from pydantic import SecretStr

from app.auth.jwks import DevelopmentIssuer
from app.embedded.demo import Demo, read_env
from tests.breaking_line import breaking_line
from tests.documents.blocks import blocks, commands
from tests.service import POLICY, Client, Databases, Service, Tenant, running_service

ROOT: Final = Path(__file__).resolve().parent.parent
NAMES: Final = ("quickstart", "api", "approvals", "conversations", "limits", "runs")
PAGES: Final = {name: (ROOT / "docs" / f"{name}.md").read_text() for name in NAMES}
PAGES["README"] = (ROOT / "README.md").read_text()
RUNS: Final = PAGES["runs"]
LANGUAGES: Final = ("sh", "python", "js")
NODE: Final = shutil.which("node")
# Of each program: asked and waited, sent again, followed, in the background, approved, cancelled.
QUERIES: Final = 6


@pytest.fixture(scope="module")
async def service(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """As `make up` starts it: with a worker."""
    async with running_service(databases, tmp_path_factory.mktemp("programs"), works=True) as running:
        yield running


@pytest.fixture(scope="module")
async def folder(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the checkout is to a reader, with the demo."""
    folder = tmp_path_factory.mktemp("checkout")
    directory = folder / ".bulkhead"
    directory.mkdir()
    demo = Demo(service.url, directory=directory, issuer=DevelopmentIssuer(directory / "issuer.pem"))
    key = service.platform.headers["Authorization"].removeprefix("Bearer ")
    await demo.prepare(platform_key=key, metrics_token=SecretStr(service.metrics_token))
    # What a reader would notice, a script must: an answer that is an error ends the command with a failure.
    (folder / ".curlrc").write_text("fail\nshow-error\nnoproxy = *\n")
    for name in ("docs", ".venv"):
        (folder / name).symlink_to(ROOT / name)
    return folder


async def run(folder: Path, *command: str, **environment: str) -> str:
    """What a program prints that ends well."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), "CURL_HOME": str(folder)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(120):
        output, complaint = await process.communicate()
    assert process.returncode == 0, output.decode() + complaint.decode()
    return output.decode()


async def run_page(folder: Path, page: str, **environment: str) -> list[str]:
    """What each shell block of a page prints that is run, all in one shell; each command must end well."""
    texts = commands(PAGES[page], "sh")
    script = "\n".join(f"echo '=== block {number}'\n{text}\necho" for number, text in enumerate(texts))
    output = await run(folder, "bash", "-euo", "pipefail", "-c", script, **environment)
    outputs = output.split("=== block ")[1:]
    assert len(outputs) == len(texts)
    return outputs


# The README


async def test_the_commands_of_the_readme_work_in_their_order(folder: Path) -> None:
    outputs = await run_page(folder, "README")
    assert len(outputs) > 10
    assert "pier 7" in outputs[0]
    assert "barometer" in outputs[1]
    assert "drafts-are-private" in outputs[2]
    assert "mcp_security_violations_total" in outputs[3]
    assert "rehearsal" in outputs[4]
    assert "VALID" in outputs[5]
    assert "event: message.delta" in outputs[6]
    assert "event: run.finished" in outputs[7]
    assert "410 EUR" in outputs[7]
    assert "docs__file_info" in outputs[8]
    assert "size: " in outputs[8]
    assert '"status":"cancelled"' in outputs[9]
    assert "from six to ten" in outputs[11]


async def test_the_commands_of_the_quickstart_show_what_it_says(folder: Path) -> None:
    asked, published, denied, record, streamed, back = await run_page(folder, "quickstart")
    assert "410 EUR" in asked
    assert '"allow:docs__*"' in asked
    assert '"version"' in published
    assert "tariffs-are-for-sales" in denied
    assert "410 EUR" not in denied
    assert "pier 7" in denied, "what the rule does not name is allowed as before"
    assert "tariffs-are-for-sales" in record
    assert "410 EUR" not in record
    assert "event: run.finished" in streamed
    assert "410 EUR" in back


# Pages whose commands are about what the reader has: a tenant, a run, an approval.


async def test_the_commands_of_the_approvals_page_work(folder: Path, reader: Reader) -> None:
    waiting = [await a_run_that_waits(reader.tenant) for _ in range(2)]
    names = {"APPROVAL_ID": waiting[0][1], "OTHER_APPROVAL_ID": waiting[1][1], "BULKHEAD_KEY": reader.tenant.user_key}
    (output,) = await run_page(folder, "approvals", **reader.names, **names)
    assert waiting[0][1] in output


async def test_the_commands_of_the_conversations_page_work(folder: Path, reader: Reader) -> None:
    names = {"CONVERSATION": str(uuid4()), "BULKHEAD_KEY": reader.tenant.user_key}
    (output,) = await run_page(folder, "conversations", **reader.names, **names)
    assert output.count("succeeded") == 1


async def test_the_commands_of_the_limits_page_work(service: Service, folder: Path, reader: Reader) -> None:
    body = {"name": "priced", "base_url": "https://models.example/v1", "models": ["small"], "credential": "sk-none"}
    endpoint = await service.platform.make("/v1/platform/models", json=body)
    outputs = await run_page(folder, "limits", **reader.names, ENDPOINT_ID=endpoint["id"])
    assert '"output":"0.4"' in outputs[0].replace(" ", "")
    assert "tool" in outputs[1]


# The last of them: it deletes the workspace.
async def test_the_commands_of_the_api_page_work(service: Service, folder: Path, reader: Reader) -> None:
    _, other, _ = await service.new_user(reader.tenant.id)
    cursor = (await reader.tenant.admin.get("/v1/users", params={"limit": 1})).json()["next_cursor"]
    tag = (await reader.tenant.admin.get("/v1/policies/published")).headers["ETag"]
    run_id, _ = await a_run_that_waits(reader.tenant)
    names = {"USER_ID": other["id"], "CURSOR": cursor, "VERSION": "1", "ETAG": tag, "RUN_ID": run_id}
    outputs = await run_page(folder, "api", **reader.names, **names)
    assert len(outputs) == 8
    assert '"auditor"' in outputs[0]
    assert "HTTP/1.1 202" in outputs[4]


@dataclass(frozen=True, slots=True)
class Reader:
    """A tenant, and the names that its pages' commands take from the environment."""

    tenant: Tenant
    names: dict[str, str]


@pytest.fixture(scope="module")
async def reader(service: Service) -> Reader:
    asking = POLICY.replace('["docs__*"]', '["docs__*"], approve: ["docs__file_info"]')
    tenant = await service.new_tenant(policy=asking, files={"tariffs.md": "410 EUR"})
    keys = {
        "BULKHEAD_ADMIN_KEY": tenant.admin.headers["Authorization"],
        "BULKHEAD_PLATFORM_KEY": service.platform.headers["Authorization"],
        "BULKHEAD_USER_KEY": tenant.user_key,
    }
    names = {name: key.removeprefix("Bearer ") for name, key in keys.items()}
    return Reader(tenant, {"BULKHEAD_URL": service.url, **names})


async def a_run_that_waits(tenant: Tenant) -> tuple[str, str]:
    """The run, and the approval that it waits for."""
    query = {"query": "Tell the size and time of the last edit of tariffs.md"}
    run_id = (await tenant.user.make("/v1/query", json=query))["run_id"]
    (approval,) = (await tenant.user.get(f"/v1/runs/{run_id}")).json()["approvals"]
    return run_id, approval


# docs/runs.md


def program(language: str) -> list[str]:
    """The command that runs all blocks of a language as one."""
    text = "\n".join(commands(RUNS, language))
    if language == "python":
        return [sys.executable, "-c", text]
    if language == "js":
        return [_node(), "--input-type=module", "-e", text]
    return ["bash", "-euo", "pipefail", "-c", text]


def _node() -> str:
    if NODE is None:
        assert os.environ.get("CI") != "true", "there is no Node.js here"
        pytest.skip("there is no Node.js here: apt-get install nodejs")
    return NODE


@pytest.mark.parametrize("language", LANGUAGES)
async def test_the_programs_get_their_answers_though_the_line_breaks(
    service: Service, folder: Path, language: str
) -> None:
    demo = read_env(folder / ".bulkhead" / "demo.env")
    user = await service.client(demo["BULKHEAD_API_KEY"])
    before = await how_many_runs(user)
    async with breaking_line(service.url) as line:
        demo["BULKHEAD_URL"] = line.url
        place = folder / language / ".bulkhead"
        place.mkdir(parents=True)
        (place / "demo.env").write_text("".join(f"{name}={value}\n" for name, value in demo.items()))
        output = await run(place.parent, *program(language), **demo, CURL_HOME=str(folder))
        assert (line.lost, line.cut >= 2) == (1, True), "the line has broken, in an answer and in a stream"
    assert output.count("410 EUR") == {"sh": 0, "python": 1, "js": 1}[language]
    assert ("It was one run." in output) == (language == "sh")
    assert output.count("pier 7") >= 3, "asked, followed and in the background"
    assert_each_event_once(output)
    assert "size: " in output
    assert output.rstrip().endswith("cancelled")
    assert await how_many_runs(user) == before + QUERIES, "what was sent again is no other run"


def assert_each_event_once(output: str) -> None:
    """Of the run that was followed: from its first event to its last, over several streams."""
    told = re.findall(r"^(?:(\d+) [a-z]+\.?[a-z]+ ?|id: (\d+)\nevent: .*\ndata: .*\n)", output, re.MULTILINE)
    sequences = [int(printed or sent) for printed, sent in told]
    # A program that prints what it receives also prints the beginnings of those that were cut off.
    whole = sorted(set(sequences)) if "id: " in output else sequences
    assert whole == list(range(1, len(whole) + 1))
    assert len(whole) > 4
    assert "run.finished" in output


async def how_many_runs(user: Client) -> int:
    return len((await user.get("/v1/runs", params={"limit": 200})).json()["items"])


def test_the_page_has_each_program_in_each_language() -> None:
    tasks = RUNS.partition("## From a program")[2].split("\n### ")
    assert len(tasks) == 7
    for task in tasks[1:]:
        languages = [block.language for block in blocks(task) if block.is_tested]
        assert languages == list(LANGUAGES), task.splitlines()[0]
