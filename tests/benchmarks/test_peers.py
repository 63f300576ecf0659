"""The comparison's figures: what is made of a result, where it goes, and that a wrong answer is no answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import pytest

from benchmarks.peers import comparison, environments, figures, page, picture, tables
from benchmarks.peers.environments import AEGRA, AGNO, LITELLM, Environment, Lacking
from benchmarks.peers.figures import ALONE, BUSY, Phase, Result
from benchmarks.peers.systems import SYSTEMS

COSTS: Final = {"bulkhead": 10.0, "mcp-use reused, stdio": 8.0, "agno": 30.0, "litellm": 60.0}
START: Final = {"import": {"times, cpu": 1.34}, "warm start": {"wall s": 2.53}}
SIZES: Final = {"process": {"rss": 1 << 20, "pss": 1 << 19, "processes": 1}}


def row(system: str, load: str, cost: float, *, asked: int = 120) -> dict[str, Any]:
    cpu = {"process": cost, "tools": 1.0, "postgres": 0.0, "relay": 0.0, "total": cost + 1}
    counts = {"asked": asked, "errors": 0, "others_cores": 0.1}
    figures = {"p50": cost, "p95": 2 * cost, "p99": 3 * cost, "per_s": 1000 / cost}
    return {"system": system, "load": load, **counts, **figures, "cpu": cpu}


def result(**changed: Any) -> Mapping[str, Any]:
    loads = (ALONE, BUSY, "5 a second")
    rounds = [[row(name, load, cost * slow) for load in loads for name, cost in COSTS.items()] for slow in (1, 1.2, 5)]
    memory = dict.fromkeys(COSTS, SIZES)
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


def test_who_was_not_measured_is_said_with_the_reason_that_is_known() -> None:
    said = tables.sections(Result.of(result(left_out={"aegra": "aegra needs Python 3.12"})))["left out"].splitlines()
    assert "Left out: aegra needs Python 3.12." in said
    assert "Left out: mcp-use live, http was not measured." in said
    assert len(said) == len(SYSTEMS) - len(COSTS)


def test_only_a_result_of_all_systems_says_that_none_was_left_out() -> None:
    def said(*by_phase: list[str]) -> str:
        memory = dict.fromkeys(SYSTEMS, SIZES)
        phases = [
            {"latency_ms": latency, "rounds": [[row(name, BUSY, 1) for name in systems]], "memory": memory}
            for latency, systems in zip((0, 500), by_phase, strict=True)
        ]
        return tables.sections(Result.of(result(phases=phases)))["left out"]

    *most, last = SYSTEMS
    assert said([*SYSTEMS], [*SYSTEMS]) == "No system was left out."
    assert said(most, most) == said([*SYSTEMS], most) == f"Left out: {last} was not measured."


def test_a_comparison_of_some_knows_the_others() -> None:
    found = comparison.left_out(["bulkhead", "mcp-use live, stdio"])
    assert set(found) == set(SYSTEMS) - {"bulkhead", "mcp-use live, stdio"}
    assert found["agno"] == "agno was not asked for"


def test_a_rate_that_was_not_asked_is_said_not_to_be() -> None:
    sections = tables.sections(Result.of(result()))
    assert "| agno | 36.0 / 72.0 / 108 | not asked | not asked |" in sections["open loop"]
    assert "| agno | 36.0 / 72.0 / 108" not in sections["sixteen at once"]


@pytest.mark.parametrize(("asked", "shown"), [(100, "36.0 / 72.0"), (101, "36.0 / 72.0 / 108")])
def test_of_few_requests_the_slowest_is_not_called_the_99th_percentile(asked: int, shown: str) -> None:
    rounds = [[row("agno", load, 36, asked=asked) for load in (BUSY, "5 a second")]]
    phases = [{"latency_ms": 0, "rounds": rounds, "memory": {"agno": SIZES}}]
    sections = tables.sections(Result.of(result(phases=phases)))
    assert f"| agno | {shown} | not asked |" in sections["open loop"]
    assert ("108" in sections["sixteen at once"]) == ("108" in shown)


def test_what_a_start_costs_stands_beside_the_aims_where_it_was_measured() -> None:
    aims = [tables.sections(Result.of(result()), start)["aims"].splitlines() for start in (START, None)]
    assert "| warm start until it is ready, s | at most 3 | 2.53 | met |" in aims[0]
    assert "| import of the API, CPU, as times that of its libraries | at most 1.2 | 1.34 | **missed** |" in aims[0]
    assert [each.endswith("|  | not measured |") for each in aims[1][-2:]] == [True, True]


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
    sections = page.sections(Result.of(result()), START)
    filled = page.filled(text, sections)
    assert all(
        f"<!-- figures: {name} -->\n\n{section}\n\n<!-- end of figures -->" in filled
        for name, section in sections.items()
    )
    assert text.count("<!-- figures: ") == filled.count("<!-- end of figures -->") == len(sections)
    later = page.sections(Result.of(result(made="later")), START)
    assert page.filled(filled, later) == filled.replace("now; 2", "later; 2")
    outside = [page.filled(each, dict.fromkeys(sections, "")) for each in (text, filled)]
    assert outside[0] == outside[1]


def test_the_picture_is_well_formed_and_its_bars_are_to_scale() -> None:
    drawn = ET.fromstring(picture.drawn(phase()))  # noqa: S314  # ours
    bars = [each for each in drawn.iter("{http://www.w3.org/2000/svg}rect") if each.get("class") in {"ours", "other"}]
    widths = [float(each.get("width", 0)) for each in bars[: len(COSTS)]]
    assert len(bars) == 3 * len(COSTS)
    assert widths[0] / widths[2] == pytest.approx(3, rel=0.01)


def test_the_picture_and_its_text_name_who_is_in_it_and_nobody_else() -> None:
    told = page.sections(Result.of(result()), None)["picture"]
    assert told.endswith("of Bulkhead, mcp-use, agno and LiteLLM](images/peers.svg)")
    title = ET.fromstring(picture.drawn(phase())).findtext("{http://www.w3.org/2000/svg}title")  # noqa: S314  # ours
    assert title is not None
    assert title.startswith("Bulkhead, mcp-use, agno and LiteLLM: ")
    alone = Phase(0, phase().rounds, {"agno": phase().memory["agno"]})
    assert picture.link(alone).endswith("of agno](images/peers.svg)")


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
