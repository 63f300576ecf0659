"""What the checks of manifests ask of them again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.k8s.rendering import Manifest

Check = Callable[[Sequence[Manifest]], Iterator[str]]
_TEMPLATED: Final = ("Deployment", "StatefulSet", "DaemonSet", "Job", "ReplicaSet")


@dataclass(frozen=True, slots=True)
class Pods:
    """The pods that one object makes."""

    owner: Manifest
    name: str
    labels: Mapping[str, str]
    spec: Manifest

    @property
    def containers(self) -> list[Manifest]:
        """All of them, sidecars too."""
        return [*self.spec.get("initContainers", []), *self.spec.get("ephemeralContainers", []), *self.mains]

    @property
    def mains(self) -> list[Manifest]:
        """Those that the pod is there for."""
        containers: list[Manifest] = self.spec["containers"]
        return containers

    def ports(self, name: str) -> list[int]:
        """The numbers that a named port has in it."""
        return [
            port["containerPort"]
            for container in self.containers
            for port in container.get("ports", [])
            if port.get("name") == name
        ]


def named(kind: str, found: Sequence[Manifest]) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in found if each["kind"] == kind}


def pods(found: Sequence[Manifest]) -> list[Pods]:
    """Of all objects that make some, and of bare pods."""
    made = []
    for each in found:
        if each["kind"] in _TEMPLATED:
            made.append(_of(each, each["spec"]["template"]))
        elif each["kind"] == "CronJob":
            made.append(_of(each, each["spec"]["jobTemplate"]["spec"]["template"]))
        elif each["kind"] == "Pod":
            made.append(_of(each, each))
    return made


def _of(owner: Manifest, template: Manifest) -> Pods:
    name = owner["metadata"]["name"]
    return Pods(owner, name, template.get("metadata", {}).get("labels", {}), template["spec"])


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """As Kubernetes has it: an empty selector takes all, none takes nothing."""
    if selector is None:
        return False
    equal = all(labels.get(name) == value for name, value in (selector.get("matchLabels") or {}).items())
    return equal and all(_fits(term, labels) for term in selector.get("matchExpressions") or [])


def _fits(term: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    value = labels.get(term["key"])
    match term["operator"]:
        case "In":
            return value in term["values"]
        case "NotIn":
            return value not in term["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case _:
            raise ValueError(term["operator"])
