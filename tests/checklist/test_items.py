"""Every item says when what it is for is broken, and says nothing of it before."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import pytest

from app.checklist import running
from app.checklist.findings import Finding, Status
from app.checklist.ground import CHECKOUT, Ground
from app.checklist.items import ITEMS
from app.checklist.keys import values
from app.embedded.postgres import EmbeddedPostgres
from tests.checklist import breaks as _breaks
from tests.checklist.ground import BREAKS, At, ground_of
from tests.service import Service, Tenant

BY_ID: Final = {item.id: item for item in ITEMS}
_WORSE: Final = list(Status)
# What they find depends on who runs the tests; a kernel that says the best of a process is their control.
_OF_THE_MACHINE: Final = ("process-user", "process-rights", "read-only-root")


@pytest.fixture(scope="module")
async def ground(service: Service) -> AsyncIterator[Ground]:
    async with ground_of(service) as made:
        yield made


@pytest.fixture(scope="module")
async def tenant(service: Service) -> Tenant:
    return await service.new_tenant(files={"note.md": "a note"})


@pytest.fixture(scope="module")
async def sound(ground: Ground, tenant: Tenant) -> dict[str, Finding]:
    """What all items find where nothing is broken: the control of every break."""
    return {finding.id: finding for finding in await running.run(ITEMS, ground, within_s=60)}


def test_every_item_has_a_break() -> None:
    assert _breaks.__name__
    assert set(BREAKS) == set(BY_ID)
    assert len(BY_ID) == len(ITEMS)


def test_the_page_says_of_each_item_that_only_warns_why() -> None:
    page = (CHECKOUT / "docs" / "checklist.md").read_text()
    section = page.partition("\n## What only warns\n")[2].partition("\n## ")[0]
    told = re.findall(r"^\| `([\w-]+)` \| \w", section, re.MULTILINE)
    assert sorted(told) == sorted(item for item, broken in BREAKS.items() if broken.status == "warn")


def test_nothing_fails_where_nothing_is_broken(sound: dict[str, Finding]) -> None:
    assert [finding for finding in sound.values() if finding.status is Status.FAIL] == []
    assert all(bool(finding.fix) == (finding.status is not Status.PASS) for finding in sound.values())


async def test_a_process_without_rights_passes(ground: Ground, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    confined = _breaks.confine(tmp_path, ground, monkeypatch)
    found = await running.run([BY_ID[name] for name in _OF_THE_MACHINE], confined)
    assert {finding.status for finding in found} == {Status.PASS}


@pytest.mark.parametrize("item", sorted(BY_ID))
async def test_an_item_says_what_is_broken(
    item: str,
    ground: Ground,
    sound: dict[str, Finding],
    service: Service,
    tenant: Tenant,
    postgres: EmbeddedPostgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = BREAKS[item]
    async with AsyncExitStack() as stack:
        at = At(ground, service, tenant, postgres, tmp_path, monkeypatch, stack)
        (found,) = await running.run([BY_ID[item]], await broken.make(at), within_s=60)
        assert found.status == broken.status, found.detail
        assert broken.words in found.detail
        assert found.fix
        assert broken.words not in sound[item].detail or item in _OF_THE_MACHINE
        assert _WORSE.index(sound[item].status) < _WORSE.index(found.status)
        assert not any(secret in f"{found.detail}{found.fix}" for secret in values(ground.settings) if secret)
        assert str(tmp_path) not in found.detail
