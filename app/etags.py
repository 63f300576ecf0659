"""Entity tags: what a caller has seen, so that it changes nothing that it has not.

A tag is a hash of the answer that shows the resource; nothing has to be counted or kept for it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Final, TypeVar

from pydantic import BaseModel
from starlette.responses import Response

from app.errors import AppError

Shown = TypeVar("Shown", bound=BaseModel)
_TAGS: Final = re.compile(r'\s*(?:W/)?"[^"]*"\s*(?:,\s*(?:W/)?"[^"]*"\s*)*')
_STRONG: Final = re.compile(r'(W/)?("[^"]*")')


class PreconditionFailed(AppError):
    """It is no longer what your If-Match names: read it again before you change it."""

    status = 412
    code = "precondition_failed"


def etag(answer: BaseModel) -> str:
    """The strong tag of a resource that is shown so."""
    return f'"{hashlib.sha256(answer.model_dump_json().encode()).hexdigest()[:32]}"'


def tagged(response: Response, answer: Shown) -> Shown:
    """The answer, its tag among the headers of the response that it will be."""
    response.headers["ETag"] = etag(answer)
    return answer


@dataclass(frozen=True, slots=True)
class IfMatch:
    """What a change asks for: one of these tags, or just that the resource is there (None)."""

    tags: frozenset[str] | None = None

    def check(self, current: BaseModel) -> None:
        """Raise PreconditionFailed; to be asked in the transaction that changes it, which has locked it."""
        if self.tags is not None and etag(current) not in self.tags:
            raise PreconditionFailed


def read_if_match(header: str | None) -> IfMatch:
    """A weak tag never matches (RFC 9110, 13.1.1), and neither does what is no tag."""
    if header is None or header.strip() == "*":
        return IfMatch()
    found = _STRONG.findall(header) if _TAGS.fullmatch(header) else []
    return IfMatch(frozenset(tag for weak, tag in found if not weak))
