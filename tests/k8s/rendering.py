"""The overlays as `kubectl kustomize` renders them, one of this machine, however old."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).resolve().parents[2]
K8S: Final = ROOT / "k8s"
OVERLAYS: Final = tuple(sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml")))
KUBECTL: Final = shutil.which("kubectl")
MISSING: Final = "There is no kubectl here. To run this: apt-get install kubernetes-client"

Manifest = dict[str, Any]


@cache
def rendered(overlay: str) -> str:
    """The overlay as one text of YAML."""
    if _is_old():
        with tempfile.TemporaryDirectory() as folder:
            return _kustomized(_in_old_words(Path(folder)) / "overlays" / overlay)
    return _kustomized(K8S / "overlays" / overlay)


def manifests(overlay: str) -> list[Manifest]:
    """The overlay's objects: each caller's own copy."""
    own: list[Manifest] = json.loads(_parsed(overlay))
    return own


@cache
def _parsed(overlay: str) -> str:
    """As JSON, which is read again in no time."""
    return json.dumps(list(yaml.load_all(rendered(overlay), Loader=yaml.CSafeLoader)))


def _kustomized(folder: Path) -> str:
    assert KUBECTL is not None
    done = subprocess.run([KUBECTL, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def _is_old() -> bool:
    """Debian 12 has kubectl 1.20, whose kustomize 2 knows some fields by other names; those up to 4 know these, too."""
    assert KUBECTL is not None
    told = subprocess.run(
        [KUBECTL, "version", "--client", "-o", "json"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    minor = re.search(r'"minor": "(\d+)', told)
    return minor is not None and int(minor[1]) < 27


def _in_old_words(folder: Path) -> Path:
    """A copy of k8s/ whose kustomizations say the same as an old kustomize wants to be told it."""
    copy = folder / "k8s"
    shutil.copytree(K8S, copy)
    for path in copy.rglob("kustomization.yaml"):
        path.write_text(yaml.safe_dump(dict(_old(yaml.safe_load(path.read_text()), path.parent))))
    return copy


def _old(said: Manifest, folder: Path) -> Iterator[tuple[str, Any]]:
    for field, value in said.items():
        match field:
            case "resources":
                yield "bases", [name for name in value if (folder / name).is_dir()]
                yield "resources", [name for name in value if not (folder / name).is_dir()]
            case "patches":
                yield "patchesStrategicMerge", [patch["path"] for patch in value]
            case _:
                yield field, value


def main(folder: Path) -> None:
    """Write each overlay to a file of its name."""
    for overlay in OVERLAYS:
        (folder / f"{overlay}.yaml").write_text(rendered(overlay))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
