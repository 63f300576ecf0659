"""Adds, changes and removes model endpoints, each with its audit event; every process takes them up by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.audit.fields import MAX_NAME
from app.caller import PLATFORM_TENANT, Caller
from app.db import new_id
from app.errors import Conflict
from app.keyring import Keyring, SecretKey
from app.model_endpoints import repository
from app.model_endpoints.models import StoredEndpoint
from app.outbound.catalogue import ModelEndpoint
from app.outbound.prices import PRICES
from app.tenants import repository as tenants
from app.tenants.service import NameTaken, open_tenant_key

_MAX_ENDPOINTS: Final = 100
# As it is; prices have parts, which a state of the record has none of.
_RECORDED: Final = frozenset({"base_url", "models", "is_enabled"})


async def add(
    session: AsyncSession, keyring: Keyring, caller: Caller, *, name: str, credential: str, **values: Any
) -> StoredEndpoint:
    """Raise NameTaken, and Conflict past 100 of them."""
    await tenants.bump_generation(session, PLATFORM_TENANT)  # what tells every process, and puts two admins in an order
    if await repository.count(session) >= _MAX_ENDPOINTS:
        raise Conflict(f"There are {_MAX_ENDPOINTS} model endpoints already: delete some.")
    endpoint_id = new_id()
    sealed = _seal(await open_tenant_key(session, keyring, PLATFORM_TENANT), endpoint_id, credential)
    try:
        async with session.begin_nested():
            await repository.add(session, endpoint_id, name=name, credential=sealed, **values)
    except IntegrityError:
        raise NameTaken from None
    await _record(session, EventType.MODEL_ENDPOINT_ADDED, caller, endpoint_id, name=name, after=_told(values))
    return await repository.get(session, endpoint_id)


async def change(
    session: AsyncSession, keyring: Keyring, caller: Caller, endpoint_id: UUID, *, credential: str | None, **values: Any
) -> StoredEndpoint:
    """Runs that have begun go on with what they began with. Raise NotFound."""
    await tenants.bump_generation(session, PLATFORM_TENANT)
    row = await repository.get(session, endpoint_id)
    data = {
        "name": row.name,
        "changed": sorted([*values, *(["credential"] if credential is not None else [])]),
        "before": _told({name: getattr(row, name) for name in values}),
        "after": _told(values),
    }
    if credential is not None:
        key = await open_tenant_key(session, keyring, PLATFORM_TENANT)
        values["credential"] = _seal(key, endpoint_id, credential)
    await repository.change(session, endpoint_id, **values)
    await _record(session, EventType.MODEL_ENDPOINT_CHANGED, caller, endpoint_id, **data)
    return await repository.get(session, endpoint_id)


async def remove(session: AsyncSession, caller: Caller, endpoint_id: UUID) -> None:
    """Queries under a policy that names it fail from now on. Raise NotFound."""
    await tenants.bump_generation(session, PLATFORM_TENANT)
    row = await repository.get(session, endpoint_id)
    data = {"name": row.name, "before": _told({name: getattr(row, name) for name in (*_RECORDED, "prices")})}
    await repository.remove(session, endpoint_id)
    await _record(session, EventType.MODEL_ENDPOINT_REMOVED, caller, endpoint_id, **data)


def _told(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of what this is, by column, the record has all but secrets: the prices of each model by themselves, in lines."""
    told = {name: state[name] for name in state.keys() & _RECORDED}
    for model, prices in state.get("prices", {}).items():
        lines = [f"{each['from']}: {each['input']}, {each['output']}" for each in prices]
        told[f"prices of {model}"[:MAX_NAME]] = lines
    return told


def unsealed(key: SecretKey, row: StoredEndpoint) -> ModelEndpoint:
    """What a run talks to; `key` is the platform's. Raise Unsealable."""
    credential = key.unseal(row.credential, aad=_aad(row.id)).decode()
    return ModelEndpoint(row.base_url, credential, tuple(row.models), PRICES.validate_python(row.prices))


def _seal(key: SecretKey, endpoint_id: UUID, credential: str) -> bytes:
    return key.seal(credential.encode(), aad=_aad(endpoint_id))


def _aad(endpoint_id: UUID) -> bytes:
    return b"model_endpoint:" + endpoint_id.bytes


async def _record(session: AsyncSession, kind: EventType, caller: Caller, endpoint_id: UUID, **data: Any) -> None:
    event = Event(kind, actor_id=caller.user_id, data={"endpoint_id": endpoint_id, **data})
    await audit.append(session, PLATFORM_TENANT, event)
