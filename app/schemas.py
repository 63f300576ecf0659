"""What all bodies of requests and answers share."""

from __future__ import annotations

import re
from datetime import date, datetime
from typing import Annotated, Final

from fastapi import Path
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    WithJsonSchema,
    field_validator,
)

_RATE: Final = re.compile(r"^[1-9][0-9]{0,5}/(second|minute|hour|day)$")
_NUMBER: Final = re.compile(r"\s*[-+]?[0-9.]+(e[0-9]+)?\s*", re.IGNORECASE)
VersionNumber = Annotated[int, Path(ge=1, le=2_147_483_647)]


def _in_reach(at: datetime) -> datetime:
    if not 1970 <= at.year < 9999:
        raise ValueError("the year must be from 1970 to 9998")
    return at


def _written(value: object) -> object:
    """The library takes a number for seconds since 1970: `0.5`, and a year that was meant."""
    if not isinstance(value, str | date) or (isinstance(value, str) and _NUMBER.fullmatch(value)):
        raise ValueError("must be written as RFC 3339 has it, not as a number")
    return value


def _rate(rate: str) -> str:
    if not _RATE.fullmatch(rate):
        raise ValueError('must be a rate such as "100/minute"')
    return rate


# So many requests in a moving window.
Rate = Annotated[str, AfterValidator(_rate), WithJsonSchema({"type": "string", "pattern": _RATE.pattern})]
Written = BeforeValidator(_written)
Moment = Annotated[AwareDatetime, AfterValidator(_in_reach), Written]
Day = Annotated[date, Written]


class Body(BaseModel):
    """A request: a member that the route does not know is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="after")
    @classmethod
    def _storable(cls, value: object) -> object:
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a text holds no NUL")  # Postgres cannot keep one
        return value


class Answer(BaseModel):
    """An answer, made from a row or a value of the domain by its attributes."""

    model_config = ConfigDict(from_attributes=True)
