"""The overlays pass our own check, and each check finds what it is there for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Final

import kubernetes_validate  # type: ignore[import-untyped]  # it ships no types
import pytest

from tests.k8s.check import CHECKS, findings
from tests.k8s.objects import named
from tests.k8s.rendering import K8S, KUBECTL, MISSING, OVERLAYS, Manifest, manifests, rendered
from tests.k8s.rule import RULE, written

pytestmark = pytest.mark.skipif(KUBECTL is None, reason=MISSING)
# Of others, whose schemas kubernetes-validate does not have: our own check reads what they name.
FOREIGN: Final = {"ServiceMonitor", "PrometheusRule", "HTTPRoute", "BackendTrafficPolicy"}
API: Final = "bulkhead-api"
Change = Callable[[list[Manifest]], object]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_has_no_findings(overlay: str) -> None:
    assert findings(manifests(overlay)) == []


def test_the_overlays_have_only_fields_that_kubernetes_knows() -> None:
    """Each object once, of those that several overlays have."""
    different = {json.dumps(manifest, sort_keys=True) for overlay in OVERLAYS for manifest in manifests(overlay)}
    for manifest in map(json.loads, sorted(different)):
        if manifest["kind"] not in FOREIGN:
            kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_validation_finds_a_field_that_is_not_there() -> None:
    deployment = named("Deployment", manifests("restricted"))[API]
    deployment["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def test_every_skip_of_a_check_has_a_reason() -> None:
    for overlay in OVERLAYS:
        for skip in re.findall(r"checkov\.io/skip.*", rendered(overlay)):
            assert re.search(r": CKV2?_K8S_\d+=\S+ \S+", skip), skip


def test_overlays_differ_where_they_say() -> None:
    """By overlay: the sandbox that is named, the seccomp profile, the users, the /proc, the runtime class."""
    differences = {overlay: _differences(manifests(overlay)) for overlay in OVERLAYS}
    assert differences == {
        "dev": ("auto", "RuntimeDefault", None, None, None),
        "restricted": ("landlock", "RuntimeDefault", None, None, None),
        "bubblewrap": ("bubblewrap", "Localhost", False, "Unmasked", None),
        "gvisor": ("auto", "RuntimeDefault", None, None, "gvisor"),
    }


def _differences(found: list[Manifest]) -> tuple[Any, ...]:
    pod = named("Deployment", found)[API]["spec"]["template"]["spec"]
    config = next(each for name, each in named("ConfigMap", found).items() if "dashboards" not in name)
    profile = pod["securityContext"]["seccompProfile"]
    proc = pod["containers"][0]["securityContext"].get("procMount")
    return (
        config["data"]["BULKHEAD_SANDBOX"],
        profile["type"],
        pod.get("hostUsers"),
        proc,
        pod.get("runtimeClassName"),
    )


def test_the_rules_are_those_of_prometheus() -> None:
    assert RULE.read_text() == written(), "run `python -m tests.k8s.rule`"


def test_every_dashboard_is_in_the_config_map() -> None:
    found = named("ConfigMap", manifests("restricted"))
    (dashboards,) = [each for name, each in found.items() if "dashboards" in name]
    files = {path.name: path.read_text() for path in (K8S / "monitoring" / "dashboards").glob("*.json")}
    assert dashboards["data"] == files
    assert dashboards["metadata"]["labels"] == {"grafana_dashboard": "1"}


# What the checks find


def _pod(found: list[Manifest], kind: str = "Deployment", name: str = API) -> Manifest:
    pod: Manifest = named(kind, found)[name]["spec"]["template"]["spec"]
    return pod


def _main(found: list[Manifest]) -> Manifest:
    main: Manifest = _pod(found)["containers"][0]
    return main


def _relay(found: list[Manifest]) -> Manifest:
    relay: Manifest = _pod(found)["initContainers"][0]
    return relay


def _config(found: list[Manifest]) -> dict[str, str]:
    maps = named("ConfigMap", found)
    data: dict[str, str] = next(each["data"] for name, each in maps.items() if "dashboards" not in name)
    return data


def _spec(found: list[Manifest], kind: str, name: str = API) -> Manifest:
    spec: Manifest = named(kind, found)[name]["spec"]
    return spec


def _put(holder: Callable[[list[Manifest]], Any], **changes: Any) -> Change:
    return lambda found: holder(found).update(changes)


def _without(holder: Callable[[list[Manifest]], Any], key: Any) -> Change:
    return lambda found: holder(found).pop(key)


def _context(of: Callable[[list[Manifest]], Manifest]) -> Callable[[list[Manifest]], Any]:
    return lambda found: of(found)["securityContext"]


def _object(kind: str, name: str = API) -> Callable[[list[Manifest]], Any]:
    return lambda found: _spec(found, kind, name)


def _drop(kind: str, name: str) -> Change:
    return lambda found: found.remove(named(kind, found)[name])


def _secret(found: list[Manifest]) -> None:
    found.append({"kind": "Secret", "metadata": {"name": "bulkhead", "namespace": "bulkhead"}, "data": {"a": "Yg=="}})


def _limit(found: list[Manifest]) -> Any:
    return _relay(found)["resources"]["limits"]


def _variable(name: str) -> Callable[[list[Manifest]], Any]:
    return lambda found: next(each for each in _main(found)["env"] if each["name"] == name)


def _route(found: list[Manifest]) -> Any:
    return _spec(found, "HTTPRoute", "bulkhead")["rules"][0]["backendRefs"][0]


# The check, what is changed, and what it must say.
FOUND: Final[list[tuple[str, Change, str]]] = [
    ("host", _put(_pod, hostNetwork=True), "hostNetwork"),
    ("host", lambda found: _pod(found)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "hostPath"),
    ("host", lambda found: _main(found)["ports"][0].update(hostPort=8000), "hostPort"),
    ("host", lambda found: _main(found)["livenessProbe"]["httpGet"].update(host="10.0.0.1"), "another host"),
    ("host", lambda found: _pod(found)["securityContext"].update(sysctls=[{"name": "a", "value": "b"}]), "sysctls"),
    ("user", _put(_context(_pod), runAsNonRoot=False), "may run as root"),
    ("user", _without(_context(_pod), "runAsUser"), "is not 10001"),
    ("user", _put(_context(_relay), runAsUser=0), "relay: is not 10001"),
    ("rights", _without(_context(_main), "allowPrivilegeEscalation"), "may gain privileges"),
    ("rights", _put(_context(_main), privileged=True), "privileged"),
    ("rights", _put(_context(_relay), capabilities={"drop": []}), "relay: has capabilities"),
    ("rights", _put(_context(_main), capabilities={"drop": ["ALL"], "add": ["NET_ADMIN"]}), "has capabilities"),
    ("rights", _put(_context(_main), procMount="Unmasked"), "procMount"),
    ("rights", _put(_context(_relay), readOnlyRootFilesystem=False), "may write to its root"),
    ("rights", _put(_context(_pod), seLinuxOptions={"type": "spc_t"}), "seLinuxOptions"),
    ("seccomp", _without(_context(_pod), "seccompProfile"), "no seccomp profile"),
    ("seccomp", _put(_context(_relay), seccompProfile={"type": "Unconfined"}), "relay: no seccomp profile"),
    ("seccomp", _put(_context(_pod), seccompProfile={"type": "Localhost", "localhostProfile": "x"}), "than ours"),
    ("tokens", _without(_pod, "automountServiceAccountToken"), "has a token"),
    ("tokens", _drop("ServiceAccount", API), "of no account"),
    ("tokens", _put(lambda found: named("ServiceAccount", found)[API], automountServiceAccountToken=True), "hands out"),
    ("namespace", lambda found: named("Namespace", found)["bulkhead"]["metadata"].pop("labels"), "not enforce"),
    ("namespace", lambda found: named("Service", found)[API]["metadata"].update(namespace="default"), "not in the"),
    ("images", _put(_main, image="registry.example.com/bulkhead:latest"), "no digest"),
    ("amounts", _put(_limit, memory="1Mi"), "asks for more memory"),
    ("amounts", _without(_limit, "cpu"), "no request or limit of cpu"),
    ("secrets", _secret, "is committed"),
    ("secrets", lambda found: _main(found)["envFrom"].append({"secretRef": {"name": "bulkhead"}}), "a whole Secret"),
    (
        "secrets",
        lambda found: _variable("BULKHEAD_ROOT_KEYS")(found)["valueFrom"]["secretKeyRef"].update(name="bulkhead-owner"),
        "knows the owner's URL",
    ),
    ("selectors", _put(_object("Service"), selector={"app.kubernetes.io/name": "bulkhead"}), "of that name alone"),
    ("selectors", lambda found: _spec(found, "Deployment")["selector"]["matchLabels"].update(a="b"), "its own pods"),
    ("selectors", _put(_object("PodDisruptionBudget"), selector={"matchLabels": {"a": "b"}}), "of that name alone"),
    ("selectors", lambda found: _pod(found)["topologySpreadConstraints"][0].pop("labelSelector"), "does not spread"),
    ("targets", lambda found: _object("HorizontalPodAutoscaler")(found)["scaleTargetRef"].update(name="x"), "nothing"),
    ("targets", _drop("PodDisruptionBudget", API), "has no PodDisruptionBudget"),
    ("targets", _put(_route, port=80), "leads nowhere"),
    ("targets", _drop("HTTPRoute", "bulkhead"), "is of no route"),
    ("ports", lambda found: _main(found)["readinessProbe"]["httpGet"].update(port="web"), "asks port web"),
    ("ports", lambda found: _object("Service")(found)["ports"][0].update(targetPort="web"), "port web is not there"),
    ("scraped", _put(_object("ServiceMonitor", "bulkhead"), selector={"matchLabels": {"a": "b"}}), "each Deployment"),
    (
        "scraped",
        lambda found: _object("ServiceMonitor", "bulkhead")(found)["endpoints"][0].update(port="web"),
        "each Deployment at web",
    ),
    ("listening", lambda found: _main(found)["ports"][0].update(containerPort=80), "listens at 8000"),
    ("listening", lambda found: _config(found).update(BULKHEAD_PORT="9000"), "listens at 9000"),
    ("probes", _without(_main, "readinessProbe"), "readinessProbe does not ask /readyz"),
    ("probes", lambda found: _main(found)["livenessProbe"]["httpGet"].update(path="/readyz"), "not ask /healthz"),
    ("volumes", lambda found: _pod(found)["volumes"].pop(0), "there is no volume"),
    ("volumes", _drop("PersistentVolumeClaim", "bulkhead-workspaces"), "there is no claim"),
    (
        "volumes",
        _put(_object("PersistentVolumeClaim", "bulkhead-workspaces"), accessModes=["ReadWriteOnce"]),
        "pods of several nodes",
    ),
    ("heads", lambda found: _config(found).update(BULKHEAD_AUDIT_HEADS_FILE="/run/bulkhead/heads"), "on no claim"),
    ("heads", lambda found: _config(found).pop("BULKHEAD_AUDIT_HEADS_FILE"), "on no claim"),
    ("relay", _without(_relay, "restartPolicy"), "no relay beside it"),
    ("relay", lambda found: _relay(found)["volumeMounts"][0].update(name="tmp"), "listens elsewhere"),
    ("relay", lambda found: _relay(found)["env"][0].update(value="/elsewhere/egress.sock"), "listens elsewhere"),
    ("settings", lambda found: _config(found).update(BULKHEAD_WORKER_RUN="2"), "no setting BULKHEAD_WORKER_RUN"),
    ("settings", lambda found: _config(found).update(BULKHEAD_SANDBOX="none"), "may not be so"),
    ("settings", lambda found: _config(found).pop("BULKHEAD_TLS_IN_FRONT"), "needs BULKHEAD_TLS_IN_FRONT"),
    ("settings", _put(_main, args=["serv"]), "needs a command"),
    (
        "settings",
        lambda found: _main(found)["env"].remove(_variable("BULKHEAD_ROOT_KEYS")(found)),
        "needs BULKHEAD_ROOT_KEYS",
    ),
    ("proxies", lambda found: _config(found).update(BULKHEAD_TRUSTED_PROXIES="10.0.0.0/8"), "all of 10.0.0.0/8"),
    ("proxies", lambda found: _config(found).update(BULKHEAD_TRUSTED_PROXIES="10.1.2.0/24,0.0.0.0/0"), "0.0.0.0/0"),
    ("strangers", _without(_pod, "enableServiceLinks"), "is told of Services"),
    ("times", _put(_pod, terminationGracePeriodSeconds=30), "before it has drained"),
    ("times", _without(_main, "lifecycle"), "still sent"),
    ("times", lambda found: _config(found).update(BULKHEAD_DRAIN_S="50"), "before it has drained"),
    ("times", lambda found: _config(found).update(BULKHEAD_REPLICAS="1"), "BULKHEAD_REPLICAS is not 10"),
    ("covered", lambda found: named("Deployment", found)[API]["spec"]["template"]["metadata"].pop("labels"), "no pod"),
    ("covered", _put(_object("NetworkPolicy", "nobody"), policyTypes=["Egress"]), "bounds its Ingress"),
    (
        "covered",
        lambda found: _spec(found, "NetworkPolicy", "front-end-to-api")["ingress"][0]["ports"][0].update(port="web"),
        "web is not there",
    ),
]


@pytest.mark.parametrize(("check", "change", "says"), FOUND, ids=[f"{name}: {says}" for name, _, says in FOUND])
def test_a_check_finds_what_it_is_there_for(check: str, change: Change, says: str) -> None:
    found = manifests("restricted")
    change(found)
    assert any(says in finding for finding in CHECKS[check](found))


def test_every_check_has_something_that_it_must_find() -> None:
    assert {check for check, _, _ in FOUND} == set(CHECKS)
