"""How findings are told on a terminal, and what they come to."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from app.checklist.findings import Finding, Status
from app.checklist.service import report

_COLOURS: Final = {Status.PASS: "green", Status.WARN: "yellow", Status.FAIL: "red"}
_WIDTH: Final = 120  # where nobody says how wide it is


def is_good(findings: Sequence[Finding], accepted: frozenset[str], *, strict: bool) -> bool:
    """Nothing fails; where it is `strict`, nothing but what is `accepted` warns either."""
    bad = {Status.FAIL, Status.WARN} if strict else {Status.FAIL}
    return not any(each.status in bad and not (each.status is Status.WARN and each.id in accepted) for each in findings)


def print_json(findings: Sequence[Finding]) -> None:
    """For machines."""
    typer.echo(json.dumps(asdict(report(findings)), indent=1, default=str))


def print_table(findings: Sequence[Finding]) -> None:
    """For people."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    table = Table("", "item", "guide", "what was found", box=None, pad_edge=False)
    for each in findings:
        colour, fix = _COLOURS[each.status], f"\n[dim]{escape(each.fix)}[/dim]" if each.fix else ""
        guide = ", ".join(map(str, each.guide)) or "more"
        table.add_row(f"[{colour}]{each.status}[/{colour}]", each.id, guide, escape(each.detail) + fix)
    console.print(table)
    counts = {status: sum(each.status is status for each in findings) for status in Status}
    console.print(f"\n{counts[Status.FAIL]} failed, {counts[Status.WARN]} to know, {counts[Status.PASS]} passed.")
