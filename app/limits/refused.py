"""Refusals by a rate that are remembered for a moment: a flood is answered before its credential is looked up.

A refusal costs a look at the credential, in the database, and at the policy, on the one loop that everybody's requests
go through. Whoever goes on after many gets the next ones from memory, until a place may be free, for a second at most:
so long a policy that was changed or a key that was revoked meanwhile may be unseen, and only for who was refused.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from app.limits import rates
from app.limits.rates import Refused
from app.limits.windows import Verdict
from app.problems import rate_limited
from app.telemetry.metrics import VIOLATIONS
from app.telemetry.security import Violation

# Refusals of a credential, each so soon after the one before, that make a flood.
AFTER: Final = 10
_APART_S: Final = 2.0
# A refusal is remembered for so long; in the second half of it a few at a time are looked up, in such steps. Otherwise
# it would be all that come until the first of them is refused.
FOR_S: Final = 1.0
LOOK_S: Final = 0.05
MOST: Final = 10_000
_QUERIES: Final = frozenset({"/query", "/v1/query", "/v1/runs"})
_log = structlog.get_logger()


@dataclass(slots=True)
class _Flood:
    """The refusals of a credential: how many were decided, and what is told meanwhile."""

    verdict: Verdict  # the last
    user_id: str
    count: int = 0
    last: float = -math.inf  # when the last was decided
    until: float = -math.inf  # all are answered from here
    free: float = 0  # when there is a place
    step: float = -math.inf  # until when so many more are looked up
    left: int = 0
    untold: int = 0  # answered from here, and not in the log yet

    def has_answer(self, now: float) -> bool:
        """Whether this request is answered from here; otherwise it is counted as one of those that are looked up."""
        if self.count < AFTER or now >= self.last + FOR_S:
            return False
        if now < self.until:
            return True
        if now >= self.step:
            self.step, self.left = now + LOOK_S, _at_once(self.verdict)
        self.left -= 1
        return self.left < 0


def _at_once(verdict: Verdict) -> int:
    """Twice as many as places come back in a step, so that nobody gets less than the limit allows."""
    limit = verdict.tightest.bound
    return max(1, math.ceil(2 * LOOK_S * limit.amount / limit.span_s))


class Refusals:
    """ASGI middleware outside of the log and the traces, inside of the metrics and of the edge.

    It holds keyed digests, no credentials. A query and any other request are counted by different limits, so they are
    remembered apart.
    """

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._floods: OrderedDict[bytes, _Flood] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = self._name(scope) if scope["type"] == "http" else None
        flood = self._floods.get(name) if name is not None else None
        if flood is not None and flood.has_answer(self._clock()):
            await self._answer(flood, scope, receive, send)
            return
        await self._app(scope, receive, send)
        if name is not None:
            self._note(name, scope["state"])

    def _name(self, scope: Scope) -> bytes | None:
        """Of what is remembered; None where no credential is looked at, whatever is sent."""
        path = scope["path"]
        if path != "/query" and not path.startswith("/v1/"):
            return None
        # As FastAPI's HTTPBearer reads it: another spelling is the same credential.
        scheme, _, credential = Headers(scope=scope).get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return None
        kind = b"query" if path in _QUERIES and scope["method"] == "POST" else b"other"
        return hashlib.blake2b(credential.strip().encode(), key=self._secret, person=kind, digest_size=16).digest()

    def _note(self, name: bytes, state: dict[str, object]) -> None:
        """Count a refusal of a caller that was accepted; what an address is refused is another's limit."""
        refusal = state.get("refusal")
        if not isinstance(refusal, Refused) or refusal.verdict is None or "user_id" not in state:
            return
        now, flood = self._clock(), self._floods.setdefault(name, _Flood(refusal.verdict, str(state["user_id"])))
        self._floods.move_to_end(name)
        if len(self._floods) > MOST:
            self._floods.popitem(last=False)
        flood.count = flood.count + 1 if now - flood.last < _APART_S else 1
        flood.verdict, flood.last = refusal.verdict, now
        flood.free = now + flood.verdict.tightest.reset_s
        flood.until = min(flood.free, now + FOR_S / 2)
        self._tell(flood)

    def _tell(self, flood: _Flood) -> None:
        """One line for all that had none: the log of a flood must not be what it costs."""
        if flood.untold:
            _log.warning("limiter.flood", refused=flood.untold)
            flood.untold = 0

    async def _answer(self, flood: _Flood, scope: Scope, receive: Receive, send: Send) -> None:
        """As it would be refused once more, and counted so; the body is not read."""
        flood.untold += 1
        rates.count(flood.verdict)
        VIOLATIONS.labels(Violation.RATE_LIMIT.value).inc()
        request = Request(scope)
        request.state.user_id = flood.user_id
        refusal = rates.exceeded(flood.verdict, reset_s=flood.free - self._clock())
        await rate_limited(request, refusal)(scope, receive, send)
