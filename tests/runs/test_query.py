"""The main job: a query is answered from what a sandboxed tool has read, under the tenant's policy, on the record."""

from __future__ import annotations

import secrets

from tests.service import Service


async def test_the_answer_quotes_a_document_that_was_uploaded_a_moment_before(service: Service) -> None:
    tenant = await service.new_tenant()
    nonce, name = secrets.token_hex(16), f"{secrets.token_hex(4)}.md"
    await tenant.admin.put_file(name, f"The word is {nonce}.")
    response = await tenant.user.ask(f"What does {name} say?")
    assert response.status_code == 200, response.text
    run = response.json()
    assert nonce in run["answer"]
    assert run["status"] == "succeeded"
    assert [(call["tool"], call["decision"], call["rule"]) for call in run["tool_calls"]] == [
        ("docs__read_file", "allowed", "allow:docs__*")
    ]


async def test_a_run_leaves_its_events_in_order_and_no_text_in_them(service: Service) -> None:
    nonce = secrets.token_hex(16)
    tenant = await service.new_tenant(files={"note.md": nonce})
    run = (await tenant.user.ask("What does note.md say?")).json()
    events = await tenant.admin.events(run_id=run["run_id"])
    assert [event["type"] for event in events] == [
        "query.received",
        "query.screened",
        "run.started",
        "tool.decided",
        "tool.finished",
        "run.finished",
    ]
    assert nonce not in str(events)
    assert "note.md" not in str(events)
