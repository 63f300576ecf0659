"""What must be true after any kills. Each claim gives the evidence against it; pure, so that it can be tried itself."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from tests.faults import chains
from tests.faults import scripted_model as model
from tests.faults.evidence import Evidence
from tests.faults.ledger import Asked
from tests.runs.faults import TERMINAL

Event = Mapping[str, Any]
_REFUSED: Final = {"query.received": 1, "query.screened": 1, "run.finished": 1}
_OK, _REFUSED_QUERY, _TOO_MANY, _UNAVAILABLE = 200, 422, 429, 503


def violations(evidence: Evidence) -> dict[str, list[str]]:
    """What contradicts each claim, by the claim's name; empty where everything holds."""
    found = {claim.__name__: list(claim(evidence)) for claim in CLAIMS}
    return {name: against for name, against in found.items() if against}


def answers_are_clear(evidence: Evidence) -> Iterator[str]:
    """Whoever was answered was told an end, a refusal that fits, or to try again later; nothing else."""
    for asked in evidence.asked:
        limit = evidence.limits[asked.tenant_id].keys()
        fits = {
            None: True,
            _OK: "contraband" not in asked.tools,
            _REFUSED_QUERY: "contraband" in asked.tools,
            _TOO_MANY: asked.body.get("code") == ("budget_exhausted" if "tokens_per_day" in limit else "too_many_runs"),
            _UNAVAILABLE: True,
        }
        if not fits.get(asked.status):
            yield f"{asked}"


def refusals_are_recorded(evidence: Evidence) -> Iterator[str]:
    """Who had no room in a budget has a run that says so, with the limit; who had no place has none."""
    by_run = _by_run(evidence)
    for asked in evidence.asked:
        if asked.status == _TOO_MANY and asked.body["code"] == "budget_exhausted":
            events = by_run[asked.body["run_id"]]
            ends = [event["data"]["code"] for event in _of(events, "run.finished")]
            limits = [event["data"]["limit"] for event in _of(events, "limit.exceeded")]
            if (ends, limits) != (["budget_exhausted"], ["tokens_per_day"]):
                yield f"{asked}: {ends}, {limits}"
        elif asked.status == _TOO_MANY and asked.nonce in evidence.runs:
            yield f"{asked} has a run"


def answered_is_recorded(evidence: Evidence) -> Iterator[str]:
    """Each answer has all events that the ledger calls for, with the decisions that the client was told."""
    by_run = _by_run(evidence)
    for asked in evidence.asked:
        if asked.status in {_OK, _REFUSED_QUERY}:
            events = by_run[asked.body["run_id"]]
            found = Counter(event["type"] for event in events)
            if found != _expected(asked) or {event["actor_id"] for event in events} != {asked.user_id}:
                yield f"{asked}: {found}"
            decided = Counter((e["data"]["tool"], e["data"]["decision"]) for e in _of(events, "tool.decided"))
            if asked.status == _OK and decided != _decisions(asked):
                yield f"{asked}: {decided}"


def told_is_stored(evidence: Evidence) -> Iterator[str]:
    """What the client was told of its run is what the run and its last event say: state, calls and tokens."""
    by_run = _by_run(evidence)
    for asked in evidence.asked:
        if asked.status == _OK:
            run_id, told = asked.body["run_id"], asked.body
            calls = Counter((call["tool"], call["decision"]) for call in told["tool_calls"])
            ends = [event["data"] for event in _of(by_run[run_id], "run.finished")]
            spent = [(end["state"], end["tool_calls"], end["input_tokens"], end["output_tokens"]) for end in ends]
            turns = len(asked.turns) + 1
            expected = ("succeeded", len(asked.tools), turns * model.IN_TOKENS, turns * model.OUT_TOKENS)
            states = {told["status"], evidence.states.get(run_id)}
            if calls != _decisions(asked) or spent != [expected] or states != {"succeeded"}:
                yield f"{asked}: {spent}, {states}"
            if asked.nonce not in told["answer"]:
                yield f"{asked}: another's answer"


def effects_were_decided(evidence: Evidence) -> Iterator[str]:
    """No tool acts without a decision that let it, recorded before; none acts twice, and none that was denied."""
    by_run, runs = _by_run(evidence), evidence.runs
    acted: dict[str, list[float]] = defaultdict(list)
    for effect in evidence.effects:
        acted[effect.nonce].append(effect.at)
        if effect.tool != "record" or effect.nonce not in runs:
            yield f"{effect} of no run, or denied"
    for note, times in Counter(effect.note for effect in evidence.effects).items():
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
        allowed = Counter(data["sequence"] for data in decided if data["decision"] == "allowed")
        finished = Counter(event["data"]["sequence"] for event in _of(events, "tool.finished"))
        if allowed != finished or any(times != 1 for times in allowed.values()):
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
    for tenant_id, rows in evidence.usage.items():
        begun = {event["run_id"] for event in _of(evidence.events[tenant_id], "run.started")}
        ends = [event for event in _of(evidence.events[tenant_id], "run.finished") if event["run_id"] in begun]
        counted = {row["user_id"]: row for row in rows}
        for user_id in counted.keys() | {_user_of(evidence, event) for event in ends}:
            own = [event["data"] for event in ends if _user_of(evidence, event) == user_id]
            row = counted.get(user_id, {"runs": 0, "input_tokens": 0, "output_tokens": 0})
            tokens = sum(data.get("input_tokens", 0) + data.get("output_tokens", 0) for data in own)
            used = row["input_tokens"] + row["output_tokens"]
            is_cut = any(data["state"] != "succeeded" for data in own)
            if row["runs"] != len(own) or used < tokens or (used > tokens and not is_cut):
                yield f"{user_id}: {row}, recorded {len(own)} runs, {tokens} tokens"


def usage_of_tools_agrees(evidence: Evidence) -> Iterator[str]:
    """Usage counts the decisions that the record has."""
    for tenant_id, rows in evidence.calls.items():
        decided = Counter(
            (event["data"]["tool"], event["data"]["decision"])
            for event in _of(evidence.events[tenant_id], "tool.decided")
        )
        counted = Counter({(row["tool"], said): row[said] for row in rows for said in ("allowed", "denied")})
        if +counted != decided:
            yield f"{tenant_id}: {counted}, recorded {decided}"


def budgets_hold(evidence: Evidence) -> Iterator[str]:
    """No tenant used more tokens than its policy allows a day."""
    for tenant_id, rows in evidence.usage.items():
        used = sum(row["input_tokens"] + row["output_tokens"] for row in rows)
        if used > evidence.limits[tenant_id].get("tokens_per_day", used):
            yield f"{tenant_id}: {used}"


def concurrency_holds(evidence: Evidence) -> Iterator[str]:
    """The model never saw more runs of a tenant at once than its policy allows, over all processes together."""
    tenants = {asked.nonce: asked.tenant_id for asked in evidence.asked}
    steps = [
        (at, change, tenants[nonce])
        for nonce, (first, last) in evidence.spans.items()
        for at, change in ((first, 1), (last, -1))
    ]
    under_way: Counter[str] = Counter()
    for at, change, tenant_id in sorted(steps):
        under_way[tenant_id] += change
        if under_way[tenant_id] > evidence.limits[tenant_id].get("concurrent_runs", len(tenants)):
            yield f"{tenant_id}: {under_way[tenant_id]} at {at}"


CLAIMS: Final[tuple[Callable[[Evidence], Iterator[str]], ...]] = (
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
    budgets_hold,
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


def _of(events: list[Any], kind: str) -> list[Any]:
    return [event for event in events if event["type"] == kind]


def _seconds(event: Event) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


def _decisions(asked: Asked) -> Counter[tuple[str, str]]:
    return Counter((f"journal__{tool}", "allowed" if tool == "record" else "denied") for tool in asked.tools)


def _expected(asked: Asked) -> Counter[str]:
    if asked.status == _REFUSED_QUERY:
        return Counter(_REFUSED)
    calls = {"tool.decided": len(asked.tools), "tool.finished": asked.tools.count("record")}
    return +Counter({**_REFUSED, "run.started": 1, **calls})
