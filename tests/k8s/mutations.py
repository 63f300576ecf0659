"""Every way to damage a set of NetworkPolicies by one change of one part of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from ipaddress import ip_network
from typing import Any, Final

from tests.k8s.objects import named
from tests.k8s.rendering import Manifest

Mutation = tuple[str, list[Manifest]]
_OTHER_PROTOCOL: Final = {"TCP": "UDP", "UDP": "TCP"}
_SIDES: Final = {"ingress": "from", "egress": "to"}


class Damage:
    """One place of one policy; each method gives the whole manifest with that place changed."""

    def __init__(self, found: Sequence[Manifest], name: str, *path: str | int) -> None:
        self._found, self._name, self._path = found, name, path

    @property
    def value(self) -> Any:
        return self._within(named("NetworkPolicy", self._found)[self._name], self._path)

    def at(self, *path: str | int) -> Damage:
        """A place further in."""
        return Damage(self._found, self._name, *self._path, *path)

    def gone(self) -> Mutation:
        def remove(holder: Any, key: Any) -> None:
            del holder[key]

        return self._changed("is gone", remove)

    def instead(self, value: Any) -> Mutation:
        def put(holder: Any, key: Any) -> None:
            holder[key] = value

        return self._changed(f"is {value}", put)

    def _changed(self, how: str, change: Any) -> Mutation:
        kept = [each for each in self._found if each["metadata"]["name"] != self._name]
        policy = deepcopy(named("NetworkPolicy", self._found)[self._name])
        change(self._within(policy, self._path[:-1]), self._path[-1])
        return f"{self._name}: {'.'.join(map(str, self._path))} {how}", [*kept, policy]

    @staticmethod
    def _within(value: Any, path: Sequence[str | int]) -> Any:
        for key in path:
            value = value[key]
        return value


def mutations(found: Sequence[Manifest]) -> Iterator[Mutation]:
    """Each names what it changes. None is without meaning: what is left out is what another line says as well."""
    for name, policy in named("NetworkPolicy", found).items():
        yield f"{name} is gone", [each for each in found if each is not policy]
        yield Damage(found, name, "metadata", "namespace").instead("elsewhere")
        spec = Damage(found, name, "spec")
        yield from _selector(spec.at("podSelector"))
        yield from _types(spec.at("policyTypes"))
        for direction in _SIDES:
            for index in range(len(policy["spec"].get(direction, []))):
                yield from _rule(spec.at(direction, index), _SIDES[direction])


def _types(place: Damage) -> Iterator[Mutation]:
    if len(place.value) == 1:
        yield place.instead(["Egress" if place.value == ["Ingress"] else "Ingress"])
        return
    for index in range(len(place.value)):
        yield place.at(index).gone()


def _rule(place: Damage, side: str) -> Iterator[Mutation]:
    yield place.gone()
    yield place.instead({})
    yield place.at(side).gone()
    yield place.at("ports").gone()
    for index in range(len(place.value["ports"])):
        yield from _port(place.at("ports", index))
    for index in range(len(place.value[side])):
        yield from _peer(place.at(side, index), alone=len(place.value[side]) == 1)


def _port(place: Damage) -> Iterator[Mutation]:
    port = place.value["port"]
    yield place.at("protocol").instead(_OTHER_PROTOCOL[place.value["protocol"]])
    yield place.at("port").gone()
    yield place.at("port").instead("another" if isinstance(port, str) else port + 1)
    if isinstance(port, int):
        yield place.at("endPort").instead(65535)


def _peer(place: Damage, *, alone: bool) -> Iterator[Mutation]:
    if not alone:
        yield place.gone()
    if "ipBlock" in place.value:
        yield from _block(place.at("ipBlock"))
        return
    for kind in ("namespaceSelector", "podSelector"):
        yield place.at(kind).gone()
        yield from _selector(place.at(kind))


def _selector(place: Damage) -> Iterator[Mutation]:
    """Wider and narrower; an empty one takes all already."""
    if place.value:
        yield place.instead({})
    yield place.at("matchLabels").instead({**place.value.get("matchLabels", {}), "of": "somebody-else"})
    for label in place.value.get("matchLabels", {}):
        yield place.at("matchLabels", label).gone()
        yield place.at("matchLabels", label).instead("another")
    for index, term in enumerate(place.value.get("matchExpressions", [])):
        yield place.at("matchExpressions", index).gone()
        for number in range(len(term["values"])):
            yield place.at("matchExpressions", index, "values", number).gone()
        yield place.at("matchExpressions", index, "operator").instead("Exists")


def _block(place: Damage) -> Iterator[Mutation]:
    yield place.at("cidr").instead(_half(place.value["cidr"]))
    yield place.at("except").gone()
    for index, network in enumerate(place.value["except"]):
        yield place.at("except", index).gone()
        if ip_network(network).num_addresses > 1:
            yield place.at("except", index).instead(_half(network))
        yield place.at("except", index).instead(str(ip_network(network).supernet()))


def _half(network: str) -> str:
    return str(next(ip_network(network).subnets()))
