"""No path in a tool call leads out of the workspace: each wall alone holds, and with all of them down it leads out."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.attacks.hijacked import POLICY, Call, HijackedModel, Played
from tests.attacks.walls import no_sandbox, weak_server, without_gate
from tests.servers.filesystem.swapping import swapping
from tests.service import Service, Tenant

SECRET = f"nonce-{secrets.token_hex(16)}"
ALL = frozenset({"gate", "server", "sandbox"})
# The server's own checks as weakened.py names them: off altogether, or replaced by resolving and comparing texts.
NONE, PREFIX = "spelling,resolution,single_name", "spelling,prefix"
GENEROUS = POLICY.replace("max_tool_calls: 20", "max_tool_calls: 1000, max_steps: 100")


@dataclass(frozen=True)
class Place:
    """A tenant, its workspace `docs` on the host, and a host file that holds the secret."""

    tenant: Tenant
    docs: Path
    outside: Path


@dataclass
class Ground:
    """Tenants by the walls behind which their server has been started."""

    service: Service
    model: HijackedModel
    folder: Path
    places: dict[tuple[frozenset[str], str], Place] = field(default_factory=dict)

    async def place(self, walls: frozenset[str], off: str) -> Place:
        key = (walls - {"gate"}, "" if "server" in walls else off)
        if key not in self.places:
            with ExitStack() as down:
                if "server" not in walls:
                    down.enter_context(weak_server(off))
                if "sandbox" not in walls:
                    program = self.folder / secrets.token_hex(8)
                    program.mkdir()
                    down.enter_context(no_sandbox(program))
                self.places[key] = await self._new_place()
        return self.places[key]

    async def _new_place(self) -> Place:
        tenant = await self.service.new_tenant(policy=GENEROUS, files={"own.txt": "own"})
        await tenant.admin.put_file("secret.txt", SECRET, workspace="docs-evil")
        first = await self.model.play(tenant, [Call("docs__read_file", '{"path": "own.txt"}')])
        assert first.heard == "own"
        workspaces = self.service.data_dir / "workspaces" / tenant.id
        return Place(tenant, workspaces / "docs", self.folder / "outside")


@pytest.fixture(scope="module")
async def ground(attacked: Service, model: HijackedModel, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    (folder / "outside").mkdir(mode=0o755)
    (folder / "outside" / "secret.txt").write_text(SECRET)
    return Ground(attacked, model, folder)


async def played(ground: Ground, place: Place, walls: frozenset[str], *turns: list[Call]) -> Played:
    with ExitStack() as down:
        if "gate" not in walls:
            down.enter_context(without_gate())
        return await ground.model.play(place.tenant, *turns)


def _parent(place: Place, mine: str) -> str:
    return f"{mine}/../../docs-evil/secret.txt"


def _sibling(place: Place, mine: str) -> str:
    return "../docs-evil/secret.txt"


def _absolute(place: Place, mine: str) -> str:
    return str(place.outside / "secret.txt")


def _symlink(place: Place, mine: str) -> str:
    (place.docs / mine / "link.txt").symlink_to(place.outside / "secret.txt")
    return f"{mine}/link.txt"


def _symlinked_folder(place: Place, mine: str) -> str:
    (place.docs / mine / "link").symlink_to("../../docs-evil")
    return f"{mine}/link/secret.txt"


def _hardlink(place: Place, mine: str) -> str:
    # A file of its own: one that has two names is refused everywhere, which would hide other faults.
    named_twice = place.outside / f"{mine}.txt"
    named_twice.write_text(SECRET)
    (place.docs / mine / "hard.txt").hardlink_to(named_twice)
    return f"{mine}/hard.txt"


@dataclass(frozen=True)
class Attack:
    """A way out, the walls that stop it, each of them alone, and what is off in a server that is no wall."""

    plant: Callable[[Place, str], str]
    walls: frozenset[str]
    off: str = NONE


ATTACKS = [
    Attack(_parent, ALL),
    Attack(_sibling, ALL, PREFIX),
    Attack(_absolute, ALL),
    Attack(_symlink, ALL - {"gate"}),
    Attack(_symlinked_folder, ALL - {"gate"}),
    Attack(_hardlink, frozenset({"server"})),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.plant.__name__)
async def test_reads_nothing_outside(ground: Ground, attack: Attack) -> None:
    for walls in (ALL, *({wall} for wall in sorted(attack.walls))):
        outcome = await _attempt(ground, attack, frozenset(walls))
        assert SECRET not in outcome.everything
        assert str(ground.service.data_dir) not in outcome.everything
        await _check_record(ground, outcome, walls=frozenset(walls))
    control = await _attempt(ground, attack, frozenset())
    assert SECRET in control.heard, "the attack proves nothing: it fails with every wall down"


async def _attempt(ground: Ground, attack: Attack, walls: frozenset[str]) -> Played:
    place = await ground.place(walls, attack.off)
    mine = secrets.token_hex(8)
    (place.docs / mine).mkdir()
    path = attack.plant(place, mine)
    (place.docs / mine).chmod(0o755)
    return await played(ground, place, walls, [Call("docs__read_file", json.dumps({"path": path}))])


async def _check_record(ground: Ground, outcome: Played, *, walls: frozenset[str]) -> None:
    (decided,) = await outcome.events("tool.decided")
    finished = await outcome.events("tool.finished")
    assert decided["data"]["tool"] == "docs__read_file"
    if decided["data"]["decision"] == "denied":
        assert "gate" in walls
        assert (decided["data"]["rule"], finished) == ("path", [])
    else:
        assert [event["data"]["outcome"] for event in finished] == ["failed"]


LOOKS = [("list_directory", {}), ("file_info", {}), ("search_files", {"query": SECRET})]


@pytest.mark.parametrize(("tool", "more"), LOOKS, ids=[tool for tool, _ in LOOKS])
async def test_sees_no_name_and_no_size_outside(ground: Ground, tool: str, more: dict[str, str]) -> None:
    name = f"{secrets.token_hex(8)}.txt"
    (ground.folder / "outside" / name).write_text(SECRET)
    leads_out = {frozenset[str](): True, frozenset({"server"}): False, frozenset({"sandbox"}): False}
    for walls, expected in leads_out.items():
        place = await ground.place(walls, NONE)
        link = place.docs / secrets.token_hex(8)
        link.symlink_to(place.outside)
        path = f"{link.name}/{name}" if tool == "file_info" else link.name
        arguments = json.dumps({"path": path, **more})
        outcome = await played(ground, place, walls, [Call(f"docs__{tool}", arguments)])
        seen = str(len(SECRET)) if tool == "file_info" else name
        assert (seen in outcome.heard) is expected, (walls, outcome.heard)


@dataclass
class Race:
    """Reads through names that are exchanged meanwhile, by what came of them."""

    own: int = 0
    refused: int = 0
    foreign: int = 0


ENOUGH = 50


async def _race(ground: Ground, walls: frozenset[str]) -> Race:
    """Read until it was enough or led outside; ten seconds at most."""
    place = await ground.place(walls, PREFIX)
    mine = place.docs / secrets.token_hex(8)
    (mine / "spin").mkdir(parents=True)
    (mine / "spin" / "secret.txt").write_text("own")
    (mine / "leaf.txt").write_text("own")
    (mine / "other").symlink_to(place.outside)
    (mine / "link.txt").symlink_to(place.outside / "secret.txt")
    names = ("spin/secret.txt", "leaf.txt")
    turn = [Call("docs__read_file", json.dumps({"path": f"{mine.name}/{name}"})) for name in names * 10]
    race, end = Race(), time.monotonic() + 10
    # A folder and a file, with links that lead outside.
    with swapping(*(mine / name for name in ("spin", "other", "leaf.txt", "link.txt"))):
        while time.monotonic() < end and not race.foreign and min(race.own, race.refused) < ENOUGH:
            outcome = await played(ground, place, walls, *[turn] * 10)
            assert str(ground.service.data_dir) not in outcome.everything
            race.own += outcome.results.count("own")
            race.foreign += outcome.results.count(SECRET)
            race.refused += sum(result not in ("own", SECRET) for result in outcome.results)
    return race


async def test_a_swap_during_open_never_leads_outside(ground: Ground) -> None:
    for wall in ("server", "sandbox"):
        race = await _race(ground, frozenset({wall}))
        assert race.foreign == 0
        assert min(race.own, race.refused) > ENOUGH / 5, race
    control = await _race(ground, frozenset())
    assert control.foreign > 0
