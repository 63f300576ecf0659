"""`bulkhead up` without its audit record: no event is inserted, and nothing is chained.

Nothing in the product can switch the record off; this replaces the functions that all of it goes through.
"""

from __future__ import annotations

from typing import Any

from app.audit import repository
from app.audit.sealer import Sealer
from benchmarks.processes import as_bulkhead


async def _nothing(*_: Any, **__: Any) -> None:
    pass


async def _no_work(_: Sealer) -> bool:
    return False


def main() -> None:
    """For comparison only: what the service then does stands nowhere."""
    for name in ("append", "insert_rows", "insert_missing"):
        assert hasattr(repository, name), name
        setattr(repository, name, _nothing)
    assert hasattr(Sealer, "seal")
    setattr(Sealer, "seal", _no_work)  # noqa: B010  an assignment would be a type error
    as_bulkhead.up()


if __name__ == "__main__":
    main()
