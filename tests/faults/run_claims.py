"""What must be true of runs that die, wait, are resumed and asked for again; as pure as the other claims."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from tests.faults import budget_claims, claims
from tests.faults.evidence import Evidence
from tests.faults.ledger import Asked, Kind
from tests.faults.load import edited
from tests.runs.faults import TERMINAL

_REPEATABLE: Final = "keep"  # what the policy declares idempotent
# What a fault of the model or of a tool server makes of a run that somebody has taken up.
_FAILURES: Final = {"model_failed", "server_unavailable", "budget_exhausted"}


def violations(evidence: Evidence) -> dict[str, list[str]]:
    """What contradicts each claim, by the claim's name; empty where everything holds."""
    found = {claim.__name__: list(claim(evidence)) for claim in CLAIMS}
    return {name: against for name, against in found.items() if against}


def queries_end_in_time(evidence: Evidence) -> Iterator[str]:
    """Each query was answered in the end, and its run has ended."""
    for asked in evidence.asked:
        if asked.status is None or (asked.run_id and asked.state not in TERMINAL):
            yield f"{asked}"


def ends_are_final(evidence: Evidence) -> Iterator[str]:
    """The end that a client has seen is the end that is stored."""
    for asked in evidence.asked:
        if asked.end and asked.run_id and asked.end != evidence.runs.get(asked.run_id):
            yield f"{asked}: {asked.end}, then {evidence.runs.get(asked.run_id)}"


def keys_act_once(evidence: Evidence) -> Iterator[str]:
    """Each call came with a key of its own run; no key acted twice, and only a repeatable call came twice with one."""
    for (moment, key), times in Counter((line.moment, line.key) for line in evidence.lines).items():
        tools = {line.tool for line in evidence.lines if line.key == key}
        if times > 1 and (moment == "acted" or tools != {_REPEATABLE}):
            yield f"{key} {moment} {times} times, {tools}"
    for line in evidence.lines:
        if evidence.nonces.get(line.key.partition(":")[0]) != line.nonce:
            yield f"{line} with the key of another run"


def calls_in_doubt_are_not_repeated(evidence: Evidence) -> Iterator[str]:
    """A call that nobody knows the outcome of is never made again under another key either."""
    called = Counter(line.note.removesuffix("-edited") for line in evidence.lines if line.moment == "called")
    repeatable = {line.note for line in evidence.lines if line.tool == _REPEATABLE}
    yield from (f"{note}: {times} times" for note, times in called.items() if times > 1 and note not in repeatable)


def letters_came_once(evidence: Evidence) -> Iterator[str]:
    """What was sent through the relay came once, and from a call."""
    known = {(line.note, line.key) for line in evidence.lines if line.moment == "called"}
    for letter, times in Counter(evidence.letters).items():
        if times > 1 or (letter not in known and letter[0].partition("-")[0] in evidence.run_ids):
            yield f"{letter}: {times} times"


def turns_are_not_repeated(evidence: Evidence) -> Iterator[str]:
    """Once a call of a turn has come to the tool server, the model is not asked for that turn again."""
    firsts: dict[tuple[str, int], float] = {}
    for line in evidence.lines:
        number = int(line.note.removesuffix("-edited").rpartition("-")[2])
        firsts[line.nonce, number] = min(line.at, firsts.get((line.nonce, number), line.at))
    for turn in evidence.turns:
        if turn.came > firsts.get((turn.nonce, turn.made), turn.came):
            yield f"{turn}: its call came at {firsts[turn.nonce, turn.made]}"


def background_is_taken_up(evidence: Evidence) -> Iterator[str]:
    """No death of a process ends a background run: it succeeds, is cancelled, or fails for what others did."""
    for asked in evidence.asked:
        if asked.kind is Kind.BACKGROUND and asked.status == 202 and asked.end:
            is_failure = asked.state == "failed" and asked.end["code"] in _FAILURES
            is_refused = asked.state == "denied" and asked.end["code"] in _FAILURES
            is_cancelled = asked.state == "cancelled" and asked.is_cancelled
            if not (asked.state == "succeeded" or is_failure or is_refused or is_cancelled):
                yield f"{asked}: {asked.end}"


def events_are_gapless(evidence: Evidence) -> Iterator[str]:
    """The events of each run count up from 1, tell of one end, the last of all, and of the one that is stored."""
    for run_id, events in evidence.run_events.items():
        ids = [event["sequence"] for event in events]
        kinds = [event["type"] for event in events]
        ends = [event["data"]["status"] for event in events if event["type"] == "run.finished"]
        if ids != list(range(1, len(ids) + 1)) or ends != [evidence.states[run_id]] or kinds[-1:] != ["run.finished"]:
            yield f"{run_id}: {list(zip(ids, kinds, strict=True))}, {evidence.states[run_id]}"


def streams_are_whole(evidence: Evidence) -> Iterator[str]:
    """Whoever streams gets each event once and in order, wherever it was resumed, and with them the whole answer."""
    for asked in evidence.asked:
        if asked.events and asked.run_id:
            stored = [(event["sequence"], event["type"]) for event in evidence.run_events.get(asked.run_id, ())]
            if asked.events != stored:
                yield f"{asked}: heard {asked.events}, stored {stored}"
            elif asked.state == "succeeded" and asked.text != asked.told["answer"]:
                yield f"{asked}: heard {asked.text!r}"


def same_key_same_answer(evidence: Evidence) -> Iterator[str]:
    """Sent again under its key, a query is answered as it was."""
    for asked in evidence.asked:
        if asked.again is not None and not _is_same(asked, *asked.again):
            yield f"{asked}: {asked.body or asked.told}, then {asked.again}"


_VARIES: Final = {"request_id"}


def _is_same(asked: Asked, status: int, body: dict[str, Any]) -> bool:
    if asked.events:
        return body == {"events": asked.events}
    return status == asked.status and all(body.get(name) == asked.body[name] for name in asked.body.keys() - _VARIES)


def approvals_hold(evidence: Evidence) -> Iterator[str]:
    """A call that needs an approval acts once for each, and with the arguments that were approved; and uses it up."""
    used = Counter(item["run_id"] for item in evidence.approvals.values() if item["state"] == "used")
    acted = Counter(evidence.run_ids.get(effect.nonce, "") for effect in evidence.effects if effect.tool == "sign")
    yield from (f"{run_id}: {times} acted, {used[run_id]} used" for run_id, times in (acted - used).items())
    granted: dict[str, str] = {}
    for decided in evidence.decided:
        if not decided.by_asker and decided.verdict in {"approve", "edit"} and decided.status in {202, None}:
            granted[decided.note] = edited(decided.note) if decided.verdict == "edit" else decided.note
    for effect in evidence.effects:
        asked_for = effect.note.removesuffix("-edited")
        if effect.tool == "sign" and granted.get(asked_for) != effect.note:
            yield f"{effect}, approved {granted.get(asked_for)}"
        if effect.tool != "sign" and effect.note != asked_for:
            yield f"{effect} was edited"


def approvals_are_decided_once(evidence: Evidence) -> Iterator[str]:
    """Of each approval one decision was taken, by a second person; the first one's was refused."""
    taken = Counter(decided.approval_id for decided in evidence.decided if decided.status == 202)
    yield from (f"{approval_id}: {times} times" for approval_id, times in taken.items() if times > 1)
    for decided in evidence.decided:
        if decided.by_asker and (decided.status, decided.code) not in _REFUSALS:
            yield f"{decided}"


# Of who may not, and of what was decided or had ended before.
_REFUSALS: Final = {(403, "self_approval"), (409, "approval_decided"), (None, None)}


def nothing_crosses_tenants(evidence: Evidence) -> Iterator[str]:
    """No tenant was sent the nonce of another, and no tool server of one has one of another's."""
    owners = {asked.nonce: asked.tenant_id for asked in evidence.asked}
    for tenant_id, nonces in evidence.ledger.seen.items():
        for nonce in nonces & owners.keys():
            if owners[nonce] != tenant_id:
                yield f"{tenant_id} has seen {nonce} of {owners[nonce]}"


CLAIMS: Final[tuple[claims.Claim, ...]] = (
    *claims.CLAIMS,
    *budget_claims.CLAIMS,
    queries_end_in_time,
    ends_are_final,
    keys_act_once,
    calls_in_doubt_are_not_repeated,
    letters_came_once,
    turns_are_not_repeated,
    background_is_taken_up,
    events_are_gapless,
    streams_are_whole,
    same_key_same_answer,
    approvals_hold,
    approvals_are_decided_once,
    nothing_crosses_tenants,
)
