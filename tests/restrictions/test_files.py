"""What holds the files: each wall before a key of the template `filesystem` holds alone, and without them nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from app.policies.servers.filesystem import FilesystemServer
from app.sandbox.contract import Limits, Profile
from app.servers import templates
from app.servers.template import Place
from tests.attacks.hijacked import POLICY, Call
from tests.attacks.walls import weak_server
from tests.restrictions import off
from tests.restrictions.conftest import Ground
from tests.service import Tenant

SECRET: Final = "secret-in-a-file"
BIG: Final = SECRET + "x" * 2_000
# No more characters than the tool's schema allows, and too many bytes all the same.
WIDE: Final = "é" * 1_000
SMALL: Final = "root: docs, readonly: false, max_file_size: 1KB"


def without_gate() -> AbstractContextManager[None]:
    return off.template("filesystem", check_call=lambda *_: None)


def without_limit() -> AbstractContextManager[None]:
    """The process of the server may write files of any size."""
    profile: Callable[[FilesystemServer, Place], Profile] = templates._TEMPLATES["filesystem"].profile

    def unlimited(declared: FilesystemServer, place: Place) -> Profile:
        return replace(profile(declared, place), limits=Limits())

    return off.template("filesystem", profile=unlimited)


WALLS: Final[dict[str, Callable[[], AbstractContextManager[None]]]] = {
    "gate": without_gate,
    "extension": lambda: weak_server("extension"),
    "size": lambda: weak_server("size"),
    "limit": without_limit,
}


@dataclass(frozen=True)
class Attack:
    """What the policy declares, a call past it, what is heard or written if it succeeds, and all that stops it."""

    declared: str
    call: Call
    done: str
    walls: tuple[str, ...]


ATTACKS: Final = {
    "extension to read": Attack(
        "root: docs", Call("docs__read_file", '{"path": "secret.key"}'), SECRET, ("extension", "gate")
    ),
    "size to read": Attack(SMALL, Call("docs__read_file", '{"path": "big.txt"}'), SECRET, ("size",)),
    "size to write": Attack(
        SMALL, Call("docs__write_file", f'{{"path": "new.txt", "content": "{WIDE}"}}'), "new.txt", ("size", "limit")
    ),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
async def test_each_wall_alone_holds_and_with_all_of_them_down_it_succeeds(ground: Ground, attack: Attack) -> None:
    """Every wall is taken away once by itself, where another must hold, and then all of them."""
    files = {"secret.key": SECRET, "big.txt": BIG}
    tenant = await ground.service.new_tenant(policy=None, files=files)
    alone = attack.walls if len(attack.walls) > 1 else ()
    for down in ((), *((wall,) for wall in alone), attack.walls):
        succeeded = await _succeeds(ground, tenant, attack, down)
        assert succeeded is (down == attack.walls), down


async def _succeeds(ground: Ground, tenant: Tenant, attack: Attack, down: tuple[str, ...]) -> bool:
    with ExitStack() as walls:
        for wall in down:
            walls.enter_context(WALLS[wall]())
        await tenant.admin.publish(POLICY.replace("root: docs", attack.declared))  # so that its server starts anew
        played = await ground.model.play(tenant, [attack.call])
    return attack.done in played.heard + await _written(tenant)


async def _written(tenant: Tenant) -> str:
    """The names of the files that hold all that was to be written."""
    files: list[dict[str, Any]] = (await tenant.admin.get("/v1/workspaces/docs/files")).json()["items"]
    return " ".join(each["path"] for each in files if each["size"] == len(WIDE.encode()))
