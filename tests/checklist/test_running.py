"""How items are run, told and counted: none of them ends the others, holds them up, or shows a traceback."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest

from app.checklist import beside, running, telling
from app.checklist.findings import Finding, Item, Status, Verdict, passed, warned
from app.checklist.ground import Ground, is_local
from app.checklist.items import ITEMS, LINES, covered
from app.checklist.service import report
from app.checklist.upkeep import supported
from app.embedded.machine import Machine
from app.errors import ConfigurationError
from app.sandbox.contract import NOBODY
from app.settings import Settings

GROUND = cast("Ground", SimpleNamespace())


async def _good(_: Ground) -> Verdict:
    return passed("It holds.")


async def _known(_: Ground) -> Verdict:
    return warned("It is known.")


async def _crashing(_: Ground) -> Verdict:
    raise LookupError("/secret/place")


async def _hanging(_: Ground) -> Verdict:
    await asyncio.sleep(60)
    return passed("At last.")


def _item(name: str, check: Any) -> Item:
    return Item(name, (13,), name, "Mend it.", check)


async def test_one_that_crashes_or_hangs_fails_with_a_code_and_the_others_go_on() -> None:
    items = [_item("crashing", _crashing), _item("hanging", _hanging), _item("good", _good)]
    crashed, hung, good = await running.run(items, GROUND, within_s=0.1)
    assert (crashed.status, crashed.detail) == ("fail", "The check itself ended early (code LookupError).")
    assert (hung.status, hung.detail) == ("fail", "No answer within 0.1 s (code timed_out).")
    assert (good.status, good.fix) == ("pass", "")


@pytest.mark.parametrize(
    ("check", "accepted", "is_good", "is_strictly_good"),
    [
        (_good, [], True, True),
        (_known, [], True, False),
        (_known, ["it"], True, True),
        (_crashing, ["it"], False, False),
    ],
)
async def test_a_failure_counts_always_and_a_warning_where_it_is_asked_for(
    check: Any, accepted: list[str], *, is_good: bool, is_strictly_good: bool
) -> None:
    found = await running.run([_item("it", check)], GROUND)
    for strict, expected in ((False, is_good), (True, is_strictly_good)):
        assert telling.is_good(found, frozenset(accepted), strict=strict) is expected


def _finding(status: Status) -> Finding:
    return Finding("some-item", (1, 2), "Some [title]", status, "what [was] found", "do [this]")


@pytest.mark.parametrize(("statuses", "worst"), [("pass", "pass"), ("pass warn", "warn"), ("warn fail pass", "fail")])
def test_a_report_is_as_bad_as_its_worst_finding(statuses: str, worst: str) -> None:
    assert report([_finding(Status(status)) for status in statuses.split()]).status == worst


def test_a_person_reads_a_table_and_a_machine_reads_json(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [_finding(Status.FAIL), _finding(Status.PASS)]
    telling.print_table(findings)
    told = capsys.readouterr().out
    assert "what [was] found" in told
    assert "do [this]" in told
    assert "1 failed, 0 to know, 1 passed." in told
    telling.print_table([Finding("beyond", (), "More", Status.PASS, "what was found", "")])
    assert "more" in capsys.readouterr().out, "what is beyond the guide, as docs/checklist.md has it"
    telling.print_json(findings)
    written = json.loads(capsys.readouterr().out)
    assert (written["status"], written["items"][0]["guide"], len(written["items"])) == ("fail", [1, 2], 2)


def test_where_nothing_runs_that_is_what_is_said(tmp_path: Path) -> None:
    settings = Settings(_env_file=None, data_dir=tmp_path)
    with pytest.raises(ConfigurationError, match=r"Nothing runs on .*: `make up` starts it"):
        beside.located(settings, Machine(settings))
    assert list(tmp_path.iterdir()) == [], "nothing is started or made to be looked at"


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_guide_without_an_item_is_found(line: int) -> None:
    assert covered(ITEMS).status == "pass"
    assert f"line {line} of the guide has no item" in covered([i for i in ITEMS if line not in i.guide]).detail


@pytest.mark.parametrize(
    ("ends_in", "status"), [(timedelta(days=400), "pass"), (timedelta(days=30), "warn"), (timedelta(days=-1), "fail")]
)
def test_the_end_of_a_python_is_told_in_time(ends_in: timedelta, status: str) -> None:
    assert supported((3, 13), date(2029, 10, 31) - ends_in).status == status
    assert supported((2, 7), date(2029, 10, 31)).status == "warn"


@pytest.mark.parametrize(
    ("host", "is_it"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("db.example", False)],  # noqa: S104  a sample
)
def test_what_is_this_machine_alone(host: str, *, is_it: bool) -> None:
    assert is_local(host) is is_it


def test_the_page_lists_every_item_as_it_is() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "checklist.md").read_text()
    section = page.partition("\n## Items\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")]
    assert rows == [
        [
            f"`{item.id}`",
            ", ".join(map(str, item.guide)) or "more",
            item.title,
            "the command" if item.is_local else "both",
        ]
        for item in ITEMS
    ]


@pytest.mark.parametrize(
    ("host", "reached"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::", "[::1]"),
        (".".join("0000"), "127.0.0.1"),
        ("service.example", "service.example"),
    ],
)
def test_the_command_reaches_a_service_wherever_it_listens(host: str, reached: str) -> None:
    assert beside.reached(host) == reached


# Binds a port, becomes somebody, and says where it listens.
_LISTENER: Final = """
import os, socket, sys
listener = socket.create_server(("127.0.0.1", 0))
os.setuid(int(sys.argv[1]))
print(listener.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def listener_of(user: int) -> Iterator[tuple[int, int]]:
    """The process and port of a program of that user."""
    argv = [sys.executable, "-I", "-c", _LISTENER, str(user)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.pid, int(process.stdout.readline())


def test_a_program_of_ours_that_listens_at_the_port_is_taken_for_the_service(tmp_path: Path) -> None:
    with listener_of(os.geteuid()) as (process, port):
        assert beside._process_at(port, tmp_path) == process
    assert beside._process_at(port, tmp_path) is None, "nobody listens there any more"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts a program as somebody else")
def test_a_program_of_another_user_that_listens_there_is_not_unless_the_data_are_that_users(tmp_path: Path) -> None:
    with listener_of(NOBODY) as (process, port):
        assert beside._process_at(port, tmp_path) is None
        os.chown(tmp_path, NOBODY, NOBODY)
        assert beside._process_at(port, tmp_path) == process
