"""Routes that tell what a version would do, and why a call was decided so. Nothing is called and nothing counted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal, Self
from uuid import UUID

from anyio import to_thread
from fastapi import APIRouter, Depends, Path, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.ext.asyncio import AsyncSession

from app.audit import repository as audit
from app.audit.events import Event, EventType
from app.auth.dependencies import TheDatabase, requires
from app.caller import Caller
from app.policies import admission, checks, diff, explain, versions
from app.policies import document as documents
from app.policies.checks import PUBLISHED, Checked, VersionUnchecked
from app.policies.decision import Verdict
from app.policies.engine import ToolRequest
from app.policies.explain import ASKING_ROLES, Asker
from app.policies.standing import Access, Standing
from app.policies.versions import ActivePolicy
from app.problems import responses
from app.runs.dependencies import TheTurns
from app.schemas import Answer, Body, VersionNumber
from app.scopes import Scope
from app.servers import deciding
from app.tenants import repository as tenants

router = APIRouter(tags=["policies"])
Reader = Annotated[Caller, Depends(requires(Scope.POLICIES_READ))]
TenantRole = Literal["tenant_admin", "auditor", "user"]
Number = Annotated[int, Field(ge=1, le=2_147_483_647)]
VersionOrPublished = Annotated[Number | Literal["published"], Path()]


class StandingOut(Answer):
    """`allowed`: every call that fits the tool and its template; `conditional`: it depends on the arguments;
    `needs_approval`: none before somebody has approved of it.
    """

    access: Access
    rules: list[str]


class KeyChangeOut(Answer):
    """A JSON pointer into the document, and what stands there; lists are compared whole."""

    path: str
    kind: Literal["added", "removed", "changed"]
    before: Any
    after: Any


class AccessChangeOut(Answer):
    """What differs for a role (a user of it whom no rule names) and a tool; null where there is no such tool.

    `narrower` is sure to allow no more than before, `wider` no less; an approval that is needed now is narrower.
    """

    role: str
    tool: str
    before: StandingOut | None
    after: StandingOut | None
    direction: diff.Direction


class DiffOut(Answer):
    """`access` is null where not both versions have been checked; `unchecked` says which have not."""

    version: int
    against: int
    keys: list[KeyChangeOut]
    access: list[AccessChangeOut] | None
    unchecked: list[int]


class AskerIn(Body):
    """For whom to decide: a user of the tenant, as they are or as if of another role; or anybody of a role."""

    role: TenantRole | None = None
    user_id: UUID | None = None

    @model_validator(mode="after")
    def _somebody(self) -> Self:
        if self.role is None and self.user_id is None:
            raise ValueError("name a role or a user")
        return self


class CallIn(Body):
    """A tool call as a model would ask for it."""

    tool: str = Field(min_length=1, max_length=128)
    arguments: dict[str, Any] = Field(default_factory=dict)


class DryRunIn(BaseModel):
    """Either a query, to be screened, or calls, to be decided."""

    model_config = ConfigDict(extra="forbid")

    as_: AskerIn = Field(alias="as")
    query: str | None = Field(default=None, min_length=1, max_length=100_000)
    calls: list[CallIn] | None = Field(default=None, min_length=1, max_length=100)

    @model_validator(mode="after")
    def _one_thing(self) -> Self:
        if (self.query is None) == (self.calls is None):
            raise ValueError("give a query, or calls")
        return self


class ScreeningOut(Answer):
    """Whether the query would be let in, the rule that refuses it, and the rules that take note of it."""

    allowed: bool
    rule: str | None
    flags: list[str]


class ToolAccessOut(StandingOut):
    """A tool that the model would see."""

    tool: str


class DecisionOut(Answer):
    """What the gate would say of a call; kill switches are not asked."""

    tool: str
    decision: Verdict
    rule: str
    reason: str


class DryRunOut(Answer):
    """What the version would do, with the tools as they were found at `checked_at`."""

    version: int
    checked_at: datetime
    role: str
    user_id: UUID | None
    screening: ScreeningOut | None = None
    tools: list[ToolAccessOut] | None = None
    calls: list[DecisionOut] | None = None


class EntryOut(ToolAccessOut):
    """Who, which tool, and by which rules."""

    role: str
    user_id: UUID | None


class ExplainedOut(Answer):
    """Who can call what. `texts` are the rules' own words; null for those that every policy has."""

    version: int
    checked_at: datetime
    entries: list[EntryOut]
    texts: dict[str, str | None]


@router.get(
    "/v1/policies/{version}/diff",
    summary="What differs between two versions",
    responses=responses(401, 403, 404, 409, 422),
)
async def diff_policies(
    version: VersionNumber,
    caller: Reader,
    database: TheDatabase,
    turns: TheTurns,
    against: Annotated[Number | Literal["published"], Query()] = "published",
) -> DiffOut:
    """From `against` (the one that holds) to this version: its keys, and what that means for who can call what."""
    async with turns.turn(caller.tenant_id):
        async with database.transaction(caller.tenant_id) as session:
            other = (await checks.get(session, PUBLISHED)).version if isinstance(against, str) else against
            texts = [(await versions.get(session, number)).document for number in (other, version)]
            found = [await _find_checked(session, number) for number in (other, version)]
        unchecked = [number for number, checked in zip((other, version), found, strict=True) if checked is None]
        before, after = found
        keys = await to_thread.run_sync(_key_changes, texts[0], texts[1])
        access = None if before is None or after is None else await to_thread.run_sync(_access_changes, before, after)
    return DiffOut(version=version, against=other, keys=keys, access=access, unchecked=unchecked)


async def _find_checked(session: AsyncSession, version: int) -> Checked | None:
    try:
        return await checks.get(session, version)
    except VersionUnchecked:
        return None


def _key_changes(before: str, after: str) -> list[KeyChangeOut]:
    found = diff.key_changes(documents.parse(before), documents.parse(after))
    return [KeyChangeOut.model_validate(change) for change in found]


def _access_changes(before: Checked, after: Checked) -> list[AccessChangeOut]:
    askers = [Asker(role.value) for role in ASKING_ROLES]
    found = diff.access_changes(before.compiled().compiled, after.compiled().compiled, askers)
    return [
        AccessChangeOut(
            role=change.asker.role,
            tool=change.tool,
            before=_standing(change.before),
            after=_standing(change.after),
            direction=change.direction,
        )
        for change in found
    ]


def _standing(standing: Standing | None) -> StandingOut | None:
    return None if standing is None else StandingOut(access=standing.access, rules=list(standing.rules))


@router.post(
    "/v1/policies/{version}/dry-run",
    summary="What a version would say to a query, or to tool calls",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def dry_run_policy(
    version: VersionOrPublished, body: DryRunIn, caller: Reader, database: TheDatabase, turns: TheTurns
) -> DryRunOut:
    """Decided as the gate decides; no tool is called, no limit is touched. A draft has to be checked first."""
    async with turns.turn(caller.tenant_id):
        async with database.transaction(caller.tenant_id) as session:
            checked = await checks.get(session, version)
            asker = await _asker(session, body.as_.role, body.as_.user_id)
            data = {
                "version": checked.version,
                "as_role": asker.role,
                "as_user_id": asker.id,
                "calls": len(body.calls or ()),
            }
            event = Event(EventType.POLICY_DRY_RUN, actor_id=caller.user_id, data=data)
            await audit.append(session, caller.tenant_id, event)
        return await to_thread.run_sync(partial(_dry_run, checked, asker, query=body.query, calls=body.calls or ()))


async def _asker(session: AsyncSession, role: str | None, user_id: UUID | None) -> Asker:
    """Raise NotFound for a user that the tenant has not."""
    if user_id is None:
        return Asker(role or "")
    user = await tenants.get_user(session, user_id)
    return Asker(role or user.role, user.id)


def _dry_run(checked: Checked, asker: Asker, *, query: str | None, calls: Sequence[CallIn]) -> DryRunOut:
    policy = checked.compiled()
    told = DryRunOut(version=checked.version, checked_at=checked.checked_at, role=asker.role, user_id=asker.id)
    if query is None:
        told.calls = [_decide(policy, asker, call) for call in calls]
        return told
    terms = policy.document.terms_for(asker.name, asker.role)
    told.screening = ScreeningOut.model_validate(admission.admit(query, terms))
    standings = asker.standings(policy.compiled).items()
    told.tools = [_access(tool, standing) for tool, standing in standings if standing.access is not Access.DENIED]
    return told


def _decide(policy: ActivePolicy, asker: Asker, call: CallIn) -> DecisionOut:
    request = ToolRequest(call.tool, call.arguments, user_id=asker.name, role=asker.role)
    decision = deciding.decide(policy, request)
    return DecisionOut(tool=call.tool, decision=decision.verdict, rule=decision.rule, reason=decision.reason)


def _access(tool: str, standing: Standing) -> ToolAccessOut:
    return ToolAccessOut(tool=tool, access=standing.access, rules=list(standing.rules))


@router.get("/v1/policies/{version}/explain", summary="Who can call what", responses=responses(401, 403, 404, 409, 422))
async def explain_policy(
    version: VersionOrPublished,
    caller: Reader,
    database: TheDatabase,
    turns: TheTurns,
    role: TenantRole | None = None,
    user_id: UUID | None = None,
    tool: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
) -> ExplainedOut:
    """Of one role or user, or of every role that may ask; of one tool or of all. Users whom a rule names: ask for
    each.
    """
    async with turns.turn(caller.tenant_id):
        async with database.transaction(caller.tenant_id) as session:
            checked = await checks.get(session, version)
            asked = role is not None or user_id is not None
            askers = [await _asker(session, role, user_id)] if asked else [Asker(each.value) for each in ASKING_ROLES]
        return await to_thread.run_sync(_explain, checked, askers, tool)


def _explain(checked: Checked, askers: Sequence[Asker], tool: str | None) -> ExplainedOut:
    policy = checked.compiled().compiled
    entries = [
        EntryOut(role=asker.role, user_id=asker.id, tool=name, access=standing.access, rules=list(standing.rules))
        for asker in askers
        for name, standing in asker.standings(policy).items()
        if tool is None or name == tool
    ]
    texts = explain.rule_texts(policy.rules)
    used = sorted({rule for entry in entries for rule in entry.rules})
    return ExplainedOut(
        version=checked.version,
        checked_at=checked.checked_at,
        entries=entries,
        texts={rule: texts.get(rule) for rule in used},
    )
