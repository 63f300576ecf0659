"""What each type of event says: the version of its data, and the fields of it with what may stand in each.

An event that does not fit is refused where it is to be appended, and with it the change that it tells of: a record that
nobody can read is no better than none. A field changes only together with its type's version, which stands in every
event: tests/audit/test_vocabulary.py compares with what was committed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from app.audit.events import Event, EventType
from app.audit.fields import Field, Kind, Schema

ID: Final = Field(Kind.ID)
NAME: Final = Field(Kind.NAME)
NAMES: Final = Field(Kind.NAMES)
COUNT: Final = Field(Kind.COUNT)
COUNTS: Final = Field(Kind.COUNTS)
HASH: Final = Field(Kind.HASH)
FLAG: Final = Field(Kind.FLAG)
STATE: Final = Field(Kind.STATE)
ID_OR_NULL: Final = Field(Kind.ID, is_nullable=True)
NAME_OR_NULL: Final = Field(Kind.NAME, is_nullable=True)
COUNT_OR_NULL: Final = Field(Kind.COUNT, is_nullable=True)
HASH_OR_NULL: Final = Field(Kind.HASH, is_nullable=True)
TIME: Final = Field(Kind.TIME)
TIME_OR_NULL: Final = Field(Kind.TIME, is_nullable=True)


class EventUnfit(ValueError):
    """An event that the vocabulary does not know so: a defect of whoever made it."""


def _optional(field: Field) -> Field:
    return Field(field.kind, is_nullable=field.is_nullable, is_required=False)


def _v(version: int, /, **fields: Field) -> Schema:
    return Schema(version, fields)


_SECRET: Final = _v(1, name=NAME, version=COUNT, provider=NAME)
_DISABLED: Final = _v(1, user_id=ID, before=STATE, after=STATE)
_TENANT: Final = _v(1, tenant_id=ID, before=NAME, after=NAME)
_APPROVAL: Final = {"approval_id": ID, "sequence": COUNT, "tool": NAME}
_HOST: Final = {"server": NAME, "connection_id": ID, "host": NAME, "port": COUNT}

VOCABULARY: Final[Mapping[EventType, Schema]] = {
    EventType.PLATFORM_ACTED: _v(1, tenant_id=ID, action=NAME),
    EventType.TENANT_CREATED: _v(1, tenant_id=ID, slug=NAME),
    EventType.TENANT_DISABLED: _TENANT,
    EventType.TENANT_ENABLED: _TENANT,
    EventType.TENANT_ERASED: _v(1, tenant_id=ID, users=COUNT),
    EventType.USER_CREATED: _v(1, user_id=ID, role=NAME, by_token=FLAG),
    EventType.USER_ROLE_CHANGED: _v(1, user_id=ID, before=STATE, after=STATE),
    EventType.USER_DISABLED: _DISABLED,
    EventType.USER_ENABLED: _DISABLED,
    EventType.USER_ERASED: _v(1, user_id=ID, keys=COUNT),
    EventType.KEY_CREATED: _v(2, key_id=ID, user_id=ID, expires_at=TIME_OR_NULL, rate=NAME_OR_NULL),
    EventType.KEY_ROTATED: _v(1, key_id=ID, successor_id=ID, ends_at=TIME),
    EventType.KEY_REVOKED: _v(1, key_id=ID, user_id=ID, before=STATE),
    EventType.ISSUER_REGISTERED: _v(1, issuer_id=ID, issuer=NAME, audience=NAME, role_claim=NAME_OR_NULL),
    EventType.ISSUER_REMOVED: _v(2, issuer_id=ID, issuer=NAME, audience=NAME, role_claim=NAME_OR_NULL),
    EventType.AUTH_SUCCEEDED: _v(1, key_id=ID_OR_NULL, role=NAME, address=NAME, count=COUNT),
    EventType.AUTH_FAILED: _v(1, reason=NAME, address=NAME, count=COUNT),
    EventType.AUTH_SLOWED: _v(1, reason=NAME, address=NAME),
    EventType.POLICY_CREATED: _v(1, version=COUNT, digest=HASH),
    EventType.POLICY_CHECKED: _v(1, version=COUNT, tools=COUNT),
    EventType.POLICY_DRY_RUN: _v(1, version=COUNT, as_role=NAME, as_user_id=ID_OR_NULL, calls=COUNT),
    EventType.POLICY_BACKTESTED: _v(
        1, backtest_id=ID, version=COUNT, against=COUNT, calls=COUNT, flipped=COUNT, is_full=FLAG
    ),
    EventType.POLICY_PUBLISHED: _v(2, before=COUNT_OR_NULL, after=COUNT, tools=COUNT, tools_digest=HASH),
    EventType.POLICY_ROLLED_BACK: _v(2, before=COUNT_OR_NULL, after=COUNT, tools=COUNT, tools_digest=HASH),
    EventType.SECRET_WRITTEN: _SECRET,
    EventType.SECRET_DELETED: _SECRET,
    EventType.SECRET_BOUND: _SECRET,
    EventType.SECRET_UNBOUND: _SECRET,
    EventType.SECRET_ACCESSED: _v(1, name=NAME, version=COUNT, provider=NAME, outcome=NAME),
    EventType.MODEL_ENDPOINT_ADDED: _v(2, endpoint_id=ID, name=NAME, after=STATE),
    EventType.MODEL_ENDPOINT_CHANGED: _v(3, endpoint_id=ID, name=NAME, changed=NAMES, before=STATE, after=STATE),
    EventType.MODEL_ENDPOINT_REMOVED: _v(2, endpoint_id=ID, name=NAME, before=STATE),
    EventType.SWITCH_ENGAGED: _v(1, switch_id=ID, scope=NAME, target=NAME_OR_NULL),
    EventType.SWITCH_LIFTED: _v(1, switch_id=ID),
    EventType.WORKSPACE_FILE_READ: _v(2, workspace=NAME, path_hmac=HASH, size=COUNT),
    EventType.WORKSPACE_FILE_WRITTEN: _v(2, workspace=NAME, path_hmac=HASH, size=COUNT, content_hmac=HASH),
    EventType.WORKSPACE_FILE_DELETED: _v(1, workspace=NAME, path_hmac=HASH),
    EventType.WORKSPACE_DELETED: _v(1, workspace=NAME, user_id=ID_OR_NULL),
    EventType.AUDIT_READ: _v(1, filters=NAMES),
    EventType.AUDIT_EXPORTED: _v(1, from_seq=COUNT, to_seq=COUNT, format=NAME),
    EventType.AUDIT_PRUNED: _v(1, seq=COUNT, count=COUNT, before=TIME),
    EventType.RATE_LIMITED: _v(2, limit=NAME, of=NAME),
    EventType.LIMIT_EXCEEDED: _v(1, limit=NAME),
    EventType.QUERY_RECEIVED: _v(1, key_id=ID_OR_NULL, conversation_id=ID_OR_NULL, length=COUNT, query_hmac=HASH),
    EventType.QUERY_SCREENED: _v(1, allowed=FLAG, rule=NAME_OR_NULL, flags=NAMES, policy_version=COUNT),
    EventType.QUERY_REFUSED: _v(1, reason=NAME),
    EventType.RUN_QUEUED: _v(1, policy_version=COUNT),
    EventType.RUN_STARTED: _v(1, policy_version=COUNT, model=NAME),
    EventType.RUN_RESUMED: _v(1, policy_version=COUNT, attempt=COUNT, model_turns=COUNT, tool_calls=COUNT),
    EventType.RUN_GIVEN_BACK: _v(1, attempt=COUNT),
    EventType.RUN_CANCEL_ORDERED: _v(1, cause=NAME),
    EventType.RUN_FINISHED: _v(
        2,
        state=NAME,
        code=NAME_OR_NULL,
        cause=NAME_OR_NULL,
        policy_version=_optional(COUNT),
        model_turns=_optional(COUNT),
        tool_calls=_optional(COUNT),
        input_tokens=_optional(COUNT),
        output_tokens=_optional(COUNT),
        answer_hmac=_optional(HASH_OR_NULL),
    ),
    EventType.RUN_READ: _v(1, user_id=ID),
    EventType.CONVERSATION_CREATED: _v(1, conversation_id=ID),
    EventType.CONVERSATION_READ: _v(1, conversation_id=ID, user_id=ID),
    EventType.CONVERSATION_DELETED: _v(1, conversation_id=ID),
    EventType.CONVERSATION_EXPIRED: _v(1, count=COUNT, retention_days=COUNT),
    EventType.TOOL_DECIDED: _v(
        2,
        sequence=COUNT,
        tool=NAME,
        decision=NAME,
        rule=NAME,
        policy_version=COUNT,
        definition_hash=HASH_OR_NULL,
        arguments_hmac=HASH,
    ),
    EventType.TOOL_REPEATED: _v(1, sequence=COUNT, tool=NAME, rule=NAME, attempt=COUNT),
    EventType.TOOL_FINISHED: _v(
        2,
        sequence=COUNT,
        tool=NAME,
        outcome=NAME,
        duration_ms=COUNT_OR_NULL,
        result_hmac=HASH_OR_NULL,
        sandbox_hash=HASH_OR_NULL,
    ),
    EventType.APPROVAL_REQUESTED: _v(
        1,
        **_APPROVAL,
        rule=NAME,
        policy_version=COUNT,
        definition_hash=HASH,
        arguments_hmac=HASH,
        expires_at=TIME,
    ),
    EventType.APPROVAL_DECIDED: _v(
        1,
        **_APPROVAL,
        decision=NAME,
        policy_version=COUNT,
        is_edited=FLAG,
        arguments_hmac=HASH_OR_NULL,
        reason_hmac=HASH_OR_NULL,
    ),
    EventType.APPROVAL_EXPIRED: _v(1, **_APPROVAL),
    EventType.APPROVAL_VOIDED: _v(1, **_APPROVAL, cause=NAME),
    EventType.APPROVAL_USED: _v(1, **_APPROVAL),
    EventType.SERVER_CRASH_LOOPING: _v(
        1, server=NAME, template=NAME, policy_version=COUNT, user_id=ID_OR_NULL, failures=COUNT, wait_s=COUNT
    ),
    EventType.SERVER_QUARANTINED: _v(
        1, quarantine_id=ID, server=NAME, policy_version=COUNT, digest=HASH, changes=COUNTS
    ),
    EventType.SERVER_QUARANTINE_DISMISSED: _v(1, quarantine_id=ID, server=NAME),
    EventType.SERVER_TOOLS_ACCEPTED: _v(2, quarantine_id=ID, server=NAME, before=HASH, after=HASH),
    EventType.EGRESS_OPENED: _v(1, **_HOST, addresses=NAMES),
    EventType.EGRESS_CLOSED: _v(
        1, **_HOST, address=NAME_OR_NULL, ended=NAME, bytes_up=COUNT, bytes_down=COUNT, duration_ms=COUNT
    ),
    EventType.EGRESS_REFUSED: _v(1, server=NAME, host_hmac=HASH, port=COUNT_OR_NULL, reason=NAME),
    EventType.EGRESS_REFUSED_MORE: _v(1, server=NAME, count=COUNT),
    EventType.ERROR_RAISED: _v(
        2, request_id=NAME_OR_NULL, route=NAME, status=COUNT, code=NAME, error=NAME, count=COUNT
    ),
}


def version_of(event: Event) -> int:
    """The version of the event's type. Raise EventUnfit for one that is not in the vocabulary as it is."""
    schema = VOCABULARY.get(event.type)
    if schema is None:
        raise EventUnfit(f"{event.type}: declare it in app/audit/vocabulary.py")
    data, fields = event.data, schema.fields
    if not schema.required <= data.keys() <= fields.keys():
        differing = sorted(schema.required - data.keys() | data.keys() - fields.keys())
        raise EventUnfit(f"{event.type}: missing or not declared in app/audit/vocabulary.py: {', '.join(differing)}")
    unfit = [name for name, value in data.items() if not fields[name].fits(value)]
    if unfit:  # the names alone: a value that does not belong there may be a secret
        raise EventUnfit(f"{event.type}: not what app/audit/vocabulary.py says: {', '.join(unfit)}")
    return schema.version
