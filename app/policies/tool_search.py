"""Finds tools by what they are for, among those that a caller may use and no others."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from app.policies.decision import BuiltIn, Decision
from app.policies.engine import PinnedTool

# No tool of a server is called so: theirs have two underscores.
NAME: Final = "search_tools"
MOST_FOUND: Final = 10
_WORD: Final = re.compile(r"[^\W_]+")
_MAX_WORDS: Final = 32
_MAX_QUERY: Final = 500
# Of a description no more is looked through: a server may write a megabyte, and each kind of caller has an index.
_MAX_DESCRIPTION: Final = 1_000
# A word of the name says more than one of a long description.
_NAME_WEIGHT: Final = 3
DEFINITION: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {"query": {"type": "string", "minLength": 1, "maxLength": _MAX_QUERY}},
    "required": ["query"],
    "additionalProperties": False,
}
DESCRIPTION: Final = (
    "Finds tools by what they do, and makes them callable from your next message on. There are more tools than you"
    " see now: search for one, in a few words, before you say that something cannot be done."
)


def decide(arguments: Mapping[str, Any]) -> Decision:
    """Whoever sees tools may search among them."""
    query = arguments.get("query")
    if arguments.keys() != {"query"} or not isinstance(query, str) or not 0 < len(query) <= _MAX_QUERY:
        return Decision.deny(BuiltIn.SCHEMA, f"A query of up to {_MAX_QUERY} characters, and nothing else.")
    return Decision(allowed=True, rule=BuiltIn.TOOL_SEARCH, reason="Only what the caller may use is found.")


class ToolIndex:
    """The words of these tools; what is not among them is never found. `search` takes microseconds a tool."""

    def __init__(self, tools: Sequence[PinnedTool]) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._counts: defaultdict[str, dict[str, int]] = defaultdict(dict)  # of each word, in which tool how often
        for tool in tools:
            for word, count in _weights(tool).items():
                self._counts[word][tool.name] = count

    @property
    def words(self) -> Mapping[str, Mapping[str, int]]:
        """Each, with the tools in which it is and how often."""
        return self._counts

    def search(self, query: str) -> list[PinnedTool]:
        """The best first, at most ten; those in which no word of the query is are left out."""
        scores: defaultdict[str, float] = defaultdict(float)
        for word in list(dict.fromkeys(_WORD.findall(query.casefold())))[:_MAX_WORDS]:
            for name, worth in self._worths(word):
                scores[name] += worth
        return [self._tools[name] for name in sorted(scores, key=lambda name: (-scores[name], name))[:MOST_FOUND]]

    def _worths(self, word: str) -> Iterator[tuple[str, float]]:
        """A rare word tells more than a common one; the tenth time it stands there tells nothing more."""
        counts = self._counts.get(word, {})
        rarity = math.log(1 + len(self._tools) / len(counts)) if counts else 0
        return ((name, rarity * count / (count + 1)) for name, count in counts.items())


def _weights(tool: PinnedTool) -> Counter[str]:
    named = Counter(_WORD.findall(tool.name.casefold()))
    words = Counter(_WORD.findall(tool.description[:_MAX_DESCRIPTION].casefold()))
    words.update({word: count * _NAME_WEIGHT for word, count in named.items()})
    return words


def told(found: Sequence[PinnedTool]) -> str:
    """What the model is told: names and the beginnings of descriptions."""
    if not found:
        return "No tool fits these words; try others."
    return "\n".join(f"{tool.name}: {tool.description[:300]}" for tool in found)
