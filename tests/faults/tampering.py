"""Breaks the record on purpose, once for each claim: what a claim does not see then, it would never have seen."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.faults import run_claims
from tests.faults.customers import BUDGETS, JOURNAL
from tests.faults.evidence import Evidence
from tests.faults.ledger import Asked, Kind
from tests.faults.load import Load
from tests.faults.plant import Plant, superuser

_DELETE: Final = text("delete from audit_events where id = :id")
_EDIT: Final = text("update audit_events set body = :body where id = :id")
_COPY: Final = text(
    "insert into audit_events select tenant_id, gen_random_uuid(), at, type, actor_id, run_id, body"
    " from audit_events where id = :id"
)
_USED: Final = (
    ("usage_agrees", "update usage_models set runs = runs + 100 where user_id = :subject"),
    ("usage_of_tools_agrees", "update usage_tools set allowed = allowed + 1 where tenant_id = :subject"),
)
# By the budget: more usage of it than it allows, and more taken of it than was used.
_OVERSPENT: Final[Mapping[str, str]] = {
    "tokens_per_day": "update usage_models set input_tokens = input_tokens + 100000 where tenant_id = :tenant",
    "cost_usd_per_day": "update usage_models set cost = cost + 1000000 where tenant_id = :tenant",
    "tool_calls_per_day": "update usage_models set tool_calls = tool_calls + 1000 where tenant_id = :tenant",
}
_LEAKED: Final[Mapping[str, str]] = {
    "tokens_per_day": "update budget_days set tokens = tokens + 1 where tenant_id = :tenant",
    "cost_usd_per_day": "update budget_days set cost = cost + 1 where tenant_id = :tenant",
    "tool_calls_per_day": "update budget_days set tool_calls = tool_calls + 1 where tenant_id = :tenant",
}
_SEEN_MISSING: Final = {
    "query.received": "answered_is_recorded",
    "tool.decided": "effects_were_decided",
    "tool.finished": "calls_end_once",
    "run.finished": "runs_end_once",
}


@dataclass(frozen=True, slots=True)
class Break:
    """What was done, which claim must see it, and what that must name."""

    deed: str
    claim: str
    subject: str


def _answered(evidence: Evidence) -> Iterator[Asked]:
    """Queries that were answered after a call that acted; each is broken in one way only."""
    known = (asked for asked in evidence.asked if asked.state == "succeeded" and asked.kind is Kind.QUERY)
    return (asked for asked in known if "record" in asked.tools)


def _event(evidence: Evidence, asked: Asked, kind: str) -> dict[str, Any]:
    for event in evidence.events[asked.tenant_id]:
        is_denial = event["data"].get("decision") == "denied"  # which no effect needs
        if (event["run_id"], event["type"]) == (asked.run_id, kind) and not is_denial:
            return event
    raise AssertionError(f"{asked} has no {kind}")


async def break_record(plant: Plant, evidence: Evidence) -> list[Break]:
    """As superuser, in the database."""
    runs = _answered(evidence)
    async with superuser(plant) as connection:
        done = [await _deleted(connection, evidence, next(runs), kind=kind) for kind in _SEEN_MISSING]
        asked = next(runs)
        end = _event(evidence, asked, "run.finished")
        await connection.execute(_COPY, {"id": end["id"]})
        done.append(Break("a second end", "runs_end_once", str(asked.run_id)))
        done.append(Break("an event beside the chain", "events_are_chained", end["id"]))
        asked = next(runs)
        end = _event(evidence, asked, "run.finished")
        data = end["data"] | {"input_tokens": end["data"]["input_tokens"] - 1}
        body = {name: value for name, value in end.items() if name not in {"seq", "hash"}} | {"data": data}
        await connection.execute(_EDIT, {"id": end["id"], "body": _canonical(body)})
        done.append(Break("a token less", "told_is_stored", asked.nonce))
        done.append(Break("a token less", "chains_verify", end["id"]))
        made = next(made for made in evidence.made if made.user_id)
        deleted = "delete from audit_events where type = 'user.created' and body like '%' || :user_id || '%'"
        await connection.execute(text(deleted), {"user_id": made.user_id})
        done.append(Break("deleted user.created", "changes_are_made_once", made.name))
        return [*done, *await _used(connection, evidence), *await _budgeted(connection, evidence)]


async def _deleted(connection: AsyncConnection, evidence: Evidence, asked: Asked, *, kind: str) -> Break:
    await connection.execute(_DELETE, {"id": _event(evidence, asked, kind)["id"]})
    claim = _SEEN_MISSING[kind]
    return Break(f"deleted {kind}", claim, str(asked.run_id) if claim.endswith("_once") else asked.nonce)


async def _used(connection: AsyncConnection, evidence: Evidence) -> list[Break]:
    """More usage than there was."""
    asked = next(_answered(evidence))
    done = []
    for (claim, statement), subject in zip(_USED, (asked.user_id, asked.tenant_id), strict=True):
        await connection.execute(text(statement), {"subject": subject})
        done.append(Break("more usage", claim, subject))
    return done


async def _budgeted(connection: AsyncConnection, evidence: Evidence) -> list[Break]:
    """Of a tenant that has little of a budget, more was used; of one that has much of each, more is taken than used."""
    done = []
    (ample,) = (each for each, limits in evidence.limits.items() if limits.keys() >= set(BUDGETS))
    for budget in BUDGETS:
        little = next(each for each, limits in evidence.limits.items() if budget in limits and each != ample)
        for claim, tenant_id, statement in (
            ("budgets_hold", little, _OVERSPENT[budget]),
            ("budgets_are_given_back", ample, _LEAKED[budget]),
        ):
            await connection.execute(text(statement), {"tenant": tenant_id})
            done.append(Break("another budget", claim, f"{tenant_id} {budget}"))
    return done


def _canonical(document: dict[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


async def break_journal(work: Load, evidence: Evidence) -> list[Break]:
    """In what the tool servers wrote: an effect more, and one less."""
    twice, never = list(_answered(evidence))[-2:]
    done = [Break("an effect more", "effects_were_decided", twice.nonce)]
    done.append(Break("an effect more", "keys_act_once", str(twice.run_id)))
    done.append(Break("a call more", "calls_in_doubt_are_not_repeated", twice.nonce))
    done.append(Break("an effect less", "successes_had_an_effect", str(never.run_id)))
    for customer in work.customers:
        lines = (await customer.admin.get(JOURNAL)).text.splitlines()
        lines += [line for line in lines if customer.id == twice.tenant_id and twice.nonce in line]
        kept = [line for line in lines if never.nonce not in line]
        await customer.admin.put_file("journal.txt", "\n".join(kept) + "\n", workspace="notes")
    return done


def unseen(breaks: list[Break], found: dict[str, list[str]]) -> list[Break]:
    """The breaks that their claim has not named."""
    return [made for made in breaks if not any(made.subject in against for against in found.get(made.claim, ()))]


def untried(breaks: list[Break]) -> set[str]:
    """The claims that nothing was broken for."""
    return {claim.__name__ for claim in run_claims.CLAIMS} - {made.claim for made in breaks}
