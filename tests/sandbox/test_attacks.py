"""No attack from inside succeeds, and every one of them does without the sandbox, as the same user."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.sandbox.attacks import ATTACKS
from tests.sandbox.ground import HERE, LIMITS, SERVICE_IS_ROOT, UID, Ground, Start

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
_SUCCEEDED, _STARTED = "succeeded\n", "started\n"


@pytest.mark.parametrize("attack", ATTACKS)
def test_refuses_when_the_service_runs_as_we_do(attack: str, ground: Ground, service_as_we_are: Start) -> None:
    refused(attack, ground, service_as_we_are)


@pytest.mark.parametrize("attack", ATTACKS)
def test_refuses_when_the_service_runs_as_an_ordinary_user(
    attack: str, ground: Ground, service_as_ordinary_user: Start
) -> None:
    refused(attack, ground, service_as_ordinary_user)


def refused(attack: str, ground: Ground, start: Start) -> None:
    prove(attack, ground)
    order = {
        "arguments": ["/opt/attacks.py", attack, json.dumps(ground.inside)],
        "host_uid": UID,
        "mounts": ground.mounts(),
        "limits": LIMITS,
    }
    inside = start(order, (ground.leaked_fd,))
    assert inside.stdout.startswith(_STARTED), inside.stderr
    assert not inside.stdout.endswith(_SUCCEEDED)


def prove(attack: str, ground: Ground) -> None:
    """Once a session: the attack works where nothing but the sandbox is missing."""
    if attack not in ground.proofs:
        ground.proofs[attack] = bare(attack, ground)
    proof = ground.proofs[attack]
    if not proof.endswith(_SUCCEEDED):
        assert attack in DEPENDS_ON_THE_KERNEL, proof
        pytest.skip(f"not proven: bare, this kernel answers {proof!r}")


def bare(attack: str, ground: Ground) -> str:
    uid = [str(UID)] if SERVICE_IS_ROOT else []
    ran = subprocess.run(
        [sys.executable, HERE / "attacks.py", attack, json.dumps(ground.bare), *uid],
        pass_fds=(ground.leaked_fd,),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return ran.stdout + ran.stderr
