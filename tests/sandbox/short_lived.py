"""A service that starts one program in a sandbox and lives until it is killed.

python short_lived.py BACKEND UID CODE NONCE
"""

from __future__ import annotations

import subprocess
import sys
import time

from app.sandbox import bubblewrap, landlock, runtimes
from app.sandbox.contract import Profile, Sandbox

backend, uid, code, nonce = sys.argv[1:]
python = runtimes.python()
sandbox: Sandbox = landlock.built_in() if backend == "landlock" else bubblewrap.packaged()
launch = sandbox.launch(
    Profile(
        argv=(python.interpreter, "-I", "-c", code, nonce),
        host_uid=int(uid),
        mounts=python.mounts,
        files=python.files,
        environment=python.environment,
    )
)
sys.stdout.write("ready\n")
sys.stdout.flush()
subprocess.Popen(launch.argv, env=launch.environment)
time.sleep(60)
