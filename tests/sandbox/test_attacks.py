"""No attack from inside succeeds but the known openings, and every one does without the sandbox, as the same user.

An opening that an attack does not find open any more must be taken off the list: it may only shrink.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from tests.sandbox.attacks import ATTACKS
from tests.sandbox.ground import HERE, LIMITS, UID, Ground, Start, outcomes
from tests.sandbox.programs import BACKENDS

# What a kernel may refuse anyone: skipped with the reason, and so not counted, where it does.
DEPENDS_ON_THE_KERNEL = {
    "change_root_in_a_namespace",
    "clone3_into_a_user_namespace",
    "clone_into_a_user_namespace",
    "connect_to_a_host_port_by_ipv6",
    "count_events_of_the_kernel",
    "keep_something_in_the_kernels_keyring",
    "load_a_bpf_program",
    "make_a_network_namespace",
    "make_a_user_namespace",
    "open_a_socket_of_the_kernels_crypto",
    "open_a_userfaultfd",
    "open_a_vsock",
    "remount_writable_in_a_namespace",
    "set_up_an_io_uring",
    "trace_a_host_process",
    "type_into_a_terminal",
}
OPENINGS = tomllib.loads((HERE / "known_openings.toml").read_text())["opening"]
MOST_OPENINGS = 9  # only ever to be lowered
OPEN = {(opening["backend"], opening["attack"]) for opening in OPENINGS}


@pytest.fixture(scope="module")
def proofs(ground: Ground) -> dict[str, str]:
    """What comes of each attack where nothing but the sandbox is missing."""
    ran = subprocess.run(
        [sys.executable, HERE / "attacks.py", *ground.arguments_bare()],
        pass_fds=(ground.leaked_fd,),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return outcomes(ran.stdout)


@pytest.fixture(scope="module", params=["service_as_we_are", "service_as_ordinary_user"])
def service(request: pytest.FixtureRequest) -> Start:
    start: Start = request.getfixturevalue(request.param)
    return start


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def made_inside(service: Start, backend: str, ground: Ground) -> dict[str, str]:
    order = {
        "backend": backend,
        "arguments": ground.arguments_inside(),
        "host_uid": UID,
        "mounts": ground.mounts(),
        "limits": LIMITS,
    }
    ran = service(order, (ground.leaked_fd,))
    assert ran.returncode == 0, ran.stderr
    return outcomes(ran.stdout)


@pytest.mark.parametrize("attack", ATTACKS)
def test_stops(attack: str, backend: str, proofs: dict[str, str], made_inside: dict[str, str]) -> None:
    if proofs[attack] != "succeeded":
        assert attack in DEPENDS_ON_THE_KERNEL, proofs[attack]
        pytest.skip(f"not proven: bare, this kernel answers {proofs[attack]!r}")
    assert (made_inside[attack] == "succeeded") == ((backend, attack) in OPEN), made_inside[attack]


def test_every_known_opening_is_one_attack_with_its_severity_and_what_to_do() -> None:
    assert {opening["attack"] for opening in OPENINGS} <= set(ATTACKS)
    assert {opening["backend"] for opening in OPENINGS} <= set(BACKENDS)
    assert {opening["severity"] for opening in OPENINGS} <= {"low", "medium", "high"}
    assert all(opening["mitigation"] for opening in OPENINGS)
    assert len(OPEN) == len(OPENINGS) <= MOST_OPENINGS
