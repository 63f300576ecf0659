"""Three figures of all systems as bars, in SVG that can be read in light and in dark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from xml.sax.saxutils import escape

from benchmarks.peers import figures
from benchmarks.peers.figures import ALONE, BUSY, REUSED, SERVERS, Phase
from benchmarks.subjects import BULKHEAD

_SVG: Final = "http://www.w3.org/2000/svg"
_SHOWN: Final[Mapping[str, str]] = {
    BULKHEAD: "Bulkhead",
    REUSED: "mcp-use",
    **dict(zip(SERVERS, ("agno", "LiteLLM", "aegra"), strict=True)),
}
_PANELS: Final[Mapping[str, tuple[str, str, figures.Figure]]] = {
    "Requests a second, 16 at once": ("longer is better", BUSY, figures.per_s),
    "CPU a request, 16 at once, ms": ("shorter is better; all processes", BUSY, figures.cpu("total")),
    "Median wait, 1 at once, ms": ("shorter is better", ALONE, figures.p50),
}
_WIDTH, _LEFT, _BAR, _STEP, _PANEL = 760, 190, 20, 28, 196
_LONGEST: Final = _WIDTH - _LEFT - 80
_STYLE: Final = """\
text { font: 14px sans-serif; fill: #263238; }
.title { font-weight: bold; }
.note { font-size: 12px; fill: #546e7a; }
.other { fill: #90a4ae; }
.ours { fill: #00897b; }
.ground { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
text { fill: #eceff1; }
.note { fill: #b0bec5; }
.other { fill: #607d8b; }
.ours { fill: #26a69a; }
.ground { fill: #1e2129; }
}
"""


def link(phase: Phase) -> str:
    """What shows it in the page; its text names what is in it."""
    return f"![Requests a second, CPU a request and median wait of {_named(phase)}](images/peers.svg)"


def _named(phase: Phase) -> str:
    *others, last = (told for name, told in _SHOWN.items() if name in phase.systems)
    return f"{', '.join(others)} and {last}" if others else last


def drawn(phase: Phase) -> str:
    """Of the phase without latency."""
    height = _PANEL * len(_PANELS)
    title = f"{_named(phase)}: {', '.join(_PANELS).lower()}"
    panels = [_panel(phase, title, number) for number, title in enumerate(_PANELS)]
    return "\n".join(
        [
            f'<svg xmlns="{_SVG}" viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="title">',
            f'<title id="title">{escape(title)}</title>',
            f"<style>\n{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{height}" class="ground"/>',
            *panels,
            "</svg>\n",
        ]
    )


def _panel(phase: Phase, title: str, number: int) -> str:
    note, load, figure = _PANELS[title]
    found = {name: phase.median(name, load, figure) for name in _SHOWN if name in phase.systems}
    known = {name: value for name, value in found.items() if value is not None}
    top, most = number * _PANEL, max(known.values(), default=1)
    bars = [_bar(name, value, top + 42 + place * _STEP, most) for place, (name, value) in enumerate(known.items())]
    heading = f'<tspan class="title">{escape(title)}</tspan> <tspan class="note">({note})</tspan>'
    return "\n".join([f'<text x="10" y="{top + 26}">{heading}</text>', *bars])


def _bar(name: str, value: float, y: int, most: float) -> str:
    kind, length, middle = "ours" if name == BULKHEAD else "other", _LONGEST * value / most, y + _BAR - 5
    return (
        f'<text x="{_LEFT - 10}" y="{middle}" text-anchor="end">{escape(name)}</text>'
        f'<rect x="{_LEFT}" y="{y}" width="{length:.1f}" height="{_BAR}" class="{kind}"/>'
        f'<text x="{_LEFT + length + 8:.1f}" y="{middle}">{value:,.1f}</text>'
    )
