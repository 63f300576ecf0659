"""A query does not become dearer unnoticed: its CPU beside that of mcp-use bare, in the same minute, and no clock."""

from __future__ import annotations

from typing import Final

import pytest

from benchmarks.cost_ratio import TWICE, ratios
from benchmarks.subjects import BULKHEAD

# docs/performance.md says how it was chosen.
BOUND: Final = 2.0
PATIENCE: Final = pytest.mark.timeout(300)  # of whichever test is the first, which measures


@pytest.fixture(scope="module")
async def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    (found,) = [each async for each in ratios(tmp_path_factory.mktemp("cost"), times=1)]
    return found


@PATIENCE
async def test_a_query_costs_no_more_beside_mcp_use_bare_than_it_may(measured: dict[str, float]) -> None:
    assert measured[BULKHEAD] <= BOUND


@PATIENCE
async def test_a_query_that_costs_twice_as_much_is_noticed(measured: dict[str, float]) -> None:
    assert measured[TWICE] > BOUND
