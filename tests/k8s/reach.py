"""Who may reach whom by the NetworkPolicies of a manifest: every pair of our pods and named others, port by port."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from itertools import groupby, product
from typing import Any, Final

from tests.k8s.objects import Pods, named, pods, selects
from tests.k8s.rendering import Manifest

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address
Port = tuple[str, int]
Row = tuple[str, str, str]
"""Who, whom, and at which ports."""

OURS: Final = "bulkhead"
_ANY_POD: Final = ip_address("10.1.2.3")
_NAME: Final = "app.kubernetes.io/name"
_COMPONENT: Final = "app.kubernetes.io/component"
# Name, namespace and label of the peers that policies are to let through.
_KNOWN: Final = (
    ("front end", "front-end", {_NAME: "front-end"}),
    ("Prometheus", "monitoring", {_NAME: "prometheus"}),
    ("Postgres", "data", {_NAME: "postgres"}),
    ("Valkey", "data", {_NAME: "valkey"}),
    ("DNS", "kube-system", {"k8s-app": "kube-dns"}),
)
# What no pod may connect to, whose first and last addresses are tried; all else on this list is public.
_SPECIAL: Final = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16"),
    *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
    *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/128", "::1/128", "::ffff:0:0/96", "64:ff9b::/96", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    *("fc00::/7", "fe80::/10", "ff00::/8"),
)
_PUBLIC: Final = (
    *("1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.0", "100.63.255.255", "100.128.0.0", "126.255.255.255"),
    *("128.0.0.0", "168.63.129.15", "168.63.129.17", "169.253.255.255", "169.255.0.0", "172.15.255.255"),
    *("172.32.0.0", "191.255.255.255", "192.0.1.0", "192.0.3.0", "192.88.98.255", "192.88.100.0", "192.167.255.255"),
    *("192.169.0.0", "198.17.255.255", "198.20.0.0", "198.51.99.255", "198.51.101.0", "203.0.112.255", "203.0.114.0"),
    *("223.255.255.255", "2001:200::", "2001:db7:ffff::1", "2001:db9::", "2003::", "2606:4700:4700::1111"),
    *("2a00:1450:4001::1", "3ffe:ffff::1", "3fff:1000::"),
)
# What policies name is tried at both ends, but for these.
_WHOLE: Final = (*_SPECIAL, "0.0.0.0/0", "2000::/3", "224.0.0.0/3")
_PORTS: Final = (22, 53, 80, 443, 5432, 6379, 8000, 8001, 9090)


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """A pod or an address outside; a pod's address is any of the cluster's."""

    name: str
    namespace: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    address: Address = _ANY_POD
    ports: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class World:
    """Everybody who is asked about, and every port."""

    ours: Sequence[Peer]
    others: Sequence[Peer]
    ports: frozenset[Port]

    @property
    def peers(self) -> list[Peer]:
        return [*self.ours, *self.others]


def allowed(found: Sequence[Manifest]) -> set[Row]:
    """All pairs of which one is ours."""
    policies = list(named("NetworkPolicy", found).values())
    world = _world(found, policies)
    meant = {id(rule): _peers(rule, policy, world) for policy in policies for rule in _all_rules(policy)}
    inward = {peer: _side(peer, "ingress", policies, world, meant) for peer in world.ours}
    outward = {peer: _side(peer, "egress", policies, world, meant) for peer in world.ours}
    pairs: set[tuple[Peer, Peer, Port]] = set()
    for peer in world.ours:
        pairs |= {(peer, to, port) for to, port in outward[peer] if to not in inward or (peer, port) in inward[to]}
        pairs |= {(of, peer, port) for of, port in inward[peer] if of not in outward}
    return set(_rows({pair for pair in pairs if pair[0] != pair[1]}, world))


def _world(found: Sequence[Manifest], policies: Sequence[Manifest]) -> World:
    said = {port.get("port") for policy in policies for rule in _all_rules(policy) for port in rule.get("ports") or []}
    numbers = {*_PORTS, *(port for port in said if isinstance(port, int))}
    ports = frozenset((protocol, number) for protocol in ("TCP", "UDP") for number in numbers)
    return World([*map(_own, pods(found)), *_strays()], [*_pods_of_others(), *_addresses(policies)], ports)


def _own(made: Pods) -> Peer:
    ports = {port["name"]: port["containerPort"] for each in made.containers for port in each.get("ports", [])}
    return Peer(made.name, made.owner["metadata"]["namespace"], made.labels, ports=ports)


def _strays() -> Iterator[Peer]:
    """Pods that somebody else has put into our namespace, with some of our labels."""
    yield Peer("a stray pod", OURS, {}, ports={"http": 8000})
    yield Peer("a stray pod of our name", OURS, {_NAME: "bulkhead"}, ports={"http": 8000})
    yield Peer("a stray component", OURS, {_NAME: "bulkhead", _COMPONENT: "another"}, ports={"http": 8000})
    for component in ("api", "worker", "migrate"):
        yield Peer(f"a stray {component}", OURS, {_COMPONENT: component}, ports={"http": 8000})


def _pods_of_others() -> Iterator[Peer]:
    """Those that are meant, those beside them, and those that look like them elsewhere."""
    for name, namespace, labels in _KNOWN:
        yield Peer(name, namespace, labels)
        yield Peer(f"what looks like {name} elsewhere", "elsewhere", labels)
        yield Peer(f"what looks like {name} among us", OURS, labels)
    for namespace in sorted({namespace for _, namespace, _ in _KNOWN}):
        yield Peer(f"another pod of {namespace}", namespace, {_NAME: "another"})
    for component in ("api", "worker"):
        yield Peer(f"what looks like our {component} elsewhere", "elsewhere", {_NAME: OURS, _COMPONENT: component})


def _addresses(policies: Sequence[Manifest]) -> Iterator[Peer]:
    """Both ends of each special network, public ones between, and both ends of what the policies name beside."""
    special = {str(address): network for network in _SPECIAL for address in _ends(_network(network))}
    for address, network in special.items():
        yield Peer(network, address=_address(address))
    for address in _PUBLIC:
        yield Peer("public addresses", address=_address(address))
    for policy in policies:
        for rule in _all_rules(policy):
            for peer in (*(rule.get("from") or []), *(rule.get("to") or [])):
                for network in (peer.get("ipBlock", {}).get("cidr"), *peer.get("ipBlock", {}).get("except", [])):
                    if network is not None and network not in _WHOLE:
                        yield from (Peer(network, address=end) for end in _ends(_network(network)))


def _ends(network: Network) -> tuple[Address, Address]:
    return network[0], network[-1]


@cache
def _network(text: str) -> Network:
    return ip_network(text)


@cache
def _address(text: str) -> Address:
    return ip_address(text)


def _all_rules(policy: Manifest) -> list[Mapping[str, Any]]:
    return [*(policy["spec"].get("ingress") or []), *(policy["spec"].get("egress") or [])]


def _side(
    pod: Peer, direction: str, policies: Sequence[Manifest], world: World, meant: Mapping[int, Sequence[Peer]]
) -> set[tuple[Peer, Port]]:
    """Whom and at which ports the policies of one direction let through; without any, everybody everywhere."""
    of = [policy for policy in policies if _is_under(pod, direction, policy)]
    if not of:
        return set(product(world.peers, world.ports))
    through: set[tuple[Peer, Port]] = set()
    for rule in (rule for policy in of for rule in policy["spec"].get(direction) or []):
        unnamed = _ports(rule, None, world)  # at whoever has no named port: asked once for all of them
        for peer in meant[id(rule)]:
            target = pod if direction == "ingress" else peer
            through |= {(peer, port) for port in (_ports(rule, target, world) if target.ports else unnamed)}
    return through


def _is_under(pod: Peer, direction: str, policy: Manifest) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    return (
        policy["metadata"]["namespace"] == pod.namespace
        and direction.capitalize() in types
        and selects(spec["podSelector"], pod.labels)
    )


def _peers(rule: Mapping[str, Any], policy: Manifest, world: World) -> list[Peer]:
    said = rule.get("from") or rule.get("to")
    if not said:
        return world.peers
    home = policy["metadata"]["namespace"]
    return [peer for peer in world.peers if any(_is_meant(peer, one, home) for one in said)]


def _is_meant(peer: Peer, said: Mapping[str, Any], home: str) -> bool:
    if "ipBlock" in said:
        block = said["ipBlock"]
        return _is_in(peer, block["cidr"]) and not any(_is_in(peer, each) for each in block.get("except", []))
    if peer.namespace is None:
        return False
    if "namespaceSelector" in said:
        is_there = selects(said["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace})
    else:
        is_there = peer.namespace == home
    return is_there and selects(said.get("podSelector", {}), peer.labels)


def _is_in(peer: Peer, network: str) -> bool:
    return peer.address in _network(network)


def _ports(rule: Mapping[str, Any], target: Peer | None, world: World) -> set[Port]:
    said = rule.get("ports")
    if not said:
        return set(world.ports)
    return {port for port in world.ports if any(_is_at(port, each, target) for each in said)}


def _is_at(port: Port, said: Mapping[str, Any], target: Peer | None) -> bool:
    protocol, number = port
    first = said.get("port")
    if isinstance(first, str):
        first = target.ports.get(first, -1) if target else -1
    is_there = first is None or first <= number <= said.get("endPort", first)
    return protocol == said.get("protocol", "TCP") and is_there


def _rows(pairs: set[tuple[Peer, Peer, Port]], world: World) -> Iterator[Row]:
    """Of addresses that have one name, all or each by itself."""
    at: dict[tuple[Peer, Peer], set[Port]] = {}
    for of, to, port in pairs:
        at.setdefault((of, to), set()).add(port)
    by_name = sorted((of.name, to.name, _said(ports, world), str(to.address)) for (of, to), ports in at.items())
    sizes = {name: len(list(group)) for name, group in groupby(sorted(peer.name for peer in world.others))}
    for row, group in groupby(by_name, key=lambda each: each[:3]):
        addresses = [each[3] for each in group]
        if len(addresses) in {1, sizes.get(row[1])} or row[1] not in sizes:
            yield row
        else:
            yield from ((row[0], f"{row[1]}: {address}", row[2]) for address in addresses)


def _said(ports: set[Port], world: World) -> str:
    if ports == world.ports:
        return "any"
    return ", ".join(f"{protocol} {number}" for protocol, number in sorted(ports))
