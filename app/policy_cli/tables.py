"""What the command shows: tables in a terminal, plain columns in a pipe, JSON where it was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Final

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STYLES: Final = {
    **dict.fromkeys(("allowed", "added", "permit"), "green"),
    **dict.fromkeys(("denied", "removed", "forbid"), "red"),
    **dict.fromkeys(("conditional", "needs_approval", "changed", "approve"), "yellow"),
}
# A pipe has no width; lines that are cut would be of no use to it.
_PIPE_WIDTH: Final = 400


class Screen:
    """Where the command writes; `as_json` makes the answer itself all that is written."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        plain = Console(highlight=False)
        self._console = plain if plain.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def answer(self, answer: Any) -> bool:
        """Write it as JSON if that is wanted; True where that was all."""
        if self.as_json:
            self._console.print(Text(json.dumps(answer, indent=2)), soft_wrap=True)
        return self.as_json

    def say(self, text: str, style: str = "") -> None:
        """A line."""
        self._console.print(Text(printable(text), style=style), soft_wrap=True)

    def warn(self, warnings: Iterable[str]) -> None:
        """A line for each."""
        for warning in warnings:
            self.say(f"warning: {warning}", "yellow")

    def complain(self, text: str) -> None:
        """A line beside the answer."""
        self._errors.print(Text(f"bulkhead: {printable(text)}", style="red"))

    def complaints(self, rows: Iterable[tuple[str, str]]) -> None:
        """Faults by their places, beside the answer."""
        for place, message in rows:
            self._errors.print(Text(f"  {printable(place) or '/'}  {printable(message)}"))

    def table(self, heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
        """A table; what it shows comes from documents, and is text, whatever it looks like."""
        frame = box.HEAVY_HEAD if self._console.is_terminal else None
        table = Table(box=frame, show_edge=False, pad_edge=False)
        for head in heads:
            table.add_column(head, overflow="fold")
        for row in rows:
            table.add_row(*(_cell(value) for value in row))
        self._console.print(table)


def _cell(value: Any) -> Text:
    text = shown(value)
    return Text(text, style=_STYLES.get(text.partition(" ")[0], ""))


def shown(value: Any) -> str:
    """A value of an answer in one cell."""
    if value is None:
        return "-"
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def printable(text: str) -> str:
    """Nothing that a terminal would take for an order."""
    return "".join(mark if mark.isprintable() or mark == "\n" else "\N{REPLACEMENT CHARACTER}" for mark in text)


def standing(found: Mapping[str, Any] | None) -> str | None:
    """An access with its rules."""
    return None if found is None else f"{found['access']} ({', '.join(found['rules'])})"
