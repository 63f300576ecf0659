"""What a tool server was confined to, as one hash for the audit record: the same after a restart, on every machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from app.sandbox.contract import Profile


def fingerprint(profile: Profile, *, backend: str) -> str:
    """SHA-256 in hex of what holds the program: who enforces it, and all that it may run, see, use and reach.

    Of the host only what is seen inside counts, not where it lies. Values of the environment and texts of files are
    left out, of which some are secrets that a hash without a key would let anyone guess at.
    """
    said = {
        "backend": backend,
        "argv": profile.argv,
        "runtime": profile.runtime,
        "host_uid": profile.host_uid,
        "working_directory": profile.working_directory,
        "mounts": [(mount.target, mount.writable) for mount in profile.mounts],
        "scratch": [asdict(scratch) for scratch in profile.scratch],
        "files": sorted(profile.files),
        "environment": sorted(profile.environment),
        "limits": {**asdict(profile.limits), "cgroups": len(profile.cgroup)},
        "network": profile.network.listen if profile.network else None,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
