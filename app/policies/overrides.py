"""Narrower terms for some callers. An override has no word that could grant: it denies, holds, lowers and refuses.

All overrides that mean a caller hold together, so that their order says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from app.errors import Fault
from app.policies.sections import Expressions, Globs, Rate, Section, Usd
from app.policies.strict_yaml import pointer
from app.policies.terms import PRESETS, InputRules, Preset, RunLimits, longest, matching_fault

MAX_OVERRIDES: Final = 50
# Of all overrides; each is held against every tool.
MAX_GLOBS: Final = 1_000
# Of all overrides; each is compiled to be counted, which takes up to some milliseconds.
MAX_PATTERNS: Final = 200
_COUNTED: Final = ("max_steps", "timeout_s", "max_tool_calls", "user_concurrent_runs")
# The policy's own bind the tenant, an override's each user that it means.
_BUDGETS: Final = ("tokens_per_day", "cost_usd_per_day", "tool_calls_per_day")

UserId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]


class _Narrower(Section):
    @field_validator("*")
    @classmethod
    def _says_something(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("must say something, or be left out")
        return value


class NarrowerTools(_Narrower):
    """Globs over `server__tool` names."""

    allow: Globs | None = None
    """Of what the policy allows, only the tools that one of these globs matches are left; none if it is empty."""
    deny: Globs = ()
    """Tools that are denied besides; a glob may match none."""
    approve: Globs = ()
    """Tools each call of which waits for an approval besides; each glob must match a tool, and allows none."""


class NarrowerLimits(_Narrower):
    """Each of them at most what the policy's own `limits` say."""

    max_steps: int | None = Field(default=None, ge=1, le=100)
    """Model turns of one run."""
    timeout_s: int | None = Field(default=None, ge=1, le=3600)
    """Seconds of one run."""
    max_tool_calls: int | None = Field(default=None, ge=1, le=1000)
    """Tool calls of one run, denied ones included."""
    requests: Rate | None = None
    """Queries of one user in a moving window; the policy's own `limits.requests` holds besides."""
    user_concurrent_runs: int | None = Field(default=None, ge=1, le=1000)
    """Runs of one user that are under way at once."""
    tokens_per_day: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """Tokens that each user who is meant may use a day; the policy's own `limits.tokens_per_day` holds besides."""
    cost_usd_per_day: Usd | None = None
    """What each user who is meant may cost a day; the policy's own `limits.cost_usd_per_day` holds besides."""
    tool_calls_per_day: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Tool calls of each user who is meant, a day; the policy's own `limits.tool_calls_per_day` holds besides."""


class NarrowerInput(_Narrower):
    """What a query must pass besides the policy's own `input`."""

    preset: Preset | None = None
    """A preset at least as strict as the policy's own."""
    max_length: int | None = Field(default=None, ge=1, le=100_000)
    """Characters of a query."""
    block: Expressions = ()
    """Regular expressions (RE2) that refuse a query, too."""
    flag: Expressions = ()
    """Regular expressions (RE2) that leave a note in the record, too."""

    def rules(self, base: InputRules) -> InputRules:
        """The rules that a query must pass after those of the policy itself."""
        own = longest(self.preset or "off", self.max_length) if self.preset or self.max_length else base.longest
        return InputRules.model_construct(
            preset=self.preset or "off", max_length=min(own, base.longest), block=self.block, flag=self.flag
        )


class Override(_Narrower):
    """What holds besides for callers of these roles, and for these users."""

    roles: Annotated[tuple[Literal["tenant_admin", "auditor", "user"], ...], Field(max_length=3)] = ()
    """Callers of one of these roles are meant."""
    users: Annotated[tuple[UserId, ...], Field(max_length=100)] = ()
    """Callers with one of these user ids are meant, whatever their role."""
    tools: NarrowerTools = NarrowerTools()
    """Fewer tools."""
    limits: NarrowerLimits = NarrowerLimits()
    """Lower limits."""
    input: NarrowerInput = NarrowerInput()
    """Stricter screening."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if not self.roles and not self.users:
            raise ValueError("means nobody: name roles or users")
        if not any(part.model_fields_set for part in (self.tools, self.limits, self.input)):
            raise ValueError("narrows nothing: name tools, limits or input")
        return self

    def means(self, user_id: str, role: str) -> bool:
        """True where it holds for this caller."""
        return role in self.roles or user_id in self.users


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for one caller: counts at their lowest, every rate, and all the screenings that a query must pass.

    Costs are in micro-USD; budgets that are None do not bind.
    `screenings` are by the prefix that their rules have in verdicts: "" for the policy's own.
    """

    max_steps: int
    timeout_s: int
    max_tool_calls: int
    requests: tuple[str, ...]
    concurrent_runs: int
    user_concurrent_runs: int
    tokens_per_day: int | None
    cost_usd_per_day: int | None
    user_tokens_per_day: int | None
    user_cost_usd_per_day: int | None
    tool_calls_per_day: int | None
    user_tool_calls_per_day: int | None
    screenings: Mapping[str, InputRules]

    @property
    def max_length(self) -> int:
        """The characters that a query may have."""
        return min(rules.longest for rules in self.screenings.values())


def terms_of(limits: RunLimits, rules: InputRules, meant: Mapping[int, Override]) -> Terms:
    """The terms of a caller whom these overrides mean, by their places."""
    all_limits: list[RunLimits | NarrowerLimits] = [limits, *(override.limits for override in meant.values())]

    def lowest(name: str) -> int:
        counts: list[int | None] = [getattr(each, name) for each in all_limits]
        return min(count for count in counts if count is not None)

    def narrowest(name: str) -> int | None:
        budgets = (getattr(override.limits, name) for override in meant.values())
        return min((budget for budget in budgets if budget is not None), default=None)

    return Terms(
        **{name: lowest(name) for name in _COUNTED},
        user_tokens_per_day=narrowest("tokens_per_day"),
        user_cost_usd_per_day=narrowest("cost_usd_per_day"),
        user_tool_calls_per_day=narrowest("tool_calls_per_day"),
        concurrent_runs=limits.concurrent_runs,
        tokens_per_day=limits.tokens_per_day,
        cost_usd_per_day=limits.cost_usd_per_day,
        tool_calls_per_day=limits.tool_calls_per_day,
        requests=_lowest(each.requests for each in all_limits if each.requests),
        screenings={
            "": rules,
            **{
                f"{prefix(place)}.": override.input.rules(rules)
                for place, override in meant.items()
                if override.input.model_fields_set
            },
        },
    )


def _lowest(rates: Iterable[str]) -> tuple[str, ...]:
    """The lowest rate of each unit, which the others follow from: each costs the limiter a window of the user."""
    lowest: dict[str, int] = {}
    for count, _, unit in (rate.partition("/") for rate in rates):
        lowest[unit] = min(int(count), lowest.get(unit, int(count)))
    return tuple(f"{count}/{unit}" for unit, count in lowest.items())


def prefix(place: int) -> str:
    """What the names of an override's rules begin with."""
    return f"overrides[{place}]"


def crowding(document: Any) -> list[Fault]:
    """Of a document as it was read: too many patterns, told before the first of them is compiled."""
    overrides = document.get("overrides") if isinstance(document, dict) else None
    inputs = [each.get("input") for each in overrides if isinstance(each, dict)] if isinstance(overrides, list) else []
    lists = [each.get(key) for each in inputs if isinstance(each, dict) for key in ("block", "flag")]
    patterns = sum(len(each) for each in lists if isinstance(each, list))
    if patterns <= MAX_PATTERNS:
        return []
    return [Fault(pointer("overrides"), f"hold {patterns} patterns in block and flag; {MAX_PATTERNS} are allowed")]


def faults(limits: RunLimits, rules: InputRules, overrides: Sequence[Override]) -> list[Fault]:
    """What would widen, which the author cannot mean, and what all patterns together would cost."""
    found = list(chain.from_iterable(_widening(limits, rules, place, each) for place, each in enumerate(overrides)))
    globs = sum(len(each.tools.allow or ()) + len(each.tools.deny) + len(each.tools.approve) for each in overrides)
    if globs > MAX_GLOBS:
        found.append(Fault(pointer("overrides"), f"hold {globs} globs; {MAX_GLOBS} are allowed"))
    patterns = _patterns([rules, *(each.input for each in overrides)])
    if overrides and (fault := matching_fault(patterns, rules.longest)):
        found.append(Fault(pointer("overrides"), f"with those of the policy's own input, {fault}"))
    return found


def _patterns(inputs: Iterable[InputRules | NarrowerInput]) -> tuple[str, ...]:
    return tuple(chain.from_iterable((*each.block, *each.flag) for each in inputs))


def _widening(limits: RunLimits, rules: InputRules, place: int, override: Override) -> Iterator[Fault]:
    own, screened = override.limits, override.input
    wider = [
        (f"limits/{name}", _is_more(getattr(own, name), getattr(limits, name)), getattr(limits, name))
        for name in (*_COUNTED, *_BUDGETS)
    ]
    wider += [
        ("limits/requests", _is_faster(own.requests, limits.requests), limits.requests),
        ("input/max_length", _is_more(screened.max_length, rules.longest), rules.longest),
        ("input/preset", _is_looser(screened.preset, rules.preset), rules.preset),
    ]
    for key, is_wider, base in wider:
        if is_wider:
            message = f"is wider than {key.replace('/', '.')} of the policy ({base}): an override only narrows"
            yield Fault(pointer("overrides", place, *key.split("/")), message)


def _is_more(count: int | None, base: int | None) -> bool:
    return count is not None and base is not None and count > base


def _is_faster(rate: str | None, base: str) -> bool:
    """Between units neither need be the wider one: ten a minute and a hundred an hour hold side by side."""
    if rate is None:
        return False
    count, _, unit = rate.partition("/")
    own, _, own_unit = base.partition("/")
    return unit == own_unit and int(count) > int(own)


def _is_looser(preset: Preset | None, base: Preset) -> bool:
    return preset is not None and PRESETS.index(preset) < PRESETS.index(base)
