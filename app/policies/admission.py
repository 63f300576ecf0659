"""Whether a query is let in for its caller: the policy's own screening, then those of the overrides that mean them."""

from __future__ import annotations

from app.policies.overrides import Terms
from app.policies.screening import Screening, Verdict


def admit(query: str, terms: Terms) -> Verdict:
    """Judge a query; it passes where every screening lets it pass. Rules of an override bear its name."""
    screening, flags = Screening(query), list[str]()
    for prefix, rules in terms.screenings.items():
        verdict = screening.judge(rules)
        if not verdict:
            return Verdict(allowed=False, rule=f"{prefix}{verdict.rule}")
        flags += [f"{prefix}{flag}" for flag in verdict.flags]
    return Verdict(allowed=True, flags=tuple(flags))
