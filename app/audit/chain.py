"""The hash chain over a tenant's audit events, and the documents that are signed over it. Pure.

Each link takes in the one before it, so that no row can be changed, moved or left out unless all that follow are
made anew; the signed head says what they were.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self
from uuid import UUID

HEAD_SCHEMA: Final = "bulkhead.audit.head/1"
CHECKPOINT_SCHEMA: Final = "bulkhead.audit.checkpoint/1"
# What row 1 follows.
GENESIS: Final = bytes(32)
_DOMAIN: Final = b"bulkhead-audit-1\n"


def digest(body: str) -> bytes:
    """SHA-256 of an event's canonical text."""
    return hashlib.sha256(body.encode()).digest()


def link(tenant_id: UUID, seq: int, *, previous: bytes, body_digest: bytes) -> bytes:
    """The hash of row `seq`, from 1 on; `previous` is that of the row before it."""
    return hashlib.sha256(_DOMAIN + tenant_id.bytes + seq.to_bytes(8, "big") + previous + body_digest).digest()


def canonical_document(document: Mapping[str, Any]) -> bytes:
    """The bytes that are signed: JSON with sorted keys, no spaces, in UTF-8."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def timestamp(at: datetime) -> str:
    """RFC 3339 in UTC, with microseconds and Z."""
    return at.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain stood when it was signed, up to row `seq`."""

    tenant_id: UUID
    seq: int
    hash: bytes
    signed_at: datetime
    key_id: str

    def document(self) -> dict[str, Any]:
        """What is signed, as canonical JSON."""
        return {
            "schema": HEAD_SCHEMA,
            "tenant_id": str(self.tenant_id),
            "seq": self.seq,
            "hash": self.hash.hex(),
            "signed_at": timestamp(self.signed_at),
            "key_id": self.key_id,
        }

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Raise KeyError, TypeError or ValueError for what is no head's document."""
        tenant_id, seq, hash_, at, key_id = _fields(document, HEAD_SCHEMA, "signed_at")
        return cls(tenant_id, seq, hash_, at, key_id)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a pruned chain begins: `hash` is that of row `seq`, the last that was deleted."""

    tenant_id: UUID
    seq: int
    hash: bytes
    pruned_at: datetime
    key_id: str

    def document(self) -> dict[str, Any]:
        """What is signed, as canonical JSON."""
        return {
            "schema": CHECKPOINT_SCHEMA,
            "tenant_id": str(self.tenant_id),
            "seq": self.seq,
            "hash": self.hash.hex(),
            "pruned_at": timestamp(self.pruned_at),
            "key_id": self.key_id,
        }

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Raise KeyError, TypeError or ValueError for what is no checkpoint's document."""
        tenant_id, seq, hash_, at, key_id = _fields(document, CHECKPOINT_SCHEMA, "pruned_at")
        return cls(tenant_id, seq, hash_, at, key_id)


def signed_document(what: Head | Checkpoint, signature: bytes) -> dict[str, Any]:
    """As it leaves the database: the document, and the signature over it in base64."""
    return {**what.document(), "signature": base64.b64encode(signature).decode()}


def _fields(document: Mapping[str, Any], schema: str, at: str) -> tuple[UUID, int, bytes, datetime, str]:
    seq = document["seq"]
    if document["schema"] != schema or type(seq) is not int or not 0 < seq < 2**63:
        raise ValueError(f"this is no {schema}")
    moment = datetime.fromisoformat(document[at])
    return UUID(document["tenant_id"]), seq, bytes.fromhex(document["hash"]), moment, str(document["key_id"])
