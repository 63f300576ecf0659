"""What a query and its run are held to: the sections `limits`, `input`, `approvals` and `conversations`."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import Field, ValidationInfo, field_validator

from app.policies.patterns import compile_pattern
from app.policies.sections import Expressions, Rate, Section, Usd

Preset = Literal["strict", "balanced", "off"]
# From the loosest to the strictest.
PRESETS: Final[tuple[Preset, ...]] = ("off", "balanced", "strict")
# Characters a query may have where the policy says nothing; the guide's number for `strict`.
_MAX_LENGTH: Final[dict[Preset, int]] = {"strict": 1_000, "balanced": 4_000, "off": 20_000}
# Instructions of all patterns times characters of a query. The worst patterns take 5 to 8 ns for each on ASCII and
# 23 ns on the widest characters, so that a screening, of a text and of its plain form, ends within a second; an
# ordinary one takes microseconds.
MAX_MATCHING: Final = 20_000_000
# A shorter query counts as one of these: the patterns have to be compiled for it all the same.
_SHORTEST: Final = 1_000


class RunLimits(Section):
    """What one run, one user's requests, and all runs of a day are bounded by."""

    max_steps: int = Field(default=20, ge=1, le=100)
    """Model turns of one run."""
    timeout_s: int = Field(default=300, ge=1, le=3600)
    """Seconds of one run."""
    max_tool_calls: int = Field(default=10, ge=1, le=1000)
    """Tool calls of one run, denied ones included."""
    requests: Rate = "10/minute"
    """Queries of one user in a moving window: a number and `second`, `minute`, `hour` or `day`."""
    tenant_requests: Rate = "600/minute"
    """Queries of the whole tenant in a moving window, likewise."""
    concurrent_runs: int = Field(default=20, ge=1, le=1000)
    """Runs of the tenant that are under way at once."""
    user_concurrent_runs: int = Field(default=5, ge=1, le=1000)
    """Runs of one user that are under way at once."""
    tokens_per_day: int | None = Field(default=None, ge=1, le=1_000_000_000_000)
    """Tokens that all runs of the tenant may use, by the day (UTC) on which they begin; without it, any number."""
    cost_usd_per_day: Usd | None = None
    """What all runs of the tenant may cost, by the day (UTC) on which they begin: a decimal text, as "50"."""
    tool_calls_per_day: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Tool calls that all runs of the tenant may make, by the day (UTC) on which they begin; denied ones are none."""


class InputRules(Section):
    """How queries are screened; without `max_length` (characters) the preset's own holds."""

    preset: Preset = "balanced"
    """How strictly queries are screened by rules of the platform."""
    max_length: int | None = Field(default=None, ge=1, le=100_000)
    """Characters of a query; without it the preset's own: strict 1,000, balanced 4,000, off 20,000."""
    block: Expressions = ()
    """Regular expressions (RE2) that refuse a query."""
    flag: Expressions = ()
    """Regular expressions (RE2) that only leave a note in the record."""

    @property
    def longest(self) -> int:
        """The characters that a query may have."""
        return longest(self.preset, self.max_length)

    @field_validator("block", "flag")
    @classmethod
    def _affordable(cls, patterns: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Told once, at the key that passes the bound; keys that are at fault themselves are not there to count."""
        before = info.data.get("block", ())
        characters = longest(info.data.get("preset", "balanced"), info.data.get("max_length"))
        if patterns and (fault := matching_fault((*before, *patterns), characters)):
            raise ValueError(fault)
        return patterns


class ApprovalRules(Section):
    """How a call that needs an approval waits for it."""

    expires_s: int = Field(default=86_400, ge=60, le=604_800)
    """Seconds until a call that nobody has decided on is denied."""
    self_approval: bool = True
    """Whether who has asked the agent may approve of its calls, too."""


class ConversationRules(Section):
    """What a run is told of its conversation, and how long that is kept."""

    window_tokens: int = Field(default=8_000, ge=0, le=200_000)
    """Tokens of what was said before that the model is told, the newest first; 0: none."""
    retention_days: int = Field(default=90, ge=1, le=3_650)
    """Days after which a conversation that nobody has gone on with is erased."""


def longest(preset: Preset, max_length: int | None) -> int:
    """The characters that a query may have under this preset, where nothing or `max_length` is said."""
    return max_length or _MAX_LENGTH[preset]


def matching_fault(patterns: tuple[str, ...], characters: int) -> str | None:
    """What speaks against matching all of these patterns against one query of so many characters."""
    allowed = MAX_MATCHING // max(characters, _SHORTEST)
    instructions = sum(compile_pattern(pattern).programsize for pattern in patterns)
    if instructions <= allowed:
        return None
    return (
        f"the patterns of block and flag take {instructions} instructions; {allowed} are allowed for queries of that"
        " length: simplify them, or lower max_length"
    )
