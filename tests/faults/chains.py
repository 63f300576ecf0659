"""Verifies an exported audit chain, written from docs/audit.md alone: it shares no code with what made the chain."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Line = Mapping[str, Any]


def faults(tenant_id: str, lines: Iterable[Line], keys: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with the export of a tenant's whole chain; `keys` are the service's public ones."""
    hashes = {0: bytes(32)}
    signed = 0
    for line in lines:
        if head := line.get("head"):
            signed = max(signed, head["seq"])
            yield from _of_head(tenant_id, head, hashes=hashes, keys=keys)
        else:
            seq = line["seq"]
            if seq != len(hashes):
                yield f"{seq} follows {len(hashes) - 1}"
            hashes[seq] = _linked(tenant_id, seq, previous=hashes.get(seq - 1, b""), body=line["body"])
            if hashes[seq].hex() != line["hash"]:
                yield f"{seq}, event {line['event_id']}: another hash"
    if signed != max(hashes):
        yield f"signed up to {signed} of {max(hashes)}"


def _linked(tenant_id: str, seq: int, *, previous: bytes, body: str | None) -> bytes:
    digest = hashlib.sha256((body or "").encode()).digest()
    place = UUID(tenant_id).bytes + seq.to_bytes(8, "big")
    return hashlib.sha256(b"bulkhead-audit-1\n" + place + previous + digest).digest()


def _of_head(
    tenant_id: str, head: Mapping[str, Any], *, hashes: Mapping[int, bytes], keys: Mapping[str, str]
) -> Iterator[str]:
    document = {name: value for name, value in head.items() if name != "signature"}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    key = Ed25519PublicKey.from_public_bytes(base64.b64decode(keys[head["key_id"]]))
    try:
        key.verify(base64.b64decode(head["signature"]), text.encode())
    except InvalidSignature:
        yield f"the head of {head['seq']} is not signed"
    if (head["tenant_id"], head["hash"]) != (tenant_id, hashes.get(head["seq"], b"").hex()):
        yield f"the head of {head['seq']} is of another chain"
