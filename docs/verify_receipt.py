#!/usr/bin/env python3
"""Verifies the receipt of a run with nothing but public keys. Needs Python 3.11 and the package `cryptography`.

    python3 verify_receipt.py receipt.json keys.json [--events export.ndjson]

`receipt.json` is what GET /v1/runs/{run_id}/receipt gave, `keys.json` what GET /.well-known/bulkhead-audit-keys.json
or `bulkhead audit keys` gave. Take the keys from somewhere that you trust: who can replace them can sign anything.
`export.ndjson`, from GET /v1/audit/export, has the texts of the events; with it they are checked, too, and how the run
ended, which without it is the service's word alone.

Exit status: 0 where everything holds, 1 where a check failed, 2 where a file cannot be read.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import UUID

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Document = dict[str, Any]
RECEIPT = "bulkhead.receipt/1"
HEAD = "bulkhead.audit.head/1"
DOMAIN = b"bulkhead-audit-1\n"
# What says under which policy version a run is: the last of them counts.
OF_POLICY = ("query.screened", "run.started", "run.resumed", "run.finished")


class Failed(Exception):
    """A check did not hold."""


def check(holds: object, why: str) -> None:
    if not holds:
        raise Failed(why)


def verify_signature(document: Document, keys: dict[str, str], schema: str, what: str) -> None:
    """Ed25519 over the canonical JSON of the document without its signature."""
    signed = {name: value for name, value in document.items() if name != "signature"}
    check(signed.get("schema") == schema, f"the {what} is no {schema}")
    raw = base64.b64decode(keys.get(signed["key_id"], ""))
    check(raw, f"the {what} is signed by the key {signed['key_id']}, which is not among the public keys")
    check(hashlib.sha256(raw).hexdigest()[:16] == signed["key_id"], f"the key {signed['key_id']} is not its id's")
    text = json.dumps(signed, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    try:
        Ed25519PublicKey.from_public_bytes(raw).verify(base64.b64decode(document["signature"]), text)
    except InvalidSignature:
        raise Failed(f"the signature of the {what} does not hold") from None


def next_link(tenant_id: UUID, seq: int, link: bytes, digest: bytes) -> bytes:
    """The hash of row `seq`, which follows the one with the hash `link`."""
    return hashlib.sha256(DOMAIN + tenant_id.bytes + seq.to_bytes(8, "big") + link + digest).digest()


def verify_span(span: Document, tenant_id: UUID, keys: dict[str, str]) -> dict[int, str]:
    """From the hash before the span over all its digests to the signed head; give the digests by their numbers."""
    head, seq, found = span["head"], span["before"]["seq"], dict[int, str]()
    verify_signature(head, keys, HEAD, f"head at row {head.get('seq')}")
    check(head["tenant_id"] == str(tenant_id), f"the head at row {head['seq']} is another tenant's")
    link = bytes.fromhex(span["before"]["hash"])
    check(seq > 0 or link == bytes(32), "row 1 follows nothing, but the receipt says something")
    for digest in span["digests"]:
        seq += 1
        found[seq] = digest
        link = next_link(tenant_id, seq, link, bytes.fromhex(digest))
    check(seq == head["seq"], f"the digests end at row {seq}, and the head is at row {head['seq']}")
    check(link.hex() == head["hash"], f"the hashes do not lead to the head at row {seq}")
    return found


def verify_receipt(receipt: Document, keys: dict[str, str]) -> None:
    """Raise Failed."""
    verify_signature(receipt, keys, RECEIPT, "receipt")
    tenant_id, sealed = UUID(receipt["tenant_id"]), dict[int, str]()
    for span in receipt["spans"]:
        sealed |= verify_span(span, tenant_id, keys)
    check(receipt["rows"], "the receipt has no rows")
    types = [row["type"] for row in receipt["rows"]]
    check(types[0] == "query.received" and "run.finished" in types, "it is not all of the run: an end is missing")
    for row in receipt["rows"]:
        check(row["seq"] in sealed, f"row {row['seq']} is under no head")
        check(sealed[row["seq"]] == row["body_digest"], f"row {row['seq']} has another digest than was sealed")
    check(len({row["seq"] for row in receipt["rows"]}) == len(receipt["rows"]), "a row is there twice")


def verify_events(receipt: Document, lines: Iterable[str]) -> None:
    """All rows of the record from the receipt's first to its last head are there as sealed: the run's are its rows."""
    rows = {row["seq"]: row for row in receipt["rows"]}
    before, head = receipt["spans"][0]["before"], receipt["spans"][-1]["head"]
    seq, link = before["seq"], bytes.fromhex(before["hash"])
    told: Document = {}
    for line in lines:
        event = json.loads(line)
        # What comes later is no part of what the run did: somebody reads its texts.
        if "body" not in event or event["seq"] > head["seq"]:
            continue
        if event["seq"] > before["seq"]:
            seq += 1
            check(event["seq"] == seq, f"the export lacks row {seq}")
            link = next_link(UUID(receipt["tenant_id"]), seq, link, hashlib.sha256(event["body"].encode()).digest())
        told |= verify_event(receipt, rows.get(event["seq"]), event)
    check(seq == head["seq"], f"the export lacks row {seq + 1}")
    check(link.hex() == head["hash"], "the export has other texts than were sealed")
    for name, what in (("state", "the run ended as"), ("policy_version", "its policy version was")):
        check(told.get(name) == receipt[name], f"{what} {told.get(name)!r}, and the receipt says {receipt[name]!r}")


def verify_event(receipt: Document, row: Document | None, event: Document) -> Document:
    """What the text says is what the receipt says of its row; give what it says of the run's end and policy."""
    body = json.loads(event["body"])
    if row is None:
        is_ours = body["run_id"] == receipt["run_id"] and body["type"] != "run.read"
        check(not is_ours, f"row {event['seq']} is of this run and not in the receipt")
        return {}
    digest = hashlib.sha256(event["body"].encode()).hexdigest()
    check(digest == row["body_digest"], f"row {row['seq']} of the export has another text than was sealed")
    said = (body["tenant_id"], body["run_id"], body["id"], body["type"])
    named = (receipt["tenant_id"], receipt["run_id"], row["event_id"], row["type"])
    check(said == named, f"row {row['seq']} is another event than the receipt says")
    if body["type"] not in OF_POLICY:
        return {}
    names = ("state", "policy_version") if body["type"] == "run.finished" else ("policy_version",)
    return {name: body["data"][name] for name in names if name in body["data"]}


def main() -> int:
    """Say what is proven, or which check failed."""
    parser = argparse.ArgumentParser(description="Verify the receipt of a run.")
    parser.add_argument("receipt", type=Path)
    parser.add_argument("keys", type=Path)
    parser.add_argument("--events", type=Path, metavar="EXPORT")
    given = parser.parse_args()
    try:
        receipt, keys = json.loads(given.receipt.read_text("utf-8")), json.loads(given.keys.read_text("utf-8"))["keys"]
        verify_receipt(receipt, keys)
        if given.events is not None:
            with given.events.open(encoding="utf-8") as lines:
                verify_events(receipt, lines)
    except Failed as failed:
        sys.stderr.write(f"NOT VALID: {failed}.\n")
        return 1
    except (OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError, AttributeError) as error:
        sys.stderr.write(f"NOT READABLE: {type(error).__name__}: {error}\n")
        return 2
    rows, heads = receipt["rows"], [span["head"] for span in receipt["spans"]]
    run = f"run {receipt['run_id']} of tenant {receipt['tenant_id']}"
    numbers = f"rows {rows[0]['seq']} to {rows[-1]['seq']} of the tenant's record"
    unseen = "were not looked at, nor whether others were left out"
    texts = "are in the export as they were sealed, and the run has no others there" if given.events else unseen
    ended = f"ended as {receipt['state']!r} under policy version {receipt['policy_version']}"
    sys.stdout.write(f"VALID: {run} {ended}.\n" if given.events else f"VALID: a receipt of {run}.\n")
    if not given.events:
        sys.stdout.write(f"That it {ended} is not proven here: --events takes an export.\n")
    sys.stdout.write(f"Its {len(rows)} events are {numbers}, the last sealed at {heads[-1]['signed_at']}.\n")
    sys.stdout.write(f"Their texts {texts}.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
