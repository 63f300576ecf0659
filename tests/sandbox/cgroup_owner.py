"""A service that has a program in a cgroup, and lives until it is killed: python cgroup_owner.py PROGRAM MEMORY UID.

First it leaves root for the user UID, unless that is 0. What it says: "found" or why not, then what the program says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from app.sandbox.cgroup_search import NoCgroups, find
from app.sandbox.contract import Limits

if __name__ == "__main__":
    program, memory, uid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    greedy = Path(__file__).with_name("greedy.py").read_text()
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        sys.executable = "/usr/bin/python3"  # ours may lie in a home that only root may enter
    found = find()
    if isinstance(found, NoCgroups):
        sys.exit(found.reason)
    print("found", flush=True)  # noqa: T201  # it is how the test hears of it
    group = found.make("theirs", "server", Limits(memory_bytes=memory))
    argv = [sys.executable, "-I", "-S", "-c", greedy, program, *map(str, group.folders)]
    subprocess.Popen(argv).wait()
    print("ended", group.usage(), flush=True)  # noqa: T201  # as above
    time.sleep(60)
