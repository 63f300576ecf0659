"""What the pages on deployment name is in the manifests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.k8s.objects import pods
from tests.k8s.rendering import KUBECTL, MISSING, ROOT, manifests

PAGES: Final = ("docs/deploy/kubernetes.md", "docs/deploy/upgrades.md")


def paths(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w/])k8s/[\w./-]*\w", text))


def objects(text: str) -> set[tuple[str, str]]:
    """As kubectl is told them, or as the text calls them."""
    told = re.findall(r"\b(job|deployment)/([\w-]+)", text)
    return {(kind.lower(), name) for kind, name in (*told, *re.findall(r"\b(Deployment|Job) `([\w-]+)`", text))}


def keys(text: str) -> dict[str, set[str]]:
    """Of each Secret that the text makes, those that it is given."""
    made = re.findall(r"create secret generic ([\w-]+)((?:\s+--from-file=[\w-]+)+)", text.replace("\\\n", ""))
    return {name: set(re.findall(r"--from-file=([\w-]+)", files)) for name, files in made}


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_are_there(page: str) -> None:
    named = paths((ROOT / page).read_text())
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.skipif(KUBECTL is None, reason=MISSING)
@pytest.mark.parametrize("page", PAGES)
def test_the_objects_that_a_page_names_are_there(page: str) -> None:
    there = {(each["kind"].lower(), each["metadata"]["name"]) for each in manifests("restricted")}
    named = objects((ROOT / page).read_text())
    assert named
    assert named - there == set()


@pytest.mark.skipif(KUBECTL is None, reason=MISSING)
def test_the_secrets_that_the_page_makes_are_those_that_pods_are_given() -> None:
    given: dict[str, set[str]] = {}
    for reference in _secret_keys():
        given.setdefault(reference["name"], set()).add(reference["key"])
    assert keys((ROOT / PAGES[0]).read_text()) == given


def _secret_keys() -> Iterator[dict[str, Any]]:
    found = manifests("restricted")
    for each in pods(found):
        for container in each.containers:
            for variable in container.get("env", []):
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    yield variable["valueFrom"]["secretKeyRef"]


@pytest.mark.skipif(KUBECTL is None, reason=MISSING)
def test_what_the_procedure_applies_first_is_what_the_migration_needs() -> None:
    """Under its selector, before any pod of the new release starts: else the Job names what is not there yet."""
    (label,) = re.findall(r"--selector (\S+)", (ROOT / PAGES[1]).read_text())
    key, _, value = label.partition("=")
    found = manifests("restricted")
    first = {
        (each["kind"], each["metadata"]["name"])
        for each in found
        if each["metadata"].get("labels", {}).get(key) == value
    }
    job = next(each for each in pods(found) if each.name == "bulkhead-migrate")
    (config,) = (source["configMapRef"]["name"] for source in job.mains[0]["envFrom"])
    jobs = {("Job", each.name) for each in pods(found) if each.owner["kind"] == "Job"}
    assert first == jobs | {("ConfigMap", config), ("ServiceAccount", job.spec["serviceAccountName"])}


def test_a_name_that_is_not_there_is_found() -> None:
    assert paths("see `k8s/none.yaml`.") == {"k8s/none.yaml"}
    assert objects("kubectl logs job/none; the Deployment `bulkhead-none`") == {
        ("job", "none"),
        ("deployment", "bulkhead-none"),
    }
    assert keys("create secret generic a --from-file=b \\\n  --from-file=c") == {"a": {"b", "c"}}
