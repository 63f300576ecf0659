"""The description of the API: written anew by `python -m tests.openapi`, compared by tests/test_openapi.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ClassVar, Final

import httpx
from fastapi import FastAPI
from pydantic import SecretStr

from app.db import DatabaseUrls
from app.keyring import new_entry
from app.main import create_app
from app.sandbox.choice import ProbedSandbox
from app.sandbox.probe import Probe
from app.settings import Settings

SNAPSHOT: Final = Path(__file__).with_suffix(".json")
_NOWHERE: Final = "postgresql+asyncpg://nobody@127.0.0.1:1/none"
_MAY_CRASH: Final = ContextVar("_MAY_CRASH", default=False)


def unconnected_app(**settings: Any) -> FastAPI:
    """The application with a database that is not there."""
    keys: dict[str, Any] = {"root_keys": SecretStr(new_entry("k1")), "model_api_key": SecretStr("none")}
    chosen = Settings(_env_file=None, **keys, **settings)
    sandbox = ProbedSandbox(None, Probe(ok=False, backend="none", reason="", remedy=""))
    return create_app(chosen, urls=DatabaseUrls(None, _NOWHERE, _NOWHERE, _NOWHERE), sandbox=sandbox)


def described(app: FastAPI) -> str:
    """The description as it is checked in."""
    return json.dumps(app.openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


@contextmanager
def crashing() -> Iterator[None]:
    """What is asked inside the block may be answered 500: the test has broken what the service rests on.

    No route declares that, so everywhere else it fails the test that got it.
    """
    token = _MAY_CRASH.set(True)
    try:
        yield
    finally:
        _MAY_CRASH.reset(token)


class Documented:
    """A hook for clients: an answer with a status that its route does not declare fails the test that got it."""

    # Of the first application of this process: no setting changes it, and it takes half of a service's start.
    _operations: ClassVar[list[tuple[re.Pattern[str], str, set[str]]]] = []

    def __init__(self, app: FastAPI) -> None:
        if not self._operations:
            paths: dict[str, dict[str, Any]] = app.openapi()["paths"]
            self._operations.extend(
                (re.compile(_pattern(path)), method.upper(), set(operation["responses"]))
                for path, methods in paths.items()
                for method, operation in methods.items()
            )

    async def __call__(self, response: httpx.Response) -> None:
        """Raise AssertionError."""
        if response.status_code == httpx.codes.INTERNAL_SERVER_ERROR and _MAY_CRASH.get():
            return
        request = response.request
        for pattern, method, declared in self._operations:
            if method == request.method and pattern.fullmatch(request.url.path):
                status = str(response.status_code)
                assert status in declared, f"{method} {request.url.path} answered {status}, which is not documented"


def _pattern(path: str) -> str:
    """A file's path may have slashes; /query is another name of /v1/query."""
    pattern = re.sub(r"{(\w+)}", lambda match: ".+" if match[1] == "path" else "[^/]+", path)
    return f"(?:/v1)?{path.removeprefix('/v1')}" if path == "/v1/query" else pattern


if __name__ == "__main__":
    SNAPSHOT.write_text(described(unconnected_app()))
