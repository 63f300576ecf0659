"""Pod Security `restricted` on pod templates, where the API server only warns; and what we ask beyond it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tests.k8s.objects import Check, Pods, named, pods
from tests.k8s.rendering import Manifest

_VOLUMES: Final = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"),
}
_HOST: Final = ("hostNetwork", "hostPID", "hostIPC")
_PROFILES: Final = {"RuntimeDefault", "Localhost"}
_PINNED: Final = re.compile(r".+@sha256:[0-9a-f]{64}")
_UNITS: Final = {"": 1.0, "m": 0.001, "k": 1e3, "M": 1e6, "G": 1e9, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30}
_MODES: Final = ("enforce", "audit", "warn")


def _containers(found: Sequence[Manifest]) -> Iterator[tuple[str, Pods, Manifest]]:
    for each in pods(found):
        for container in each.containers:
            yield f"{each.name} {container['name']}", each, container


def _set(pod: Pods, container: Manifest, name: str) -> Any:
    """A container's own, else what the pod says for all."""
    own = container.get("securityContext", {}).get(name)
    return own if own is not None else pod.spec.get("securityContext", {}).get(name)


def host(found: Sequence[Manifest]) -> Iterator[str]:
    """No namespace, port, folder, setting or probe of the host."""
    for each in pods(found):
        yield from (f"{each.name}: {name}" for name in _HOST if each.spec.get(name))
        if each.spec.get("securityContext", {}).get("sysctls"):
            yield f"{each.name}: sysctls"
        for volume in each.spec.get("volumes", []):
            yield from (f"{each.name}: volume of {kind}" for kind in volume.keys() - {"name"} - _VOLUMES)
    for name, _, container in _containers(found):
        if any("hostPort" in port for port in container.get("ports", [])):
            yield f"{name}: hostPort"
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            if "host" in container.get(probe, {}).get("httpGet", {}):
                yield f"{name}: {probe} of another host"


def user(found: Sequence[Manifest]) -> Iterator[str]:
    """An ordinary one, by number."""
    for name, pod, container in _containers(found):
        if _set(pod, container, "runAsNonRoot") is not True:
            yield f"{name}: may run as root"
        if _set(pod, container, "runAsUser") != 10001 or _set(pod, container, "runAsGroup") != 10001:
            yield f"{name}: is not 10001:10001"


def rights(found: Sequence[Manifest]) -> Iterator[str]:
    """None, and no way to get any."""
    for name, pod, container in _containers(found):
        own = container.get("securityContext", {})
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{name}: may gain privileges"
        if own.get("privileged"):
            yield f"{name}: privileged"
        if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
            yield f"{name}: has capabilities"
        # As the standard has it since Kubernetes 1.35.
        if own.get("procMount", "Default") != "Default" and pod.spec.get("hostUsers") is not False:
            yield f"{name}: procMount"
        if own.get("readOnlyRootFilesystem") is not True:
            yield f"{name}: may write to its root"
        for kind in ("seLinuxOptions", "windowsOptions", "appArmorProfile"):
            if _set(pod, container, kind):
                yield f"{name}: {kind}"


def seccomp(found: Sequence[Manifest]) -> Iterator[str]:
    """A profile that filters something; of ours, one that is in k8s/seccomp."""
    for name, pod, container in _containers(found):
        profile = _set(pod, container, "seccompProfile") or {}
        if profile.get("type") not in _PROFILES:
            yield f"{name}: no seccomp profile"
        elif profile["type"] == "Localhost" and profile.get("localhostProfile") != "profiles/bulkhead.json":
            yield f"{name}: another seccomp profile than ours"


def tokens(found: Sequence[Manifest]) -> Iterator[str]:
    """Nobody has one of the API server."""
    accounts = named("ServiceAccount", found)
    for name, account in accounts.items():
        if account.get("automountServiceAccountToken") is not False:
            yield f"{name}: hands out its token"
    for each in pods(found):
        if each.spec.get("automountServiceAccountToken") is not False:
            yield f"{each.name}: has a token"
        if each.spec.get("serviceAccountName") not in accounts:
            yield f"{each.name}: is of no account of ours"


def namespace(found: Sequence[Manifest]) -> Iterator[str]:
    """The API server enforces the same, and all is in it."""
    (own,) = named("Namespace", found).values()
    for mode in _MODES:
        if own["metadata"].get("labels", {}).get(f"pod-security.kubernetes.io/{mode}") != "restricted":
            yield f"the namespace does not {mode} restricted"
    for each in found:
        if each["kind"] != "Namespace" and each["metadata"].get("namespace") != own["metadata"]["name"]:
            yield f"{each['kind']} {each['metadata']['name']}: is not in the namespace"


def images(found: Sequence[Manifest]) -> Iterator[str]:
    """By digest, or never pulled: what was loaded into a node by hand has none."""
    for name, _, container in _containers(found):
        if not _PINNED.fullmatch(container["image"]) and container.get("imagePullPolicy") != "Never":
            yield f"{name}: {container['image']} has no digest"


def amounts(found: Sequence[Manifest]) -> Iterator[str]:
    """Each container asks for something and is bounded, and not to less than it asks for."""
    for name, _, container in _containers(found):
        asked, bounds = (container.get("resources", {}).get(kind, {}) for kind in ("requests", "limits"))
        for kind in ("cpu", "memory", "ephemeral-storage"):
            if kind not in asked or kind not in bounds:
                yield f"{name}: no request or limit of {kind}"
            elif amount(asked[kind]) > amount(bounds[kind]):
                yield f"{name}: asks for more {kind} than its limit"


def amount(text: object) -> float:
    """A quantity of Kubernetes."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert match is not None, text
    return float(match[1]) * _UNITS[match[2]]


def secrets(found: Sequence[Manifest]) -> Iterator[str]:
    """No value of one is committed, and only what migrates knows the owner of the schema."""
    yield from (f"Secret {name}: is committed" for name in named("Secret", found))
    for each in pods(found):
        of = {ref["name"] for container in each.containers for ref in _references(container, "secretKeyRef")}
        if "bulkhead-owner" in of and each.owner["kind"] != "Job":
            yield f"{each.name}: knows the owner's URL"
        if any(_references(container, "secretRef") for container in each.containers):
            yield f"{each.name}: is given a whole Secret"


def _references(container: Manifest, kind: str) -> list[Mapping[str, Any]]:
    sources = [variable.get("valueFrom", {}) for variable in container.get("env", [])]
    return [each[kind] for each in (*sources, *container.get("envFrom", [])) if kind in each]


CHECKS: Final[Mapping[str, Check]] = {
    check.__name__: check for check in (host, user, rights, seccomp, tokens, namespace, images, amounts, secrets)
}
