"""Our events as OCSF: every type has its class, and what that class requires is there."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import pytest

from app.audit import ocsf
from app.audit.events import EventType
from app.audit.vocabulary import VOCABULARY
from app.runs.state import Outcome as CallOutcome
from app.runs.state import State
from app.secrets.providers.reading import Outcome as SecretOutcome

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "audit.md"
ID: Final = "01a20520-3df6-74ba-be68-febaa59cc10c"
# Required attributes, at-least-one constraints and activities, from github.com/ocsf/ocsf-schema at its tag 1.3.0:
# events/base_event.json with includes/{classification,occurrence}.json, then each class with those that it extends.
BASE: Final = {"activity_id", "category_uid", "class_uid", "type_uid", "time", "severity_id", "metadata"}
REQUIRED: Final = {
    2004: {"finding_info"},  # findings/finding.json
    3001: {"user"},  # iam/account_change.json
    3002: {"user"},  # iam/authentication.json
    4001: {"dst_endpoint"},  # network/network.json
    6003: {"api", "actor", "src_endpoint"},  # application/api.json
}
ACTIVITIES: Final = {
    2004: {1, 2, 3},
    3001: set(range(1, 12)),
    3002: set(range(1, 7)),
    4001: set(range(1, 8)),
    6003: {1, 2, 3, 4},
}
OTHERWISE: Final = {0, 99}
_ENDPOINT: Final = {"ip", "uid", "name", "hostname", "svc_name", "instance_uid", "interface_uid", "interface_name"}
ANY_OF: Final = {
    "user": {"account", "name", "uid"},
    "actor": {"process", "user", "invoked_by", "session", "app_name", "app_uid"},
    "src_endpoint": _ENDPOINT,
    "dst_endpoint": _ENDPOINT,
    "service": {"name", "uid"},
}
# Of objects/metadata.json, product.json, finding_info.json, api.json, analytic.json and observable.json.
OF_OBJECTS: Final = {
    "metadata": {"product", "version"},
    "product": {"vendor_name"},
    "finding_info": {"title", "uid"},
    "api": {"operation"},
    "analytic": {"type_id"},
}
DATA: Final[dict[str, dict[str, Any]]] = {
    "auth.failed": {"reason": "unknown_key", "address": "203.0.113.9", "count": 1},
    "user.created": {"user_id": ID, "role": "user", "by_token": False},
    "tool.decided": {"sequence": 1, "tool": "docs__read_file", "decision": "allowed", "rule": "tools.allow"},
    "egress.opened": {"server": "web", "connection_id": ID, "host": "example.com", "port": 443, "addresses": []},
    "egress.closed": {
        "server": "web",
        "host": "example.com",
        "port": 443,
        "address": "203.0.113.8",
        "ended": "done",
        "bytes_up": 10,
        "bytes_down": 20,
    },
}


def ours(kind: str, **data: Any) -> dict[str, Any]:
    return {
        "id": ID,
        "tenant_id": ID,
        "at": "2026-11-22T12:15:49.066610Z",
        "type": kind,
        "schema_version": 1,
        "actor_id": ID,
        "run_id": None,
        "data": DATA.get(kind, {}) | data,
    }


def lacking(event: Any, name: str = "") -> list[str]:
    """What OCSF asks of an object and all inside it, and is not there."""
    if isinstance(event, list):
        return [lack for item in event for lack in lacking(item, name.removesuffix("s"))]
    if not isinstance(event, dict) or name == "unmapped":
        return []
    found = [f"{name}.{attribute}" for attribute in OF_OBJECTS.get(name, set()) - event.keys()]
    if name in ANY_OF and not ANY_OF[name] & event.keys():
        found.append(f"{name} without any of {sorted(ANY_OF[name])}")
    return found + [lack for inside, value in event.items() for lack in lacking(value, inside)]


def faults(event: dict[str, Any]) -> list[str]:
    kind, activity = event.get("class_uid", 0), event.get("activity_id", -1)
    found = [*sorted((BASE | REQUIRED.get(kind, {"class_uid"})) - event.keys()), *lacking(event)]
    if activity not in ACTIVITIES.get(kind, set()) | OTHERWISE:
        found.append(f"activity {activity}")
    if activity == 99 and "activity_name" not in event:
        found.append("activity_name")
    if (event["category_uid"], event["type_uid"]) != (kind // 1000, kind * 100 + activity):
        found.append("type_uid")
    if kind == 3002 and not {"service", "dst_endpoint"} & event.keys():
        found.append("neither service nor dst_endpoint")
    if any(not {"name", "type_id"} <= observable.keys() for observable in event["observables"]):
        found.append("observables")
    return found


@pytest.mark.parametrize("kind", sorted(EventType))
@pytest.mark.parametrize("actor", [ID, None], ids=["user", "service"])
def test_every_type_becomes_a_valid_event(kind: EventType, actor: str | None) -> None:
    body = ours(kind) | {"actor_id": actor}
    event = ocsf.event(body, seq=7)
    assert faults(event) == []
    assert event["unmapped"]["event"] == body
    assert (event["metadata"]["uid"], event["metadata"]["sequence"], event["time"]) == (ID, 7, 1795349749067)
    json.dumps(event)


def test_what_lacks_something_is_found() -> None:
    for path in (
        ("metadata", "version"),
        ("api", "operation"),
        ("actor", "user"),
        ("src_endpoint", "svc_name"),
        ("time",),
    ):
        event: Any = ocsf.event(ours("policy.published"))
        inner = event
        for step in path[:-1]:
            inner = inner[step]
        del inner[path[-1]]
        assert faults(event), path


@pytest.mark.parametrize(
    ("body", "kind", "activity", "status", "severity"),
    [
        (ours("auth.failed"), 3002, 1, 2, 2),
        (ours("auth.succeeded"), 3002, 1, 1, 1),
        (ours("user.created"), 3001, 1, 1, 1),
        (ours("user.disabled"), 3001, 5, 1, 1),
        (ours("user.role_changed"), 3001, 99, 1, 1),
        (ours("policy.created"), 6003, 1, 1, 1),
        (ours("auth.slowed"), 3002, 1, 2, 2),
        (ours("secret.accessed", outcome="read"), 6003, 2, 1, 1),
        (ours("secret.accessed", outcome="unusable"), 6003, 2, 2, 2),
        (ours("workspace.file_written"), 6003, 3, 1, 1),
        (ours("key.revoked"), 6003, 4, 1, 1),
        (ours("run.finished", state="succeeded"), 6003, 99, 1, 1),
        (ours("run.finished", state="timed_out"), 6003, 99, 2, 2),
        (ours("tool.decided"), 6003, 99, 1, 1),
        (ours("tool.decided", decision="denied"), 2004, 1, 1, 3),
        (ours("query.screened", allowed=True), 6003, 99, 1, 1),
        (ours("query.screened", allowed=False), 2004, 1, 1, 3),
        (ours("egress.opened"), 4001, 1, 1, 1),
        (ours("egress.closed"), 4001, 2, 1, 1),
        (ours("egress.closed", ended="unreachable"), 4001, 4, 2, 2),
        (ours("egress.closed", ended="broken"), 4001, 2, 2, 2),
        (ours("egress.refused"), 2004, 1, 1, 3),
        (ours("egress.refused_more"), 2004, 1, 1, 3),
        (ours("error.raised"), 6003, 99, 2, 2),
        (ours("rate_limit.exceeded"), 2004, 1, 1, 2),
        (ours("server.quarantined"), 2004, 1, 1, 4),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else str(value),
)
def test_an_event_is_in_the_class_that_fits(
    body: dict[str, Any], kind: int, activity: int, status: int, severity: int
) -> None:
    event = ocsf.event(body)
    found = (event["class_uid"], event["activity_id"], event["status_id"], event["severity_id"])
    assert found == (kind, activity, status, severity)


def _ends_of_links() -> list[str]:
    """As the document of the record lists them."""
    (listed,) = re.findall(r"`ended` of\s+`egress\.closed`: (.*?)\.\s", DOCUMENT.read_text(), re.DOTALL)
    return re.findall(r"`(\w+)`", listed)


# What says how something went: the field, all that may stand there, and what is no failure.
SAYINGS: Final[dict[str, tuple[str, Iterable[str], set[str]]]] = {
    "secret.accessed": ("outcome", SecretOutcome, {"read"}),
    "tool.finished": ("outcome", CallOutcome, {"succeeded"}),
    "run.finished": ("state", State, {"succeeded"}),
    "egress.closed": ("ended", _ends_of_links(), {"done"}),
}


@pytest.mark.parametrize("kind", SAYINGS)
def test_only_what_went_well_is_a_success(kind: str) -> None:
    name, values, good = SAYINGS[kind]
    successes = {str(value) for value in values if ocsf.event(ours(kind, **{name: str(value)}))["status_id"] == 1}
    assert successes == good
    assert len(list(values)) > len(good) + 2, "the control: there are failures"
    assert ocsf.event(ours(kind, **{name: "something new"}))["status_id"] == 2


def test_no_other_field_says_how_something_went() -> None:
    """Whoever adds one adds what it says where it went well."""
    fields = {
        (kind.value, name) for kind, schema in VOCABULARY.items() for name in schema.fields if name in ocsf._WENT_WELL
    }
    assert fields == {(kind, name) for kind, (name, _, _) in SAYINGS.items()} | {
        ("query.screened", "allowed"),
        ("tool.decided", "decision"),
        ("approval.decided", "decision"),
    }


def test_addresses_and_hosts_can_be_looked_for() -> None:
    failed = ocsf.event(ours("auth.failed"))
    assert {"name": "src_endpoint.ip", "type_id": 2, "value": "203.0.113.9"} in failed["observables"]
    closed = ocsf.event(ours("egress.closed"))
    assert {"name": "dst_endpoint.hostname", "type_id": 1, "value": "example.com"} in closed["observables"]
    assert closed["traffic"] == {"bytes_out": 10, "bytes_in": 20}


def test_an_address_that_is_none_is_not_given_out_as_one() -> None:
    assert ocsf.event(ours("auth.failed", address="unknown"))["src_endpoint"] == {"svc_name": "bulkhead"}
