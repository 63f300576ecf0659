"""What the version that holds asks of the one that shall replace it."""

from __future__ import annotations

from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from app.errors import Conflict
from app.policies.sections import Section

# A backtest counts for as long: what was asked of the agent since then is not in it.
FRESH_HOURS: Final = 24


class PublishingRules(Section):
    """Whether a successor has to be backtested against this version, and how many calls it may decide otherwise."""

    require_backtest: Annotated[
        bool, Field(description="Publish a successor only after a full backtest of it, at most 24 hours old.")
    ] = False
    max_flips: Annotated[
        int | None, Field(ge=0, le=10_000, description="How many recorded calls it may decide otherwise.")
    ] = None

    @model_validator(mode="after")
    def _max_of_what(self) -> Self:
        if self.max_flips is not None and not self.require_backtest:
            raise ValueError("max_flips needs require_backtest: true")
        return self


class BacktestRequired(Conflict):
    """The version that holds asks for a backtest of its successor first."""

    code = "backtest_required"


class TooManyFlips(Conflict):
    """The version decides more recorded calls otherwise than the version that holds lets it."""

    code = "too_many_flips"
