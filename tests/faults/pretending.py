"""Breaks what was seen, where neither a superuser nor a tool server could do it: once for each claim that is left."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.faults import scripted_model as model
from tests.faults.customers import BUDGETS
from tests.faults.evidence import Evidence
from tests.faults.ledger import Asked, Kind
from tests.faults.tampering import Break

Pretended = Iterator[tuple[Break, Evidence]]


def break_ledger(evidence: Evidence) -> Pretended:
    """What was broken, and the evidence with that."""
    yield from _of_answers(evidence)
    yield from _of_ends(evidence)
    yield from _of_events(evidence)
    yield from _of_approvals(evidence)
    yield from _of_what_others_saw(evidence)
    yield from _of_budgets(evidence)


def _succeeded(evidence: Evidence, kind: Kind) -> Asked:
    found = (asked for asked in evidence.asked if asked.kind is kind and asked.state == "succeeded")
    return next(asked for asked in found if asked.again)


def _with(evidence: Evidence, asked: Asked, **changes: Any) -> Evidence:
    """The same, but that this query went otherwise."""
    told = [replace(other, **changes) if other is asked else other for other in evidence.asked]
    return replace(evidence, ledger=replace(evidence.ledger, asked=told))


def _of_answers(evidence: Evidence) -> Pretended:
    asked = _succeeded(evidence, Kind.QUERY)
    yield Break("answered with 500", "answers_are_clear", asked.nonce), _with(evidence, asked, status=500)
    refused = _with(evidence, asked, status=429, body=asked.body | {"code": "budget_exhausted"})
    yield Break("told of a budget", "refusals_are_recorded", asked.nonce), refused
    again = _with(evidence, asked, again=(200, asked.body | {"answer": "another"}))
    yield Break("another answer", "same_key_same_answer", asked.nonce), again
    nonces = dict(evidence.nonces) | {str(asked.run_id): "of-nobody"}
    yield Break("a run of nobody", "queries_begin_once", str(asked.run_id)), replace(evidence, nonces=nonces)


def _of_ends(evidence: Evidence) -> Pretended:
    asked = _succeeded(evidence, Kind.BACKGROUND)
    end = (asked.end or {}) | {"status": "interrupted"}
    yield Break("no end", "queries_end_in_time", asked.nonce), _with(evidence, asked, end=None)
    yield Break("another end", "ends_are_final", asked.nonce), _with(evidence, asked, end=end)
    yield Break("not taken up", "background_is_taken_up", asked.nonce), _with(evidence, asked, end=end)


def _of_events(evidence: Evidence) -> Pretended:
    asked = _succeeded(evidence, Kind.STREAM)
    run_id = str(asked.run_id)
    fewer = evidence.run_events | {run_id: evidence.run_events[run_id][1:]}
    yield Break("an event less", "events_are_gapless", run_id), replace(evidence, run_events=fewer)
    unheard = _with(evidence, asked, events=asked.events[:-1])
    yield Break("an event unheard", "streams_are_whole", asked.nonce), unheard
    event = evidence.events[asked.tenant_id][0]
    events = {**evidence.events, "again": [event]}
    yield Break("an event twice", "events_are_unique", event["id"]), replace(evidence, events=events)


def _of_approvals(evidence: Evidence) -> Pretended:
    effect = next(effect for effect in evidence.effects if effect.tool == "sign")
    silent = replace(evidence.ledger, decided=[])
    yield Break("nobody approved", "approvals_hold", effect.note), replace(evidence, ledger=silent)
    taken = next(decided for decided in evidence.decided if decided.status == 202)
    twice = replace(evidence.ledger, decided=[*evidence.decided, taken])
    subject = taken.approval_id
    yield Break("decided twice", "approvals_are_decided_once", subject), replace(evidence, ledger=twice)


def _of_what_others_saw(evidence: Evidence) -> Pretended:
    asked = _succeeded(evidence, Kind.QUERY)
    letter = (model.note(asked.nonce, 0), "of-no-call")
    letters = [*evidence.letters, letter, letter]
    yield Break("a letter twice", "letters_came_once", asked.nonce), replace(evidence, letters=letters)
    effect = next(effect for effect in evidence.effects if effect.nonce == asked.nonce)
    late = model.Turn(asked.nonce, 0, None, effect.at + 1, effect.at + 2)
    turns = [*evidence.turns, late]
    yield Break("a turn again", "turns_are_not_repeated", asked.nonce), replace(evidence, turns=turns)
    one = next(tenant_id for tenant_id, limit in evidence.limits.items() if limit.get("concurrent_runs") == 1)
    own = [other.nonce for other in evidence.asked if other.tenant_id == one]
    at_once = [model.Turn(nonce, 0, None, 0, 1) for nonce in own]
    yield Break("all runs at once", "concurrency_holds", one), replace(evidence, turns=at_once)
    other = next(tenant_id for tenant_id in evidence.limits if tenant_id != asked.tenant_id)
    seen = replace(evidence.ledger, seen={**evidence.ledger.seen, other: {asked.nonce}})
    yield Break("a byte of another", "nothing_crosses_tenants", asked.nonce), replace(evidence, ledger=seen)


def _of_budgets(evidence: Evidence) -> Pretended:
    asked = _succeeded(evidence, Kind.QUERY)
    held = evidence.reserved | {asked.tenant_id: [str(asked.run_id)]}
    yield Break("still reserved", "nothing_stays_reserved", str(asked.run_id)), replace(evidence, reserved=held)
    for budget in BUDGETS:
        tenant_id = next(each for each, limits in evidence.limits.items() if budget in limits)
        free = replace(evidence, days=evidence.days | {tenant_id: []})
        yield Break("given for nothing", "what_was_given_is_charged", f"{tenant_id} {budget}"), free
