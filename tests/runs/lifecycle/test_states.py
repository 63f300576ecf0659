"""The states of a run, and how one comes from one to another: the code, the table of docs/runs.md and its picture."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final, cast
from uuid import UUID
from xml.etree import ElementTree as ET

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from app.runs import repository
from app.runs.context import RunContext
from app.runs.lifecycle import opening
from app.runs.state import Ending, State, StopCause, cancelled
from tests.runs.queue_ground import Customer, QueueGround, queue_ground
from tests.service import Databases
from tests.test_docs import ROOT, codes, page, rows, section

Way = tuple[str, str]
Step = Callable[[AsyncSession, RunContext], Awaitable[object]]
NEW: Final = "new"
OPEN: Final = {State.QUEUED, State.RUNNING, State.WAITING_APPROVAL}
YES_OR_NO: Final = {"yes", "no"}  # the last column of the table of states
PICTURE: Final = ROOT / "docs" / "images" / "run-states.svg"
_SVG: Final = "{http://www.w3.org/2000/svg}"
_NEAR: Final = 8.0  # of a box, where an arrow begins or ends


# What the code does


@pytest.fixture
async def ground(databases: Databases) -> AsyncIterator[QueueGround]:
    made = queue_ground(await asyncio.to_thread(databases))
    yield made
    await made.close()


async def finish(state: State, session: AsyncSession, run: RunContext) -> object:
    return await repository.finish(session, run, Ending(state, "code", 200), None)


async def claim(session: AsyncSession, run: RunContext) -> object:
    return await repository.claim(session, run.run_id, lease_s=60, policy_version=1, model="m")


async def cancel(session: AsyncSession, run: RunContext) -> object:
    return await repository.cancel_idle(session, run.run_id, StopCause.USER)


async def fail(session: AsyncSession, run: RunContext) -> object:
    return await repository.fail_queued(session, run.run_id)


async def requeue(session: AsyncSession, run: RunContext) -> object:
    return await repository.requeue(session, run.run_id)


STEPS: Final[list[Step]] = [
    *(partial(finish, state) for state in set(State) - OPEN),
    repository.suspend,
    partial(repository.give_back, has_died=False),
    claim,
    cancel,
    fail,
    requeue,
]


async def ways_of_the_code(ground: QueueGround) -> set[Way]:
    """Each step is tried on a run in each state, whose lease has run out; what comes of it is what it may do."""
    customer, found = await ground.customer(), set()
    for state in State:
        for step in STEPS:
            run_id = await ground.add(customer, state=state, lease_s=-1)
            async with ground.app.transaction(customer.id) as session:
                has_moved = await step(session, a_run(run_id))
            if has_moved:
                found.add((state.value, await state_of(ground, customer, run_id)))
        found |= await interrupted(ground, state)
    return found


async def interrupted(ground: QueueGround, state: State) -> set[Way]:
    """The step that is no process's own."""
    customer = await ground.customer()
    run_id = await ground.add(customer, state=state, lease_s=-1)
    async with ground.platform.transaction() as session:
        ended = await repository.interrupt_expired(session, customer.id, attempts=1, claim_s=1)
    return {(state.value, await state_of(ground, customer, run_id))} if ended else set()


def a_run(run_id: UUID) -> RunContext:
    """One of which nothing is asked but its id and its attempt."""
    return RunContext(run_id, *cast("tuple[Any, Any, Any, Any, Any]", (None, None, None, None, None)))


async def state_of(ground: QueueGround, customer: Customer, run_id: UUID) -> str:
    async with ground.app.transaction(customer.id) as session:
        run = await repository.find(session, run_id, user_id=None)
    assert run is not None
    return run.state


def ends_of_a_beginning() -> set[str]:
    """As what a run may end where it is to begin or to go on: in one transaction, so that nobody sees it running."""
    endings = [value for value in vars(opening).values() if isinstance(value, Ending)]
    return {ending.state.value for ending in (*endings, cancelled(StopCause.USER))}


# What the page says


def ways_of_the_table() -> set[Way]:
    table = (row for row in rows(section(page("runs.md"), "## States")) if row[2] not in YES_OR_NO)
    return {(before.strip("`"), after.strip("`")) for before, after, _ in table}


def drawn(kind: str) -> list[ET.Element]:
    return list(ET.parse(PICTURE).getroot().iter(f"{_SVG}{kind}"))  # noqa: S314  ours


def arrows() -> dict[Way, ET.Element]:
    """By what their titles say."""
    found = {(path.findtext(f"{_SVG}title") or ""): path for path in drawn("path")}
    found.pop("")  # the tips
    pairs = {title: tuple(title.split(" to ")) for title in found}
    return {cast("Way", pairs[title]): path for title, path in found.items()}


def boxes() -> dict[str, tuple[float, float, float, float]]:
    """Left, top, right and bottom of each state, and of the dot from which runs come."""
    found = {}
    for box in drawn("rect"):
        if name := box.get("id"):
            left, top, width, height = (float(box.get(side, "")) for side in ("x", "y", "width", "height"))
            found[name] = (left, top, left + width, top + height)
    (dot,) = drawn("circle")
    x, y, radius = (float(dot.get(side, "")) for side in ("cx", "cy", "r"))
    return found | {dot.get("id", ""): (x - radius, y - radius, x + radius, y + radius)}


def is_near(point: tuple[float, float], box: tuple[float, float, float, float]) -> bool:
    (x, y), (left, top, right, bottom) = point, box
    return left - _NEAR <= x <= right + _NEAR and top - _NEAR <= y <= bottom + _NEAR


async def test_the_table_has_the_ways_that_there_are(ground: QueueGround) -> None:
    ended_in_the_queue = {(State.QUEUED.value, end) for end in ends_of_a_beginning()}
    begun = {(NEW, state.value) for state in (State.RUNNING, State.QUEUED, State.DENIED, State.CANCELLED)}
    assert ways_of_the_table() == await ways_of_the_code(ground) | ended_in_the_queue | begun


def test_the_table_says_of_every_state_what_it_means_and_whether_it_stays() -> None:
    table = [row for row in rows(section(page("runs.md"), "## States")) if row[2] in YES_OR_NO]
    assert {codes(state)[0]: changes for state, _, changes in table} == {
        state.value: "yes" if state in OPEN else "no" for state in State
    }
    assert {before for before, _ in ways_of_the_table()} == {NEW, *(state.value for state in OPEN)}


def test_the_picture_shows_the_states_and_ways_of_the_table() -> None:
    assert set(boxes()) == {NEW, *(state.value for state in State)}
    assert set(arrows()) == ways_of_the_table()
    assert f"](images/{PICTURE.name})" in page("runs.md")


@pytest.mark.parametrize("way", sorted(arrows()), ids=" to ".join)
def test_an_arrow_leads_from_where_it_says_to_where_it_says(way: Way) -> None:
    numbers = [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", arrows()[way].get("d", ""))]
    points = list(zip(numbers[::2], numbers[1::2], strict=True))
    near = [{name for name, box in boxes().items() if is_near(point, box)} for point in (points[0], points[-1])]
    assert near == [{way[0]}, {way[1]}]


def test_the_picture_names_its_states_in_words() -> None:
    said = {text.text for text in drawn("text")}
    assert {state.value for state in State} <= said
    assert PICTURE.read_text().count('role="img" aria-labelledby="title words"') == 1
