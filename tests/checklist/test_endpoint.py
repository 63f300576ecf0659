"""GET /v1/checklist: for the platform, without a secret or a place of this host, and no load."""

from __future__ import annotations

import asyncio

from app.checklist.items import ITEMS
from app.checklist.keys import values
from tests.service import Service


async def test_the_platform_reads_findings_and_no_secret_and_no_place(service: Service) -> None:
    answer = await service.platform.get("/v1/checklist")
    assert answer.status_code == 200
    told = answer.json()
    assert [item["id"] for item in told["items"]] == [item.id for item in ITEMS if not item.is_local]
    assert [item for item in told["items"] if item["status"] == "fail"] == []
    settings = service.app.state.settings
    assert not any(secret in answer.text for secret in values(settings) if secret)
    assert str(service.data_dir) not in answer.text
    assert "Traceback" not in answer.text


async def test_whoever_asks_meanwhile_and_soon_after_gets_the_same_report(service: Service) -> None:
    answers = await asyncio.gather(*(service.platform.get("/v1/checklist") for _ in range(20)))
    assert len({answer.text for answer in answers}) == 1
    assert (await service.platform.get("/v1/checklist")).text == answers[0].text


async def test_no_role_of_a_tenant_reads_it(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    for client in (tenant.admin, tenant.user):
        assert (await client.get("/v1/checklist")).status_code == 403
