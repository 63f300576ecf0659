"""Routes that look at what runs have done: a backtest of a version, and why one call was decided so."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Final, Literal
from uuid import UUID

from anyio import to_thread
from fastapi import APIRouter, Depends, Path, Request
from pydantic import AwareDatetime, Field

from app.auth.dependencies import TheDatabase, TheKeyring, requires
from app.caller import Caller
from app.errors import NotFound
from app.keyring import SecretKey
from app.policies import checks, explain, versions
from app.policies import document as documents
from app.policies.checks import PUBLISHED, Checked
from app.policies.decision import Verdict
from app.policies.engine import ToolRequest
from app.policies.rules import Effect
from app.problems import responses
from app.runs import reading, repository
from app.runs.backtests import recorded
from app.runs.backtests import service as backtests
from app.runs.backtests.recorded import UNREADABLE, Head
from app.runs.dependencies import TheTurns
from app.schemas import Answer, Body, VersionNumber, Written
from app.scopes import Scope
from app.servers import deciding
from app.tenants.service import open_tenant_key

router = APIRouter(tags=["policies"])


_FIRST: Final = datetime(1970, 1, 1, tzinfo=UTC)


class BacktestIn(Body):
    """Which recorded calls to replay: the newest `limit`, not older than `since`."""

    # Within what the database knows in every time zone.
    since: Annotated[AwareDatetime, Field(ge=_FIRST, lt=datetime.max.replace(tzinfo=UTC)), Written] | None = None
    limit: int = Field(default=backtests.MAX_CALLS, ge=1, le=backtests.MAX_CALLS)


class ExampleOut(Answer):
    """One of the calls: GET /v1/runs/{run_id}/tool_calls/{sequence}/explain."""

    run_id: UUID
    sequence: int


class FlipOut(Answer):
    """Calls of one user and tool that would be decided otherwise, each for the same reason."""

    user_id: UUID
    role: str
    tool: str
    decision_before: Verdict
    rule_before: str
    decision_after: Verdict
    rule_after: str
    count: int
    example: ExampleOut


class BacktestOut(Answer):
    """Of `calls` replayed, `flipped` would be decided otherwise than by `against`, the version that holds.

    `skipped` counts, by reason, the calls that could not be replayed. `is_full`: it may stand for publishing.
    """

    id: UUID
    version: int
    against: int
    is_full: bool
    calls: int
    flipped: int
    skipped: dict[str, int]
    flips: list[FlipOut]


@router.post(
    "/v1/policies/{version}/backtest",
    summary="Replay a version over the tenant's own recorded calls",
    responses=responses(401, 403, 404, 409, 413, 422),
)
async def backtest_policy(
    request: Request,
    version: VersionNumber,
    caller: Annotated[Caller, Depends(requires(Scope.POLICIES_WRITE))],
    body: BacktestIn = BacktestIn(),
) -> BacktestOut:
    """Every call whose decision would differ is told, by user, tool and rule. It takes up to a minute."""
    question = backtests.Question(version, body.since, body.limit)
    found = await request.app.state.backtests.run(caller, question)
    return BacktestOut.model_validate(found)


class RuledOut(Answer):
    """By which version and rule, and the rule's words; null for a rule that every policy has."""

    policy_version: int
    rule: str
    text: str | None


class RecordedOut(RuledOut):
    """What was decided then; a call that is `waiting` still waits for its approval."""

    decision: Literal["allowed", "denied", "waiting"]


class FiringOut(Answer):
    """A rule that holds on the call now, whether or not another outdoes it."""

    rule: str
    effect: Effect
    text: str


class NowOut(RuledOut):
    """What the version that holds would say of the same call."""

    decision: Verdict
    reason: str
    firing: list[FiringOut]


class CallExplainedOut(Answer):
    """Why a call was decided so. `now` is null where the call cannot be read any more; `unreadable` says why."""

    run_id: UUID
    sequence: int
    tool: str
    user_id: UUID
    role: str
    made_at: datetime
    recorded: RecordedOut
    now: NowOut | None
    unreadable: str | None


@router.get(
    "/v1/runs/{run_id}/tool_calls/{sequence}/explain",
    summary="Why a tool call was decided so",
    responses=responses(401, 403, 404, 409, 422),
)
async def explain_call(
    run_id: UUID,
    sequence: Annotated[int, Path(ge=1, le=100_000)],
    caller: Annotated[Caller, Depends(requires(Scope.POLICIES_READ))],
    database: TheDatabase,
    keyring: TheKeyring,
    turns: TheTurns,
) -> CallExplainedOut:
    """The rule that decided it then, in its words, and what the version that holds would say now."""
    async with database.transaction(caller.tenant_id) as session:
        run = await reading.get(session, caller, run_id)
        heads = await recorded.heads(session, limit=1, run_id=run_id, sequence=sequence)
        if not heads:
            raise NotFound
        (call,) = [each for each in await repository.calls_of(session, run_id) if each.sequence == sequence]
        then = (await versions.get(session, run.policy_version)).document
        published = await checks.get(session, PUBLISHED)
        sealed = await recorded.sealed_arguments(session, heads)
        tenant_key = await open_tenant_key(session, keyring, caller.tenant_id)
    (head,) = heads
    opening = partial(_now, published, head, sealed.get((run_id, sequence)), tenant_key)
    async with turns.turn(caller.tenant_id):
        now = await to_thread.run_sync(opening) if head.unreadable is None else None
        text = await to_thread.run_sync(_text_then, then, call.rule)
    return CallExplainedOut(
        run_id=run_id,
        sequence=sequence,
        tool=call.tool,
        user_id=run.user_id,
        role=head.role,
        made_at=call.created_at,
        recorded=RecordedOut(policy_version=run.policy_version, decision=call.decision, rule=call.rule, text=text),
        now=now,
        unreadable=head.unreadable or (None if now else UNREADABLE),
    )


def _text_then(document: str, rule: str) -> str | None:
    written = explain.rule_texts(explain.written_rules(documents.parse(document)))
    return explain.text_of(rule, written)


def _now(published: Checked, head: Head, sealed: bytes | None, tenant_key: SecretKey) -> NowOut | None:
    call = recorded.opened(head, sealed, tenant_key)
    if call is None:
        return None
    policy = published.compiled()
    request = ToolRequest(call.tool, call.arguments, user_id=str(call.user_id), role=call.role)
    decision = deciding.decide(policy, request)
    texts = explain.rule_texts(policy.compiled.rules)
    effects = {rule.id: rule.effect for rule in policy.compiled.rules}
    firing = [FiringOut(rule=name, effect=effects[name], text=texts[name]) for name in policy.compiled.firing(request)]
    return NowOut(
        policy_version=policy.version,
        decision=decision.verdict,
        rule=decision.rule,
        reason=decision.reason,
        text=texts.get(decision.rule),
        firing=firing,
    )
