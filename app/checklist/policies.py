"""Whether what the guide asks of templates, policies and screening is what this program does: each by trying."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final

from anyio import to_thread
from sqlalchemy import text

from app.caller import PLATFORM_TENANT
from app.checklist.findings import Item, Verdict, judged, warned
from app.checklist.ground import Ground
from app.policies import document, engine, screening
from app.policies.decision import BuiltIn
from app.policies.document import PolicyInvalid
from app.policies.engine import PinnedTool, ToolRequest
from app.policies.terms import InputRules
from app.policies.versions import Published

_MB: Final = 1 << 20
_SECONDS: Final = 4
_MOST: Final = 500
_SERVERS: Final = """\
schema: bulkhead/1
servers:
  files: {template: filesystem, root: files}
  pages: {template: browser, allowed_domains: [example.com]}
  tables: {template: postgres, dsn: "secret:dsn", allowed_schemas: [public, reporting]}
"""
_STRICT: Final[dict[str, dict[str, Any]]] = {
    "files": {
        "readonly": True,
        "max_file_size": 10 * _MB,
        "allowed_extensions": (".txt", ".md", ".json", ".py"),
    },
    "pages": {"block_private_ips": True, "timeout_s": 30, "isolation": "run"},
    "tables": {"readonly": True, "connect_timeout_s": 30, "max_connections": 5},
}
_BOUNDS: Final = {"max_steps": 20, "timeout_s": 300, "max_tool_calls": 10, "requests": "10/minute"}
# What the guide's rules must refuse, by the rule that does.
_ATTEMPTS: Final = {
    "rm_rf": "please rm -rf /",
    "sudo": "sudo su",
    "chmod_777": "chmod 777 /etc",
    "path_traversal": "read ../../etc/passwd",
    "script_tag": "<SCRIPT>alert(1)</SCRIPT>",
    "drop_table": "'; DROP TABLE users; --",
    "suspicious_character": "a | b",
    "max_length": "a" * 1_001,
}
_CANARY: Final = """\
schema: bulkhead/1
servers: {docs: {template: filesystem, root: docs}}
tools:
  allow: [docs__read_file, docs__list_directory]
  rules: |
    @id("drafts")
    forbid (principal, action == Action::"docs__read_file", resource)
    when { context.arguments.path like "drafts/*" };
"""
_TOOLS: Final = tuple(
    PinnedTool(
        name=f"docs__{name}",
        server="docs",
        description="",
        input_schema={"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    )
    for name in ("read_file", "list_directory", "write_file")
)
# A call, and the rule that must decide it; the first is the control.
_CALLS: Final = (
    ("docs__read_file", "a.md", "allow:docs__read_file"),
    ("docs__list_directory", "a", "allow:docs__list_directory"),
    ("docs__read_file", "drafts/a.md", "drafts"),
    ("docs__write_file", "a.md", BuiltIn.DEFAULT_DENY),
    ("docs__delete_file", "a.md", BuiltIn.UNKNOWN_TOOL),
)
_PUBLISHED: Final = text("""
select p.tenant_id, p.version, p.pinned_at, v.document, p.pinned_tools
from published_policies p join policy_versions v on v.tenant_id = p.tenant_id and v.version = p.version
""")
_TENANTS: Final = text("select id from tenants where status = 'active' and id <> :platform order by id limit :most")
_SET_TENANT: Final = text("select set_config('app.tenant_id', :tenant_id, true)")
_SWITCHES: Final = text(
    "select count(*), count(*) filter (where scope = 'all') from kill_switches where lifted_at is null"
)


def _template(name: str) -> Any:
    async def check(_: Ground) -> Verdict:
        server = document.parse(_SERVERS).servers[name]
        loose = [key for key, value in _STRICT[name].items() if getattr(server, key) != value]
        return judged([f"{key} is not what the guide asks" for key in loose], "What a policy leaves out is strict.")

    return check


async def _bounds(_: Ground) -> Verdict:
    limits = document.parse(_SERVERS).limits
    loose = [key for key, value in _BOUNDS.items() if getattr(limits, key) != value]
    return judged([f"{key} is not what the guide asks" for key in loose], "20 steps, 300 s, 10 queries in a minute.")


async def _default_deny(_: Ground) -> Verdict:
    return await to_thread.run_sync(_decide, abandon_on_cancel=True)


def _decide() -> Verdict:
    compiled = engine.compile_policy(document.parse(_CANARY), _TOOLS)
    faults = []
    for tool, path, rule in _CALLS:
        decision = compiled.decide(ToolRequest(tool, {"path": path}, user_id="u", role="user"))
        if decision.rule != rule or bool(decision) != rule.startswith("allow:"):
            faults.append(f"{tool} on {path} was decided by {decision.rule}, and not by {rule}")
    return judged(faults, f"{len(_CALLS)} calls were decided as the policy says.")


async def _screening(_: Ground) -> Verdict:
    strict = InputRules(preset="strict")
    through = [name for name, query in _ATTEMPTS.items() if screening.screen(query, strict).allowed]
    faults = [f"strict lets through what {name} is for" for name in through]
    if not screening.screen("What does welcome.md say?", strict).allowed:
        faults.append("strict refuses an ordinary question")
    if screening.screen("sudo su", InputRules()).allowed:
        faults.append("the default preset lets an attempt through")
    return judged(faults, f"{len(_ATTEMPTS)} attempts were refused, and an ordinary question was not.")


async def _published(ground: Ground) -> Verdict:
    """As many tenants as there is time for; each alone, as the role that serves."""
    ends = time.monotonic() + _SECONDS
    rows = await ground.database.rows("platform", _TENANTS, platform=PLATFORM_TENANT, most=_MOST)
    faults, held, looked_at = [], 0, 0
    for (tenant_id,) in rows:
        if time.monotonic() > ends:
            break
        looked_at += 1
        async with ground.database.as_role("app") as connection:
            await connection.execute(_SET_TENANT, {"tenant_id": str(tenant_id)})
            row = (await connection.execute(_PUBLISHED)).one_or_none()
        if row is not None and not await to_thread.run_sync(_holds, Published(*row[1:]), abandon_on_cancel=True):
            faults.append(f"the policy of tenant {tenant_id} can no longer be read")
        held += row is not None
    return judged(
        faults[:10], f"{held} published policies of {looked_at} of {len(rows)} tenants are read as they stand."
    )


def _holds(published: Published) -> bool:
    try:
        published.compiled()
    except PolicyInvalid:
        return False
    return True


async def _switches(ground: Ground) -> Verdict:
    _, stopped = (await ground.database.rows("app", _SWITCHES))[0]
    engaged, _ = (await ground.database.rows("platform", _SWITCHES))[0]
    if stopped:
        return warned("A kill switch stops everything.", "Lift it when the incident is over: DELETE /v1/switches/{id}.")
    return judged([], f"{engaged} hold now; a run in flight can read them.")


def _items() -> Iterator[Item]:
    for name, template, line in (("files", "filesystem", 3), ("pages", "browser", 4), ("tables", "postgres", 5)):
        yield Item(
            f"{template}-defaults",
            (line,),
            f"The template {template} is strict where a policy says nothing",
            "Run the version as it was released: its own defaults have been changed.",
            _template(name),
        )


ITEMS: Final = (
    *_items(),
    Item(
        "run-defaults",
        (6, 8),
        "Runs and requests are bounded where a policy says nothing",
        "Run the version as it was released: its own defaults have been changed.",
        _bounds,
    ),
    Item(
        "policy-default-deny",
        (6,),
        "What no rule allows is denied",
        "Stop the service: the decision engine does not do what policies say. Install what is pinned, and try again.",
        _default_deny,
    ),
    Item(
        "published-policies",
        (6,),
        "Every tenant's published policy can be read",
        "The tenant publishes a version that this release reads; until then its queries are refused.",
        _published,
    ),
    Item(
        "kill-switches",
        (6,),
        "Kill switches can be read",
        "Run `bulkhead migrate` as the owner role: the roles that serve lack a right.",
        _switches,
    ),
    Item(
        "screening",
        (7,),
        "The guide's attempts are refused before a model sees them",
        "Run the version as it was released: its rules have been changed.",
        _screening,
    ),
)
