"""What one run carries with it, visible to every layer through a context variable of the run's own task."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, TypeVar
from uuid import UUID

from app.caller import Caller
from app.keyring import SecretKey
from app.limits.meter import Meter
from app.policies.decision import BuiltIn, Decision
from app.policies.engine import PinnedTool
from app.policies.overrides import Terms
from app.policies.tool_search import ToolIndex
from app.policies.versions import ActivePolicy
from app.runs.events.log import EventLog
from app.runs.state import INTERRUPTED, STEP_LIMIT, TOOL_LIMIT, Outcome, RunEnded

UNKNOWN_TOOL: Final = "(unknown)"
_T = TypeVar("_T")
_SETTLE_S: Final = 5.0
_LOOK_S: Final = 0.05
_UNDECIDED: Final = Decision(allowed=False, rule=BuiltIn.NOT_DECIDED, reason="")


@dataclass(slots=True)
class Call:
    """One tool call that the model asked for, and what became of it.

    `turn` and `position` are where the model asked for it. What `is_counted` is in the usage already.
    """

    sequence: int
    tool: str
    arguments: Mapping[str, Any] = field(repr=False)
    turn: int = 0
    position: int = 0
    is_counted: bool = False
    decision: Decision = _UNDECIDED
    outcome: Outcome | None = None
    result: str = field(default="", repr=False)
    duration_ms: int | None = None
    sandbox_hash: str | None = None

    @property
    def recorded_tool(self) -> str:
        """The tool as it is kept in the clear: a name that no server has is a text of the model's."""
        return UNKNOWN_TOOL if self.decision.rule == BuiltIn.UNKNOWN_TOOL else self.tool

    @property
    def recorded_decision(self) -> str:
        """As the journal and the record spell it."""
        if self.decision.needs_approval:
            return "waiting"
        return "allowed" if self.decision else "denied"


@dataclass(slots=True)
class RunContext:
    """A run in flight. `content_key` seals its texts, `hash_key` makes the audit record's keyed hashes.

    `unwritten` are calls whose outcome waits for the run's next commit, `governed` the tasks that decide, record and
    make calls, `calling` those among them that wait for a server. With an `index` the model has to search for tools,
    and sees those that it has `found`. `messages` are the model's own, as JSON, of which the first `written` are in the
    journal; of a run that `is_durable` they go there with the next commit, so that another process can take it up.
    `attempt` is its claim's number: whoever has a later one owns the run. Until `leased_until`, on this process' clock,
    nobody else takes it for dead.
    """

    run_id: UUID
    caller: Caller
    policy: ActivePolicy
    content_key: SecretKey = field(repr=False)
    hash_key: SecretKey = field(repr=False)
    events: EventLog = field(repr=False)
    conversation_id: UUID | None = None
    attempt: int = 1
    leased_until: float = math.inf
    is_durable: bool = False
    messages: list[str] = field(default_factory=list, repr=False)
    written: int = 0
    model_turns: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    answer: str = field(default="", repr=False)
    calls: list[Call] = field(default_factory=list)
    unwritten: list[Call] = field(default_factory=list)
    governed: set[asyncio.Task[Any]] = field(default_factory=set)
    calling: set[asyncio.Task[Any]] = field(default_factory=set)
    is_over: bool = False
    index: ToolIndex | None = None
    found: set[str] = field(default_factory=set)
    meter: Meter = field(default_factory=Meter)
    _terms: Terms | None = field(default=None, init=False, repr=False)

    @property
    def waiting(self) -> list[Call]:
        """The calls that wait for somebody's approval."""
        return [call for call in self.calls if call.decision.needs_approval]

    async def until_leased(self) -> None:
        """Before what no commit fences: a process that has stalled for longer waits until the lease is renewed, or it
        is told that the run is not its own any more, and ends it.
        """
        while time.monotonic() >= self.leased_until:  # noqa: ASYNC110  it is over, or was moved: no event tells of both
            await asyncio.sleep(_LOOK_S)

    @contextmanager
    def writing(self) -> Iterator[Sequence[Call]]:
        """The calls whose outcome the block commits; where it fails, they wait for the next one."""
        noted, self.unwritten = self.unwritten, []
        messages = len(self.messages) if self.is_durable else 0
        try:
            yield noted
        except BaseException:  # cancelled as well: what was not committed is still to be written
            self.unwritten = [*noted, *self.unwritten]
            raise
        self.written = max(self.written, messages)

    def unwrite(self, unwritten: Sequence[Call], written: int, *, is_committed: bool) -> None:
        """Have it as it was before `writing`, unless the transaction that it was in is known to be committed."""
        if not is_committed:
            self.unwritten, self.written = [*unwritten, *self.unwritten], written

    def keep(self, governed: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Govern a call in a task of its own, which ends before the run does and which nobody else may cancel."""
        task = asyncio.create_task(governed)
        self.governed.add(task)
        task.add_done_callback(self.governed.discard)
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever waited may be gone
        return task

    async def until_its_end(self, calling: Coroutine[Any, Any, _T]) -> _T:
        """Call a server; cancelled when the run ends, and RunEnded with nothing called where it has ended."""
        if self.is_over:
            calling.close()
            raise RunEnded(INTERRUPTED)
        task = asyncio.create_task(calling)
        self.calling.add(task)
        try:
            return await task
        finally:
            self.calling.discard(task)

    async def settle(self, *, patience_s: float) -> None:
        """Let the calls under way end, and cancel those that do not: nothing of a run happens after its end.

        Only waiting for a server is cancelled, never a transaction: what is kept in memory is what is stored. Who is
        cancelled here has no more patience, but settles all the same.
        """
        try:
            if self.governed:
                await asyncio.wait(self.governed, timeout=patience_s)
        finally:
            self.is_over = True
            for task in self.calling:
                task.cancel()
            await self._until_settled()

    async def _until_settled(self) -> None:
        """Bounded, and not cut short by a cancel: it is raised afterwards."""
        deadline = time.monotonic() + _SETTLE_S
        cancelled: asyncio.CancelledError | None = None
        while self.governed and (left_s := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait(self.governed, timeout=left_s)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    @property
    def terms(self) -> Terms:
        """What holds for the run's caller, under the policy that it keeps."""
        if self._terms is None:
            self._terms = self.policy.document.terms_for(str(self.caller.user_id), self.caller.role.value)
        return self._terms

    @property
    def visible_tools(self) -> tuple[PinnedTool, ...]:
        """The tools that some call of the run's caller could be allowed to use."""
        return self.policy.compiled.visible_to(str(self.caller.user_id), self.caller.role.value)

    @property
    def model(self) -> str:
        """The catalogue's entry and, where the policy names one, the model."""
        choice = self.policy.document.model
        return f"{choice.use}/{choice.name}" if choice.name else choice.use

    @property
    def tools_in_flight(self) -> frozenset[str]:
        """Tools that have been allowed and have not answered yet."""
        return frozenset(call.tool for call in self.calls if call.decision and call.outcome is None)

    def begin_model_turn(self) -> None:
        """Raise RunEnded past the policy's max_steps."""
        if self.model_turns >= self.terms.max_steps:
            raise RunEnded(STEP_LIMIT)
        self.model_turns += 1

    def begin_call(self, tool: str, arguments: Mapping[str, Any], *, position: int) -> Call:
        """Number a tool call of the last model turn; raise RunEnded past the policy's max_tool_calls."""
        if len(self.calls) >= self.terms.max_tool_calls:
            raise RunEnded(TOOL_LIMIT)
        # Of calls side by side a dead process may have recorded the second and not the first, whose number is free.
        taken = {call.sequence for call in self.calls}
        sequence = next(number for number in count(1) if number not in taken)
        call = Call(sequence, tool, arguments, self.model_turns, position)
        self.calls.append(call)
        return call


_CURRENT: ContextVar[RunContext] = ContextVar("run")


def current_run() -> RunContext:
    """The run whose task this is; raise LookupError outside of one, so that nothing happens without one."""
    return _CURRENT.get()


@contextmanager
def running(run: RunContext) -> Iterator[None]:
    """Make the run current for the block."""
    token = _CURRENT.set(run)
    try:
        yield
    finally:
        _CURRENT.reset(token)
