"""Screening of queries before a model sees them. A refusal names its rule and quotes nothing of the query.

Each rule is matched on the query as it is and on its plain form; the query that goes on is unchanged.
Two regular-expression engines, on purpose: the rules below are ours, constant and linear, and their white space
is every Unicode space; what a tenant writes is matched by RE2 alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Final

from app.policies.lookalikes import plain
from app.policies.patterns import compile_pattern
from app.policies.terms import InputRules


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a query may go on, the rule that refused it, and the names of rules worth a note in the audit record."""

    allowed: bool
    rule: str | None = None
    flags: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.allowed


@dataclass(frozen=True, slots=True, eq=False)
class _Rule:
    name: str
    pattern: re.Pattern[str]
    plainly: bool

    def matches(self, forms: tuple[str, ...]) -> bool:
        return any(self.pattern.search(form) for form in (forms if self.plainly else forms[:1]))


def _rules(*, plainly: bool = True, **patterns: str) -> tuple[_Rule, ...]:
    """`plainly`: on the plain form, too, and not only on the query as it is."""
    return tuple(_Rule(name, re.compile(pattern, re.IGNORECASE), plainly) for name, pattern in patterns.items())


# The guide's six, to the letter.
_GUIDE: Final = _rules(
    rm_rf=r"rm\s+-rf",
    sudo=r"sudo",
    chmod_777=r"chmod\s+777",
    path_traversal=r"\.\./",
    script_tag=r"<script",
    drop_table=r"DROP\s+TABLE",
)
# And its characters. The plain form of a Chinese or Greek text is full of them.
_SUSPICIOUS: Final = _rules(plainly=False, suspicious_character=r"[&|;$`]")

# Where a command is given and not talked about: the query is nothing else, asks to run it, or it follows another.
_ALONE: Final = r"\A[\s`'\"$#>]*(?:please\s+|now\s+)?"
_ASKED: Final = (
    r"(?:\A\W{0,3}|[.!\n]\s+|\b(?:please|must|now|(?:can|could|would|will|want)\s+you(?:\s+to)?"
    r"|(?:instructions|rules|prompt)\s+and)\s+)"
    r"(?:run|execute|exec|perform|type|issue|invoke)(?:\s*:\s*|\s+)(?:(?:the|this|following|shell|bash|command)\s*){0,4}[:,]?\s*[`'\"]{0,3}"
)
# A new line after a question or a colon begins what is talked about.
_CHAINED: Final = r"(?:[;&|]|\$\(|(?<![?:\s])\s{0,3}[\n\u2028])\s*"
_END: Final = r"[\s`'\";.!)]*\Z"
_SYSTEM: Final = r"(?:bin|boot|dev|etc|home|lib|opt|proc|root|sbin|srv|sys|usr|var)"
_SUDO: Final = r"sudo\s+(?:-[nEHS]\s+|-u\s+root\s+)?"
_SHELL: Final = r"(?:(?:ba|da|z)?sh\s+-c\s*['\"]{0,2})?"
# Recursive, in whatever spelling and place among up to four options.
_RM: Final = (
    rf"{_SHELL}(?:{_SUDO})?(?:/(?:usr/)?bin/|\\)?rm\s+"
    r"(?=(?:-\S{1,20}\s+){0,3}-(?:-recursive\b|[a-z]{0,7}r))(?:-\S{0,20}\s+){1,4}['\"]?"
)
_ROOT: Final = rf"(?:/{{1,2}}{_SYSTEM}?/?|~/?|\$HOME/?|\.)\*?"
_AS_ROOT: Final = (
    r"(?:su|bash|sh|zsh|passwd|useradd|adduser|usermod|visudo|shutdown|reboot|halt|poweroff|mkfs\S{0,8}|-[is])"
)
_OPEN: Final = r"(?:sudo\s+)?chmod\s+(?:-R\s+)?0?777\s+(?:-R\s+)?"
_WEB: Final = r"(?:document\.cookie|\beval\s*\(|\b(?:alert|confirm)\s*\(|\bprompt\s*\(|\blocation\s*=|\bfetch\s*\()"
_UP: Final = r"\.{2,4}[/\\]{1,2}"
_DROP: Final = r"DROP\s+TABLE\s+(?:IF\s+EXISTS\s+)?[\w.\"`\[\]]{1,100}"

# The same six where the text is an attempt and not a question about one: people ask what `sudo` does.
_NARROW: Final = _rules(
    rm_rf=rf"{_CHAINED}{_RM}[/~](?:\s|\*|$)|{_CHAINED}{_RM}{_ROOT}(?=[;&|]|{_END})"
    rf"|{_ALONE}{_RM}(?:{_ROOT}|\.\.|(?:\.{{1,2}}/)?\*|(?:/{_SYSTEM}/|~/)\S{{0,100}})(?:\s+--no-preserve-root)?(?:['\"]?\s*[;&|]|{_END})"
    rf"|{_ASKED}{_RM}{_ROOT}(?![\w/])",
    sudo=rf"{_CHAINED}{_SUDO}(?:su|bash|sh|passwd|useradd|visudo)\b\s*(?:-|$)"
    rf"|{_ALONE}{_SUDO}(?:(?:/(?:usr/)?bin/)?{_AS_ROOT}|(?:rm|chmod|chown|dd|cat|tee|cp|mv)(?=\s+(?:[-/~.$\d]|[io]f=)))"
    rf"(?:\s+(?:[-/~.$\d]|[io]f=|bs=)\S{{0,100}}){{0,5}}(?:\s+root)?{_END}"
    rf"|{_ASKED}{_SUDO}(?:/(?:usr/)?bin/)?{_AS_ROOT}(?![\w/])",
    chmod_777=rf"{_CHAINED}{_OPEN}/(?:\s|$|etc\b|root\b|home\b)"
    rf"|(?:{_ALONE}|{_CHAINED}){_OPEN}(?:/(?:{_SYSTEM}(?:/\S{{0,100}})?)?|~\S{{0,100}}|\.|\*){_END}"
    rf"|{_ASKED}{_OPEN}/(?:{_SYSTEM}\b|\s|$)",
    path_traversal=rf"{_UP}(?:etc[/\\](?:passwd|shadow|sudoers)|proc[/\\](?:self|\d)|root[/\\]|var[/\\]run[/\\]secrets"
    r"|windows[/\\](?:system32|win\.ini)|boot\.ini|\S{0,60}\.(?:ssh|aws)[/\\])"
    r"|(?:\.\.[/\\]){6}",
    script_tag=rf"<script[^<>]{{0,200}}>[^<>]{{0,200}}{_WEB}|\A\s*<script[^<>]{{0,200}}>(?:[^<]{{0,2000}}</script\s*>)?\s*\Z",
    drop_table=rf"['\"]\s*(?:\)\s*)?;\s*{_DROP}(?:\s+CASCADE)?\s*;?\s*(?:--|#|/\*|\Z)|\d\s*\)?;\s*{_DROP}\s*;?\s*--"
    rf"|{_ALONE}{_DROP}(?:\s+CASCADE)?\s*;?(?:\s*--.{{0,100}})?{_END}|{_ASKED}{_DROP}\b",
    # What parts the turns of a conversation in a model's own format.
    role_marker=r"<\|(?:im_start|start_header_id|system|assistant)\|>|<<SYS>>|\[/INST\]",
)

# What no one types: text that a reader does not see, or sees otherwise than the model does.
# Joiners alone (emoji, Persian, Hindi) and bidi marks and isolates (Arabic, Hebrew) are ordinary writing.
_ZERO: Final = r"\u200b-\u200d\u2060-\u2064\ufeff"
_SELECTORS: Final = r"\ufe00-\ufe0f\U000e0100-\U000e01ef"
_RIGHT_TO_LEFT: Final = r"\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc\U00010800-\U00010fff\U0001e800-\U0001efff"
_INVISIBLE: Final = _rules(
    plainly=False,
    # Of the second set those that terminals act on; the others are quotation marks in text of a wrong encoding.
    control_character=r"[\x00-\x08\x0e-\x1f\x7f\x90\x9b\x9d]",
    bidi_override=rf"[\u202d\u202e]|\A(?s:(?!.*[{_RIGHT_TO_LEFT}]).*[\u202b\u2067])",
    hidden_text=rf"[{_ZERO}\u00ad\u034f\u115f\u1160\u180e\u3164\uffa0]{{6}}|(?:[a-z][{_ZERO}]{{1,5}}){{4}}"
    rf"|[{_SELECTORS}]{{3}}|[a-z][\ufe00-\ufe0e\U000e0100-\U000e01ef]|[\u206a-\u206f\ufff9-\ufffb]|[\U000e0000-\U000e007f]",
)
_FLAG_EMOJI: Final = re.compile(r"\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{2,6}\U000e007f")
_SURROGATE: Final = re.compile(r"[\ud800-\udfff]")

# Worth a note, and too often innocent to refuse.
_NOTED: Final = _rules(
    plainly=False,
    zero_width=r"[\u200b\u2060-\u2064\ufeff]",
    bidi_control=r"[\u202a-\u202c\u2066-\u2069]",
    mixed_script=r"[a-z][\u0400-\u052f]|[\u0400-\u052f][a-z]",
)
_OVERRIDE: Final = _rules(
    instruction_override=r"\b(?:ignore|disregard|forget)\s+(?:(?:all|any|of|the|your|my)\s+){0,3}"
    r"(?:previous|prior|earlier|above|preceding|system)\s+(?:instructions?|rules|directives|prompts?|guidelines)\b",
)

# `strict` refuses what `balanced` refuses, too: stricter must never let more through.
_SIGNALS: Final = (*_NOTED, *_OVERRIDE)
_REFUSED: Final = {
    "strict": (*_INVISIBLE, *_GUIDE, *_SUSPICIOUS, *_NARROW),
    "balanced": (*_INVISIBLE, *_NARROW),
    "off": (),
}
_FLAGGED: Final = {"strict": _SIGNALS, "balanced": (*_GUIDE, *_SUSPICIOUS, *_SIGNALS), "off": ()}
BUILT_IN: Final = frozenset(rule.name for rule in (*_REFUSED["strict"], *_SIGNALS))

# White space without end would cost our rules quadratic time. What counts as a control character stays.
_GAP: Final = re.compile(r"[^\S\x1c-\x1f]{8,}")


def screen(query: str, rules: InputRules) -> Verdict:
    """Judge a query by a policy's input rules. Tenant rules are called `block[n]` and `flag[n]`, by their place.

    With tenant rules it takes up to a second: in a server, call it in a thread, where RE2 lets go of the GIL.
    """
    return Screening(query).judge(rules)


class Screening:
    """A query to be judged, by several sets of rules if need be: its forms are made once, and each rule of ours is
    matched once, since a policy may have fifty overrides.
    """

    def __init__(self, query: str) -> None:
        self._query = query
        self._matched: dict[_Rule, bool] = {}

    def judge(self, rules: InputRules) -> Verdict:
        """As `screen` does."""
        if len(self._query) > rules.longest:
            return Verdict(allowed=False, rule="max_length")
        if _SURROGATE.search(self._query):
            return Verdict(allowed=False, rule="invalid_text")
        if refused := next(chain(self._ours(_REFUSED[rules.preset]), self._tenants("block", rules.block)), None):
            return Verdict(allowed=False, rule=refused)
        flags = *self._ours(_FLAGGED[rules.preset]), *self._tenants("flag", rules.flag)
        return Verdict(allowed=True, flags=flags)

    @cached_property
    def _forms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self._query, plain(self._query))))

    @cached_property
    def _narrowed(self) -> tuple[str, ...]:
        return tuple(_GAP.sub(" ", form) for form in (_FLAG_EMOJI.sub("", self._forms[0]), *self._forms[1:]))

    def _ours(self, rules: Iterable[_Rule]) -> Iterator[str]:
        return (rule.name for rule in rules if self._matches(rule))

    def _matches(self, rule: _Rule) -> bool:
        if rule not in self._matched:
            self._matched[rule] = rule.matches(self._narrowed)
        return self._matched[rule]

    def _tenants(self, kind: str, patterns: Iterable[str]) -> Iterator[str]:
        for place, text in enumerate(patterns):
            pattern = compile_pattern(text)
            if any(pattern.search(form) for form in self._forms):
                yield f"{kind}[{place}]"
