"""What must be true of the record after any faults. Each claim gives the evidence against it; pure, so to be tried."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from operator import itemgetter
from typing import Any, Final

from tests.faults import chains
from tests.faults import scripted_model as model
from tests.faults.customers import BUDGETS
from tests.faults.evidence import Evidence
from tests.faults.ledger import Asked, Kind
from tests.runs.faults import TERMINAL

Event = Mapping[str, Any]
Claim = Callable[[Evidence], Iterator[str]]
_REFUSED: Final = {"query.received": 1, "query.screened": 1, "run.finished": 1}
_OK, _ACCEPTED, _REFUSED_QUERY, _TOO_MANY = 200, 202, 422, 429
# What a fault of somebody else's may have led to, by status.
_FAULTS: Final = {
    502: {"model_failed"},
    503: {"interrupted", "server_unavailable", "unavailable", "shutting_down"},
    504: {"run_timeout"},
}


def answers_are_clear(evidence: Evidence) -> Iterator[str]:
    """Whoever asked was told an end, a refusal that fits, or to try again later; nothing else, and never a defect."""
    for asked in evidence.asked:
        for status, code in {*asked.told_of, (asked.status, asked.body.get("code"))}:
            if not _fits(asked, evidence.limits[asked.tenant_id], status=status, code=code):
                yield f"{asked}: {status} {code}"


def _fits(asked: Asked, limit: Mapping[str, Any], *, status: int | None, code: str | None) -> bool:
    is_contraband = "contraband" in asked.tools
    if status == _ACCEPTED:
        return not is_contraband and (asked.kind is Kind.BACKGROUND or "sign" in asked.tools)
    if status == _TOO_MANY:
        # Who is let have few runs at once has budgets that nobody uses up, if any.
        return code == ("too_many_runs" if "concurrent_runs" in limit else "budget_exhausted")
    if status in {_OK, _REFUSED_QUERY, None}:
        return status is None or is_contraband == (status == _REFUSED_QUERY)
    return code in _FAULTS.get(status or 0, ())


def refusals_are_recorded(evidence: Evidence) -> Iterator[str]:
    """Who had no room in a budget has a run that says so, with the limit; who had no place has none."""
    by_run = _by_run(evidence)
    for asked in evidence.asked:
        if asked.status == _TOO_MANY and asked.body["code"] == "budget_exhausted":
            events = by_run[asked.body["run_id"]]
            ends = [event["data"]["code"] for event in _of(events, "run.finished")]
            limits = [event["data"]["limit"] for event in _of(events, "limit.exceeded")]
            budgets = [name for name in BUDGETS if name in evidence.limits[asked.tenant_id]]
            if (ends, limits) != (["budget_exhausted"], budgets):
                yield f"{asked}: {ends}, {limits}"
        elif asked.status == _TOO_MANY and asked.nonce in evidence.run_ids:
            yield f"{asked} has a run"


def answered_is_recorded(evidence: Evidence) -> Iterator[str]:
    """Each run that succeeded or was refused has all events that the ledger calls for; more only if it was resumed."""
    by_run = _by_run(evidence)
    for asked in evidence.asked:
        if asked.run_id and (asked.status == _REFUSED_QUERY or asked.state == "succeeded"):
            events = by_run[asked.run_id]
            found, expected = Counter(event["type"] for event in events), _expected(asked)
            actors = {event["actor_id"] for event in events}
            if expected - found or (_is_plain(asked, found) and (found != expected or actors != {asked.user_id})):
                yield f"{asked}: {found}, {actors}"


def told_is_stored(evidence: Evidence) -> Iterator[str]:
    """What the client was told of its run is what the run and its last event say: state, calls and tokens."""
    by_run = _by_run(evidence)
    for asked in evidence.asked:
        if asked.run_id and asked.state == "succeeded":
            told, stored = asked.told, evidence.runs.get(asked.run_id, {})
            ends = [event["data"] for event in _of(by_run[asked.run_id], "run.finished")]
            same = ("status", "answer", "tool_calls", "usage", "policy_version")
            if any(told.get(name) != stored.get(name) for name in same) or len(ends) != 1:
                yield f"{asked}: {told}, stored {stored}, ends {ends}"
            elif told["answer"] != model.answer(asked.nonce) or _calls(told) != _decisions(asked):
                yield f"{asked}: {told}"
            elif not _spent(asked, ends[0], evidence):
                yield f"{asked}: {ends}"


def _calls(told: Mapping[str, Any]) -> Counter[str]:
    return Counter(call["tool"] for call in told["tool_calls"])


def _spent(asked: Asked, end: Mapping[str, Any], evidence: Evidence) -> bool:
    """As many tokens as its turns take; more where a turn was asked for again, but never more than were answered."""
    turns = len(asked.turns) + 1
    answered = sum(turn.is_answered for turn in evidence.turns if turn.nonce == asked.nonce)
    used = end["input_tokens"], end["output_tokens"]
    fits = [(times * model.IN_TOKENS, times * model.OUT_TOKENS) for times in range(turns, max(turns, answered) + 1)]
    return end["state"] == "succeeded" and end["tool_calls"] == len(asked.tools) and used in fits


def effects_were_decided(evidence: Evidence) -> Iterator[str]:
    """No tool acts without a decision that let it, recorded before; none acts twice, and none that was denied."""
    by_run, runs = _by_run(evidence), evidence.run_ids
    acted: dict[str, list[float]] = defaultdict(list)
    for effect in evidence.effects:
        acted[effect.nonce].append(effect.at)
        if effect.tool == "erase" or effect.nonce not in runs:
            yield f"{effect} of no run, or denied"
    for note, times in Counter(effect.note.removesuffix("-edited") for effect in evidence.effects).items():
        if times != 1:
            yield f"{note}: {times} times"
    for nonce, times_at in acted.items():
        allowed = [e for e in _of(by_run[runs.get(nonce, "")], "tool.decided") if e["data"]["decision"] == "allowed"]
        decided_at = sorted(_seconds(event) for event in allowed)
        for place, at in enumerate(sorted(times_at)):
            if place >= len(decided_at) or decided_at[place] > at:
                yield f"{nonce}: effect {place} at {at}, decided at {decided_at}"


def successes_had_an_effect(evidence: Evidence) -> Iterator[str]:
    """A call that is recorded as succeeded has acted."""
    acted = Counter(effect.nonce for effect in evidence.effects)
    for run_id, events in _by_run(evidence).items():
        done = [event for event in _of(events, "tool.finished") if event["data"]["outcome"] == "succeeded"]
        if len(done) > acted[evidence.nonces.get(run_id, "")]:
            yield f"{run_id}: {len(done)} calls succeeded"


def calls_end_once(evidence: Evidence) -> Iterator[str]:
    """Each call that was let through has one outcome, if only `unknown`; a denied one has none."""
    for run_id, events in _by_run(evidence).items():
        decided = [e["data"] for e in _of(events, "tool.decided")]
        allowed = {data["sequence"] for data in decided if data["decision"] == "allowed"}
        finished = Counter(event["data"]["sequence"] for event in _of(events, "tool.finished"))
        if allowed != finished.keys() or any(times != 1 for times in finished.values()):
            yield f"{run_id}: allowed {allowed}, finished {finished}"


def runs_end_once(evidence: Evidence) -> Iterator[str]:
    """Each run has one end, in the runs and in the record; and the two tell of the same runs."""
    by_run = _by_run(evidence)
    for run_id in evidence.states.keys() | by_run.keys():
        ends = [event["data"]["state"] for event in _of(by_run[run_id], "run.finished")]
        if ends != [evidence.states.get(run_id)] or ends[0] not in TERMINAL:
            yield f"{run_id}: {evidence.states.get(run_id)}, ends {ends}"


def queries_begin_once(evidence: Evidence) -> Iterator[str]:
    """Each query is one run at most, and each run is of a query that was sent, by whom it was sent."""
    for nonce, times in Counter(evidence.nonces.values()).items():
        if times != 1:
            yield f"{nonce}: {times} runs"
    senders = {asked.nonce: asked.user_id for asked in evidence.asked}
    for run_id, events in _by_run(evidence).items():
        received = [event["actor_id"] for event in _of(events, "query.received")]
        if received != [senders.get(evidence.nonces.get(run_id, ""))]:
            yield f"{run_id}: received {received}"


def changes_are_made_once(evidence: Evidence) -> Iterator[str]:
    """A change that was sent until it was answered was made once and stands in the record once."""
    created = Counter(
        event["data"]["user_id"] for events in evidence.events.values() for event in _of(events, "user.created")
    )
    for made in evidence.made:
        there = evidence.users[made.tenant_id].count(made.name)
        if there > 1 or (made.user_id is not None and (there, created[made.user_id]) != (1, 1)):
            yield f"{made}: {there} users, {created[made.user_id or '']} events"
    if created.total() != sum(map(len, evidence.users.values())):
        yield f"{created.total()} events of users"


def events_are_unique(evidence: Evidence) -> Iterator[str]:
    """No event is there twice."""
    ids = Counter(event["id"] for events in evidence.events.values() for event in events)
    yield from (f"{event_id}: {times} times" for event_id, times in ids.items() if times > 1)


def events_are_chained(evidence: Evidence) -> Iterator[str]:
    """Every event that the API shows is in its tenant's chain, word for word."""
    for tenant_id, events in evidence.events.items():
        chained = {line["seq"]: line for line in evidence.chains.get(tenant_id, ()) if "seq" in line}
        for event in events:
            told = {name: value for name, value in event.items() if name not in {"seq", "hash"}}
            line = chained.get(event["seq"], {"body": "{}", "hash": None})
            if (json.loads(line["body"] or "{}"), line["hash"]) != (told, event["hash"]):
                yield f"{event['id']}: {line}"


def chains_verify(evidence: Evidence) -> Iterator[str]:
    """Each tenant's chain links every row to the one before it, and ends in a signed head."""
    for tenant_id, lines in evidence.chains.items():
        yield from (f"{tenant_id}: {fault}" for fault in chains.faults(tenant_id, lines, evidence.audit_keys))


def usage_agrees(evidence: Evidence) -> Iterator[str]:
    """Usage counts each run that began once, and no token less than the record; more only where a run was cut off."""
    repeated = _repeated(evidence)
    for tenant_id, rows in evidence.usage.items():
        begun = {event["run_id"] for event in _of(evidence.events[tenant_id], "run.started")}
        ends = [event for event in _of(evidence.events[tenant_id], "run.finished") if event["run_id"] in begun]
        resumed = {_user_of(evidence, event) for event in _of(evidence.events[tenant_id], "run.resumed")}
        counted = {row["user_id"]: row for row in rows}
        for user_id in counted.keys() | {_user_of(evidence, event) for event in ends}:
            own = [event["data"] for event in ends if _user_of(evidence, event) == user_id]
            row = counted.get(user_id, {"runs": 0, "input_tokens": 0, "output_tokens": 0})
            tokens = sum(data.get("input_tokens", 0) + data.get("output_tokens", 0) for data in own)
            used = row["input_tokens"] + row["output_tokens"]
            is_cut = any(data["state"] != "succeeded" for data in own) or user_id in repeated | resumed
            if row["runs"] != len(own) or used < tokens or (used > tokens and not is_cut):
                yield f"{user_id}: {row}, recorded {len(own)} runs, {tokens} tokens"


def usage_of_tools_agrees(evidence: Evidence) -> Iterator[str]:
    """Usage counts the decisions that the record has."""
    for tenant_id, rows in evidence.calls.items():
        decided = Counter(
            (event["data"]["tool"], event["data"]["decision"])
            for event in _of(evidence.events[tenant_id], "tool.decided")
            if event["data"]["decision"] != "waiting"  # which is followed by another
        )
        counted = Counter({(row["tool"], said): row[said] for row in rows for said in ("allowed", "denied")})
        if +counted != decided:
            yield f"{tenant_id}: {counted}, recorded {decided}"


def concurrency_holds(evidence: Evidence) -> Iterator[str]:
    """The model never saw more runs of a tenant at once than its policy allows, over all processes together.

    A run may ask twice at once: by a retry, when its process has given up on an answer. A process that was stopped past
    its lease still asks; what it asked counts until the record gives its run away.
    """
    given_away, tenants = _given_away(evidence), {asked.nonce: asked.tenant_id for asked in evidence.asked}
    steps = []
    for turn in (turn for turn in evidence.turns if turn.nonce in tenants):
        given = given_away[evidence.run_ids.get(turn.nonce)]
        end = min([turn.ended or turn.came, *(at for at in given if at > turn.came)])
        if end > turn.came:
            steps += [(turn.came, True, turn), (end, False, turn)]
    under_way: defaultdict[str, dict[int, model.Turn]] = defaultdict(dict)
    for at, is_begin, turn in sorted(steps, key=itemgetter(0, 1)):
        tenant_id = tenants[turn.nonce]
        asking = under_way[tenant_id]
        if not is_begin:
            del asking[id(turn)]
            continue
        asking[id(turn)] = turn
        if len({each.nonce for each in asking.values()}) > evidence.limits[tenant_id].get("concurrent_runs", 1 << 31):
            yield f"{tenant_id} at {at}: {list(asking.values())}"


CLAIMS: Final[tuple[Claim, ...]] = (
    answers_are_clear,
    refusals_are_recorded,
    answered_is_recorded,
    told_is_stored,
    effects_were_decided,
    successes_had_an_effect,
    calls_end_once,
    runs_end_once,
    queries_begin_once,
    changes_are_made_once,
    events_are_unique,
    events_are_chained,
    chains_verify,
    usage_agrees,
    usage_of_tools_agrees,
    concurrency_holds,
)


def _by_run(evidence: Evidence) -> defaultdict[str, list[Event]]:
    found: defaultdict[str, list[Event]] = defaultdict(list)
    for events in evidence.events.values():
        for event in events:
            if event["run_id"] is not None:
                found[event["run_id"]].append(event)
    return found


def _user_of(evidence: Evidence, event: Event) -> str | None:
    senders = {asked.nonce: asked.user_id for asked in evidence.asked}
    return senders.get(evidence.nonces.get(event["run_id"], ""))


def _given_away(evidence: Evidence) -> dict[str | None, list[float]]:
    """When a run was ended by another process, or taken up by one, by its id."""
    found: dict[str | None, list[float]] = defaultdict(list)
    for event in (event for events in evidence.events.values() for event in events):
        is_lost = event["type"] == "run.finished" and event["data"]["state"] == "interrupted"
        if is_lost or event["type"] == "run.resumed":
            found[event["run_id"]].append(_seconds(event))
    return found


def _of(events: list[Any], kind: str) -> list[Any]:
    return [event for event in events if event["type"] == kind]


def _seconds(event: Event) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


def _repeated(evidence: Evidence) -> set[str]:
    """Users for whom the model was asked for a turn again: by a retry, or since a process died with its answer."""
    times = Counter((turn.nonce, turn.made) for turn in evidence.turns)
    senders = {asked.nonce: asked.user_id for asked in evidence.asked}
    return {senders[nonce] for (nonce, _), count in times.items() if count > 1 and nonce in senders}


def _decisions(asked: Asked) -> Counter[str]:
    return Counter(f"journal__{tool}" for tool in asked.tools)


def _is_plain(asked: Asked, found: Counter[str]) -> bool:
    """No approval, no cancel, and nothing died: a background run is taken up once."""
    is_once = (asked.end or {}).get("attempt", 1) <= 1
    return is_once and "sign" not in asked.tools and not asked.is_cancelled and "run.resumed" not in found


def _expected(asked: Asked) -> Counter[str]:
    if asked.status == _REFUSED_QUERY:
        return Counter(_REFUSED)
    # What waited in the queue is screened once more, by the policy that holds when it begins.
    queued = {"run.queued": 1, "query.screened": 2} if asked.kind is Kind.BACKGROUND else {}
    if "sign" in asked.tools:
        return Counter({**_REFUSED, "run.started": 1})
    calls = {"tool.decided": len(asked.tools), "tool.finished": len(asked.tools) - asked.tools.count("erase")}
    return +Counter({**_REFUSED, "run.started": 1, **calls, **queued})
