"""What goes to the log of a text that a server has provoked: of a secret nothing, and of a long one a part."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID, uuid4

import pytest
import structlog

from app.telemetry import logs

TENANT = uuid4()


@contextmanager
def configured() -> Iterator[None]:
    """Inside the block as the service logs, for a caller of the tenant; after it as before."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    logs.configure("info")
    try:
        with structlog.contextvars.bound_contextvars(tenant_id=str(TENANT)):
            yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.configure(**before)


def redact(tenant_id: UUID, text: str) -> str:
    return text.replace("pineapple", "[redacted]") if tenant_id == TENANT else text


def said(capsys: pytest.CaptureFixture[str]) -> str:
    logging.getLogger("mcp.client").warning("Failed to validate: %s", "pineapple")
    try:
        int("pineapple")
    except ValueError:
        logging.getLogger().exception("Unhandled")  # as mcp does
        structlog.get_logger().exception("failed", detail="pineapple")
    return capsys.readouterr().err


def test_no_line_of_a_library_or_of_ours_holds_a_secret_of_whom_it_is_logged_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with configured():
        with logs.redacting(redact):
            lines = said(capsys)
            with structlog.contextvars.bound_contextvars(tenant_id=str(uuid4())):
                assert "pineapple" in said(capsys), "another tenant's line"
        assert [line.count("pineapple") for line in said(capsys).splitlines()] == [1, 2, 3], "the control: afterwards"
    assert [json.loads(line)["tenant_id"] for line in lines.splitlines()] == [str(TENANT)] * 3
    assert "pineapple" not in lines


def test_what_a_library_repeats_of_a_server_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    with configured():
        logging.getLogger().warning("Message was: %s", "x" * 1_000_000)
    assert 10_000 < len(capsys.readouterr().err) < 11_000
