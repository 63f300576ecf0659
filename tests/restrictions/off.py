"""Each enforcement by itself, taken away: what a control does before it repeats its attack."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from app.limits.rates import RateLimiter
from app.limits.windows import Bound, Verdict
from app.policies import screening
from app.policies.decision import Decision
from app.policies.document import PolicyDocument
from app.policies.terms import InputRules
from app.runs.agent import executor, gate
from app.runs.context import Call, RunContext
from app.servers import templates
from app.servers.tenant_servers import TenantServers


def steps(patch: pytest.MonkeyPatch) -> None:
    """Nobody counts model turns."""
    patch.setattr(RunContext, "begin_model_turn", lambda _: None)


def tool_calls(patch: pytest.MonkeyPatch) -> None:
    """Nobody counts tool calls."""

    def begin_call(run: RunContext, tool: str, arguments: Mapping[str, Any], *, position: int) -> Call:
        call = Call(len(run.calls) + 1, tool, arguments, run.model_turns, position)
        run.calls.append(call)
        return call

    patch.setattr(RunContext, "begin_call", begin_call)


def time(patch: pytest.MonkeyPatch) -> None:
    """A run has no end."""
    endless = SimpleNamespace(**vars(asyncio) | {"timeout": lambda _: asyncio.timeout(None)})
    patch.setattr(executor, "asyncio", endless)


def rate(patch: pytest.MonkeyPatch) -> None:
    """The window refuses nobody."""
    hit = RateLimiter.hit

    async def agreeable(self: RateLimiter, *bounds: Bound) -> Verdict:
        return dataclasses.replace(await hit(self, *bounds), is_allowed=True)

    patch.setattr(RateLimiter, "hit", agreeable)


def preset(patch: pytest.MonkeyPatch) -> None:
    """The platform's own rules refuse nothing."""
    patch.setitem(screening._REFUSED, "balanced", ())


def length(patch: pytest.MonkeyPatch) -> None:
    """No query is too long."""
    patch.setattr(InputRules, "longest", property(lambda _: 1_000_000))


def patterns(patch: pytest.MonkeyPatch) -> None:
    """The tenant's patterns match nothing."""
    patch.setattr(screening.Screening, "_tenants", lambda *_: iter(()))


def overridden_terms(patch: pytest.MonkeyPatch) -> None:
    """Limits and screenings of an override mean nobody."""
    patch.setattr(PolicyDocument, "meant_for", lambda *_: {})


def decision(patch: pytest.MonkeyPatch) -> None:
    """The gate allows whatever is asked."""
    patch.setattr(gate, "_decide", lambda *_: Decision(allowed=True, rule="off", reason=""))


def narrowing_of_the_search(patch: pytest.MonkeyPatch) -> None:
    """A search knows all tools, whoever asks."""
    patch.setattr(RunContext, "visible_tools", property(lambda run: run.policy.tools))


def pins(patch: pytest.MonkeyPatch) -> None:
    """A server may have other tools than those that were pinned."""

    async def nothing(*_: Any) -> None:
        return None

    patch.setattr(TenantServers, "_compare", nothing)


@contextmanager
def template(name: str, **parts: Any) -> Iterator[None]:
    """Parts of the template are others, for calls that are checked and servers that start in the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(templates._TEMPLATES, name, dataclasses.replace(templates._TEMPLATES[name], **parts))
        yield
