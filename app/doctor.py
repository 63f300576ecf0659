"""`bulkhead doctor`: the checklist beside a running system. Exits with 0 where nothing fails, else with 1."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from app.audit_cli.ground import read_settings
from app.embedded.machine import Machine
from app.errors import ConfigurationError


def doctor(
    context: typer.Context,
    accept: Annotated[
        list[str] | None, typer.Option(help="An item whose warning is known and taken; as often as needed.")
    ] = None,
    *,
    patience: Annotated[float | None, typer.Option(min=0.1, max=600, help="Seconds that an item may take.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A warning counts as a failure.")] = False,
) -> None:
    """Check the security of what runs here, item by item, each by trying, and say what to mend."""
    # They bring half a second of imports, which no other command should wait for.
    from app.checklist import beside, telling  # noqa: PLC0415
    from app.checklist.items import ITEMS  # noqa: PLC0415  as above

    accepted = frozenset(accept or ())
    if unknown := accepted - {item.id for item in ITEMS}:
        raise ConfigurationError(f"There is no item {', '.join(sorted(unknown))}.")
    settings = read_settings(context)
    machine = Machine(settings)
    urls = beside.located(settings, machine)
    findings = asyncio.run(beside.found(settings, urls, machine, within_s=patience))
    (telling.print_json if as_json else telling.print_table)(findings)
    if not telling.is_good(findings, accepted, strict=strict):
        raise typer.Exit(1)
