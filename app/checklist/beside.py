"""The checklist beside a running system: where that is, and what the command can see of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import typer
from anyio import to_thread
from sqlalchemy.exc import SQLAlchemyError

from app import migration
from app.checklist import running
from app.checklist.findings import Finding
from app.checklist.ground import Answering, Ground, connected
from app.checklist.items import ITEMS
from app.db import DatabaseUrls, database_urls
from app.embedded.demo import ENV_FILE, read_env
from app.embedded.machine import Machine
from app.errors import ConfigurationError
from app.sandbox.choice import choose
from app.settings import Settings
from app.tenants import images

_ANSWER_S: Final = 4


def located(settings: Settings, machine: Machine) -> DatabaseUrls:
    """Raise ConfigurationError where nothing runs: nothing is started only to be looked at."""
    configured = database_urls(settings)
    if configured is not None:
        return configured
    if not machine.is_made() or machine.holder() is None:
        raise ConfigurationError(
            f"Nothing runs on {machine.directory}: `make up` starts it. For a service elsewhere, run this where its"
            " settings are."
        )
    return machine.running_urls()


async def found(
    settings: Settings, urls: DatabaseUrls, machine: Machine, *, within_s: float | None
) -> Sequence[Finding]:
    """What all items find; that no service answers is told on its own."""
    url, process = place_of(settings, machine)
    answering = await _asked(url)
    if answering is None:
        typer.echo(f"No service answers at {url}: what needs one fails below.", err=True)
    async with connected(urls) as database:
        with suppress(SQLAlchemyError, OSError):  # a database that does not answer is told by each item
            await migration.require_schema(database.engines["platform"])
        ground = Ground(
            settings=settings,
            urls=urls,
            sandbox=await choose(settings.sandbox),
            database=database,
            answering=answering,
            process=process,
            is_demo=machine.holder() is not None,
            quota_refusal=lambda: _quota_refusal(settings),
            url=url,
        )
        return await running.run(ITEMS, ground, within_s=within_s)


def place_of(settings: Settings, machine: Machine) -> tuple[str, int | None]:
    """Where the service answers from here, and its process where that is known."""
    holder = machine.holder()
    told = read_env(settings.data_dir / ENV_FILE).get("BULKHEAD_URL")
    if holder is not None and told is not None:
        return told, holder
    return f"http://{reached(settings.host)}:{settings.port}", _process_at(settings.port, settings.data_dir)


def reached(host: str) -> str:
    """As a URL has it; an address that stands for all of them is reached on loopback."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        address = ip_address("::1" if address.version == 6 else "127.0.0.1")
    return f"[{address}]" if address.version == 6 else str(address)


def _process_at(port: int, data_dir: Path) -> int | None:
    """Nobody's where any that listens there is not ours: whoever is on this machine may have taken the port first.

    Ours is what could read the service's files in any case.
    """
    users = {0, os.geteuid(), *({data_dir.stat().st_uid} if data_dir.exists() else ())}
    try:
        found = psutil.net_connections("tcp")
        at_port = (each for each in found if each.laddr and each.laddr.port == port)
        listening = {each.pid for each in at_port if each.status == psutil.CONN_LISTEN}
        is_ours = all(pid and psutil.Process(pid).uids().effective in users for pid in listening)
    except psutil.Error:
        return None
    return next(iter(listening), None) if is_ours else None


async def _asked(url: str) -> Answering | None:
    try:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=_ANSWER_S) as client:
            told: dict[str, Any] = (await client.get("/readyz")).json()
        return Answering(
            is_ready=bool(told["ready"]),
            missing=tuple(name for name in ("database", "sandbox", "background") if not told[name]),
            has_cgroup=bool(told["sandbox_detail"]["cgroup"]["available"]),
            models=tuple(map(str, told["models"])),
        )
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None


async def _quota_refusal(settings: Settings) -> str | None:
    refusal = await to_thread.run_sync(images.probe, settings.data_dir.resolve() / "volumes", abandon_on_cancel=True)
    return None if refusal is None else refusal.reason
