"""The vocabulary of the record: every type is in it, what does not fit is refused, and no field changes unannounced."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.audit.fields import Field, Kind, Schema
from app.audit.vocabulary import VOCABULARY, EventUnfit, version_of
from tests.audit.vocabulary import SNAPSHOT, described, unannounced
from tests.service import Service

VALUES: dict[Kind, Any] = {
    Kind.ID: uuid4(),
    Kind.NAME: "a name",
    Kind.NAMES: ["a name"],
    Kind.COUNT: 1,
    Kind.COUNTS: {"a name": 1},
    Kind.HASH: "0a" * 32,
    Kind.FLAG: True,
    Kind.TIME: datetime.now(UTC),
    Kind.STATE: {"a name": "a name"},
}
# None of them fits any kind but the free one of a state, and the first two not even that.
STRANGE = [object(), 1.5, ["x" * 1_001], -1, "x" * 1_001]


def fitting(kind: EventType) -> dict[str, Any]:
    return {name: VALUES[field.kind] for name, field in VOCABULARY[kind].fields.items()}


def test_every_type_is_in_the_vocabulary() -> None:
    assert set(VOCABULARY) == set(EventType)


@pytest.mark.parametrize("kind", EventType)
def test_of_each_type_what_fits_is_taken_and_what_does_not_is_refused(kind: EventType) -> None:
    data = fitting(kind)
    assert version_of(Event(kind, data=data)) == VOCABULARY[kind].version
    with pytest.raises(EventUnfit, match="other"):
        version_of(Event(kind, data=data | {"other": 1}))
    for name, field in VOCABULARY[kind].fields.items():
        without = {key: value for key, value in data.items() if key != name}
        assert refused(Event(kind, data=without)) is field.is_required
        assert refused(Event(kind, data=data | {name: None})) is not field.is_nullable
        for strange in STRANGE[:2] if field.kind is Kind.STATE else STRANGE:
            assert refused(Event(kind, data=data | {name: strange}))


def refused(event: Event) -> bool:
    try:
        version_of(event)
    except EventUnfit:
        return True
    return False


def test_a_refusal_names_the_field_and_not_what_stands_in_it() -> None:
    data = fitting(EventType.SECRET_WRITTEN) | {"version": "a secret in the wrong place"}
    with pytest.raises(EventUnfit, match=r"^secret\.written: not what app/audit/vocabulary\.py says: version$"):
        version_of(Event(EventType.SECRET_WRITTEN, data=data))


async def test_an_event_that_does_not_fit_takes_its_change_with_it(service: Service) -> None:
    tenant = await service.new_tenant(policy=None)
    rename = text("update users set role = 'auditor' where id = :id")
    for data in ({"user_id": tenant.user_id, "keys": "all"}, {"user_id": tenant.user_id, "keys": 1}):
        try:
            async with service.app.state.database.transaction(UUID(tenant.id)) as session:
                await session.execute(rename, {"id": UUID(tenant.user_id)})
                await audit.append(session, UUID(tenant.id), Event(EventType.USER_ERASED, data=data))
        except EventUnfit:
            assert data["keys"] == "all"
            assert (await tenant.user.get("/v1/me")).json()["role"] == "user"
    assert (await tenant.user.get("/v1/me")).json()["role"] == "auditor", "the control"


def test_no_field_has_changed_under_its_version() -> None:
    before = json.loads(SNAPSHOT.read_text())
    assert unannounced(before, described()) == [], "raise their versions in app/audit/vocabulary.py"
    assert described() == before, "write it anew: python -m tests.audit.vocabulary"


def test_a_field_that_changes_without_its_version_is_found() -> None:
    one = Schema(1, {"name": Field(Kind.NAME)})
    before = described({"a": one})
    changed = [
        Schema(1, {"name": Field(Kind.ID)}),
        Schema(1, {"name": Field(Kind.NAME, is_nullable=True)}),
        Schema(1, {"name": Field(Kind.NAME, is_required=False)}),
        Schema(1, {"name": Field(Kind.NAME), "more": Field(Kind.NAME)}),
        Schema(1, {}),
    ]
    assert [unannounced(before, described({"a": schema})) for schema in changed] == [["a"]] * len(changed)
    assert unannounced(before, {}) == ["a"]
    raised = [described({"a": Schema(2, schema.fields)}) for schema in changed]
    assert [unannounced(before, now) for now in raised] == [[]] * len(changed), "the control"
    assert unannounced(before, described({"a": one, "b": one})) == [], "new types change no old ones"
