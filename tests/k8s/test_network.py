"""The NetworkPolicies let through what docs/deploy/kubernetes.md says, and no change of one of them goes unseen."""

from __future__ import annotations

import re
from ipaddress import ip_network
from typing import Final

import pytest

from app.outbound.addresses import is_public
from tests.k8s.mutations import Mutation, mutations
from tests.k8s.objects import named
from tests.k8s.reach import Row, allowed
from tests.k8s.rendering import KUBECTL, MISSING, OVERLAYS, ROOT, manifests

pytestmark = pytest.mark.skipif(KUBECTL is None, reason=MISSING)
PAGE: Final = ROOT / "docs" / "deploy" / "kubernetes.md"


def told() -> set[Row]:
    """The table of the page."""
    _, _, after = PAGE.read_text().partition("| from | to | at |\n|---|---|---|\n")
    rows = re.findall(r"\| ([^|]+) \| ([^|]+) \| ([^|]+) \|\n", after.partition("\n\n")[0] + "\n")
    return {(of.strip("`"), to.strip("`"), at) for of, to, at in rows}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pair_that_may_connect_is_in_the_table_and_no_other(overlay: str) -> None:
    assert allowed(manifests(overlay)) == told()


def test_every_change_of_one_policy_is_seen() -> None:
    found = [each for each in manifests("restricted") if each["kind"] != "ConfigMap"]
    damaged: list[Mutation] = list(mutations(found))
    assert len(damaged) > 200
    right = told()
    assert [what for what, policies in damaged if allowed(policies) == right] == []


def test_without_any_policy_everybody_reaches_everybody() -> None:
    """The control of the evaluation itself."""
    found = [each for each in manifests("restricted") if each["kind"] != "NetworkPolicy"]
    open_to = allowed(found)
    assert ("Postgres", "bulkhead-api", "any") in open_to
    assert ("bulkhead-migrate", "169.254.0.0/16", "any") in open_to


def test_what_is_public_is_what_the_relay_says_is() -> None:
    """At both ends of all that is excepted and next to them."""
    to = named("NetworkPolicy", manifests("restricted"))["to-world"]["spec"]["egress"][0]["to"]
    blocks = [
        (ip_network(peer["ipBlock"]["cidr"]), [ip_network(each) for each in peer["ipBlock"]["except"]]) for peer in to
    ]
    for whole, excepted in blocks:
        for network in excepted:
            first, last = int(network[0]), int(network[-1])
            for number in {first, last, max(int(whole[0]), first - 1), min(int(whole[-1]), last + 1)}:
                address = type(network[0])(number)
                assert is_public(address) == (not any(address in each for each in excepted)), address
