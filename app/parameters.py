"""Query parameters: one that the route does not take is refused, as an unknown member of a body is.

What is ignored may be what was to bound the request: with `userid` for `user_id` a deletion would take more away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, get_args, get_origin

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from starlette.routing import BaseRoute

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,100}")
# By endpoint: the names of its parameters, and whether each may be given more than once.
Declared = Mapping[Callable[..., Any], Mapping[str, bool]]


def declared(routes: Sequence[BaseRoute]) -> Declared:
    """What these routes take, with what their dependencies take."""
    found: dict[Callable[..., Any], dict[str, bool]] = {}
    for route in iter_route_contexts(routes):
        if (endpoint := route.endpoint) is not None:
            found.setdefault(endpoint, {}).update(_of(route.dependant))
    return found


def _of(dependant: Dependant) -> Iterator[tuple[str, bool]]:
    for field in dependant.query_params:
        annotation = field.field_info.annotation
        yield field.alias, any(get_origin(each) is list for each in (annotation, *get_args(annotation)))
    for dependency in dependant.dependencies:
        yield from _of(dependency)


def check(request: Request, known: Declared) -> None:
    """Raise RequestValidationError for what the route does not take, or takes once only."""
    if not request.scope["query_string"]:
        return
    given = Counter(name for name, _ in request.query_params.multi_items())
    if faults := list(_faults(given, known.get(request.scope["endpoint"], {}))):
        raise RequestValidationError(faults)


def _faults(given: Mapping[str, int], known: Mapping[str, bool]) -> Iterator[dict[str, Any]]:
    for name, times in given.items():
        if name not in known:
            # No other text of a caller's is in the answer.
            place = ("query", name) if _NAME.fullmatch(name) else ("query",)
            yield {"type": "unknown_parameter", "loc": place, "msg": "is not a known parameter"}
        elif times > 1 and not known[name]:
            yield {"type": "repeated_parameter", "loc": ("query", name), "msg": "is given more than once"}
