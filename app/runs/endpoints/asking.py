"""Routes that begin runs: ask and wait for the answer, follow the events, or let the run go on in the background."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, TypeVar
from uuid import UUID

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import ClientDisconnect

from app.caller import Caller
from app.db import Database, new_id
from app.errors import AppError, Conflict, NotFound
from app.idempotency.once import Once, Taken
from app.keyring import Keyring
from app.limits.queue import TooManyRuns
from app.policies.versions import ActivePolicy
from app.problems import responses
from app.runs import reading, repository
from app.runs.contents import Kind
from app.runs.dependencies import AskedOnce, TheAdmitted, record_refusal
from app.runs.endpoints.accept import EVENTS, prefers_events
from app.runs.endpoints.streaming import follow, streamed
from app.runs.lifecycle.budgets import until_tomorrow_s
from app.runs.models import Run
from app.runs.repeats import answers
from app.runs.repeats.twins import Twins, is_watched
from app.runs.schemas import AcceptedOut, QueryIn, RunOut
from app.runs.service import Question, RunService
from app.runs.state import BUDGET_EXHAUSTED, WAITING, Ending, RunKind, State, StopCause

router = APIRouter(tags=["runs"])
_T = TypeVar("_T")
# A run ends this long after its policy's timeout at the latest, whatever becomes of its process.
_SPARE_S: Final = 60
_REPLAYED: Final = {"Idempotency-Replayed": "true"}
_ACCEPTED: Final[dict[str, Any]] = {
    "model": AcceptedOut,
    "description": "The run goes on in the background",
    "headers": {"Location": {"description": "The run", "schema": {"type": "string"}}},
}
_IN_BACKGROUND: Final[dict[int | str, dict[str, Any]]] = {202: _ACCEPTED}
_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {EVENTS: {"schema": {"type": "string"}}}},
    **_IN_BACKGROUND,
}


class RunProblem(AppError):
    """The run ended without an answer."""

    def __init__(self, run_id: UUID, ending: Ending, headers: Mapping[str, str] | None = None) -> None:
        # A budget begins anew with the next day (UTC), whichever it is.
        is_budget = ending.code == BUDGET_EXHAUSTED.code
        told = {"Retry-After": str(until_tomorrow_s())} if is_budget else {}
        super().__init__(ending.detail, headers=told | dict(headers or {}), extra={"run_id": str(run_id)})
        self.status, self.code = ending.http_status, ending.code or "internal"


class RunUnderWay(Conflict):
    """The run that this Idempotency-Key has begun is under way still. Send the request again, or look at the run."""

    code = "run_under_way"

    def __init__(self, run_id: UUID) -> None:
        super().__init__(headers={"Retry-After": "1"}, extra={"run_id": str(run_id)})


@dataclass(frozen=True, slots=True)
class _Asking:
    """A request that begins a run, or has begun one when it was sent before."""

    request: Request
    caller: Caller
    policy: ActivePolicy
    runs: RunService
    twins: Twins
    database: Database
    once: Once

    @property
    def wants_events(self) -> bool:
        return prefers_events(", ".join(self.request.headers.getlist("accept")))

    def question(self, body: QueryIn) -> Question:
        return Question(new_id(), body.query, body.conversation, once=self.once, is_live=self.wants_events)

    async def replay(self) -> None:
        """Raise Taken where this has begun a run before. It needs no place among the runs under way."""
        if self.once.key is not None:
            async with self.database.transaction(self.caller.tenant_id) as session:
                await self.once.replay(session, self.caller.tenant_id)

    async def run(self, run_id: UUID) -> Run:
        async with self.database.transaction(self.caller.tenant_id) as session:
            run = await repository.find(session, run_id, user_id=self.caller.user_id)
        if run is None:
            raise NotFound
        return run

    async def problem(self, run_id: UUID, ending: Ending, headers: Mapping[str, str] | None = None) -> RunProblem:
        """In the words that were used the first time: a run's row keeps no more than its code."""
        if self.once.key is not None:
            async with self.database.transaction(self.caller.tenant_id) as session:
                words = await self.once.tell(session, self.caller.tenant_id, ending.detail)
            ending = replace(ending, detail=words)
        return RunProblem(run_id, ending, headers)


async def _asking(request: Request, admitted: TheAdmitted, once: AskedOnce) -> _Asking:
    """The parts are looked up here: FastAPI walks the whole tree of dependencies for each query."""
    parts = request.app.state
    return _Asking(request, admitted.caller, admitted.policy, parts.runs, parts.twins, parts.database, once)


Asking = Annotated[_Asking, Depends(_asking)]


@router.post("/query", include_in_schema=False, response_model=RunOut)
@router.post(
    "/v1/query",
    summary="Ask the tenant's agent and wait for the answer, or follow its events",
    response_model=RunOut,
    responses=_ANSWERS | responses(401, 403, 404, 409, 413, 422, 429, 502, 504),
)
async def ask(body: QueryIn, asking: Asking, response: Response) -> RunOut | Response:
    """Run the query under the tenant's published policy; every tool call of it is decided by that policy.

    Where a call waits for an approval, the run goes on in the background and the answer is 202.
    """
    try:
        await asking.replay()
        question = asking.question(body)
        return await _follow(asking, question) if question.is_live else await _answer(asking, question)
    except Taken as taken:
        response.headers.update(_REPLAYED)
        return await _again(asking, taken.subject)


@router.post(
    "/v1/runs",
    status_code=202,
    summary="Ask the tenant's agent and let it work in the background",
    responses=_IN_BACKGROUND | responses(401, 403, 404, 409, 413, 422, 429),
)
async def start_run(body: QueryIn, asking: Asking, response: Response) -> AcceptedOut:
    """As a query is asked, without waiting: the run begins as soon as it may. `Location` tells what becomes of it."""
    try:
        await asking.replay()
        run_id = await _submit(asking, replace(asking.question(body), is_live=False))
    except Taken as taken:
        run_id, run = taken.subject, await asking.run(taken.subject)
        if answers.was_refused(run):
            raise await asking.problem(run_id, answers.ending_of(run), _REPLAYED) from None
        response.headers.update(_REPLAYED)
    asking.request.state.run_state = State.QUEUED.value
    response.headers["Location"] = _location(run_id)
    return AcceptedOut(
        run_id=run_id,
        user_id=asking.caller.user_id,
        kind=RunKind.BACKGROUND,
        status=State.QUEUED,
        code=None,
        conversation=body.conversation,
    )


async def _submit(asking: _Asking, question: Question) -> UUID:
    try:
        submitted = await asking.runs.submit(asking.caller, asking.policy, question)
    except TooManyRuns as error:
        await record_refusal(asking.request, asking.caller, error.code)
        raise
    if submitted.ending is not None:
        raise await asking.problem(question.run_id, submitted.ending)
    return question.run_id


async def _answer(asking: _Asking, question: Question) -> RunOut | Response:
    answering = asking.runs.begin(asking.caller, asking.policy, question)
    # Shielded: whatever becomes of this request, the run is carried to its recorded end.
    answered = await _patiently(asking, question, asyncio.shield(answering))
    run, ending = answered.run, answered.ending
    asking.request.state.run_state = ending.state.value
    if ending.state is WAITING.state:
        return _accepted(run.run_id, asking.caller.user_id, run.conversation_id)
    if not ending.answers:
        raise await asking.problem(question.run_id, ending)
    if asking.once.key is not None:  # told from the record, as it will be if this is sent again
        return await _recorded(asking, await asking.run(run.run_id))
    return RunOut.of(run, ending)


async def _follow(asking: _Asking, question: Question) -> Response:
    """A refusal is a problem with its status, as it is for those who wait; what has begun is told as events."""
    with asking.request.app.state.following.room(asking.caller):  # also while the query waits for its turn
        answering = asking.runs.begin(asking.caller, asking.policy, question)
        await _patiently(asking, question, asyncio.shield(asking.runs.begun(question.run_id)))
        if answers.was_refused(await asking.run(question.run_id)):
            raise await asking.problem(question.run_id, (await asyncio.shield(answering)).ending)
        asking.request.state.run_state = State.RUNNING.value
        return await streamed(asking.request, asking.caller, question.run_id)


async def _patiently(asking: _Asking, question: Question, awaited: asyncio.Future[_T]) -> _T:
    """What is awaited, unless the client goes before."""
    watching = asyncio.create_task(_cancel_when_client_is_gone(asking, question.run_id))
    try:
        return await awaited
    except TooManyRuns as error:
        await asking.replay()  # the first of twins may be what has used up the room for the second
        await record_refusal(asking.request, asking.caller, error.code)
        raise
    finally:
        watching.cancel()


async def _again(asking: _Asking, run_id: UUID) -> RunOut | Response:
    """What the run was answered with, or is when it has ended."""
    run = await asking.run(run_id)
    if asking.wants_events and not answers.was_refused(run):
        asking.request.state.run_state = run.state
        events = await follow(asking.request, asking.caller, run_id, after=0)
        events.headers.update(_REPLAYED)
        return events
    if answers.is_awaited(run):
        await _wait(asking, run_id)
        run = await asking.run(run_id)
    if run.kind == RunKind.BACKGROUND:
        asking.request.state.run_state = WAITING.state.value
        return _accepted(run_id, run.user_id, run.conversation_id, _REPLAYED)
    return await _recorded(asking, run)


async def _wait(asking: _Asking, run_id: UUID) -> None:
    """Until the run has ended, and no longer than the client does: nobody else keeps the run going for it."""
    terms = asking.policy.document.terms_for(str(asking.caller.user_id), asking.caller.role.value)
    at_most_s = terms.timeout_s + _SPARE_S
    waiting = asyncio.create_task(asking.twins.wait(asking.caller.tenant_id, run_id, at_most_s=at_most_s))
    going = asyncio.create_task(_until_gone(asking.request))
    try:
        done, _ = await asyncio.wait({waiting, going}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        going.cancel()
    if waiting not in done:
        raise ClientDisconnect
    if not waiting.result():
        raise RunUnderWay(run_id)


async def _recorded(asking: _Asking, run: Run) -> RunOut:
    """The answer of a run that has ended, from its record."""
    ending = answers.ending_of(run)
    asking.request.state.run_state = ending.state.value
    if not ending.answers:
        raise await asking.problem(run.id, ending, _REPLAYED)
    async with asking.database.transaction(asking.caller.tenant_id) as session:
        calls = await repository.calls_of(session, run.id)
        keyring: Keyring = asking.request.app.state.keyring
        texts = await reading.texts(session, keyring, run.tenant_id, run.user_id, [run.id])
    return RunOut.recorded(run, calls, texts.get((run.id, Kind.ANSWER)))


def _accepted(
    run_id: UUID, user_id: UUID, conversation_id: UUID | None, headers: Mapping[str, str] | None = None
) -> Response:
    """Of a run that waits for an approval, or has done so: what was said then."""
    said = AcceptedOut(
        run_id=run_id,
        user_id=user_id,
        kind=RunKind.BACKGROUND,
        status=WAITING.state,
        code=WAITING.code,
        conversation=conversation_id,
    )
    told = {"Location": _location(run_id)} | dict(headers or {})
    return JSONResponse(said.model_dump(mode="json"), status_code=WAITING.http_status, headers=told)


def _location(run_id: UUID) -> str:
    return f"/v1/runs/{run_id}"


async def _until_gone(request: Request) -> None:
    """Looks every second, and not at once: most answers are there before."""
    while True:
        await asyncio.sleep(1)
        if await request.is_disconnected():
            return


async def _cancel_when_client_is_gone(asking: _Asking, run_id: UUID) -> None:
    await _until_gone(asking.request)
    asking.runs.withdraw(run_id)
    await asyncio.sleep(asking.request.app.state.settings.client_grace_s)
    while True:  # until there is an answer: it may have come to the queue, or begun, only now
        if not await _is_watched(asking, run_id):
            asking.runs.withdraw(run_id)
            asking.runs.stop(run_id, StopCause.CLIENT_GONE)
        await asyncio.sleep(1)


async def _is_watched(asking: _Asking, run_id: UUID) -> bool:
    """Whether the same request was sent again, or somebody follows the events; also while nobody can tell."""
    try:
        async with asking.database.transaction(asking.caller.tenant_id) as session:
            return await is_watched(session, run_id)
    except (SQLAlchemyError, OSError, TimeoutError):
        return True
