"""The documents say what the code is: settings, codes, events, keys, rules, names, links, and commands that work."""

from __future__ import annotations

import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from http import HTTPStatus
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException

import app
from app import connections, problems
from app.audit.events import EventType
from app.audit.vocabulary import VOCABULARY
from app.auth.jwks import DevelopmentIssuer
from app.errors import AppError
from app.policies import document, screening
from app.policies.decision import BuiltIn
from app.policies.engine import ToolRequest
from app.runs import state
from app.settings import Settings
from app.tables import metadata
from tests.service import Service, Tenant

ROOT: Final = Path(__file__).resolve().parent.parent
PAGES: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README: Final = (ROOT / "README.md").read_text()


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def rows(text: str) -> Iterator[list[str]]:
    """The cells of all tables, heads and rules left out."""
    lines = text.splitlines()
    for above, line in pairwise(lines):
        if line.startswith("|") and above.startswith("|") and not set(line) <= set("|-: "):
            yield [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    level, _, _ = heading.partition(" ")
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, heading
    return found[1]


def codes(cell: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


# Settings


def settings() -> dict[str, str]:
    """Every setting as it would be written to have its default; nothing for None."""
    fields = Settings.model_fields.items()
    return {f"BULKHEAD_{name.upper()}": written(field.default) for name, field in fields}


def written(default: object) -> str:
    if default is None:
        return ""
    return ",".join(default) if isinstance(default, tuple) else str(default).lower()


def test_every_setting_stands_in_the_reference_with_its_default() -> None:
    table = {codes(name)[0]: default for name, default, _ in rows(page("settings.md").partition("\n## ")[0])}
    assert {name: "".join(codes(default)) for name, default in table.items()} == settings()
    assert {default for name, default in table.items() if not codes(default)} == {"none"}


def test_every_setting_stands_in_the_example_with_its_default() -> None:
    lines = re.findall(r"^([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert dict(lines) == settings()
    assert len(lines) == len(settings())


def test_the_example_as_it_is_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in settings():
        monkeypatch.delenv(name, raising=False)
    assert Settings(_env_file=ROOT / ".env.example") == Settings(_env_file=None)


def test_an_empty_metrics_token_is_none_and_opens_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BULKHEAD_METRICS_TOKEN", "")
    assert Settings(_env_file=None).metrics_token is None


def test_every_name_of_the_guide_is_mapped() -> None:
    names = {codes(row[0])[0] for row in rows(section(page("settings.md"), "## The guide's names"))}
    assert names == {
        *("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GROQ_API_KEY"),
        *("FILESYSTEM_ROOT", "DATABASE_URL", "MCP_TIMEOUT", "MAX_TOOL_CALLS", "ALLOWED_DOMAINS"),
    }


def test_the_file_of_secrets_is_not_under_version_control() -> None:
    assert {".env", ".bulkhead/"} <= set((ROOT / ".gitignore").read_text().splitlines())


# Errors


def subclasses(kind: type[AppError]) -> set[type[AppError]]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def error_codes() -> dict[str, set[int]]:
    """Every code that a caller may meet, with its statuses: of errors, of endings, of what the framework refuses."""
    for module in pkgutil.walk_packages(app.__path__, "app."):
        # These run inside the sandbox or before it, beside files that are only there.
        if not module.name.endswith((".server", "_launcher")):
            import_module(module.name)
    found: dict[str, set[int]] = {}
    for kind in subclasses(AppError):
        found.setdefault(kind.code, set()).add(kind.status)
    endings = [value for value in vars(state).values() if isinstance(value, state.Ending)]
    for ending in (*endings, state.cancelled(state.StopCause.USER)):
        if ending.code is not None:
            found.setdefault(ending.code, set()).add(ending.http_status)
    for refusal in vars(connections).values():
        if isinstance(refusal, connections.Refusal):
            found.setdefault(refusal.code, set()).add(refusal.status)
    request = Request({"type": "http", "app": FastAPI(), "path": "/", "headers": [], "server": ("x", 80)})
    for status in (400, 404, 405, 413, 422):
        refused = problems._from_http(request, HTTPException(status))
        found.setdefault(refused.code, set()).add(refused.status)
    return found


def test_every_error_code_is_explained_with_its_status() -> None:
    text = page("errors.md")
    documented = {
        code: {int(number) for number in re.findall(r"\b[2-5]\d\d\b", section(text, f"## {code}").partition(".")[0])}
        for code in re.findall(r"^## (\S+)$", text, re.MULTILINE)
    }
    assert documented == error_codes()


def test_the_causes_of_a_cancellation_are_all_named() -> None:
    named = codes(section(page("errors.md"), "## cancelled"))
    assert set(named) - {"detail", "cancel_cause"} == set(state.StopCause)


def test_the_table_of_endings_is_that_of_the_code() -> None:
    table = list(rows(section(page("request-flow.md"), "## How a run can end")))
    documented = {(codes(end)[0], int(http[:3])) for _, end, http, _ in table if codes(end)}
    endings = [value for value in vars(state).values() if isinstance(value, state.Ending)]
    endings.append(state.cancelled(state.StopCause.USER))
    assert documented == {(ending.state.value, ending.http_status) for ending in endings}
    assert all(HTTPStatus(status) for _, status in documented)


# Packages


def test_every_package_and_module_at_the_top_has_its_place() -> None:
    inside = {path for path in (ROOT / "app").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    named = {
        name
        for row in rows(section(page("architecture.md"), "## The packages, from the top down"))
        for name in codes(row[0])
    }
    assert named == {f"app/{path.name}" for path in inside if path.name != "__init__.py"}


# Events


def event_fields() -> dict[str, set[str]]:
    table = rows(section(page("audit.md"), "## Events"))
    return {kind: set(codes(fields.partition(";")[0])) for kinds, _, fields in table for kind in codes(kinds)}


def test_every_type_of_event_stands_in_the_vocabulary() -> None:
    assert set(event_fields()) == set(EventType)


def test_events_have_the_fields_that_are_documented() -> None:
    assert event_fields() == {kind: set(schema.fields) for kind, schema in VOCABULARY.items()}


def test_every_table_has_its_line_on_what_is_kept_of_an_erased_user() -> None:
    table = rows(section(page("erasure.md"), "## What is kept of an erased user"))
    assert {name for row in table for name in codes(row[0])} == set(metadata.tables)


# Where a test sees those that it takes more to provoke.
_SEEN_ELSEWHERE: Final = {
    "approval.": "runs/approvals/test_path.py",
    "audit.": "audit/test_search.py",
    "auth.slowed": "limits/test_attempts.py",
    "auth.succeeded": "audit/test_ledger.py",
    "conversation.": "runs/conversations/test_conversations.py",
    "egress.": "servers/test_egress.py",
    "error.raised": "audit/test_ledger.py",
    "limit.exceeded": "limits/test_quotas.py",
    "query.refused": "audit/test_ledger.py",
    "run.cancel_ordered": "runs/lifecycle/test_stops.py",
    "run.given_back": "runs/test_background.py",
    "run.queued": "runs/test_background.py",
    "run.read": "audit/test_ledger.py",
    "run.resumed": "runs/test_background.py",
    "secret.accessed": "secrets/test_store.py",
    "server.": "runs/test_quarantine.py",
    "tool.repeated": "runs/test_background.py",
    "tenant.erased": "tenants/test_erasure.py",
    "user.erased": "tenants/test_erasure.py",
}


def test_what_is_said_to_be_seen_elsewhere_is() -> None:
    for kind, where in _SEEN_ELSEWHERE.items():
        assert kind in (ROOT / "tests" / where).read_text(), where


async def test_every_type_of_event_happens(service: Service) -> None:
    tenant = await service.new_tenant(files={"note.md": "text", "old.md": "text"})
    await _do_everything(service, tenant)
    platforms = {"auth.failed", "platform.acted", *(kind for kind in EventType if kind.startswith("model_endpoint."))}
    seen = {event["type"] for event in await tenant.admin.events()}
    seen |= platforms & {event["type"] for event in await service.platform.events()}
    assert {kind for kind in seen if not kind.startswith(tuple(_SEEN_ELSEWHERE))} == {
        kind for kind in EventType if not kind.startswith(tuple(_SEEN_ELSEWHERE))
    }


async def _do_everything(service: Service, tenant: Tenant) -> None:
    """One thing at least for each type of event."""
    admin, base = tenant.admin, f"/v1/tenants/{tenant.id}"
    await tenant.user.ask("What does note.md say?")
    await admin.get("/v1/workspaces/docs/files/note.md")
    await admin.delete("/v1/workspaces/docs/files/old.md")
    assert (await admin.delete("/v1/workspaces/docs")).is_success
    for role in ("auditor", "user"):
        assert (await admin.patch(f"/v1/users/{tenant.user_id}", json={"role": role})).is_success
    endpoint = {"name": "listed", "base_url": "https://models.example", "models": ["a"], "credential": "sk-none"}
    path = f"/v1/platform/models/{(await service.platform.make('/v1/platform/models', json=endpoint))['id']}"
    assert (await service.platform.patch(path, json={"is_enabled": False})).is_success
    assert (await service.platform.delete(path)).is_success
    issuer = DevelopmentIssuer(service.data_dir / "issuer.pem", issuer="https://issuer.example")
    registered = await admin.make("/v1/issuers", json={"issuer": issuer.issuer, "jwks": issuer.public_jwks()})
    await admin.delete(f"/v1/issuers/{registered['id']}")
    switch = await admin.make("/v1/switches", json={"scope": "tool", "target": "docs__x", "reason": "test"})
    await admin.delete(f"/v1/switches/{switch['id']}")
    locator = {"provider": "environment", "variable": "BULKHEAD_SECRET_A"}
    for client, path, body in (
        (admin, "/v1/secrets/key", {"value": "some-text"}),
        (service.platform, f"{base}/secret-bindings/key", {"locator": locator}),
    ):
        assert (await client.put(path, json=body)).is_success
        assert (await client.delete(path)).is_success
    await admin.make("/v1/policies/1/check")
    await admin.make("/v1/policies/1/dry-run", json={"as": {"role": "user"}, "query": "hello"})
    await admin.make("/v1/policies/1/backtest", json={})
    await admin.make("/v1/policies/rollback", json={"to": 1})
    await admin.publish((await admin.get("/v1/policies/1")).json()["document"].replace("100000/minute", "1/day"))
    for _ in range(3):
        await tenant.user.ask("list the files")
    key = await admin.make(f"/v1/keys/{tenant.user_key_id}/rotate", json={})
    await admin.delete(f"/v1/keys/{key['id']}")
    await (await service.client(key["key"])).get("/v1/me")
    for act in (f"/v1/users/{tenant.user_id}/disable", f"/v1/users/{tenant.user_id}/enable"):
        assert (await admin.post(act)).is_success
    for act in ("disable", "enable"):
        assert (await service.platform.post(f"{base}/{act}")).is_success


def test_every_metric_of_ours_is_listed() -> None:
    source = (ROOT / "app" / "telemetry" / "metrics.py").read_text()
    listed = {codes(row[0])[0] for row in rows(section(page("observability.md"), "## Metrics"))}
    ours = {name for name in listed if name.startswith(("mcp_", "bulkhead_"))}
    assert ours == set(re.findall(r'"((?:mcp|bulkhead)_\w+)"', source))


# Policies


def policy_keys(schema: dict[str, Any], node: dict[str, Any], path: str = "") -> Iterator[str]:
    """The paths of all keys that the document takes."""
    node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
    if "oneOf" in node:  # the templates
        for part in node["oneOf"]:
            yield from policy_keys(schema, part, path)
    elif "$ref" in node.get("items", {}):
        yield from policy_keys(schema, node["items"], f"{path}[]")
    elif "patternProperties" in node:
        for part in node["patternProperties"].values():
            yield from policy_keys(schema, part, f"{path}.<name>")
    elif "properties" in node:
        for name, part in node["properties"].items():
            yield from policy_keys(schema, part, f"{path}.{name}" if path else name)
    else:
        yield path


def test_every_key_of_a_policy_is_explained() -> None:
    schema = document.PolicyDocument.model_json_schema()
    listed = {codes(row[0])[0] for row in rows(section(page("policies.md"), "## Keys"))}
    assert listed == set(policy_keys(schema, schema))


def test_every_rule_that_can_decide_is_named() -> None:
    named = {name for row in rows(section(page("policies.md"), "## How a call is decided")) for name in codes(row[0])}
    own = {"allow:<glob>", "deny:<glob>", "@id", "rules[n]", "kill_switch", "not_decided"}
    own |= {"overrides[n].allow", "overrides[n].deny:<glob>", "approve:<glob>", "overrides[n].approve:<glob>"}
    assert named == own | set(BuiltIn)


def test_every_screening_rule_is_named() -> None:
    tables = rows(section(page("policies.md"), "## Screening"))
    named = {name for row in tables if len(row) == 2 for name in codes(row[0])}
    assert named == screening.BUILT_IN | {"max_length", "invalid_text", "block[n]", "flag[n]"}


EXAMPLES: Final = re.findall(r"<!-- policy -->\n```yaml\n(.*?)```\n\n(.*?)\n\n", page("policies.md"), re.DOTALL)


@pytest.mark.parametrize(("text", "table"), EXAMPLES)
async def test_the_policies_of_the_page_decide_as_their_tables_say(service: Service, text: str, table: str) -> None:
    tenant = await service.new_tenant(policy=text)
    generation = (await service.sql("select generation from tenants where id = :id", role="platform", id=tenant.id))[0]
    active = await service.app.state.policies.current(tenant.id, generation[0])
    decided = []
    for role, tool, arguments, _, _ in (expected := list(rows(table))):
        request = ToolRequest(codes(tool)[0], json.loads(codes(arguments)[0]), user_id="u1", role=codes(role)[0])
        decision = active.compiled.decide(request)
        decided.append((request, decision.verdict, decision.rule))
    assert [(verdict, rule) for _, verdict, rule in decided] == [(row[3], codes(row[4])[0]) for row in expected], (
        decided
    )


def test_the_page_has_policies_to_try() -> None:
    assert len(EXAMPLES) == 4


async def test_the_tools_of_the_page_are_those_of_the_template(service: Service) -> None:
    tenant = await service.new_tenant(policy=EXAMPLES[0][0].replace('deny: ["*__delete*"]', ""))
    tools = (await tenant.user.get("/v1/me")).json()["tools"]
    listed = {codes(row[0])[0] for row in rows(section(page("policies.md"), "## Tools"))}
    assert {tool["name"] for tool in tools} == {f"docs__{name}" for name in listed}


# The README


def test_every_target_of_make_is_in_the_readme() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)) - {"help"}
    listed = {codes(row[0])[0] for row in rows(section(README, "## Commands"))}
    assert listed == {f"make {target}" for target in targets}


@pytest.mark.parametrize(("start", "folder"), [("README.md", "docs/"), ("docs/index.md", "")])
def test_every_page_is_found_from_where_readers_begin(start: str, folder: str) -> None:
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / start).read_text())}
    pages = {f"{folder}{path.name}" for path in (ROOT / "docs").glob("*.md") if path != ROOT / start}
    assert pages - links == set()


# Names, links, addresses


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        found = path.parent / target if target else path
        if not found.exists() or (anchor and anchor not in anchors(found)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, path.read_text()) == []


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = "[a](docs/errors.md#cancelled) [b](docs/errors.md#cancel) [c](docs/none.md) [d](#try-it)"
    assert broken_links(ROOT / "README.md", text) == ["docs/errors.md#cancel", "docs/none.md"]


def missing_names(text: str) -> list[str]:
    """Files and tests of ours that a page names in backticks, and that are not there."""
    missing = []
    for name, test in re.findall(r"`((?:app|tests|migrations|benchmarks)/[\w./-]+)(?:::(\w+))?`", text):
        path = ROOT / name
        if not path.exists() or (test and not re.search(rf"def {test}\(", path.read_text())):
            missing.append(f"{name}::{test}")
    return missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_and_tests_that_a_page_names_are_there(path: Path) -> None:
    assert missing_names(path.read_text()) == []


def test_a_name_of_nothing_is_found() -> None:
    text = (
        "`app/main.py` `app/none.py` `tests/test_docs.py::test_a_name_of_nothing_is_found` `tests/test_docs.py::test_x`"
    )
    assert missing_names(text) == ["app/none.py::", "tests/test_docs.py::test_x"]


HOSTS: Final = {
    *("127.0.0.1", "api.openai.com", "keepachangelog.com", "semver.org", "www.cedarpolicy.com"),
    *("tickets.example.com", "db.example.com", "models.example"),
}


@pytest.mark.parametrize("path", [*PAGES, ROOT / ".env.example"], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_names_no_machine_and_no_host_that_is_not_meant_to_be_visited(path: Path) -> None:
    text = path.read_text()
    hosts = {urlsplit(url).hostname or "" for url in re.findall(r"[a-z+]+://[^\s`'\")]+", text)}
    assert hosts - {""} <= HOSTS
    assert [name for name in (str(ROOT), str(Path.home()), str(Path(sys.prefix).resolve())) if f"{name}/" in text] == []
