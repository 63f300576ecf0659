"""Our events as those of the Open Cybersecurity Schema Framework, 1.3.0. Pure.

Classes, activities and required attributes are those of github.com/ocsf/ocsf-schema at its tag 1.3.0. What has no
place there stands in `unmapped.event`, which is our whole event.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from typing import Any, Final

from app.audit.events import EventType

VERSION: Final = "1.3.0"
Event = Mapping[str, Any]


class Class(IntEnum):
    """`class_uid`; its thousands are `category_uid`."""

    DETECTION_FINDING = 2004
    ACCOUNT_CHANGE = 3001
    AUTHENTICATION = 3002
    NETWORK_ACTIVITY = 4001
    API_ACTIVITY = 6003


class Severity(IntEnum):
    """`severity_id`."""

    INFORMATIONAL = 1
    LOW = 2
    MEDIUM = 3
    HIGH = 4


_OTHER: Final = 99
# What is a finding whatever it says; a refused query or call is one by what it says.
_FINDINGS: Final = {
    EventType.RATE_LIMITED: Severity.LOW,
    EventType.EGRESS_REFUSED: Severity.MEDIUM,
    EventType.EGRESS_REFUSED_MORE: Severity.MEDIUM,
    EventType.SERVER_CRASH_LOOPING: Severity.MEDIUM,
    EventType.SERVER_QUARANTINED: Severity.HIGH,
}
_REFUSING: Final = frozenset({"refused", "denied", "exceeded", "limited", "exhausted", "rejected"})
# By the last word of a type: create, read, update, delete, as in API Activity.
_CREATE, _READ, _UPDATE, _DELETE = 1, 2, 3, 4
_CRUD: Final = {
    **dict.fromkeys(("created", "added", "written", "registered", "bound", "engaged", "received"), _CREATE),
    **dict.fromkeys(("read", "file_read", "accessed", "exported", "checked", "dry_run", "backtested"), _READ),
    **dict.fromkeys(("changed", "disabled", "enabled", "rotated", "published", "rolled_back", "file_written"), _UPDATE),
    **dict.fromkeys(
        ("deleted", "removed", "revoked", "unbound", "lifted", "file_deleted", "erased", "pruned", "expired"), _DELETE
    ),
}
_ACCOUNTS: Final = {"created": 1, "enabled": 2, "disabled": 5, "erased": 6}
# Last words of types that tell of a failure, and what fields say where it went well: whatever else they say is one too.
_FAILURES: Final = _REFUSING | {"failed", "slowed", "raised"}
_WENT_WELL: Final[Mapping[str, tuple[object, ...]]] = {
    "allowed": (True,),
    "decision": ("allowed", "approved", "waiting"),
    "ended": ("done",),
    "outcome": ("succeeded", "read"),
    "state": ("succeeded",),
}
_NEW: Final = 1
_NOT_MADE: Final = frozenset({"unreachable", "tls", "not_recorded"})
_NETWORK_OPEN, _NETWORK_CLOSE, _NETWORK_FAIL = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Mapped:
    """Where an event belongs."""

    kind: Class
    activity_id: int
    severity: Severity
    is_success: bool


def event(body: Event, *, seq: int | None = None) -> dict[str, Any]:
    """An event of OCSF; `body` is ours, `seq` its place in the chain."""
    mapped = _mapped(body)
    specific = _SPECIFIC[mapped.kind](body)
    return {
        "activity_id": mapped.activity_id,
        **({"activity_name": body["type"]} if mapped.activity_id == _OTHER else {}),
        "category_uid": mapped.kind // 1000,
        "class_uid": int(mapped.kind),
        "type_uid": mapped.kind * 100 + mapped.activity_id,
        "time": _milliseconds(body["at"]),
        "severity_id": int(mapped.severity),
        "status_id": _status(mapped),
        "message": body["type"],
        "metadata": _metadata(body, seq),
        **specific,
        "observables": _observables(specific),
        "unmapped": {"event": dict(body)},
    }


def _mapped(body: Event) -> Mapped:
    """By what the event's data say, then by its type."""
    domain, _, verb = body["type"].partition(".")
    is_success = _is_success(body, verb)
    if (severity := _finding(body, verb)) is not None:
        return Mapped(Class.DETECTION_FINDING, 1, severity, is_success)
    severity = Severity.INFORMATIONAL if is_success else Severity.LOW
    match domain:
        case "auth":
            return Mapped(Class.AUTHENTICATION, 1, severity, is_success)
        case "user":
            return Mapped(Class.ACCOUNT_CHANGE, _ACCOUNTS.get(verb, _OTHER), severity, is_success)
        case "egress":
            return Mapped(Class.NETWORK_ACTIVITY, _of_network(body, verb), severity, is_success)
    return Mapped(Class.API_ACTIVITY, _CRUD.get(verb, _OTHER), severity, is_success)


def _finding(body: Event, verb: str) -> Severity | None:
    """How severe a finding it is, or None for what is none."""
    data = body["data"]
    if body["type"] in _FINDINGS:
        return _FINDINGS[body["type"]]
    is_refused = data.get("allowed") is False or data.get("decision") == "denied" or verb in _REFUSING
    return Severity.MEDIUM if is_refused else None


def _is_success(body: Event, verb: str) -> bool:
    data = body["data"]
    return verb not in _FAILURES and all(data[name] in good for name, good in _WENT_WELL.items() if name in data)


def _status(mapped: Mapped) -> int:
    """Success or failure; of a finding, that nobody has looked at it."""
    if mapped.kind is Class.DETECTION_FINDING:
        return _NEW
    return 1 if mapped.is_success else 2


def _of_network(body: Event, verb: str) -> int:
    if verb != "closed":
        return _NETWORK_OPEN if verb == "opened" else _OTHER
    return _NETWORK_FAIL if body["data"].get("ended") in _NOT_MADE else _NETWORK_CLOSE


def _milliseconds(at: str) -> int:
    return round(datetime.fromisoformat(at).timestamp() * 1000)


def _metadata(body: Event, seq: int | None) -> dict[str, Any]:
    return {
        "version": VERSION,
        "product": {"name": "Bulkhead", "vendor_name": "Bulkhead"},
        "uid": body["id"],
        "tenant_uid": body["tenant_id"],
        "event_code": body["type"],
        "log_name": "audit",
        "log_version": str(body["schema_version"]),
        "original_time": body["at"],
        **({"correlation_uid": body["run_id"]} if body["run_id"] else {}),
        **({"sequence": seq} if seq is not None else {}),
    }


def _actor(body: Event) -> dict[str, Any]:
    """The user who did it, or the service itself."""
    return {"user": {"uid": body["actor_id"]}} if body["actor_id"] else {"app_name": "bulkhead"}


def _source(body: Event) -> dict[str, Any]:
    """The address of the caller where the event has one; else what the caller came through."""
    with suppress(ValueError):
        return {"ip": str(ipaddress.ip_address(body["data"].get("address", "")))}
    return {"svc_name": "bulkhead"}


def _resources(body: Event) -> list[dict[str, str]]:
    found = {name.removesuffix("_id"): value for name, value in body["data"].items() if name.endswith("_id")}
    found |= {"run": body["run_id"]}
    named = ("tool", "server", "workspace")
    return [
        *({"type": kind, "uid": str(uid)} for kind, uid in found.items() if uid is not None),
        *({"type": kind, "name": str(body["data"][kind])} for kind in named if body["data"].get(kind) is not None),
    ]


def _authentication(body: Event) -> dict[str, Any]:
    user = {"uid": body["actor_id"]} if body["actor_id"] else {"name": "unknown"}
    reason = body["data"].get("reason")
    detail = {"status_detail": reason} if reason is not None else {}
    return {"user": user, "service": {"name": "bulkhead"}, "src_endpoint": _source(body), "is_remote": True, **detail}


def _account(body: Event) -> dict[str, Any]:
    uid = body["data"].get("user_id")
    return {"user": {"uid": str(uid)} if uid is not None else {"name": "unknown"}, "actor": _actor(body)}


def _network(body: Event) -> dict[str, Any]:
    data = body["data"]
    target = {"hostname": data.get("host"), "port": data.get("port"), "ip": data.get("address")}
    traffic = {"bytes_out": data.get("bytes_up"), "bytes_in": data.get("bytes_down")}
    return {
        "src_endpoint": {"svc_name": str(data.get("server") or "bulkhead")},
        "dst_endpoint": {name: value for name, value in target.items() if value is not None} or {"name": "unknown"},
        **({"traffic": traffic} if None not in traffic.values() else {}),
    }


def _api(body: Event) -> dict[str, Any]:
    return {
        "actor": _actor(body),
        "api": {"operation": body["type"], "service": {"name": "bulkhead"}},
        "src_endpoint": _source(body),
        "resources": _resources(body),
    }


def _detection(body: Event) -> dict[str, Any]:
    rule = body["data"].get("rule") or body["data"].get("reason")
    return {
        "finding_info": {
            "uid": body["id"],
            "title": body["type"],
            "created_time": _milliseconds(body["at"]),
            **({"analytic": {"name": str(rule), "type_id": 1}} if rule is not None else {}),
        },
        "evidences": [{"actor": _actor(body)}],
        "resources": _resources(body),
    }


_SPECIFIC: Final[Mapping[Class, Callable[[Event], dict[str, Any]]]] = {
    Class.AUTHENTICATION: _authentication,
    Class.ACCOUNT_CHANGE: _account,
    Class.NETWORK_ACTIVITY: _network,
    Class.API_ACTIVITY: _api,
    Class.DETECTION_FINDING: _detection,
}
# The kinds of observables that we have: `type_id` by the last part of the attribute's name.
_OBSERVABLE: Final = {"hostname": 1, "ip": 2, "port": 11}
_RESOURCE_UID: Final = 10


def _observables(specific: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What somebody would look for in other records."""
    ends = [name for name in ("src_endpoint", "dst_endpoint") if name in specific]
    found = [
        {"name": f"{end}.{part}", "type_id": type_id, "value": str(specific[end][part])}
        for end in ends
        for part, type_id in _OBSERVABLE.items()
        if part in specific[end]
    ]
    uids = [resource["uid"] for resource in specific.get("resources", ()) if "uid" in resource]
    return [*found, *({"name": "resources.uid", "type_id": _RESOURCE_UID, "value": uid} for uid in uids)]
