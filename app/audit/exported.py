"""Reads what has left the database: signed heads, and exports of a tenant's chain, a line of JSON each. Pure."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from app.audit import chain
from app.audit.chain import Checkpoint, Head
from app.audit.signing import PublicKeys
from app.audit.verify import Break, Held, Row, Signed, Verifier


class Unreadable(ValueError):
    """A line is not what the file should hold."""


@dataclass(frozen=True, slots=True)
class _After:
    """The row that an export's first one follows."""

    seq: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class _Pruned:
    """The checkpoint that an export begins with."""

    checkpoint: Checkpoint
    signature: bytes


_Step = Row | Signed | _After | _Pruned


def read_heads(lines: Iterable[bytes], *, source: str, tenant: UUID | None = None) -> Mapping[UUID, Sequence[Signed]]:
    """Of each tenant, or of one; raise Unreadable. A last line without its end was cut off by a crash, and is no head.

    All of them are kept, since the newest agrees as well with a chain that was cut and has grown on. One that is there
    again, as several processes write it, is kept once.
    """
    found: dict[UUID, list[Signed]] = defaultdict(list)
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            step = _read(line, number, source, is_head=True)
            if isinstance(step, Signed) and tenant in {None, step.head.tenant_id}:
                heads = found[step.head.tenant_id]
                if not heads or heads[-1] != step:
                    heads.append(step)
    return found


def verify_export(
    lines: Iterable[bytes], *, keys: PublicKeys, heads: Mapping[UUID, Sequence[Signed]], is_part: bool
) -> Break | Held:
    """The first break of an exported chain, or which rows of it hold; raise Unreadable.

    `heads` were kept elsewhere. Of a part they may say that the chain goes on after it.
    """
    verifier, after = None, None
    for number, line in enumerate(lines, 1):
        step = _read(line, number, "the export")
        if isinstance(step, _After):
            if number > 1:
                raise Unreadable(f"Line {number} of the export says again where it begins.")
            after = step
            continue
        broken = None
        if verifier is None:
            tenant_id = _tenant_of(step, number)
            verifier = Verifier(tenant_id, keys)
            broken = _begin(verifier, after or step) or verifier.expect(heads.get(tenant_id, ()))
        elif isinstance(step, _Pruned):
            raise Unreadable(f"Line {number} of the export says again where it begins.")
        broken = broken or _take(verifier, step)
        if broken:
            return broken
    if verifier is None:
        raise Unreadable("The export has no row.")
    return verifier.finish(is_part=is_part)


def _begin(verifier: Verifier, step: _Step) -> Break | None:
    if isinstance(step, _Pruned):
        return verifier.begin(step.checkpoint, step.signature)
    if isinstance(step, _After):
        verifier.follow(step.seq, step.hash)
    return None


def _take(verifier: Verifier, step: _Step) -> Break | None:
    if isinstance(step, Row):
        return verifier.take(step)
    return verifier.expect([step]) if isinstance(step, Signed) else None


def _tenant_of(step: _Step, number: int) -> UUID:
    """A row's own text says whose it is; each later row must say the same."""
    if isinstance(step, _Pruned):
        return step.checkpoint.tenant_id
    if isinstance(step, Signed):
        return step.head.tenant_id
    try:
        return UUID(json.loads(step.body or "")["tenant_id"] if isinstance(step, Row) else "")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Unreadable(f"Line {number} of the export is of no tenant.") from None


def _read(line: bytes, number: int, source: str, *, is_head: bool = False) -> _Step:
    """What a line says, in the one way in which it is written. A name that stands twice is found by this as well."""
    with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        document = json.loads(line)
        step = _signed(document, source) if is_head else _step(document, source)
        if line == chain.canonical_document(_written(step, is_head=is_head)) + b"\n":
            return step
    raise Unreadable(f"Line {number} of {source} is not what this version writes.")


def _step(document: Mapping[str, Any], source: str) -> _Step:
    if "head" in document:
        return _signed(document["head"], source)
    if "checkpoint" in document:
        checkpoint = document["checkpoint"]
        return _Pruned(Checkpoint.read(checkpoint), _signature(checkpoint))
    if "after" in document:
        return _After(_number(document["after"]["seq"]), bytes.fromhex(document["after"]["hash"]))
    seq, body = _number(document["seq"]), document["body"]
    if not isinstance(body, str):
        raise TypeError
    return Row(seq, UUID(document["event_id"]), body, bytes.fromhex(document["hash"]))


def _signed(document: Mapping[str, Any], source: str) -> Signed:
    return Signed(Head.read(document), _signature(document), source)


def _written(step: _Step, *, is_head: bool) -> Mapping[str, Any]:
    if isinstance(step, Signed):
        head = chain.signed_document(step.head, step.signature)
        return head if is_head else {"head": head}
    if isinstance(step, _Pruned):
        return {"checkpoint": chain.signed_document(step.checkpoint, step.signature)}
    if isinstance(step, _After):
        return {"after": {"seq": step.seq, "hash": step.hash.hex()}}
    return {"seq": step.seq, "event_id": str(step.event_id), "body": step.body, "hash": step.hash.hex()}


def _signature(document: Mapping[str, Any]) -> bytes:
    return base64.b64decode(document["signature"], validate=True)


def _number(value: object) -> int:
    """A row's: it goes into eight bytes."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(value)
    return value
