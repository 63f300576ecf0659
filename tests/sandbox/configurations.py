"""Every attack in every configuration: what comes of it bare, and inside."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app.sandbox import cgroup_search
from app.sandbox.contract import Limits
from tests.sandbox.attacks import APART
from tests.sandbox.elsewhere import elsewhere
from tests.sandbox.ground import HERE, LIMITS, NONCE, SERVICE_IS_ROOT, UID, Ground, Service, outcomes

_OUTLIVING: Final = "outlive_the_service"
_BURNING: Final = "burn_more_processors_than_mine"
_ELSEWHERE: Final = ",".join(sorted(APART - {_OUTLIVING, _BURNING}))
_DOORS: Final = [("127.0.0.1", 3128), ("127.0.0.1", 443)]
# Less than the bomb of many processes wants, and more than any one process may have.
_MEMORY: Final = 200 << 20
_FEW_CPUS: Final = 0.08  # far below what a process gets even on a busy machine


@dataclass(frozen=True)
class Configuration:
    name: str
    backend: str
    is_ordinary: bool = False
    has_network: bool = False
    is_in_cgroup: bool = False


CONFIGURATIONS: Final = (
    Configuration("bubblewrap", "bubblewrap"),
    Configuration("bubblewrap, ordinary user", "bubblewrap", is_ordinary=True),
    Configuration("bubblewrap, network", "bubblewrap", has_network=True),
    Configuration("bubblewrap, network, ordinary user", "bubblewrap", is_ordinary=True, has_network=True),
    Configuration("bubblewrap, cgroup", "bubblewrap", is_in_cgroup=True),
    Configuration("landlock", "landlock"),
    Configuration("landlock, ordinary user", "landlock", is_ordinary=True),
    Configuration("landlock, cgroup", "landlock", is_in_cgroup=True),
)


def bare(ground: Ground) -> dict[str, str]:
    """As the user that a server would be, with nothing missing but the sandbox."""

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, HERE / "attacks", *ground.arguments_bare(), *words],
            env={"SECRET_OF_THE_SERVICE": NONCE},
            pass_fds=ground.leaked,
            stdout=subprocess.PIPE,
            text=True,
        )

    return _all(ground, start) | _outcomes(start(f"only={_BURNING}"))


def inside(configuration: Configuration, ground: Ground, service: Service) -> dict[str, str]:
    """Raises LookupError, with the reason, where this machine cannot be configured so."""
    with _starting(configuration, ground, service) as start:
        found = _all(ground, start)
    with _starting(configuration, ground, service, cpus=_FEW_CPUS) as start:
        return found | _outcomes(start(f"only={_BURNING}"))


@contextlib.contextmanager
def _starting(
    configuration: Configuration, ground: Ground, service: Service, *, cpus: float = 1
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with _order(configuration, ground, cpus) as (order, fds):

        def start(*words: str) -> subprocess.Popen[str]:
            arguments = [*ground.arguments_inside(), *words]
            return service.started(order | {"arguments": arguments}, fds, stdout=subprocess.PIPE)

        yield start


def _all(ground: Ground, start: Callable[..., subprocess.Popen[str]]) -> dict[str, str]:
    found = _outcomes(start())
    found[_OUTLIVING] = _outlived(start(f"only={_OUTLIVING}"), ground)
    if SERVICE_IS_ROOT:
        with elsewhere() as addresses:
            words = (f"{name}={value}" for name, value in addresses.items())
            return found | _outcomes(start(f"only={_ELSEWHERE}", *words))
    return found | dict.fromkeys(_ELSEWHERE.split(","), "refused: it takes root")


def _outcomes(process: subprocess.Popen[str]) -> dict[str, str]:
    with process:
        try:
            output, _ = process.communicate(timeout=90)
        finally:
            process.kill()
    assert process.returncode == 0
    return outcomes(output)


def _outlived(service: subprocess.Popen[str], ground: Ground) -> str:
    heartbeat = Path(ground.bare["workspace"], "heartbeat")
    try:
        with service:
            try:
                _await(lambda: heartbeat.exists() and heartbeat.stat().st_size > 0)
            finally:
                service.kill()
        time.sleep(0.5)
        before = heartbeat.stat().st_size
        time.sleep(0.5)
        return "succeeded" if heartbeat.stat().st_size > before else "refused: it ended with the service"
    finally:
        heartbeat.unlink(missing_ok=True)


def _await(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def _order(
    configuration: Configuration, ground: Ground, cpus: float
) -> Iterator[tuple[dict[str, Any], tuple[int, ...]]]:
    limits: dict[str, Any] = dict(LIMITS)
    if configuration.is_in_cgroup:
        limits |= {"memory_bytes": _MEMORY, "cpus": cpus}
    order: dict[str, Any] = {
        "backend": configuration.backend,
        "host_uid": UID,
        "mounts": ground.mounts(),
        "limits": limits,
    }
    with contextlib.ExitStack() as stack:
        fds = ground.leaked
        if configuration.has_network:
            ours, theirs = (stack.enter_context(end) for end in socket.socketpair())
            assert ours.fileno() >= 0  # whoever lets go of it ends the doors
            order["network"] = [theirs.fileno(), _DOORS]
            fds = (*fds, theirs.fileno())
        if configuration.is_in_cgroup:
            order["cgroup"] = stack.enter_context(_cgroup(limits))
        yield order, fds


@contextlib.contextmanager
def _cgroup(limits: dict[str, Any]) -> Iterator[list[str]]:
    found = cgroup_search.find()
    if isinstance(found, cgroup_search.NoCgroups):
        raise LookupError(f"no cgroup is writable: {found.reason}")  # noqa: TRY004  # it is no mistake in a type
    try:
        yield [str(folder) for folder in found.make("attacker", "suite", Limits(**limits)).folders]
    finally:
        found.close()
