"""What one object of a manifest says of another is so: selectors, ports, volumes, settings, times."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from ipaddress import ip_network
from typing import Any, Final

from pydantic import ValidationError

from app.settings import Settings
from tests.k8s.objects import Check, Pods, named, pods, selects
from tests.k8s.rendering import Manifest

_PROBES: Final = ("startupProbe", "livenessProbe", "readinessProbe")
_PATHS: Final = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
# Of the libraries that connect to Postgres.
_OF_OTHERS: Final = {"PGSSLROOTCERT"}
_URLS: Final = {f"BULKHEAD_DATABASE_{role}_URL" for role in ("APP", "PLATFORM", "SEALER")}
_RUNS: Final = {
    *_URLS,
    *(
        f"BULKHEAD_{name}"
        for name in (
            *("ROOT_KEYS", "MODEL_API_KEY", "METRICS_TOKEN", "HOST", "TLS_IN_FRONT", "DATA_DIR", "EGRESS_SOCKET"),
            *("SANDBOX", "DRAIN_S", "REPLICAS"),
        )
    ),
}
# What each command cannot do without, or must not be left to its default.
REQUIRED: Final[Mapping[str, set[str]]] = {
    "serve": {*_RUNS, "BULKHEAD_PUBLIC_URL", "BULKHEAD_TRUSTED_PROXIES", "BULKHEAD_AUDIT_HEADS_FILE"},
    "worker": _RUNS,
    "egress": {"BULKHEAD_EGRESS_SOCKET"},
    "migrate": {*_URLS, "BULKHEAD_DATABASE_OWNER_URL"},
    "admin bootstrap": {*_URLS, "BULKHEAD_DATABASE_OWNER_URL", "BULKHEAD_ROOT_KEYS"},
}
# A front end's pods have this many bits of addresses at most: not a cluster's whole network.
_FRONT_END_BITS: Final = 12
# After a run's last moment, for answers and for the record.
_CLOSING_S: Final = 10


def selectors(found: Sequence[Manifest]) -> Iterator[str]:
    """Each takes the pods of one kind that it is meant for, and no other."""
    made = pods(found)
    for each in made:
        own = each.owner["spec"].get("selector")
        if each.owner["kind"] == "Deployment" and not selects(own, each.labels):
            yield f"{each.name}: does not select its own pods"
        for spread in each.spec.get("topologySpreadConstraints", []):
            if not selects(spread.get("labelSelector"), each.labels):
                yield f"{each.name}: does not spread its own pods"
    for kind in ("Service", "PodDisruptionBudget"):
        for name, each_object in named(kind, found).items():
            selector = each_object["spec"]["selector"]
            selector = {"matchLabels": selector} if kind == "Service" else selector
            if [each.name for each in made if selects(selector, each.labels)] != [name]:
                yield f"{kind} {name}: does not select the pods of that name alone"


def targets(found: Sequence[Manifest]) -> Iterator[str]:
    """What is named is there."""
    deployments, services = named("Deployment", found), named("Service", found)
    scaled = named("HorizontalPodAutoscaler", found)
    for name, each in scaled.items():
        if each["spec"]["scaleTargetRef"]["name"] not in deployments:
            yield f"HorizontalPodAutoscaler {name}: scales nothing"
    for kind in ("HorizontalPodAutoscaler", "PodDisruptionBudget"):
        yield from (f"{name}: has no {kind}" for name in deployments.keys() - named(kind, found).keys())
    for name, each in named("HTTPRoute", found).items():
        for rule in each["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                service = services.get(backend["name"], {"spec": {"ports": []}})
                if backend["port"] not in [port["port"] for port in service["spec"]["ports"]]:
                    yield f"HTTPRoute {name}: leads nowhere"
    for name, each in named("BackendTrafficPolicy", found).items():
        if {target["name"] for target in each["spec"]["targetRefs"]} - named("HTTPRoute", found).keys():
            yield f"BackendTrafficPolicy {name}: is of no route"


def ports(found: Sequence[Manifest]) -> Iterator[str]:
    """What is asked by a name or a number listens there."""
    made = pods(found)
    for each in made:
        for container in each.containers:
            for probe in _PROBES:
                port = container.get(probe, {}).get("httpGet", {}).get("port")
                if port is not None and not _listens(container, port):
                    yield f"{each.name}: {probe} asks port {port}"
    for name, service in named("Service", found).items():
        behind = [each for each in made if selects({"matchLabels": service["spec"]["selector"]}, each.labels)]
        for port in service["spec"]["ports"]:
            if not all(each.ports(port["targetPort"]) for each in behind):
                yield f"Service {name}: port {port['targetPort']} is not there"


def scraped(found: Sequence[Manifest]) -> Iterator[str]:
    """Prometheus asks every process, once."""
    services = list(named("Service", found).values())
    for name, monitor in named("ServiceMonitor", found).items():
        watched = [each for each in services if selects(monitor["spec"]["selector"], each["metadata"]["labels"])]
        of = [port["name"] for service in watched for port in service["spec"]["ports"]]
        for endpoint in monitor["spec"]["endpoints"]:
            if of != [endpoint["port"]] * len(named("Deployment", found)):
                yield f"ServiceMonitor {name}: does not ask each Deployment at {endpoint['port']}"


def _listens(container: Manifest, port: str | int) -> bool:
    return any(port in (each.get("name"), each["containerPort"]) for each in container.get("ports", []))


def listening(found: Sequence[Manifest]) -> Iterator[str]:
    """The port that is declared is the one that the command takes."""
    fields = Settings.model_fields
    for each in pods(found):
        for container in each.mains:
            own, command = _values(container, found), " ".join(container["args"])
            setting = {"serve": "port", "worker": "worker_port"}.get(command)
            if setting is not None:
                port = int(own.get(f"BULKHEAD_{setting.upper()}") or fields[setting].default)
                if each.ports("http") != [port]:
                    yield f"{each.name}: {command} listens at {port}"


def probes(found: Sequence[Manifest]) -> Iterator[str]:
    """What runs for long is probed, each for what it is there for."""
    for each in pods(found):
        if each.owner["kind"] != "Deployment":
            continue
        for container in each.mains:
            for probe, path in _PATHS.items():
                if container.get(probe, {}).get("httpGet", {}).get("path") != path:
                    yield f"{each.name}: {probe} does not ask {path}"


def volumes(found: Sequence[Manifest]) -> Iterator[str]:
    """Each mount has its volume, and each volume its claim, of all nodes where there may be more than one pod."""
    claims = named("PersistentVolumeClaim", found)
    for each in pods(found):
        held = {volume["name"]: volume for volume in each.spec.get("volumes", [])}
        for container in each.containers:
            missing = {mount["name"] for mount in container.get("volumeMounts", [])} - held.keys()
            yield from (f"{each.name} {container['name']}: there is no volume {name}" for name in missing)
        wanted = {volume["persistentVolumeClaim"]["claimName"] for volume in _claimed(held)}
        yield from (f"{each.name}: there is no claim {name}" for name in wanted - claims.keys())
    most = sum(each["spec"]["maxReplicas"] for each in named("HorizontalPodAutoscaler", found).values())
    for name, claim in claims.items():
        if most > 2 and claim["spec"]["accessModes"] != ["ReadWriteMany"]:
            yield f"{name}: cannot be used by pods of several nodes"


def _claimed(held: Mapping[str, Manifest]) -> Iterator[Manifest]:
    return (volume for volume in held.values() if "persistentVolumeClaim" in volume)


def heads(found: Sequence[Manifest]) -> Iterator[str]:
    """What proves the record complete is not lost with a pod."""
    for each in pods(found):
        kept = {volume["name"] for volume in each.spec.get("volumes", []) if "persistentVolumeClaim" in volume}
        for container in each.mains:
            place = _place(container, found, "BULKHEAD_AUDIT_HEADS_FILE")
            if container["args"] == ["serve"] and (place is None or place[0] not in kept):
                yield f"{each.name}: the signed heads are on no claim"


def relay(found: Sequence[Manifest]) -> Iterator[str]:
    """Who runs tools has the relay beside it, as a sidecar, on the same folder."""
    for each in pods(found):
        if each.owner["kind"] != "Deployment":
            continue
        beside = [sidecar for sidecar in each.spec.get("initContainers", []) if sidecar["args"] == ["egress"]]
        if [sidecar.get("restartPolicy") for sidecar in beside] != ["Always"]:
            yield f"{each.name}: has no relay beside it"
            continue
        folders = {_place(container, found, "BULKHEAD_EGRESS_SOCKET") for container in (*beside, *each.mains)}
        if len(folders) != 1 or None in folders:
            yield f"{each.name}: its relay listens elsewhere"


def _place(container: Manifest, found: Sequence[Manifest], setting: str) -> tuple[str, str] | None:
    """The volume that what is set lies on, and where in it."""
    path = str(_values(container, found).get(setting))
    for mount in container.get("volumeMounts", []):
        if path.startswith(mount["mountPath"] + "/"):
            return mount["name"], path.removeprefix(mount["mountPath"])
    return None


def settings(found: Sequence[Manifest]) -> Iterator[str]:
    """What is set is a setting, with a value that it may have, and what a command needs is set."""
    known = {f"BULKHEAD_{name}".upper() for name in Settings.model_fields} | _OF_OTHERS
    for each in pods(found):
        for container in each.containers:
            name, values = f"{each.name} {container['name']}", _values(container, found)
            yield from (f"{name}: there is no setting {unknown}" for unknown in values.keys() - known)
            yield from (f"{name}: needs {needed}" for needed in _needed(container) - values.keys())
            said = {key: value for key, value in values.items() if value and key in known - _OF_OTHERS}
            fields: dict[str, Any] = {key.removeprefix("BULKHEAD_").lower(): value for key, value in said.items()}
            try:
                Settings(_env_file=None, **fields)
            except ValidationError as error:
                yield f"{name}: {error.errors()[0]['loc']} may not be so"


def _needed(container: Manifest) -> set[str]:
    return REQUIRED.get(" ".join(container["args"]), {"a command that is known"})


def _values(container: Manifest, found: Sequence[Manifest]) -> dict[str, str]:
    """By name; a secret's is a stand-in, one that need not be there is left out."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= named("ConfigMap", found).get(source["configMapRef"]["name"], {"data": {}})["data"]
    for variable in container.get("env", []):
        of = variable.get("valueFrom", {}).get("secretKeyRef", {})
        if not of.get("optional"):
            values[variable["name"]] = variable.get("value") or ("" if of else "unsaid")
    return values


def proxies(found: Sequence[Manifest]) -> Iterator[str]:
    """Who may say whose address a request has is a few addresses."""
    for each in pods(found):
        for container in each.containers:
            said = _values(container, found).get("BULKHEAD_TRUSTED_PROXIES", "")
            networks = [ip_network(part.strip()) for part in said.split(",") if part.strip()]
            for wide in (net for net in networks if net.max_prefixlen - net.prefixlen > _FRONT_END_BITS):
                yield f"{each.name} {container['name']}: believes all of {wide}"


def strangers(found: Sequence[Manifest]) -> Iterator[str]:
    """Kubernetes adds nothing to the environment: the variables of a Service `bulkhead-api` look like settings of ours,
    and a service that is told of one that it does not know does not start.
    """
    for each in pods(found):
        if each.spec.get("enableServiceLinks") is not False:
            yield f"{each.name}: is told of Services by variables"


def times(found: Sequence[Manifest]) -> Iterator[str]:
    """A pod is given the time that its runs are, and the limits' parts add up to the whole."""
    for each in pods(found):
        if each.owner["kind"] != "Deployment":
            continue
        (main,) = each.mains
        values = _values(main, found)
        sleep = main.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if sleep < 3:
            yield f"{each.name}: ends while requests are still sent to it"
        if each.spec.get("terminationGracePeriodSeconds", 30) < sleep + int(values["BULKHEAD_DRAIN_S"]) + _CLOSING_S:
            yield f"{each.name}: is killed before it has drained"
    most = named("HorizontalPodAutoscaler", found)["bulkhead-api"]["spec"]["maxReplicas"]
    for name, config in named("ConfigMap", found).items():
        if re.fullmatch(r"bulkhead-[a-z0-9]{10}", name) and config["data"].get("BULKHEAD_REPLICAS") != str(most):
            yield f"{name}: BULKHEAD_REPLICAS is not {most}"


def covered(found: Sequence[Manifest]) -> Iterator[str]:
    """Each pod is under policies of both directions, and each policy is of some pod."""
    policies = named("NetworkPolicy", found)
    for each in pods(found):
        of = [policy["spec"] for policy in policies.values() if selects(policy["spec"]["podSelector"], each.labels)]
        for direction in ("Ingress", "Egress"):
            if not any(direction in spec["policyTypes"] for spec in of):
                yield f"{each.name}: no NetworkPolicy bounds its {direction}"
    for name, policy in policies.items():
        of_pods = [each for each in pods(found) if selects(policy["spec"]["podSelector"], each.labels)]
        if not of_pods:
            yield f"NetworkPolicy {name}: is of no pod"
        yield from (f"NetworkPolicy {name}: {port} is not there" for port in _unknown_ports(policy, of_pods))


def _unknown_ports(policy: Manifest, of_pods: Sequence[Pods]) -> set[Any]:
    rules = policy["spec"].get("ingress", [])
    said = {port.get("port") for rule in rules for port in rule.get("ports", [])}
    return {port for port in said if isinstance(port, str) and not all(each.ports(port) for each in of_pods)}


CHECKS: Final[Mapping[str, Check]] = {
    check.__name__: check
    for check in (
        *(selectors, targets, ports, scraped, listening, probes, volumes, heads, relay, settings, proxies, strangers),
        *(times, covered),
    )
}
