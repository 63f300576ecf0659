"""The log: lines that machines read, with ids and without anybody's text, and never in anybody's way."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Timer
from typing import Any, Final
from uuid import uuid4

import mcp_use.logging
import openai._utils._logs
import pytest
import structlog
from uvicorn.config import LOGGING_CONFIG

from app.telemetry import lines as lines_of_log
from app.telemetry import logs
from app.telemetry.lines import Lines
from app.telemetry.security import SecurityEvent, Violation
from tests.service import POLICY, Service, Tenant

TENANT: Final = uuid4()


@contextmanager
def configured(level: str = "info", **settings: Any) -> Iterator[Lines]:
    """Inside the block as the service logs; after it as before."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, threshold = root.handlers[:], root.level
    lines = logs.configure(level, **settings)
    try:
        yield lines
    finally:
        lines.flush(10)  # the machine may be busy
        root.handlers[:] = handlers
        root.setLevel(threshold)
        structlog.configure(**before)


def said(lines: Lines, capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What went to stdout, all of it JSON."""
    assert lines.flush(10)
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def redact(tenant_id: object, text: str) -> str:
    return text.replace("pineapple", "[redacted]") if tenant_id == TENANT else text


def test_no_line_of_a_library_or_of_ours_holds_a_secret_of_whom_it_is_logged_for(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with configured() as lines:
        with logs.redacting(redact):
            for tenant_id in (TENANT, uuid4()):
                with structlog.contextvars.bound_contextvars(tenant_id=str(tenant_id)):
                    structlog.get_logger().info("said", detail="a pineapple")
                    logging.getLogger("uvicorn.error").warning("a pineapple")
        with structlog.contextvars.bound_contextvars(tenant_id=str(TENANT)):
            structlog.get_logger().info("said", detail="a pineapple")
        found = said(lines, capfd)
    has_secret = ["pineapple" in str(line) for line in found]
    assert has_secret == [False, False, True, True, True], "controls: another tenant's, and afterwards"


def test_what_shall_be_left_out_is_and_only_so_long(capfd: pytest.CaptureFixture[str]) -> None:
    with configured() as lines:
        with logs.without("said"):
            for event in ("said", "done"):
                structlog.get_logger().info(event)
        structlog.get_logger().info("said")
        found = said(lines, capfd)
    assert [line["event"] for line in found] == ["done", "said"]


def test_when_and_what_come_first_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    with configured() as lines:
        with structlog.contextvars.bound_contextvars(tenant_id=str(TENANT)):
            structlog.get_logger().info("said", detail="this")
            logging.getLogger("uvicorn.error").warning("this")
        found = said(lines, capfd)
    assert [list(line)[:2] for line in found] == [["timestamp", "event"]] * 2


def test_an_exception_is_types_and_frames_and_a_library_s_line_is_a_place(capfd: pytest.CaptureFixture[str]) -> None:
    nonce = f"word-{secrets.token_hex(8)}"
    with configured() as lines:
        try:
            _fail(nonce)
        except ExceptionGroup:
            structlog.get_logger().exception("failed")
            logging.getLogger().exception("Unhandled %s", nonce)  # as mcp does
            logging.getLogger("asyncio").exception("Task exception: <Task %r>", nonce)
        logging.getLogger("mcp.client.session").warning("Failed to validate: %s", nonce)
        logging.getLogger("sqlalchemy.pool").error("gone\n%s", nonce)
        text = str(found := said(lines, capfd))
    assert nonce not in text
    assert [line["event"] for line in found] == [
        *("failed", "library.spoke", "Task exception:", "library.spoke", "gone")
    ]
    assert all("builtins.LookupError" in line["exception"] and "in _fail" in line["exception"] for line in found[:3])
    assert found[3]["at"].startswith("test_logs:")


def _fail(text: str) -> None:
    try:
        int(text)
    except ValueError as error:
        raise ExceptionGroup(text, [LookupError(text)]) from error


def test_libraries_stay_tamed_when_they_are_imported_later_or_set_themselves_up_again(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_LOG", "debug")
    with configured("debug") as lines:
        mcp_use.logging.Logger.configure()
        mcp_use.logging.Logger.set_debug(2)
        openai._utils._logs.setup_logging()
        logging.getLogger("langgraph").addHandler(logging.StreamHandler(sys.stdout))
        for name in ("mcp_use", "mcp_use.agents", "openai._base_client", "httpx", "langgraph", "langchain_core.x"):
            logging.getLogger(name).info("a query")
            logging.getLogger(name).warning("a query")
        found = said(lines, capfd)
        mcp_use.logging.Logger.set_debug(0)
    assert [line["event"] for line in found] == ["library.spoke"] * 6


def test_what_a_server_has_set_up_for_itself_before_is_undone(capfd: pytest.CaptureFixture[str]) -> None:
    logging.config.dictConfig(LOGGING_CONFIG)
    with configured() as lines:
        logging.getLogger("uvicorn.error").warning("said")
        logging.getLogger("uvicorn.access").info("a path")
        (line,) = said(lines, capfd)
    assert line["event"] == "said"


def test_without_ours_they_would_speak(capfd: pytest.CaptureFixture[str]) -> None:
    """The control: what the class of their loggers keeps them from."""
    logger = logging.Logger("untamed")  # noqa: LOG001  registered nowhere
    logger.addHandler(logging.StreamHandler(sys.stdout))
    logger.setLevel("INFO")
    logger.info("a query")
    assert "a query" in capfd.readouterr().out


async def test_a_run_is_found_by_its_ids_and_no_text_of_it_is_anywhere(
    service: Service, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nonce, name = secrets.token_hex(12), f"{secrets.token_hex(12)}.md"
    tenant = await service.new_tenant(files={name: nonce})
    secret = f"hunter-{secrets.token_hex(8)}"
    file = tmp_path / "log"
    capfd.readouterr()
    with configured("debug", file=file):
        await tenant.admin.put("/v1/secrets/tickets", json={"value": secret})
        answer = await tenant.user.ask(f"What does {name} say?")
        await tenant.user.get(f"/v1/runs/{answer.json()['run_id']}?secret={secret}")
        await tenant.user.get(f"/v1/{secret}")
        await (await service.client(f"bh_{secret}")).get("/v1/me")
    assert nonce in answer.json()["answer"]
    text = file.read_text()
    said = "".join(capfd.readouterr())
    assert not [private for private in (nonce, name, secret, tenant.user_key) if private in text + said]
    ours = [line for line in map(json.loads, text.splitlines()) if line.get("run_id") == answer.json()["run_id"]]
    assert [line["event"] for line in ours] == ["agent.started", "tool.used", "agent.finished", "http.request"]
    for line in ours:
        assert line["request_id"] == answer.headers["x-request-id"]
        assert (line["tenant_id"], line["user_id"]) == (tenant.id, tenant.user_id)
        assert line["timestamp"].endswith("Z")
    assert ours[-1] | {"method": "POST", "route": "/query", "status": 200} == ours[-1]
    assert file.stat().st_mode & 0o777 == 0o600


async def test_the_guide_s_security_events_have_their_names(
    service: Service, tenant_of_few: Tenant, tmp_path: Path
) -> None:
    file = tmp_path / "log"
    with configured(file=file):
        await tenant_of_few.user.ask("sudo rm -rf /")
        await tenant_of_few.user.ask("Read the file ../../etc/passwd")
        for _ in range(3):
            await tenant_of_few.user.ask("What does note.md say?")
        await tenant_of_few.user.get("/v1/audit/events")
        await (await service.client("bh_nobody")).get("/v1/me")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    kinds = {line["type"]: line for line in found if line["event"] == SecurityEvent.VIOLATION}
    assert set(kinds) == set(Violation) - {Violation.TOOL_DENIED}
    assert all(line["level"] == "warning" for line in kinds.values())
    assert kinds["invalid_query"]["rule"]
    assert kinds["invalid_query"]["user_id"] == tenant_of_few.user_id
    assert kinds["unauthenticated"]["address"] == "127.0.0.1"
    assert kinds["forbidden"]["reason"] == "lacks_scope:audit:read"
    used = next(line for line in found if line["event"] == SecurityEvent.TOOL_USED)
    assert (used["tool"], used["outcome"]) == ("docs__read_file", "succeeded")


@pytest.fixture
async def tenant_of_few(service: Service) -> Tenant:
    """A tenant whose user may ask four times a minute."""
    policy = POLICY.replace("100000/minute", "4/minute").replace("servers:", "input: {preset: strict}\nservers:")
    return await service.new_tenant(policy=policy, files={"note.md": "a note"})


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(files={"note.md": "a note"})


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines_of_log, "_PATIENCE_S", 0.1)


@pytest.mark.parametrize("trouble", ["full", "closed", "stuck"])
async def test_a_log_that_cannot_be_written_fails_no_query_and_says_so_afterwards(
    tenant: Tenant, tmp_path: Path, trouble: str, impatient: None
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with configured(file=Path("/dev/full") if trouble == "full" else fifo) as lines:
        if trouble == "closed":
            os.close(reader)
        for _ in range(400 if trouble == "stuck" else 1):
            structlog.get_logger().info("filler", text="x" * 1000)
        answer = await tenant.user.ask("What does note.md say?")
        lines.flush(3)
    if trouble != "closed":
        os.close(reader)
    assert answer.status_code == 200, answer.text
    assert lines._lost > 0, "the control: there was trouble"


def test_a_log_that_can_be_written_again_says_how_many_lines_it_has_lost(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with configured(file=fifo) as lines:
        os.close(reader)
        structlog.get_logger().info("lost")
        lines.flush(10)  # the machine may be busy
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        structlog.get_logger().info("kept")
        lines.flush(10)  # the machine may be busy
        found = [json.loads(line) for line in os.read(reader, 10_000).splitlines()]
    os.close(reader)
    assert [(line["event"], line.get("lines")) for line in found] == [("logs.lost", 1), ("kept", None)]


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with configured(file=file) as lines:
        structlog.get_logger().info("one")
        lines.flush(10)  # the machine may be busy
        file.rename(tmp_path / "log.1")
        structlog.get_logger().info("two")
        lines.flush(10)  # the machine may be busy
    assert [json.loads(path.read_text())["event"] for path in (tmp_path / "log.1", file)] == ["one", "two"]


class Halting:
    """A sink that stops in each write until it is told to go on."""

    def __init__(self) -> None:
        self.written, self.halts, self.may_go_on = b"", Event(), Event()

    def write(self, data: bytes) -> None:
        self.halts.set()
        assert self.may_go_on.wait(10)
        self.written += data


def test_a_flush_waits_for_what_came_while_others_were_written() -> None:
    sink = Halting()
    lines = Lines(sink, str)
    lines.put("one")
    assert sink.halts.wait(10)
    lines.put("two")
    assert not lines.flush(0.01), "the control: it is being written"
    Timer(0.1, sink.may_go_on.set).start()
    assert lines.flush(10)
    assert sink.written == b"one\ntwo\n"


def test_a_line_that_was_cut_in_two_spoils_no_other(tmp_path: Path, impatient: None) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with configured(file=fifo) as lines:
        structlog.get_logger().info("cut", text="x" * 1_000_000)
        assert lines.flush(10)
        first = os.read(reader, 1 << 20)
        structlog.get_logger().info("kept")
        assert lines.flush(10)
        second = os.read(reader, 1 << 20)
    os.close(reader)
    assert first.startswith(b"{")
    assert not first.endswith(b"\n"), "the control: it was cut"
    assert [json.loads(line)["event"] for line in second.splitlines()[1:]] == ["logs.lost", "kept"]


def test_a_file_that_cannot_be_begun_anew_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    with configured(file=folder / "log") as lines:
        for step in (lambda: folder.rename(tmp_path / "old"), folder.mkdir):
            structlog.get_logger().info("one")
            assert lines.flush(10)
            step()
        structlog.get_logger().info("two")
        assert lines.flush(10)
    found = [json.loads(line)["event"] for line in (folder / "log").read_text().splitlines()]
    assert found == ["logs.lost", "two"]


def test_an_exception_of_many_is_cut(capfd: pytest.CaptureFixture[str]) -> None:
    error: Exception = ValueError()
    for _ in range(8):
        error = ExceptionGroup("", [error] * 10)
    with configured() as lines:
        structlog.get_logger().error("failed", exc_info=error)
        (found,) = said(lines, capfd)
    assert found["exception"].count("\n") < 1_000, "of a hundred million"


def test_a_flood_is_cut_and_holds_up_nobody(tmp_path: Path, impatient: None) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with configured(file=fifo) as lines:
        for number in range(30_000):
            lines.put(f"{number:0100}")
        assert len(lines._waiting) <= 10_000
        lines.flush(10)  # the machine may be busy
        assert lines._lost > 0
        with suppress(BlockingIOError):
            while os.read(reader, 1 << 20):
                pass
        lines.flush(0.1)
    os.close(reader)


def test_every_security_event_stands_in_the_documents() -> None:
    page = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
    section = page.partition("### Security events")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    assert {row[1].strip(" `") for row in rows} == set(SecurityEvent)
    kinds = next(row[3] for row in rows if "security.violation" in row[1])
    assert set(re.findall(r"`(\w+)`(?= \(|,|:)", kinds)) >= set(Violation)
