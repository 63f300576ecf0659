"""The comparison's figures: what is made of a result, where it goes, and that a wrong answer is no answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import pytest

from benchmarks.peers import environments, figures, page, picture, tables
from benchmarks.peers.environments import AEGRA, AGNO, LITELLM, Environment, Lacking
from benchmarks.peers.figures import ALONE, BUSY, Phase, Result

COSTS: Final = {"bulkhead": 10.0, "mcp-use reused, stdio": 8.0, "agno": 30.0, "litellm": 60.0}


def row(system: str, load: str, cost: float) -> dict[str, Any]:
    cpu = {"process": cost, "tools": 1.0, "postgres": 0.0, "relay": 0.0, "total": cost + 1}
    counts = {"asked": 100, "errors": 0, "others_cores": 0.1}
    figures = {"p50": cost, "p95": 2 * cost, "p99": 3 * cost, "per_s": 1000 / cost}
    return {"system": system, "load": load, **counts, **figures, "cpu": cpu}


def result(**changed: Any) -> Mapping[str, Any]:
    loads = (ALONE, BUSY, "5 a second")
    rounds = [[row(name, load, cost * slow) for load in loads for name, cost in COSTS.items()] for slow in (1, 1.2, 5)]
    sizes = {"process": {"rss": 1 << 20, "pss": 1 << 19, "processes": 1}}
    memory = dict.fromkeys(COSTS, sizes)
    phases = [{"latency_ms": latency, "rounds": rounds, "memory": memory} for latency in (0, 500)]
    machine = {"processors": 2, "processor": "P", "kernel": "6.1-x", "python": "3.11.7", "fdatasync_ms": 0.5}
    told = {
        "made": "now",
        "machine": machine,
        "versions": {"agno": "1"},
        "left_out": {},
        "seconds": 4,
        "phases": phases,
    }
    profile = {"cpu_ms": 10.0, "layers": {"database": 6.0, "our own code": 4.0}, "steps": {"decide": 1.0}}
    return told | {"profile": profile} | changed


def phase() -> Phase:
    return Result.of(result()).phases[0]


def test_a_figure_is_the_median_of_the_rounds_and_a_ratio_is_taken_within_one() -> None:
    assert phase().median("agno", BUSY, figures.p50) == pytest.approx(36)
    assert phase().times("bulkhead", "agno", BUSY, figures.p50) == pytest.approx(1 / 3)
    assert phase().median("aegra", BUSY, figures.p50) is None


def test_an_aim_that_is_missed_is_said_to_be() -> None:
    found = {aim.text: aim for aim in figures.aims(phase())}
    assert found["requests/s, as times agno, 16 at once"].is_met is True
    assert found["CPU of the API process a request, as times mcp-use reused, 16 at once"].is_met is True
    assert found["requests/s, as times aegra, 16 at once"].is_met is None
    dear = [[row(name, BUSY, 16 if name == "bulkhead" else cost) for name, cost in COSTS.items()]]
    missed = {aim.text: aim.is_met for aim in figures.aims(Phase(0, dear, phase().memory))}
    assert missed["requests/s, as times agno, 16 at once"] is False
    assert missed["CPU of the API process a request, as times mcp-use reused, 16 at once"] is False
    assert missed["p95, as times the best of agno, litellm, aegra, 16 at once"] is False


def test_what_was_not_asked_and_who_was_left_out_is_said() -> None:
    sections = tables.sections(Result.of(result(left_out={"aegra": "aegra needs Python 3.12"})))
    assert sections["left out"] == "Left out: aegra needs Python 3.12."
    assert "| agno | 36.0 / 72.0 / 108 | not asked | not asked |" in sections["open loop"]
    assert "| agno | 36.0 / 72.0 / 108" not in sections["sixteen at once"]


def test_a_result_of_a_busy_machine_says_that_it_measures_nothing() -> None:
    quiet = result()
    busy = [
        {**phase, "rounds": [[{**row, "others_cores": 0.4} for row in rows] for rows in phase["rounds"]]}
        for phase in quiet["phases"]
    ]
    said = [tables.sections(Result.of({**quiet, "phases": phases}))["machine"] for phases in (quiet["phases"], busy)]
    assert ["measures nothing" in each for each in said] == [False, True]


def test_the_page_has_a_place_for_each_section_and_nothing_else_of_it_is_changed() -> None:
    text = page.PAGE.read_text()
    sections = tables.sections(Result.of(result()))
    filled = page.filled(text, sections)
    assert all(
        f"<!-- figures: {name} -->\n\n{section}\n\n<!-- end of figures -->" in filled
        for name, section in sections.items()
    )
    assert text.count("<!-- figures: ") == filled.count("<!-- end of figures -->") == len(sections)
    assert page.filled(filled, tables.sections(Result.of(result(made="later")))) == filled.replace("now; 2", "later; 2")
    outside = [page.filled(each, dict.fromkeys(sections, "")) for each in (text, filled)]
    assert outside[0] == outside[1]


def test_the_picture_is_well_formed_and_its_bars_are_to_scale() -> None:
    drawn = ET.fromstring(picture.drawn(phase()))  # noqa: S314  # ours
    bars = [each for each in drawn.iter("{http://www.w3.org/2000/svg}rect") if each.get("class") in {"ours", "other"}]
    widths = [float(each.get("width", 0)) for each in bars[: len(COSTS)]]
    assert len(bars) == 3 * len(COSTS)
    assert widths[0] / widths[2] == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("environment", [AGNO, LITELLM, AEGRA], ids=lambda environment: environment.name)
def test_each_peer_is_pinned_with_hashes(environment: Environment) -> None:
    text = (environments.PINS / f"{environment.name}.txt").read_text()
    assert environment.version in (environments.PINS / f"{environment.name}.in").read_text()
    assert text.count("--hash=sha256:") >= text.count("==") > 50
    assert "://" not in text


def test_a_peer_without_its_python_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environments, "_FOLDER", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(Lacking, match=r"aegra .* needs Python 3\.14 with venv"):
        Environment("aegra", "aegra-api", minor=14).build()
