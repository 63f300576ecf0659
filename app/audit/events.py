"""Every type of audit event, and the canonical text of one. What each says stands in `vocabulary`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID


class EventType(StrEnum):
    """Every kind of event; a name is never reused for another meaning."""

    PLATFORM_ACTED = "platform.acted"
    TENANT_CREATED = "tenant.created"
    TENANT_DISABLED = "tenant.disabled"
    TENANT_ENABLED = "tenant.enabled"
    TENANT_ERASED = "tenant.erased"
    USER_CREATED = "user.created"
    USER_ROLE_CHANGED = "user.role_changed"
    USER_DISABLED = "user.disabled"
    USER_ENABLED = "user.enabled"
    USER_ERASED = "user.erased"
    KEY_CREATED = "key.created"
    KEY_ROTATED = "key.rotated"
    KEY_REVOKED = "key.revoked"
    ISSUER_REGISTERED = "issuer.registered"
    ISSUER_REMOVED = "issuer.removed"
    AUTH_SUCCEEDED = "auth.succeeded"
    AUTH_FAILED = "auth.failed"
    AUTH_SLOWED = "auth.slowed"
    POLICY_CREATED = "policy.created"
    POLICY_CHECKED = "policy.checked"
    POLICY_DRY_RUN = "policy.dry_run"
    POLICY_BACKTESTED = "policy.backtested"
    POLICY_PUBLISHED = "policy.published"
    POLICY_ROLLED_BACK = "policy.rolled_back"
    SECRET_WRITTEN = "secret.written"
    SECRET_DELETED = "secret.deleted"
    SECRET_BOUND = "secret.bound"
    SECRET_UNBOUND = "secret.unbound"
    SECRET_ACCESSED = "secret.accessed"
    MODEL_ENDPOINT_ADDED = "model_endpoint.added"
    MODEL_ENDPOINT_CHANGED = "model_endpoint.changed"
    MODEL_ENDPOINT_REMOVED = "model_endpoint.removed"
    SWITCH_ENGAGED = "switch.engaged"
    SWITCH_LIFTED = "switch.lifted"
    WORKSPACE_FILE_READ = "workspace.file_read"
    WORKSPACE_FILE_WRITTEN = "workspace.file_written"
    WORKSPACE_FILE_DELETED = "workspace.file_deleted"
    WORKSPACE_DELETED = "workspace.deleted"
    AUDIT_READ = "audit.read"
    AUDIT_EXPORTED = "audit.exported"
    AUDIT_PRUNED = "audit.pruned"
    RATE_LIMITED = "rate_limit.exceeded"
    LIMIT_EXCEEDED = "limit.exceeded"
    QUERY_RECEIVED = "query.received"
    QUERY_SCREENED = "query.screened"
    QUERY_REFUSED = "query.refused"
    RUN_QUEUED = "run.queued"
    RUN_STARTED = "run.started"
    RUN_RESUMED = "run.resumed"
    RUN_GIVEN_BACK = "run.given_back"
    RUN_CANCEL_ORDERED = "run.cancel_ordered"
    RUN_FINISHED = "run.finished"
    RUN_READ = "run.read"
    CONVERSATION_CREATED = "conversation.created"
    CONVERSATION_READ = "conversation.read"
    CONVERSATION_DELETED = "conversation.deleted"
    CONVERSATION_EXPIRED = "conversation.expired"
    TOOL_DECIDED = "tool.decided"
    TOOL_REPEATED = "tool.repeated"
    TOOL_FINISHED = "tool.finished"
    APPROVAL_REQUESTED = "approval.requested"
    APPROVAL_DECIDED = "approval.decided"
    APPROVAL_EXPIRED = "approval.expired"
    APPROVAL_VOIDED = "approval.voided"
    APPROVAL_USED = "approval.used"
    SERVER_CRASH_LOOPING = "server.crash_looping"
    SERVER_QUARANTINED = "server.quarantined"
    SERVER_QUARANTINE_DISMISSED = "server.quarantine_dismissed"
    SERVER_TOOLS_ACCEPTED = "server.tools_accepted"
    EGRESS_OPENED = "egress.opened"
    EGRESS_CLOSED = "egress.closed"
    EGRESS_REFUSED = "egress.refused"
    EGRESS_REFUSED_MORE = "egress.refused_more"
    ERROR_RAISED = "error.raised"


@dataclass(frozen=True, slots=True)
class Event:
    """What happened. `data` holds ids, names of our own and keyed hashes, never a text of a user or a tool."""

    type: EventType
    actor_id: UUID | None = None
    run_id: UUID | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


def canonical(
    event: Event,
    *,
    id: UUID,  # noqa: A002  the field's own name
    tenant_id: UUID,
    at: datetime,
    version: int,
) -> str:
    """The text that is stored, hashed and exported: JSON with sorted keys, no spaces, times in UTC with Z."""
    body = {
        "id": str(id),
        "tenant_id": str(tenant_id),
        "at": at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "type": event.type.value,
        "schema_version": version,
        "actor_id": str(event.actor_id) if event.actor_id else None,
        "run_id": str(event.run_id) if event.run_id else None,
        "data": event.data,
    }
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)
