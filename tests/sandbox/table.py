"""The table of attacks in docs/sandbox.md: `python -m tests.sandbox.table` makes every attack and writes it."""

from __future__ import annotations

import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tests.sandbox import ground as ground_
from tests.sandbox.attacks import ATTACKS, DEPENDS, KINDS
from tests.sandbox.configurations import CONFIGURATIONS, Configuration, bare, inside
from tests.sandbox.ground import HERE, ROOT, Ground

PAGE: Final = ROOT / "docs" / "sandbox.md"
BEGIN: Final = "<!-- python -m tests.sandbox.table writes from here -->"
END: Final = "<!-- to here -->"
OPENINGS: Final[list[dict[str, Any]]] = tomllib.loads((HERE / "known_openings.toml").read_text())["opening"]

Outcomes = Mapping[str, str]


def bare_cell(attack: str, outcome: str) -> str:
    return "succeeds" if outcome == "succeeded" else f"not proven: takes {DEPENDS.get(attack, 'what is not here')}"


def inside_cell(outcome: str) -> str:
    return "**open**" if outcome == "succeeded" else "stopped"


def is_known(attack: str, configuration: Configuration) -> bool:
    """Whether an opening is on the list for a configuration."""
    return any(
        (opening["attack"], opening["backend"]) == (attack, configuration.backend)
        and (not configuration.is_in_cgroup or opening.get("closed_by") != "cgroup")
        and (configuration.is_ordinary or opening.get("only_as") != "ordinary user")
        for opening in OPENINGS
    )


def committed() -> dict[str, dict[str, str]]:
    """What the page says of each attack: by column, `bare` and the names of the configurations."""
    _, _, rest = PAGE.read_text().partition(BEGIN)
    lines = [line for line in rest.partition(END)[0].splitlines() if line.startswith("|")]
    heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[1]: dict(zip(heads[2:], row[2:], strict=True)) for row in rows}


def written(results: Mapping[str, Outcomes]) -> str:
    names = ["bare", *(configuration.name for configuration in CONFIGURATIONS)]
    proven = sum(outcome == "succeeded" for outcome in results["bare"].values())
    lines = [
        f"{len(ATTACKS)} attacks, of which {proven} succeed bare on the machine that wrote this, and count.",
        "",
        f"| kind | attack | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
        *(f"| {kind} | {attack} | {' | '.join(_row(attack, results))} |" for kind, attack in _by_kind()),
    ]
    return "\n".join(lines)


def _by_kind() -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        name = kind.__name__.rpartition(".")[2]
        yield from ((name, attack) for attack, made in ATTACKS.items() if made.__module__ == kind.__name__)


def _row(attack: str, results: Mapping[str, Outcomes]) -> Iterator[str]:
    yield bare_cell(attack, results["bare"][attack])
    yield from (inside_cell(results[configuration.name][attack]) for configuration in CONFIGURATIONS)


def _made(folder: Path, ground: Ground) -> dict[str, Outcomes]:
    services = {
        False: ground_.service_as_we_are(),
        True: ground_.service_as_ordinary_user(folder, ground_.ordinary_python(folder)),
    }
    results: dict[str, Outcomes] = {"bare": bare(ground)}
    for configuration in CONFIGURATIONS:
        results[configuration.name] = inside(configuration, ground, services[configuration.is_ordinary])
    return results


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bulkhead-sandbox-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        with ground_.prepared(folder) as ground:
            table = written(_made(folder, ground))
    before, _, rest = PAGE.read_text().partition(BEGIN)
    if not rest:
        sys.exit(f"{PAGE} has no place for the table")
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
