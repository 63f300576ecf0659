"""Receipts: a run's place in the sealed record, proven by the documents' script with public keys alone."""

from __future__ import annotations

import asyncio
import base64
import copy
import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from app.audit import chain
from app.audit.signing import Signers
from app.embedded.postgres import EmbeddedPostgres
from app.keyring import Keyring, new_entry
from tests.audit.sealing import all_sealed, receipt_of
from tests.service import POLICY, Service, Tenant

SCRIPT: Final = Path(__file__).resolve().parents[2] / "docs" / "verify_receipt.py"
WAITING: Final = POLICY.replace('"docs__*"]}', '"docs__*"], approve: [docs__read_file]}')
Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Issued:
    """A receipt, and what its holder may have beside it."""

    tenant: Tenant
    signers: Signers
    receipt: Document
    keys: Document
    export: str


@pytest.fixture(scope="module")
async def issued(service: Service) -> Issued:
    tenant = await service.new_tenant(files={"note.md": "hello"})
    asked = [await tenant.user.ask("What does note.md say?") for _ in range(2)]
    receipt = await receipt_of(tenant.user, asked[1].json()["run_id"])
    keys = (await tenant.user.get("/.well-known/bulkhead-audit-keys.json")).json()
    export = (await tenant.admin.get("/v1/audit/export")).text
    return Issued(tenant, service.app.state.signers, receipt, keys, export)


async def verified(folder: Path, receipt: Document, keys: Document, export: str | None = None) -> tuple[int, str]:
    """The status of the script, as a process that knows nothing of us, and what it says."""
    paths = [folder / "receipt.json", folder / "keys.json"]
    for path, document in zip(paths, (receipt, keys), strict=True):
        path.write_text(json.dumps(document))
    if export is not None:
        (folder / "export.ndjson").write_text(export)
    events = [] if export is None else ["--events", str(folder / "export.ndjson")]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", str(SCRIPT), *map(str, paths), *events),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


def failure(issued: Issued, receipt: Document) -> str:
    """The check of the script that fails, found without a process; nothing where none does."""
    script = runpy.run_path(str(SCRIPT))
    try:
        script["verify_receipt"](receipt, issued.keys["keys"])
    except script["Failed"] as failed:
        return str(failed)
    return ""


def resigned(issued: Issued, change: Callable[[Document], object]) -> Document:
    """The receipt as a service with a defect would have signed it."""
    receipt = copy.deepcopy(issued.receipt)
    change(receipt)
    del receipt["signature"]
    signature = issued.signers.sign(chain.canonical_document(receipt)).signature
    return receipt | {"signature": base64.b64encode(signature).decode()}


async def test_a_receipt_has_every_event_of_its_run_and_verifies(issued: Issued, tmp_path: Path) -> None:
    receipt, run_id = issued.receipt, issued.receipt["run_id"]
    events = await issued.tenant.admin.events(run_id=run_id)
    assert [(row["event_id"], row["type"]) for row in receipt["rows"]] == [
        (event["id"], event["type"]) for event in events if event["type"] != "run.read"
    ]
    assert {"query.received", "tool.decided", "tool.finished", "run.finished"} <= {
        row["type"] for row in receipt["rows"]
    }
    assert (receipt["tenant_id"], receipt["state"]) == (issued.tenant.id, "succeeded")
    status, said = await verified(tmp_path, receipt, issued.keys)
    assert (status, said.partition(":")[0]) == (0, "VALID"), said
    assert "not looked at" in said
    assert "That it ended as 'succeeded' under policy version 1 is not proven here" in said
    status, said = await verified(tmp_path, receipt, issued.keys, issued.export)
    assert (status, "are in the export" in said) == (0, True), said
    assert f"VALID: run {run_id} of tenant {issued.tenant.id} ended as 'succeeded' under policy version 1." in said


async def test_a_receipt_holds_no_text_of_an_event(issued: Issued) -> None:
    told = json.dumps(issued.receipt)
    for event in await issued.tenant.admin.events(run_id=issued.receipt["run_id"]):
        for name in ("query_hmac", "arguments_hmac", "result_hmac", "answer_hmac"):
            assert event["data"].get(name) is None or event["data"][name] not in told


def changed(value: Any) -> Any:
    """Something else of the same kind."""
    if isinstance(value, int):
        return value + 1
    assert isinstance(value, str)
    return value[:-2] + ("00" if value[-2:] != "00" else "11")


FIELDS: Final = ["schema", "tenant_id", "run_id", "policy_version", "state", "issued_at", "key_id", "rows", "spans"]


async def test_a_receipt_has_no_field_that_the_next_test_leaves_out(issued: Issued) -> None:
    assert sorted(issued.receipt) == sorted([*FIELDS, "signature"])


async def test_no_field_can_be_changed(issued: Issued, tmp_path: Path) -> None:
    for name in [*FIELDS, "signature"]:
        receipt = copy.deepcopy(issued.receipt)
        receipt[name] = receipt[name][:-1] if isinstance(receipt[name], list) else changed(receipt[name])
        assert failure(issued, receipt), name
    status, said = await verified(tmp_path, issued.receipt | {"state": "failed"}, issued.keys)
    assert (status, said.partition(":")[0]) == (1, "NOT VALID"), said


def _set(*path: str | int, value: Any = None) -> Callable[[Document], None]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = changed(document[path[-1]]) if value is None else value

    return change


# What the receipt's own signature would cover up: each of these is signed with the right key.
DEFECTS: Final = {
    "a digest of a row": (_set("rows", 0, "body_digest"), "another digest"),
    "a number of a row": (_set("rows", -1, "seq", value=10**9), "under no head"),
    "a digest on the way": (_set("spans", 0, "digests", -1), "do not lead to the head"),
    "the hash before": (_set("spans", 0, "before", "hash"), "do not lead to the head"),
    "the number before": (_set("spans", 0, "before", "seq"), "end at row"),
    "the head's hash": (_set("spans", 0, "head", "hash"), "signature of the head"),
    "the head's time": (_set("spans", 0, "head", "signed_at", value="2020-01-01T00:00:00Z"), "signature of the head"),
    "the tenant": (_set("tenant_id", value="00000000-0000-7000-8000-000000000000"), "another tenant's"),
    "a row too many": (lambda document: document["rows"].append(document["rows"][0]), "twice"),
    "no rows": (lambda document: document["rows"].clear(), "no rows"),
}


@pytest.mark.parametrize("defect", DEFECTS)
async def test_what_is_signed_and_wrong_is_found(issued: Issued, defect: str) -> None:
    change, why = DEFECTS[defect]
    assert why in failure(issued, resigned(issued, change))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("state", "failed", "the run ended as 'succeeded'"), ("policy_version", 2, "its policy version was 1")],
)
async def test_a_headline_that_the_events_do_not_bear_out_is_found(
    issued: Issued, tmp_path: Path, name: str, value: object, why: str
) -> None:
    forged = resigned(issued, _set(name, value=value))
    status, said = await verified(tmp_path, forged, issued.keys)
    assert (status, f"{value!r}" in said.partition("is not proven")[0]) == (0, True), "hashes alone do not tell"
    status, said = await verified(tmp_path, forged, issued.keys, issued.export)
    assert (status, why in said) == (1, True), said


async def test_signing_again_is_not_what_fails_there(issued: Issued) -> None:
    assert failure(issued, resigned(issued, lambda _: None)) == ""


async def test_another_key_than_the_public_ones_proves_nothing(issued: Issued, tmp_path: Path) -> None:
    stranger = Signers(Keyring.parse(new_entry("k1"))).public.document()
    status, said = await verified(tmp_path, issued.receipt, stranger)
    assert (status, "not among the public keys" in said) == (1, True), said
    # The stranger's key under our key's id.
    posing = stranger | {"keys": dict.fromkeys(issued.keys["keys"], next(iter(stranger["keys"].values())))}
    status, said = await verified(tmp_path, issued.receipt, posing)
    assert (status, "is not its id's" in said) == (1, True), said


async def test_an_export_with_another_text_or_without_a_row_is_found(issued: Issued, tmp_path: Path) -> None:
    lines = issued.export.splitlines(keepends=True)
    seq = issued.receipt["rows"][2]["seq"]
    (at,) = [number for number, line in enumerate(lines) if json.loads(line).get("seq") == seq]
    forged = json.loads(lines[at])
    forged["body"] = forged["body"].replace('"schema_version":', '"schema_version": ')
    edited = [*lines[:at], json.dumps(forged) + "\n", *lines[at + 1 :]]
    for export, why in (
        ("".join(edited), f"row {seq} of"),
        ("".join(lines[:at] + lines[at + 1 :]), f"lacks row {seq}"),
    ):
        status, said = await verified(tmp_path, issued.receipt, issued.keys, export)
        assert (status, why in said) == (1, True), said


async def test_an_event_of_the_run_that_a_receipt_leaves_out_is_found(issued: Issued, tmp_path: Path) -> None:
    short = resigned(issued, lambda receipt: receipt["rows"].pop(3))
    assert (await verified(tmp_path, short, issued.keys))[0] == 0, "hashes alone do not tell whose the other rows are"
    status, said = await verified(tmp_path, short, issued.keys, issued.export)
    assert (status, "not in the receipt" in said) == (1, True), said


async def test_an_export_must_not_leave_out_or_change_what_the_receipt_leaves_out(
    issued: Issued, tmp_path: Path
) -> None:
    """Else two omissions would hide what one does not."""
    short = resigned(issued, lambda receipt: receipt["rows"].pop(3))
    seq = issued.receipt["rows"][3]["seq"]
    lines = issued.export.splitlines(keepends=True)
    (at,) = [number for number, line in enumerate(lines) if json.loads(line).get("seq") == seq]
    other = lines[at].replace(issued.receipt["run_id"], issued.tenant.id)
    assert other != lines[at]
    for export in (lines[:at] + lines[at + 1 :], [*lines[:at], other, *lines[at + 1 :]]):
        status, said = await verified(tmp_path, short, issued.keys, "".join(export))
        assert (status, said.partition(":")[0]) == (1, "NOT VALID"), said


@pytest.mark.parametrize("end", [0, -1])
async def test_a_run_without_its_beginning_or_its_end_is_not_all_of_it(issued: Issued, end: int) -> None:
    assert "not all of the run" in failure(issued, resigned(issued, lambda receipt: receipt["rows"].pop(end)))


async def test_what_is_no_receipt_is_not_readable(issued: Issued, tmp_path: Path) -> None:
    for receipt in ({}, {"schema": "bulkhead.receipt/1"}):
        status, said = await verified(tmp_path, receipt, issued.keys)
        assert status in {1, 2}
        assert "Traceback" not in said


# Who gets one, and when


async def test_a_receipt_is_for_the_owner_an_auditor_and_an_admin(service: Service, issued: Issued) -> None:
    path = f"/v1/runs/{issued.receipt['run_id']}/receipt"
    colleague, _, _ = await service.new_user(issued.tenant.id)
    auditor, _, _ = await service.new_user(issued.tenant.id, "auditor")
    stranger = (await service.new_tenant(policy=None)).admin
    for client, status in ((issued.tenant.admin, 200), (auditor, 200), (colleague, 404), (stranger, 404)):
        assert (await client.get(path)).status_code == status


async def test_there_is_no_receipt_before_all_is_sealed(service: Service, issued: Issued) -> None:
    tenant = issued.tenant
    # The lock of whoever seals this tenant's record.
    lock = text("select pg_advisory_xact_lock(hashtextextended('bulkhead_audit_seal:' || :id, 0))")
    engine = create_async_engine(service.urls.owner or "")
    async with engine.begin() as connection:
        await connection.execute(lock, {"id": tenant.id})
        run_id = (await tenant.user.ask("What does note.md say?")).json()["run_id"]
        refused = await tenant.user.get(f"/v1/runs/{run_id}/receipt")
    await engine.dispose()
    assert (refused.status_code, refused.json()["code"]) == (409, "receipt_not_ready")
    assert refused.headers["retry-after"] == "1"
    assert (await receipt_of(tenant.user, run_id))["run_id"] == run_id


async def test_there_is_no_receipt_of_a_run_that_is_queued_or_waits(service: Service, tmp_path: Path) -> None:
    """All that is recorded of it may be sealed by then."""
    tenant = await service.new_tenant(policy=WAITING, files={"note.md": "hello"})
    queued = (await tenant.user.make("/v1/runs", json={"query": "What does note.md say?"}))["run_id"]
    waiting = (await tenant.user.ask("What does note.md say?")).json()["run_id"]
    await all_sealed(tenant.admin)
    for run_id, state in ((queued, "queued"), (waiting, "waiting_approval")):
        assert (await tenant.user.get(f"/v1/runs/{run_id}")).json()["status"] == state
        refused = await tenant.user.get(f"/v1/runs/{run_id}/receipt")
        assert (refused.status_code, refused.json()["code"]) == (409, "receipt_not_ready")
        await tenant.user.post(f"/v1/runs/{run_id}/cancel")
        receipt = await receipt_of(tenant.user, run_id)
        assert (receipt["state"], receipt["policy_version"]) == ("cancelled", 1), "whose end names no policy"
        keys = (await tenant.user.get("/.well-known/bulkhead-audit-keys.json")).json()
        export = (await tenant.admin.get("/v1/audit/export")).text
        assert (await verified(tmp_path, receipt, keys, export))[0] == 0


# What a superuser changes beside the chain or in it


async def as_superuser(service: Service, postgres: EmbeddedPostgres, statement: str, **values: object) -> None:
    engine = create_async_engine(postgres.url("postgres", make_url(service.urls.app).database or ""))
    async with engine.begin() as connection:
        await connection.execute(text("set local session_replication_role = replica"))
        await connection.execute(text(statement), values)
    await engine.dispose()


async def test_what_a_run_s_row_says_is_not_what_is_signed(
    service: Service, issued: Issued, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    run_id = (await issued.tenant.user.ask("What does note.md say?")).json()["run_id"]
    forge = "update runs set state = 'failed', policy_version = 9 where id = :id"
    await as_superuser(service, postgres, forge, id=UUID(run_id))
    assert (await issued.tenant.user.get(f"/v1/runs/{run_id}")).json()["status"] == "failed", "the control"
    receipt = await receipt_of(issued.tenant.user, run_id)
    assert (receipt["state"], receipt["policy_version"]) == ("succeeded", 1)
    export = (await issued.tenant.admin.get("/v1/audit/export")).text
    assert (await verified(tmp_path, receipt, issued.keys, export))[0] == 0


_TWIN: Final = """
insert into audit_events (tenant_id, id, at, type, actor_id, run_id, body)
select tenant_id, id, at - interval '1 second', type, actor_id, run_id, replace(body, 'succeeded', 'failed')
from audit_events where tenant_id = :tenant_id and run_id = :id and type = 'run.finished'
"""
_EDIT: Final = """
update audit_events set body = replace(body, 'succeeded', 'failed')
where tenant_id = :tenant_id and run_id = :id and type = 'run.finished'
"""
_RENAME: Final = """
update audit_events set type = 'run.finished'
where tenant_id = :tenant_id and run_id = :id and type = 'query.screened'
"""
_REDIGEST: Final = (
    f"with edited as ({_EDIT} returning tenant_id, id, body)"  # noqa: S608  texts of our own
    """
    update audit_chain c set body_digest = sha256(convert_to(e.body, 'UTF8')) from edited e
    where c.tenant_id = e.tenant_id and c.event_id = e.id
    """
)
_DELETE: Final = "delete from audit_events where tenant_id = :tenant_id and run_id = :id and type = 'run.finished'"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param(_EDIT, "record_changed", id="its end is edited"),
        pytest.param(_REDIGEST, "record_changed", id="its end is edited with the digest"),
        pytest.param(_RENAME, "record_changed", id="another event is named its end"),
        pytest.param(_TWIN, "receipt_not_ready", id="another end under the same id"),
        pytest.param(_DELETE, "receipt_not_ready", id="its end is deleted"),
    ],
)
async def test_what_is_not_as_it_was_sealed_is_not_signed(
    service: Service, issued: Issued, postgres: EmbeddedPostgres, change: str, code: str
) -> None:
    tenant = issued.tenant
    run_id = (await tenant.user.ask("What does note.md say?")).json()["run_id"]
    assert (await receipt_of(tenant.user, run_id))["state"] == "succeeded", "the control"
    await as_superuser(service, postgres, change, tenant_id=UUID(tenant.id), id=UUID(run_id))
    refused = await tenant.user.get(f"/v1/runs/{run_id}/receipt")
    assert (refused.status_code, refused.json()["code"]) == (409, code)


async def test_a_search_shows_no_forged_event_as_sealed(
    service: Service, issued: Issued, postgres: EmbeddedPostgres
) -> None:
    """Another row under a sealed event's id, with the text that somebody would like to be read."""
    run_id = (await issued.tenant.user.ask("What does note.md say?")).json()["run_id"]
    await receipt_of(issued.tenant.user, run_id)
    await as_superuser(service, postgres, _TWIN, tenant_id=UUID(issued.tenant.id), id=UUID(run_id))
    found = await issued.tenant.admin.get("/v1/audit/events", params={"run_id": run_id, "type": "run.finished"})
    seqs = {item["data"]["state"]: item["seq"] for item in found.json()["items"]}
    assert seqs["failed"] is None
    assert seqs["succeeded"] > 0, "the control"
    await as_superuser(service, postgres, _EDIT, tenant_id=UUID(issued.tenant.id), id=UUID(run_id))
    found = await issued.tenant.admin.get("/v1/audit/events", params={"run_id": run_id, "type": "run.finished"})
    items = found.json()["items"]
    assert {(item["data"]["state"], item["seq"], item["hash"]) for item in items} == {("failed", None, None)}
