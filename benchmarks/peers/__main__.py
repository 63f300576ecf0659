"""Bulkhead with everything on beside its peers with nothing, in one run. `make bench-peers` does all of it.

    python -m benchmarks.peers environments           # build what the peers need
    python -m benchmarks.peers run                    # about twenty minutes; --rounds 3 --seconds 4
    python -m benchmarks.peers page RESULT.json [START_COST.json]    # put their figures into docs/performance.md

docs/performance.md says what is measured and how to read it.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from benchmarks.peers import comparison, page
from benchmarks.peers.environments import Lacking
from benchmarks.peers.systems import SYSTEMS


def main() -> None:
    """Do what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("environments")
    run = commands.add_parser("run")
    run.add_argument("--rounds", type=int, default=3)
    run.add_argument("--seconds", type=float, default=4, help="of each block")
    run.add_argument("--latency-ms", type=int, nargs="*", default=[0, 500], help="of the model, one phase each")
    run.add_argument("--only", nargs="*", choices=list(SYSTEMS), default=list(SYSTEMS), metavar="SYSTEM")
    run.add_argument("--loads", nargs="*", default=None, metavar="LOAD", help="such as '16 at once'")
    rewriting = commands.add_parser("page")
    rewriting.add_argument("result", type=Path)
    rewriting.add_argument("start", type=Path, nargs="?", help="a result of benchmarks/start_cost.py")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwind as for Ctrl-C: nothing is left running
    if given.command == "environments":
        _build()
    elif given.command == "page":
        page.rewrite(given.result, given.start)
    else:
        comparison.run(
            given.only, rounds=given.rounds, seconds=given.seconds, latencies_ms=given.latency_ms, loads=given.loads
        )


def _build() -> None:
    for _, environment in SYSTEMS.values():
        if environment is not None:
            try:
                environment.build()
            except Lacking as reason:
                print(f"Left out: {reason}.")


if __name__ == "__main__":
    main()
