"""What all bodies of requests and answers share."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import Path
from pydantic import BaseModel, ConfigDict, field_validator

# So many requests in a moving window.
RATE: Final = r"^[1-9][0-9]{0,5}/(second|minute|hour|day)$"
VersionNumber = Annotated[int, Path(ge=1, le=2_147_483_647)]


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
