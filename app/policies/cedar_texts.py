"""What Cedar is given, as JSON text, and what it makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final

import cedarpy

from app.errors import Fault
from app.policies.cedar_schema import Action, schema_of
from app.policies.document import PolicyDocument, PolicyInvalid
from app.policies.rules import WHERE, Rule

# A small schema takes some fifty times its text: nearly all that a small policy takes.
_MAX_SHARED: Final = 64
_MAX_SHARED_TEXT: Final = 16_384


def schema(document: PolicyDocument, actions: Sequence[Action], *, overrides: int = 0) -> str:
    """The types that the rules are checked against."""
    return json.dumps(schema_of(actions, document.servers, overrides=overrides))


def read_schema(text: str) -> cedarpy.Schema:
    """What `schema` has written, for Cedar."""
    return _shared(text) if len(text) <= _MAX_SHARED_TEXT else cedarpy.Schema.from_json_str(text)


@lru_cache(maxsize=_MAX_SHARED)
def _shared(text: str) -> cedarpy.Schema:
    """Says nothing but what tools there are: one for all policies with the same servers, whosever they are."""
    return cedarpy.Schema.from_json_str(text)


def policies(rules: Iterable[Rule]) -> str:
    """The rules that Cedar knows of."""
    static = {rule.id: rule.statement for rule in rules if rule.is_permit or rule.is_forbid}
    return json.dumps({"templates": {}, "staticPolicies": static, "templateLinks": []})


def read_policies(text: str) -> cedarpy.PolicySet:
    """What `policies` has written, for Cedar. Raise PolicyInvalid."""
    try:
        return cedarpy.PolicySet.from_json_str(text)
    except ValueError as error:
        fault = Fault(WHERE, "A rule is too deep to compile: join at most 50 conditions in one rule.")
        raise PolicyInvalid(faults=[fault]) from error
