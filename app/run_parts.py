"""Builds what begins, executes and ends runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from app.db import Database, DatabaseUrls, create_engine
from app.keyring import Keyring
from app.limits.queue import RunQueue
from app.platform_db import PlatformDatabase
from app.policies.versions import PolicyCache
from app.runs.agent.chats import Chats
from app.runs.agent.executor import Executor
from app.runs.approvals.expiry import expire
from app.runs.approvals.reviews import Reviews
from app.runs.backtests.service import Backtests
from app.runs.conversations.retention import ConversationRetention
from app.runs.dispatch import Dispatch
from app.runs.events.following import Following
from app.runs.events.log import Events
from app.runs.events.retention import EventRetention
from app.runs.lifecycle.budgets import Budgets
from app.runs.lifecycle.closing import Closing
from app.runs.lifecycle.erased import end_idle_runs
from app.runs.lifecycle.journal import Journal
from app.runs.lifecycle.opening import Opening
from app.runs.redaction import Redactor
from app.runs.repeats.twins import Twins
from app.runs.service import RunService
from app.runs.watch import Watch
from app.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What runs stand on."""

    settings: Settings
    urls: DatabaseUrls
    database: Database
    watching: PlatformDatabase
    keyring: Keyring = field(repr=False)
    policies: PolicyCache
    budgets: Budgets
    chats: Chats
    serving: Mapping[str, Any]
    redact: Redactor


def build(on: Ground) -> dict[str, Any]:
    """Every part by the name that routes ask for it."""
    settings, database = on.settings, on.database
    journal, dispatch = Journal(database), _dispatch(settings)
    # Connections of its own: what runs tell must not wait, nor hold up what stops them.
    telling = PlatformDatabase(create_engine(on.urls.platform, pool_size=2))
    events = Events(telling, on.redact)
    executor = Executor(
        journal=journal,
        chats=on.chats,
        servers=on.serving["servers"],
        redact=on.redact,
        tool_timeout_s=settings.tool_timeout_s,
    )
    opening = Opening(
        database=database,
        keyring=on.keyring,
        budgets=on.budgets,
        policies=on.policies,
        events=events,
        dispatch=dispatch,
        lease_s=settings.run_lease_s,
        attempts=settings.run_attempts,
    )
    runs = RunService(
        opening=opening,
        executor=executor,
        closing=Closing(database=database, journal=journal, budgets=on.budgets, dispatch=dispatch),
        queue=_queue(settings),
    )
    watch = Watch(
        platform=on.watching,
        executor=executor,
        pool=on.serving["pool"],
        every_s=settings.run_watch_s,
        lease_s=settings.run_lease_s,
        attempts=settings.run_attempts,
        claim_s=settings.run_claim_s,
    )
    backtests = Backtests(database=database, keyring=on.keyring)
    parts = {"executor": executor, "runs": runs, "watch": watch, "backtests": backtests, "dispatch": dispatch}
    return parts | _approvals(on, dispatch) | _endings(on, dispatch) | _told(on, telling) | {"events": events}


def _approvals(on: Ground, dispatch: Dispatch) -> dict[str, Any]:
    reviews = Reviews(database=on.database, keyring=on.keyring, policies=on.policies, dispatch=dispatch)
    return {"reviews": reviews, "expire_approvals": partial(expire, on.watching, dispatch)}


def _endings(on: Ground, dispatch: Dispatch) -> dict[str, Any]:
    """What ends runs of those who have gone, and conversations of those who have not come back."""
    return {
        "end_erased": partial(end_idle_runs, on.database, dispatch),
        "conversations": ConversationRetention(on.watching, on.database),
    }


def _told(on: Ground, telling: PlatformDatabase) -> dict[str, Any]:
    """What tells how runs go."""
    return {
        "telling": telling,
        "following": _following(on, telling),
        "event_retention": EventRetention(telling, on.settings.events_retention_days),
        "twins": Twins(on.database),
    }


def _following(on: Ground, telling: PlatformDatabase) -> Following:
    most, most_of_a_user = on.settings.streams_max, on.settings.streams_per_user
    return Following(database=on.database, platform=telling, url=on.urls.app, most=most, most_of_a_user=most_of_a_user)


def _dispatch(settings: Settings) -> Dispatch:
    return Dispatch(per_tenant=settings.background_per_tenant, queued=settings.background_queued)


def _queue(settings: Settings) -> RunQueue:
    return RunQueue(
        places=settings.runs_max,
        waiting=settings.queue_max,
        waiting_of_a_tenant=settings.queue_per_tenant,
        wait_s=settings.queue_wait_s,
    )
