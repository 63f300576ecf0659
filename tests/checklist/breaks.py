"""A break for each item of the checklist: how it is made worse, and what the item then says."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from app.checklist import databases, items, processes, upkeep
from app.checklist.ground import Ground
from app.db import DatabaseUrls
from app.keyring import new_entry
from app.outbound import destinations
from app.policies import document, engine, screening
from app.policies.document import PolicyDocument
from app.policies.engine import CompiledPolicy, PinnedTool
from app.policies.screening import Verdict
from app.sandbox.choice import ProbedSandbox
from app.sandbox.probe import Probe
from app.tenants import beneath
from tests.checklist.ground import At, Bare, breaks

_ELSEWHERE = "postgresql+asyncpg://app:0123456789@db.example/bulkhead"


# Keys


@breaks("keys-not-in-git", "fail", "a configured secret stands in notes.txt")
async def _a_committed_secret(at: At) -> Ground:
    token = at.ground.settings.metrics_token
    at.file("notes.txt", f"the token is {token.get_secret_value() if token else ''}\n")
    git = shutil.which("git") or ""
    for words in (("init", "-q"), ("add", "notes.txt")):
        await asyncio.to_thread(subprocess.run, [git, "-C", str(at.folder), *words], check=True)
    return replace(at.ground, checkout=at.folder)


@breaks("env-file", "fail", "others on this machine can read .env")
async def _a_readable_env_file(at: At) -> Ground:
    return replace(at.ground, env_file=at.file(".env", "A=b", mode=0o644))


@breaks("required-keys", "fail", "BULKHEAD_ROOT_KEYS is not set")
async def _no_root_keys(at: At) -> Ground:
    return at.set(root_keys=None)


@breaks("default-credentials", "fail", "1 keys of demo.env are valid")
async def _a_demo_in_production(at: At) -> Ground:
    at.file("demo.env", f"BULKHEAD_API_KEY={at.tenant.user_key}\n")
    return replace(at.set(data_dir=at.folder), is_demo=False)


@breaks("private-files", "fail", "others can read machine.env")
async def _readable_files(at: At) -> Ground:
    at.file("machine.env", mode=0o640)
    return at.set(data_dir=at.folder)


# What is elsewhere


@breaks("secret-providers", "fail", "the provider file does not give a secret that is bound (not_configured)")
async def _a_provider_that_is_not_set(at: At) -> Ground:
    path = f"/v1/tenants/{at.tenant.id}/secret-bindings/key"
    locator = {"provider": "file", "path": "key"}
    assert (await at.service.platform.put(path, json={"locator": locator})).is_success
    at.stack.push_async_callback(at.service.platform.delete, path)
    return at.ground


@breaks("limits-storage", "fail", "3 processes serve, and each counts by itself")
async def _processes_without_a_storage(at: At) -> Ground:
    return at.set(replicas=3)


@breaks("models-reached", "fail", "the model endpoint default is not reached")
async def _a_model_that_is_not_there(at: At) -> Ground:
    return at.set(model_api_key=SecretStr("any-key"), model_base_url="http://127.0.0.1:1/v1", model_loopback=True)


@breaks("issuers-reached", "warn", "the key set at 127.0.0.1:1 cannot be used")
async def _an_issuer_that_is_not_there(at: At) -> Ground:
    names = {"tenant_id": at.tenant.id, "id": str(uuid4())}
    await at.sql_until(
        "insert into issuers (tenant_id, id, issuer, audience, jwks_uri)"
        " values (:tenant_id, :id, 'https://127.0.0.1:1', 'bulkhead:there', 'https://127.0.0.1:1/keys')",
        undo="delete from issuers where tenant_id = :tenant_id and id = :id",
        **names,
    )
    return at.ground


# Policies


def _loosened(at: At, name: str, **loose: Any) -> Ground:
    strict = document.parse

    def parse(written: str) -> PolicyDocument:
        read = strict(written)
        return read.model_copy(update={"servers": {**read.servers, name: read.servers[name].model_copy(update=loose)}})

    at.patch.setattr(document, "parse", parse)
    return at.ground


@breaks("filesystem-defaults", "fail", "readonly is not what the guide asks")
async def _a_filesystem_that_writes(at: At) -> Ground:
    return _loosened(at, "files", readonly=False)


@breaks("browser-defaults", "fail", "block_private_ips is not what the guide asks")
async def _a_browser_that_goes_everywhere(at: At) -> Ground:
    return _loosened(at, "pages", block_private_ips=False)


@breaks("postgres-defaults", "fail", "max_connections is not what the guide asks")
async def _a_postgres_without_a_bound(at: At) -> Ground:
    return _loosened(at, "tables", max_connections=50)


@breaks("run-defaults", "fail", "timeout_s is not what the guide asks")
async def _runs_without_an_end(at: At) -> Ground:
    strict = document.parse
    loose = strict("schema: bulkhead/1\nlimits: {timeout_s: 3600}").limits
    at.patch.setattr(document, "parse", lambda written: strict(written).model_copy(update={"limits": loose}))
    return at.ground


@breaks("policy-default-deny", "fail", "docs__write_file on a.md was decided by allow:docs__*")
async def _an_engine_that_allows(at: At) -> Ground:
    strict = engine.compile_policy

    def compile_policy(read: PolicyDocument, tools: Sequence[PinnedTool]) -> CompiledPolicy:
        return strict(read.model_copy(update={"tools": read.tools.model_copy(update={"allow": ("docs__*",)})}), tools)

    at.patch.setattr(engine, "compile_policy", compile_policy)
    return at.ground


@breaks("published-policies", "fail", "can no longer be read")
async def _a_policy_of_another_time(at: At) -> Ground:
    rows = await at.sql("select document from policy_versions where tenant_id = :id", id=at.tenant.id)
    names = {"id": at.tenant.id, "was": rows[0][0]}
    await at.sql_until(
        "update policy_versions set document = cast(:was as text) || ' from_tomorrow: 1' where tenant_id = :id",
        undo="update policy_versions set document = :was where tenant_id = :id",
        **names,
    )
    return at.ground


@breaks("kill-switches", "fail", "code ProgrammingError")
async def _switches_that_cannot_be_read(at: At) -> Ground:
    await at.sql_until(
        "revoke select on kill_switches from bulkhead_app", undo="grant select on kill_switches to bulkhead_app"
    )
    return at.ground


@breaks("screening", "fail", "strict lets through what rm_rf is for")
async def _a_screening_that_sleeps(at: At) -> Ground:
    at.patch.setattr(screening, "screen", lambda *_: Verdict(allowed=True))
    return at.ground


# Sandboxes


def _bare(at: At) -> Ground:
    return replace(at.ground, sandbox=ProbedSandbox(Bare(), Probe(ok=True, backend="bare")))


@breaks("sandbox-holds", "fail", "a program inside reads a file of the host")
async def _no_sandbox(at: At) -> Ground:
    return _bare(at)


@breaks("sandbox-limits", "warn", "no writable cgroup")
async def _no_cgroup(at: At) -> Ground:
    assert at.ground.answering is not None
    return replace(at.ground, answering=replace(at.ground.answering, has_cgroup=False))


@breaks("sandbox-egress", "fail", "a server without a network reaches 127.0.0.1")
async def _a_network_for_everybody(at: At) -> Ground:
    return _bare(at)


@breaks("metadata-refused", "fail", "a name may resolve to the metadata address")
async def _rules_without_metadata(at: At) -> Ground:
    at.patch.setattr(destinations, "_is_metadata", lambda *_: False)
    return at.ground


@breaks("path-canary", "fail", "a link was opened")
async def _an_open_that_follows(at: At) -> Ground:
    at.patch.setattr(
        beneath, "open_at", lambda directory, parts, _: os.open(Path(*parts), os.O_RDONLY, dir_fd=directory)
    )
    return at.ground


@breaks("workspace-quotas", "warn", "No server may write to a workspace here: no loop device")
async def _no_quota(at: At) -> Ground:
    async def refusal() -> str | None:
        return "no loop device"

    return replace(at.ground, quota_refusal=refusal)


# Records


@breaks("audit-chain", "fail", "has another text than was chained")
async def _a_changed_event(at: At) -> Ground:
    await at.chained()
    newest = "select event_id from audit_chain where tenant_id = :id order by seq desc limit 1"
    (event,) = (await at.sql(newest, id=at.tenant.id))[0]
    await at.sql_until(
        "update audit_events set body = body || ' ' where tenant_id = :id and id = :event",
        undo="update audit_events set body = rtrim(body) where tenant_id = :id and id = :event",
        id=at.tenant.id,
        event=event,
    )
    return at.ground


@breaks("audit-lag", "fail", "are not chained, the oldest for")
async def _an_event_that_nobody_chains(at: At) -> Ground:
    await at.sql_until(
        "insert into audit_pending (tenant_id, event_id, at) values (:id, :event, now() - interval '1 hour')",
        undo="delete from audit_pending where tenant_id = :id and event_id = :event",
        id=at.tenant.id,
        event=str(uuid4()),
    )
    return at.ground


@breaks("audit-signer", "fail", "Heads are signed by keys that are not in the settings")
async def _another_signer(at: At) -> Ground:
    await at.chained()
    return at.set(audit_keys=SecretStr(new_entry("k9")))


@breaks("audit-heads-file", "fail", "The file of heads is not there")
async def _no_file_of_heads(at: At) -> Ground:
    return at.set(audit_heads_file=at.folder / "heads")


@breaks("metrics-token", "fail", "has less than 16 characters")
async def _a_short_token(at: At) -> Ground:
    return at.set(metrics_token=SecretStr("short"))


@breaks("told-to-others", "warn", "traces carry queries, answers and tool calls")
async def _texts_in_traces(at: At) -> Ground:
    return at.set(trace_content=True)


# The process


def confine(folder: Path, ground: Ground, patch: pytest.MonkeyPatch, *, status: str = "", root: str = "ro") -> Ground:
    """The same, whose kernel says the best of its process, in a container, but for this."""
    (folder / str(ground.process)).mkdir()
    sound = "Uid:\t10001 10001\nNoNewPrivs:\t1\nSeccomp:\t2\nCapEff:\t0\n"
    (folder / str(ground.process) / "status").write_text(sound + status)
    (folder / str(ground.process) / "mountinfo").write_text(f"1 2 0:3 / / {root},relatime - overlay overlay rw\n")
    patch.setattr(processes, "_PROC", folder)
    patch.setattr(processes, "is_container", lambda: True)
    return replace(ground, is_demo=False)


@breaks("process-user", "fail", "the service runs as root")
async def _root(at: At) -> Ground:
    return confine(at.folder, at.ground, at.patch, status="Uid:\t0 0\n")


@breaks("process-rights", "fail", "no filter of system calls holds; it holds capabilities (CapEff)")
async def _a_process_with_rights(at: At) -> Ground:
    return confine(at.folder, at.ground, at.patch, status="NoNewPrivs:\t0\nSeccomp:\t0\nCapEff:\t00000000a80425fb\n")


@breaks("read-only-root", "fail", "its root file system can be written to")
async def _a_writable_root(at: At) -> Ground:
    return confine(at.folder, at.ground, at.patch, root="rw")


@breaks("service-ready", "fail", "Nothing answers")
async def _no_service(at: At) -> Ground:
    return replace(at.ground, answering=None)


@breaks("listens-on", "fail", "The service listens on 0.0.0.0 without TLS")
async def _an_open_port(at: At) -> Ground:
    return at.set(host="0.0.0.0")  # noqa: S104  that is what is found


@breaks("trusted-hosts", "fail", "by a name that is not its own")
async def _any_host(at: At) -> Ground:
    return await at.answers(200, "{}")


@breaks("docs-page", "fail", "loads what is on other hosts")
async def _a_page_from_elsewhere(at: At) -> Ground:
    return await at.answers(200, '<script src="https://cdn.example/ui.js"></script>')


@breaks("openings", "warn", "BULKHEAD_JWKS_LOOPBACK lets key sets that tenants name be on this machine")
async def _loopback_for_tenants(at: At) -> Ground:
    return at.set(jwks_loopback=True)


# The database


@breaks("database-roles", "fail", "the role app has BYPASSRLS")
async def _a_role_past_row_security(at: At) -> Ground:
    await at.sql_until("alter role bulkhead_app bypassrls", undo="alter role bulkhead_app nobypassrls")
    return at.ground


@breaks("row-security", "fail", "users shows rows to a connection without a tenant")
async def _a_table_without_row_security(at: At) -> Ground:
    await at.sql_until(
        "alter table users disable row level security", undo="alter table users enable row level security"
    )
    return at.ground


@breaks("record-append-only", "fail", "the role app may update audit_events set")
async def _a_record_that_can_be_changed(at: At) -> Ground:
    await at.sql_until(
        "grant update on audit_events to bulkhead_app", undo="revoke update on audit_events from bulkhead_app"
    )
    return at.ground


@breaks("schema-version", "fail", "The database's schema is from_tomorrow")
async def _another_schema(at: At) -> Ground:
    version, works_from = (await at.sql("select version_num, works_from from alembic_version"))[0]
    await at.sql("update alembic_version set version_num = 'from_tomorrow', works_from = 'from_tomorrow'")
    undo = "update alembic_version set version_num = :version, works_from = :works_from"
    at.stack.push_async_callback(at.sql, undo, version=version, works_from=works_from)
    return at.ground


@breaks("clock", "fail", "differ by 3600")
async def _another_time(at: At) -> Ground:
    at.patch.setattr(databases, "_NOW", text("select clock_timestamp() + interval '1 hour'"))
    return at.ground


@breaks("database-link", "fail", "without TLS that verifies whose certificate it is")
async def _a_plain_connection(at: At) -> Ground:
    at.patch.setattr(databases, "_TLS", text("select false as ssl, false as is_socket"))
    return replace(at.ground, urls=DatabaseUrls(None, _ELSEWHERE, _ELSEWHERE, _ELSEWHERE))


@breaks("owner-apart", "fail", "BULKHEAD_DATABASE_OWNER_URL is set where this runs")
async def _the_owner_at_hand(at: At) -> Ground:
    return at.set(database_owner_url=SecretStr(_ELSEWHERE), tls_in_front=True)


@breaks("backups", "fail", "last attempt to archive its log has failed")
async def _an_archive_that_is_full(at: At) -> Ground:
    at.patch.setattr(databases, "_ARCHIVED", text("select now() - interval '1 day', now()"))
    return at.ground


@breaks("workers", "fail", "and no worker lives")
async def _nobody_works(at: At) -> Ground:
    run = await at.tenant.user.make("/v1/runs", json={"query": "What does note.md say?"})
    at.stack.push_async_callback(at.tenant.user.post, f"/v1/runs/{run['run_id']}/cancel")
    return at.ground


# Upkeep


@breaks("programs-owned", "fail", "the program itself can be changed by another user")
async def _a_program_for_everybody(at: At) -> Ground:
    at.file("app/cli.py", mode=0o666)
    return replace(at.ground, checkout=at.folder)


@breaks("catalogue-commands", "fail", "the entry shell is not valid")
async def _a_shell_in_the_catalogue(at: At) -> Ground:
    at.file("shell/server.toml", 'kind = "python"\ncommand = "sh"\nargs = ["-c", "id"]\n')
    at.file("shell/requirements.txt")
    return at.set(server_catalogue=at.folder)


@breaks("dependencies-pinned", "fail", "fastapi is ")
async def _another_version(at: At) -> Ground:
    at.file("requirements/base.txt", "fastapi==0.0.1 \\\n    --hash=sha256:00\n")
    return replace(at.ground, checkout=at.folder)


@breaks("dependencies-intact", "fail", "changed/inside.py of changed-package is not as it was installed")
async def _a_changed_file(at: At) -> Ground:
    at.file("requirements/base.txt", "changed-package==1.0\n")
    at.file("changed/inside.py", "print('changed')")
    at.file("changed_package-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: changed-package\nVersion: 1.0\n")
    at.file("changed_package-1.0.dist-info/RECORD", "changed/inside.py,sha256=AAAA,16\n")
    at.patch.syspath_prepend(str(at.folder))
    return replace(at.ground, checkout=at.folder)


@breaks("lock-age", "warn", "days old; what was fixed since is missing")
async def _old_pins(at: At) -> Ground:
    path = at.file("requirements/base.txt", "fastapi==0.0.1\n")
    os.utime(path, (0, 0))
    return replace(at.ground, checkout=at.folder)


@breaks("python-supported", "fail", "gets no security fixes since 2020-01-01")
async def _an_old_python(at: At) -> Ground:
    at.patch.setattr(upkeep, "_SUPPORTED", dict.fromkeys(upkeep._SUPPORTED, date(2020, 1, 1)))
    return at.ground


@breaks("libraries-silent", "fail", "the environment lets libraries report to their makers")
async def _a_library_that_reports(at: At) -> Ground:
    at.patch.setenv("MCP_USE_ANONYMIZED_TELEMETRY", "true")
    return at.ground


# The checklist itself


@breaks("guide-covered", "fail", "line 7 of the guide has no item")
async def _a_line_without_an_item(at: At) -> Ground:
    at.patch.setattr(items, "ITEMS", [item for item in items.ITEMS if item.id != "screening"])
    return at.ground
