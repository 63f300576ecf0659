"""How many ordinary queries the presets of screening refuse, and how many attacks of the checked-in list.

    python -m benchmarks.screening          # seconds; the table of docs/policies.md

The queries are those that people asked for bfcl-eval and agentdojo, each text once. Both are read as data.
"""

from __future__ import annotations

import ast
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import distribution
from math import sqrt
from pathlib import Path
from typing import Any, Final, Literal

from app.policies.screening import screen
from app.policies.terms import InputRules

ROOT: Final = Path(__file__).resolve().parent.parent
Preset = Literal["balanced", "strict"]
PRESETS: Final[tuple[Preset, ...]] = ("balanced", "strict")
_Z: Final = 1.959964  # of 95 %


@dataclass(frozen=True, slots=True)
class Refusals:
    """How many of `asked` were refused, by rule."""

    asked: int
    by_rule: Counter[str]

    @property
    def share(self) -> float:
        return self.by_rule.total() / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, at 95 %."""
        n, z2 = self.asked, _Z * _Z
        middle = (self.share + z2 / (2 * n)) / (1 + z2 / n)
        reach = _Z / (1 + z2 / n) * sqrt(self.share * (1 - self.share) / n + z2 / (4 * n * n))
        return max(0.0, middle - reach), middle + reach


def main() -> None:
    """Print the table."""
    started = time.perf_counter()
    queries = ordinary_queries()
    print("| preset | queries | n | refused | share, with its 95 % interval | by rule |\n|---|---|---|---|---|---|")
    for preset in PRESETS:
        for name, found in measured(queries, preset).items():
            print(row(preset, name, found))
    attacks = [text for texts in attack_list().values() for text in texts]
    for preset in PRESETS:
        print(f"`{preset}` refuses {_refusals(attacks, preset).by_rule.total()} of {len(attacks)} attacks.")
    print(f"{time.perf_counter() - started:.1f} s")


def measured(queries: Iterable[str], preset: Preset) -> dict[str, Refusals]:
    """The two halves, and both together."""
    halves = {False: list[str](), True: list[str]()}
    for query in queries:
        halves[is_held_out(query)].append(query)
    tuned, held_out = (_refusals(half, preset) for half in halves.values())
    both = Refusals(tuned.asked + held_out.asked, tuned.by_rule + held_out.by_rule)
    return {"all": both, "half for tuning": tuned, "half held out": held_out}


def row(preset: Preset, name: str, found: Refusals) -> str:
    low, high = found.interval
    rules = ", ".join(f"{count} `{rule}`" for rule, count in sorted(found.by_rule.items()))
    share = f"{found.share:.3%} ({low:.3%} to {high:.3%})"
    return f"| `{preset}` | {name} | {found.asked:,} | {found.by_rule.total()} | {share} | {rules} |"


def _refusals(texts: Iterable[str], preset: Preset) -> Refusals:
    rules = InputRules(preset=preset)
    verdicts = [screen(text, rules) for text in texts]
    return Refusals(len(verdicts), Counter(verdict.rule for verdict in verdicts if verdict.rule))


def ordinary_queries() -> list[str]:
    return sorted({*bfcl_queries(), *agentdojo_prompts()})


def is_held_out(query: str) -> bool:
    """Whether it is in the half that no rule may be made from."""
    return bool(hashlib.sha256(query.encode(errors="surrogatepass")).digest()[0] & 1)


def attack_list() -> dict[str, list[str]]:
    texts: dict[str, list[str]] = json.loads((ROOT / "tests" / "policies" / "attacks.json").read_text())
    return texts


def bfcl_queries() -> Iterator[str]:
    """What users say in all data sets of bfcl-eval."""
    folder = _folder("bfcl-eval", "bfcl_eval/data")
    for path in sorted(folder.rglob("*.json")):
        if "possible_answer" not in path.parts:
            yield from _said_by_users([json.loads(line) for line in _records(path)])


def _records(path: Path) -> Iterator[str]:
    """One value a line; what is not kept so is no set of questions."""
    text = path.read_text(encoding="utf-8")
    return (line for line in text.splitlines() if '"question"' in line or '"user"' in line)


def _said_by_users(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _said_by_users(item)
    elif isinstance(value, dict):
        if value.get("role") == "user":
            yield str(value["content"])
        elif isinstance(question := value.get("question"), str):
            yield question
        else:
            yield from _said_by_users(list(value.values()))


def agentdojo_prompts() -> Iterator[str]:
    """The prompts of all user tasks of agentdojo, in all its versions, read from its source."""
    for path in sorted(_folder("agentdojo", "agentdojo/default_suites").rglob("user_tasks.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and any(map(_is_prompt, node.targets)):
                yield _text(node.value)


def _text(value: ast.expr) -> str:
    """What is put into a prompt at run time stands there as its name."""
    if isinstance(value, ast.JoinedStr):
        return "".join(map(_text, value.values))
    return str(value.value) if isinstance(value, ast.Constant) else ast.unparse(value)


def _is_prompt(target: ast.expr) -> bool:
    return isinstance(target, ast.Name) and target.id == "PROMPT"


def _folder(name: str, path: str) -> Path:
    return Path(str(distribution(name).locate_file(path)))


if __name__ == "__main__":
    main()
