"""The programs of the pages work: those of the README in their order, those of docs/runs.md on a line that breaks."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest
from pydantic import SecretStr

from app.auth.jwks import DevelopmentIssuer
from app.embedded.demo import Demo, read_env
from app.runs.state import State
from tests.breaking_line import breaking_line
from tests.runs.faults import TERMINAL
from tests.service import Client, Databases, Service, running_service

ROOT: Final = Path(__file__).resolve().parent.parent
RUNS: Final = (ROOT / "docs" / "runs.md").read_text()
LANGUAGES: Final = ("sh", "python", "js")
NODE: Final = shutil.which("node")
# Of each program: asked and waited, sent again, followed, in the background, approved, cancelled.
QUERIES: Final = 6


def blocks(text: str, language: str) -> list[str]:
    """What a page says is tested."""
    return re.findall(rf"<!-- tested -->\n```{language}\n(.*?)```", text, re.DOTALL)


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


async def run_shell(folder: Path, script: str) -> str:
    return await run(folder, "bash", "-euo", "pipefail", "-c", script)


# The README


async def test_the_commands_of_the_readme_work_in_their_order(folder: Path) -> None:
    commands = blocks((ROOT / "README.md").read_text(), "sh")
    script = "\n".join(f"echo '=== block {number}'\n{block}\necho" for number, block in enumerate(commands))
    outputs = (await run_shell(folder, script)).split("=== block ")[1:]
    assert len(outputs) == len(commands) > 10
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


# docs/runs.md


def program(language: str) -> list[str]:
    """The command that runs all blocks of a language as one."""
    text = "\n".join(blocks(RUNS, language))
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
        assert [len(blocks(task, language)) for language in LANGUAGES] == [1, 1, 1], task.splitlines()[0]
    assert RUNS.count("<!-- tested -->") == RUNS.count("```sh") + RUNS.count("```python") + RUNS.count("```js")


ARROWS: Final = re.findall(r"^    (\S+) --> ([^\s:]+)(?:: (.+))?$", RUNS, re.MULTILINE)


def test_the_diagram_has_the_states_of_the_code_and_says_who_changes_them() -> None:
    assert {name for start, end, _ in ARROWS for name in (start, end)} - {"[*]"} == set(State)
    assert {start for start, end, _ in ARROWS if end == "[*]"} == TERMINAL
    assert {start for start, _, _ in ARROWS if start in TERMINAL} == {start for start, end, _ in ARROWS if end == "[*]"}
    assert all(who for _, end, who in ARROWS if end != "[*]")
    assert len(ARROWS) == RUNS.count(" --> ")


def test_the_table_says_which_states_are_the_last() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (yes|no) \|$", RUNS, re.MULTILINE)
    assert dict(rows) == {state.value: "no" if state in TERMINAL else "yes" for state in State}
