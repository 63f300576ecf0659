"""The route on the server catalogue: which programs a policy may name, and what they leave open."""

from __future__ import annotations

from typing import Annotated, Literal

from anyio import to_thread
from fastapi import APIRouter, Depends, Request

from app.auth.dependencies import requires
from app.caller import Caller
from app.problems import responses
from app.schemas import Answer
from app.scopes import Scope
from app.servers.catalogue import Parameter
from app.servers.offers import Offer, ServerOffers

router = APIRouter(tags=["servers"])
Reader = Annotated[Caller, Depends(requires(Scope.SERVERS_READ))]


class ParameterOut(Answer):
    """A text that all of `pattern` matches (RE2), or one of `enum`; without a default a policy has to give one."""

    pattern: str | None
    enum: list[str] | None
    default: str | None


class OfferOut(Answer):
    """What a policy names as `servers.<name>.server`; the rest bounds what it may say of it."""

    name: str
    is_installed: bool
    parameters: dict[str, ParameterOut]
    workspace: Literal["none", "read", "write"]
    hosts: list[str] | Literal["any"]
    env: dict[str, Literal["required", "optional"]]
    isolation: Literal["tenant", "user", "run"]


class OffersOut(Answer):
    """All valid entries, by name."""

    items: list[OfferOut]


@router.get("/v1/server-catalogue", summary="List the programs that a policy may name", responses=responses(401, 403))
async def list_offers(request: Request, _caller: Reader) -> OffersOut:
    """For the template `command`. What is not installed yet does not start."""
    offers: ServerOffers = request.app.state.offers
    return OffersOut(items=[_out(offer) for offer in await to_thread.run_sync(offers.all)])


def _out(offer: Offer) -> OfferOut:
    entry = offer.entry
    return OfferOut(
        name=offer.name,
        is_installed=offer.is_installed,
        parameters={name: _parameter(each) for name, each in entry.parameters.items()},
        workspace=entry.workspace,
        hosts="any" if entry.hosts == "any" else list(entry.hosts),
        env=entry.env,
        isolation=entry.isolation,
    )


def _parameter(parameter: Parameter) -> ParameterOut:
    enum = list(parameter.enum) if parameter.enum is not None else None
    return ParameterOut(pattern=parameter.pattern, enum=enum, default=parameter.default)
