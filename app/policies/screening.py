"""Screening of queries before a model sees them. A refusal names its rule and quotes nothing of the query.

Two regular-expression engines, on purpose: the rules below are ours, constant and linear, and their white space
is every Unicode space; what a tenant writes is matched by RE2 alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from app.policies.document import InputRules
from app.policies.patterns import compile_pattern


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a query may go on, the rule that refused it, and the names of rules worth a note in the audit record."""

    allowed: bool
    rule: str | None = None
    flags: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.allowed


@dataclass(frozen=True, slots=True)
class _Rule:
    name: str
    pattern: re.Pattern[str]

    def matches(self, query: str) -> bool:
        return self.pattern.search(query) is not None


def _rules(**patterns: str) -> tuple[_Rule, ...]:
    return tuple(_Rule(name, re.compile(pattern, re.IGNORECASE)) for name, pattern in patterns.items())


# The guide's six and its suspicious characters, to the letter.
_GUIDE: Final = _rules(
    rm_rf=r"rm\s+-rf",
    sudo=r"sudo",
    chmod_777=r"chmod\s+777",
    path_traversal=r"\.\./",
    script_tag=r"<script",
    drop_table=r"DROP\s+TABLE",
    suspicious_character=r"[&|;$`]",
)

# The same six where the text is an attempt and not a question about one: people ask what `sudo` does.
_NARROW: Final = _rules(
    rm_rf=r"[;&|]\s*(?:sudo\s+)?rm\s+-(?:rf|fr)\s+(?:--no-preserve-root\s+)?[/~](?:\s|\*|$)",
    sudo=r"[;&|]\s*sudo\s+(?:su|bash|sh|passwd|useradd|visudo)\b\s*(?:-|$)",
    chmod_777=r"[;&|]\s*(?:sudo\s+)?chmod\s+(?:-R\s+)?777\s+/(?:\s|$|etc\b|root\b|home\b)",
    path_traversal=r"\.\./\.\./(?:etc/(?:passwd|shadow)|proc/self|root/\.ssh)\b",
    script_tag=r"<script[^<>]{0,200}>[^<>]{0,200}(?:document\.cookie|\beval\s*\(|\balert\s*\()",
    drop_table=r"['\"]\s*(?:\)\s*)?;\s*DROP\s+TABLE\s+\w+\s*;?\s*--",
)

# What no one types: text that a reader does not see, or sees otherwise than the model does.
# Joiners alone (emoji, Persian, Hindi) and bidi marks and isolates (Arabic, Hebrew) are ordinary writing.
_INVISIBLE: Final = _rules(
    control_character=r"[\x00-\x08\x0e-\x1f\x7f]",
    bidi_override=r"[\u202d\u202e]",
    hidden_text=r"[\u200b-\u200d\u2060-\u2064\ufeff]{6,}|[\ufe00-\ufe0f\U000e0100-\U000e01ef]{3,}"
    r"|[\U000e0000-\U000e007f]",
)
_FLAG_EMOJI: Final = re.compile(r"\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{2,6}\U000e007f")
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")
_ZERO_WIDTH: Final = _rules(zero_width=r"[\u200b\u2060-\u2064\ufeff]")

# `strict` refuses what `balanced` refuses for being invisible, too: stricter must never let more through.
_REFUSED: Final = {"strict": (*_INVISIBLE, *_GUIDE), "balanced": (*_INVISIBLE, *_NARROW), "off": ()}
_FLAGGED: Final = {"strict": _ZERO_WIDTH, "balanced": (*_GUIDE, *_ZERO_WIDTH), "off": ()}


def screen(query: str, rules: InputRules) -> Verdict:
    """Judge a query by a policy's input rules. Tenant rules are called `block[n]` and `flag[n]`, by their place.

    With tenant rules it takes up to half a second: in a server, call it in a thread, where RE2 lets go of the GIL.
    """
    if len(query) > rules.longest:
        return Verdict(allowed=False, rule="max_length")
    if _SURROGATE.search(query):
        return Verdict(allowed=False, rule="invalid_text")
    if refused := next(_refusals(query, rules), None):
        return Verdict(allowed=False, rule=refused)
    flags = *_matching(query, _FLAGGED[rules.preset]), *_tenant(query, "flag", rules.flag)
    return Verdict(allowed=True, flags=flags)


def _refusals(query: str, rules: InputRules) -> Iterator[str]:
    yield from _matching(_FLAG_EMOJI.sub("", query), _REFUSED[rules.preset])
    yield from _tenant(query, "block", rules.block)


def _matching(query: str, rules: Iterable[_Rule]) -> Iterator[str]:
    return (rule.name for rule in rules if rule.matches(query))


def _tenant(query: str, kind: str, patterns: Iterable[str]) -> Iterator[str]:
    return (f"{kind}[{place}]" for place, text in enumerate(patterns) if compile_pattern(text).search(query))
