# ruff: noqa: INP001  a program of the image, not a module
"""Writes what the image consists of, as CycloneDX 1.6, and a list of licences: run in the build, before it is trimmed.

    sbom <pip's installation report> <version of Bulkhead> <folder>

A Python distribution carries the hash of the very wheel that was installed; a package of the system, its version and
the licences that its notice names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

_SYSTEM = "/var/lib/dpkg/status"
_NOTICES = Path("/usr/share/doc")
_LICENSE = re.compile(r"^License: *(\S[^\n]{0,80})$", re.MULTILINE)
_CLASSIFIER = "License :: "


def document(report: dict[str, Any], version: str, *, system: str, release: dict[str, str]) -> dict[str, Any]:
    """The whole bill, its components in the order of their names."""
    components = [*_distributions(report), *_packages(system, release)]
    application = {"type": "application", "bom-ref": "bulkhead", "name": "bulkhead", "version": version}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": application | {"licenses": [{"license": {"id": "Apache-2.0"}}]}},
        "components": sorted(components, key=lambda component: component["bom-ref"]),
    }


def _distributions(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for item in report["install"]:
        name, version = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower(), item["metadata"]["version"]
        reference = f"pkg:pypi/{name}@{version}"
        yield {
            "type": "library",
            "bom-ref": reference,
            "name": name,
            "version": version,
            "purl": reference,
            "hashes": [{"alg": "SHA-256", "content": item["download_info"]["archive_info"]["hashes"]["sha256"]}],
            "licenses": _licenses(_named(item["metadata"])),
        }


def _named(told: dict[str, Any]) -> list[str]:
    """An expression where there is one; else what the classifiers say, else the first line of the free text."""
    if expression := told.get("license_expression"):
        return [expression]
    classified = [line.rpartition(" :: ")[2] for line in told.get("classifier", ()) if line.startswith(_CLASSIFIER)]
    text = (told.get("license") or "").strip().partition("\n")[0]
    return [name for name in classified if name != "OSI Approved"] or ([text[:80]] if text else [])


def _packages(status: str, release: dict[str, str]) -> Iterator[dict[str, Any]]:
    distribution = f"{release['ID']}-{release['VERSION_ID']}"
    for paragraph in status.strip().split("\n\n"):
        told = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " ")
        if told.get("Status") != "install ok installed":
            continue
        name, version = told["Package"], told["Version"].replace("+", "%2B").replace(":", "%3A")
        reference = f"pkg:deb/{release['ID']}/{name}@{version}?arch={told['Architecture']}&distro={distribution}"
        notice = _NOTICES / name / "copyright"
        text = notice.read_text(errors="replace") if notice.is_file() else ""
        yield {
            "type": "library",
            "bom-ref": reference,
            "name": name,
            "version": told["Version"],
            "purl": reference,
            "licenses": _licenses(sorted(set(_LICENSE.findall(text)))),
        }


def _licenses(names: list[str]) -> list[dict[str, Any]]:
    return [{"license": {"name": name}} for name in names]


def listing(bill: dict[str, Any]) -> str:
    """A line a component: name, version, licences."""
    lines = []
    for component in bill["components"]:
        names = ", ".join(entry["license"]["name"] for entry in component["licenses"]) or "not said: see its notice"
        lines.append(f"{component['name']}\t{component['version']}\t{names}\n")
    return "".join(lines)


def _release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def _check_complete(report: dict[str, Any]) -> None:
    """What pip says that it has installed is what is there."""
    said = {re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower() for item in report["install"]}
    found = {re.sub(r"[-_.]+", "-", each.metadata["Name"]).lower() for each in metadata.distributions()} - {"pip"}
    if said != found:
        sys.exit(f"The report and the installation differ: {sorted(said ^ found)}")


if __name__ == "__main__":
    told = json.loads(Path(sys.argv[1]).read_text())
    _check_complete(told)
    made = document(told, sys.argv[2], system=Path(_SYSTEM).read_text(), release=_release())
    folder = Path(sys.argv[3])
    folder.mkdir(parents=True)
    (folder / "sbom.cdx.json").write_text(json.dumps(made, indent=1) + "\n")
    (folder / "licenses.txt").write_text(listing(made))
