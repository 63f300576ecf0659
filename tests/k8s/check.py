"""Our own check of rendered manifests: `python -m tests.k8s.check out.yaml ...` prints what it finds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import yaml

from tests.k8s import restricted, wiring
from tests.k8s.rendering import Manifest

CHECKS: Final = {**restricted.CHECKS, **wiring.CHECKS}


def findings(manifests: Sequence[Manifest]) -> list[str]:
    """Of all checks, each with the name of its check."""
    return [f"{name}: {finding}" for name, check in CHECKS.items() for finding in check(manifests)]


def main(paths: Sequence[str]) -> int:
    """The exit code of the command."""
    found = {path: findings(list(yaml.safe_load_all(Path(path).read_text()))) for path in paths}
    for path, lines in found.items():
        sys.stdout.write("\n  ".join([f"{path}: {len(CHECKS)} checks, {len(lines)} findings", *lines]) + "\n")
    return any(found.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
