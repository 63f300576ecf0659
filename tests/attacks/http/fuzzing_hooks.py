"""Who Schemathesis is: loaded by its command, in a process of its own. The credentials come by the environment."""

from __future__ import annotations

import json
import os
import secrets
import ssl
from itertools import count
from typing import Any, Final
from uuid import uuid4

import httpx
import schemathesis

KEYS: Final[dict[str, str]] = json.loads(os.environ["FUZZING_KEYS"])
# Of all operations the one caller, or of each the one that may.
ONE: Final = os.environ.get("FUZZING_AS")
# What would end the caller itself, and with it all that comes after.
OWN: Final[frozenset[str]] = frozenset(json.loads(os.environ["FUZZING_OWN"]))
_PLATFORM: Final = ("/v1/tenants", "/v1/platform", "/v1/checklist")
NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
_numbers: Final = count(1)
_asked: Final[set[str]] = set()


def _key(path: str) -> str:
    if path == "/metrics":
        return KEYS["metrics"]
    return KEYS[ONE or ("platform" if path.startswith(_PLATFORM) else "admin")]


@schemathesis.auth()
class Credential:
    """A key of the caller."""

    def get(self, case: Any, context: Any) -> str:
        return _key(context.operation.path)

    def set(self, case: Any, data: str, context: Any) -> None:
        case.headers["Authorization"] = f"Bearer {data}"


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Spare the caller, and send under a key what belongs under it."""
    if case.method != "GET":
        for name, value in (case.path_parameters or {}).items():
            if value in OWN:
                case.path_parameters[name] = str(uuid4())
    for name in [name for name in case.headers or {} if name.lower() == "idempotency-key"]:
        key = str(case.headers[name])
        if 1 <= len(key) <= 200 and key.isascii() and key.isprintable():
            case.headers[name] = f"{key}-{next(_numbers)}"


@schemathesis.check
def wants_a_credential(context: Any, response: Any, case: Any) -> None:
    """Where a request was answered, the same without a credential, or with a wrong one, is not. Once an operation."""
    operation = case.operation
    if (
        not operation.definition.raw.get("security")
        or not 200 <= response.status_code < 300
        or operation.label in _asked
    ):
        return
    _asked.add(operation.label)
    sent = response.request
    headers = {name: value for name, value in sent.headers.items() if name.lower() != "authorization"}
    for credential in ({}, {"Authorization": f"Bearer {secrets.token_hex(16)}"}):
        answer = httpx.request(
            sent.method, sent.url, content=sent.body, headers=headers | credential, trust_env=False, verify=NO_TLS
        )
        assert answer.status_code == 401, f"{operation.label} answered {answer.status_code} to whom it does not know"
