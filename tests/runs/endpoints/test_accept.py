"""Who gets the events of a run, and who gets its answer."""

from __future__ import annotations

import pytest

from app.runs.endpoints.accept import prefers_events


@pytest.mark.parametrize(
    "accept",
    [
        "text/event-stream",
        "Text/Event-Stream",
        "text/event-stream;q=0.5",
        "text/event-stream, application/json;q=0.9",
        "text/event-stream, */*;q=0.1",
        "text/*, application/json;q=0.2",
        " text/event-stream ; q=1.000 , */* ; q=0.999 ",
        "*/*, application/json;q=0.1",
    ],
)
def test_who_likes_events_better_gets_them(accept: str) -> None:
    assert prefers_events(accept)


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/json",
        "application/json, text/event-stream",
        "text/event-stream;q=0.5, application/json",
        "text/event-stream;q=0, */*",
        "text/event-stream;q=0",
        "text/event-stream;q=2",
        "text/event-stream;q=nan",
        "text/event-stream;q=0.1234",
        "text/event-streams",
        "text/html, image/png",
        "text/*;q=0.5, */*",
        ",;=,,;q",
    ],
)
def test_all_others_get_the_answer(accept: str) -> None:
    assert not prefers_events(accept)
