"""`bulkhead policy` against a real service: what it shows, what it exits with, and that it never shows a traceback."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import pytest
from typer.testing import CliRunner, Result

from app.cli import cli
from tests.service import POLICY, Service, Tenant

ROOT: Final = Path(__file__).resolve().parent.parent
NARROW: Final = POLICY.replace('["docs__*"]', "[docs__list_directory]")
Run = Callable[..., Awaitable[Result]]


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    tenant = await service.new_tenant(files={"note.md": "text"})
    await tenant.user.ask("What does note.md say?")
    return tenant


@pytest.fixture
def run(service: Service, tenant: Tenant) -> Run:
    """The command as the tenant's admin, in a thread: the service is in this loop."""
    environment = {"BULKHEAD_URL": service.url, "BULKHEAD_API_KEY": _key(tenant), "NO_PROXY": "127.0.0.1"}

    async def run(*arguments: str, **changed: str | None) -> Result:
        def invoke() -> Result:
            return CliRunner().invoke(cli, ["policy", *arguments], env=environment | changed)

        return await asyncio.to_thread(invoke)

    return run


def _key(tenant: Tenant) -> str:
    return tenant.admin.headers["Authorization"].removeprefix("Bearer ")


def written(folder: Path, policy: str, name: str = "policy.yaml") -> str:
    path = folder / name
    path.write_text(policy)
    return str(path)


async def test_a_document_is_validated_without_any_service(tmp_path: Path) -> None:
    good = written(tmp_path, POLICY)
    bad = written(tmp_path, POLICY.replace("bulkhead/1", "bulkhead/9"), "bad.yaml")
    for file, code, said in ((good, 0, "no fault"), (str(tmp_path / "absent"), 2, "cannot be read")):
        told = CliRunner().invoke(cli, ["policy", "validate", file])
        assert (told.exit_code, said in told.output) == (code, True), told.output
    ended = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "app.cli", "policy", "validate", bad],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, "/schema" in ended.stderr, ended.stdout) == (1, True, ""), ended
    assert "Traceback" not in ended.stderr
    assert "\x1b" not in ended.stderr, "no colours in a pipe"
    waits = "servers: {web: {template: browser, allowed_domains: [a.example]}}\ntools: {approve: ['web__*']}\n"
    told = CliRunner().invoke(cli, ["policy", "validate", written(tmp_path, f"schema: bulkhead/1\n{waits}")])
    assert (told.exit_code, "warning: web: " in told.output) == (0, True), told.output


async def test_from_a_draft_in_a_file_to_what_holds_and_back(run: Run, tenant: Tenant, tmp_path: Path) -> None:
    file = written(tmp_path, NARROW)
    shown = await run("diff", file)
    assert shown.exit_code == 0, shown.output
    assert "/tools/allow" in shown.output
    assert "denied (default_deny)" in shown.output
    replayed = await run("backtest", file)
    assert (replayed.exit_code, "1 flip" in replayed.output) == (1, True), replayed.output
    assert tenant.user_id in replayed.output
    example = next(word for word in replayed.output.split() if word.endswith("/1"))
    why = await run("explain", "--call", example)
    assert (why.exit_code, "tools.allow: docs__*" in why.output) == (0, True), why.output
    assert len((await tenant.admin.get("/v1/policies")).json()["items"]) == 2, "one draft for the one file"
    held = await run("publish", file)
    assert (held.exit_code, "Version 2 holds" in held.output) == (0, True), held.output
    assert "Version 1 holds" in (await run("rollback")).output


async def test_a_dry_run_and_an_explanation(run: Run, tenant: Tenant, tmp_path: Path) -> None:
    calls = written(tmp_path, json.dumps([{"tool": "docs__read_file", "arguments": {"path": "../x"}}]), "calls.json")
    denied = await run("dry-run", "published", "--role", "user", "--calls", calls)
    assert (denied.exit_code, "denied" in denied.output, "path" in denied.output) == (1, True, True), denied.output
    asked = await run("dry-run", "published", "--user", tenant.user_id, "--query", "hello")
    assert (asked.exit_code, "is let in" in asked.output) == (0, True), asked.output
    told = await run("explain", "--tool", "docs__read_file", "--json")
    assert {entry["access"] for entry in json.loads(told.output)["entries"]} == {"allowed"}
    waits = written(tmp_path, POLICY.replace('["docs__*"]', '["docs__*"], approve: [docs__read_file]'))
    calls = written(tmp_path, json.dumps([{"tool": "docs__read_file", "arguments": {"path": "x.md"}}]), "calls.json")
    waiting = await run("dry-run", waits, "--role", "user", "--calls", calls)
    assert (waiting.exit_code, "needs_approval" in waiting.output) == (1, True), waiting.output
    assert "narrower" in (await run("diff", waits)).output


@pytest.mark.parametrize(
    ("arguments", "changed", "code", "said"),
    [
        (("diff", "999"), {}, 1, "not_found"),
        (("publish", "999"), {}, 1, "not_found"),
        (("rollback", "--to", "999"), {}, 1, "has held before"),
        (("dry-run", "published", "--query", "a"), {}, 2, "Give --role or --user"),
        (("diff", "absent.yaml"), {}, 2, "cannot be read"),
        (("diff", "1"), {"BULKHEAD_URL": "http://127.0.0.1:1"}, 2, "cannot be asked"),
        *(
            (("diff", "1"), {"BULKHEAD_URL": url}, 2, "BULKHEAD_URL must begin with http:// or https://")
            for url in ("nonsense", "127.0.0.1:8000")
        ),
        (("diff", "1"), {"BULKHEAD_API_KEY": None}, 2, "BULKHEAD_ADMIN_KEY"),
        (("diff", "1"), {"BULKHEAD_API_KEY": "bh_wrong"}, 2, "unauthenticated"),
        (("diff", "1"), {"BULKHEAD_API_KEY": "a\nb"}, 2, ""),
        (("backtest", "1", "--since", "yesterday"), {}, 1, "/body/since"),
        (("diff",), {}, 2, "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
async def test_what_goes_wrong_is_a_line_and_a_code(
    run: Run, arguments: tuple[str, ...], changed: dict[str, Any], code: int, said: str
) -> None:
    ended = await run(*arguments, **changed)
    assert ended.exit_code == code, ended.output
    assert said in " ".join(ended.output.split()), ended.output
    assert ended.exception is None or isinstance(ended.exception, SystemExit), "a traceback, in a real process"


STRANGERS: Final = [
    (200, b"{}"),
    (200, b"null"),
    (200, b'[{"version": 1}]'),
    (200, b"[" * 100_000),
    (422, b'{"errors": ["x"]}'),
    (409, b'{"errors": 5}'),
]


@pytest.fixture(scope="module")
def stranger() -> Iterator[str]:
    """A service that answers in JSON and is not Bulkhead: with what the path's first part counts to."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, body = STRANGERS[int(self.path.split("/")[1])]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://me:hunter2@127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("number", range(len(STRANGERS)))
async def test_what_is_not_bulkhead_gets_a_line_and_no_traceback(
    run: Run, stranger: str, tmp_path: Path, number: int
) -> None:
    url = {"BULKHEAD_URL": f"{stranger}/{number}"}
    file = written(tmp_path, POLICY)
    for arguments in (["diff", file], ["publish", "1"], ["explain"], ["explain", "--call", "a/1"], ["backtest", "1"]):
        ended = await run(*arguments, **url)
        assert isinstance(ended.exception, SystemExit), (arguments, ended.exception)
        assert (ended.exit_code, "does not answer like Bulkhead" in ended.output) == (2, True), ended.output
        assert "hunter2" not in ended.output


async def test_a_document_cannot_give_orders_to_a_terminal(run: Run, tenant: Tenant) -> None:
    evil = f'{POLICY}instructions: "\\e]0;owned\\a[red]\\e[2J"\n'
    version = (await tenant.admin.make("/v1/policies", content=evil.encode()))["version"]
    shown = await run("diff", str(version), "--against", "1")
    assert shown.exit_code == 0, shown.output
    assert "\x1b" not in shown.output
    assert "[red]" in shown.output
