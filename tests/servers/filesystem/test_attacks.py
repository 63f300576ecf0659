"""Each attack is refused, with any one of the layers against it off too, and succeeds with all of them off."""

from __future__ import annotations

import asyncio
import os
import secrets
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mcp import McpError

from tests.servers.filesystem.lab import MAX_FILE_SIZE, Lab
from tests.servers.filesystem.swapping import swapping

SECRET = f"nonce-{secrets.token_hex(8)}"
Plant = Callable[[Lab, Path], dict[str, Any]]


def _secret_in(folder: Path, name: str = "secret.txt") -> Path:
    file = folder / name
    file.write_text(SECRET)
    return file


def _relative(lab: Lab, path: Path) -> str:
    return str(path.relative_to(lab.root))


def _parent(lab: Lab, mine: Path) -> dict[str, Any]:
    _secret_in(lab.outside)
    return {"path": f"{mine.name}/../../outside/secret.txt"}


def _absolute(lab: Lab, mine: Path) -> dict[str, Any]:
    return {"path": str(_secret_in(lab.outside))}


def _sibling(lab: Lab, mine: Path) -> dict[str, Any]:
    _secret_in(lab.sibling)
    return {"path": "../docs-evil/secret.txt"}


def _symlink(lab: Lab, mine: Path) -> dict[str, Any]:
    (mine / "link.txt").symlink_to(_secret_in(lab.outside))
    return {"path": f"{mine.name}/link.txt"}


def _symlinked_folder(lab: Lab, mine: Path) -> dict[str, Any]:
    _secret_in(lab.outside)
    (mine / "link").symlink_to(lab.outside)
    return {"path": f"{mine.name}/link/secret.txt"}


def _hardlink(lab: Lab, mine: Path) -> dict[str, Any]:
    (mine / "hard.txt").hardlink_to(_secret_in(lab.outside, f"{mine.name}.txt"))
    return {"path": f"{mine.name}/hard.txt"}


def _hardlink_searched(lab: Lab, mine: Path) -> dict[str, Any]:
    _hardlink(lab, mine)
    return {"query": "nonce-", "path": mine.name}


def _wrong_extension(lab: Lab, mine: Path) -> dict[str, Any]:
    return {"path": _relative(lab, _secret_in(mine, "secret.key"))}


def _shouted_extension(lab: Lab, mine: Path) -> dict[str, Any]:
    return {"path": _relative(lab, _secret_in(mine, "secret.KEY"))}


def _no_extension(lab: Lab, mine: Path) -> dict[str, Any]:
    return {"path": _relative(lab, _secret_in(mine, ".txt"))}


def _wrong_extension_searched(lab: Lab, mine: Path) -> dict[str, Any]:
    _secret_in(mine, "secret.key")
    return {"query": "NONCE", "path": mine.name}


def _extension_of_a_folder(lab: Lab, mine: Path) -> dict[str, Any]:
    _secret_in(mine, "secret.key")
    (mine / "x.txt").mkdir()
    return {"path": f"{mine.name}/x.txt/../secret.key"}


def _trailing_dot(lab: Lab, mine: Path) -> dict[str, Any]:
    return {"path": _relative(lab, _secret_in(mine, "secret.txt."))}


def _trailing_space(lab: Lab, mine: Path) -> dict[str, Any]:
    return {"path": _relative(lab, _secret_in(mine, "secret.txt "))}


def _nul(lab: Lab, mine: Path) -> dict[str, Any]:
    # To us the name ends in .txt; to the kernel it ends at the NUL.
    _secret_in(mine, "secret.key")
    return {"path": f"{mine.name}/secret.key\0.txt"}


def _oversize(lab: Lab, mine: Path) -> dict[str, Any]:
    file = mine / "big.txt"
    file.write_text(SECRET + "x" * MAX_FILE_SIZE)
    return {"path": _relative(lab, file)}


@dataclass(frozen=True)
class Attack:
    plant: Plant
    layers: tuple[str, ...]
    tool: str = "read_file"


READS = [
    Attack(_parent, ("spelling", "resolution")),
    Attack(_absolute, ("spelling", "resolution")),
    Attack(_sibling, ("spelling", "prefix")),
    Attack(_symlink, ("resolution",)),
    Attack(_symlinked_folder, ("resolution",)),
    Attack(_hardlink, ("single_name",)),
    Attack(_hardlink_searched, ("single_name",), "search_files"),
    Attack(_wrong_extension, ("extension",)),
    Attack(_shouted_extension, ("extension",)),
    Attack(_no_extension, ("extension",)),
    Attack(_wrong_extension_searched, ("extension",), "search_files"),
    Attack(_extension_of_a_folder, ("spelling", "resolution", "extension")),
    Attack(_trailing_dot, ("spelling", "extension")),
    Attack(_trailing_space, ("spelling", "extension")),
    Attack(_nul, ("spelling",)),
    Attack(_oversize, ("size",)),
]


@pytest.mark.parametrize("attack", READS, ids=lambda attack: f"{attack.plant.__name__}")
async def test_reads_nothing_that_it_must_not(lab: Lab, mine: Path, attack: Attack) -> None:
    arguments = attack.plant(lab, mine)
    one_layer_off = attack.layers if len(attack.layers) > 1 else ()
    for off in ("", "openat2", *one_layer_off):
        answer = await lab.call(attack.tool, arguments, off=off)
        assert SECRET not in answer.text
        assert answer.is_error or attack.tool == "search_files"
        assert str(lab.root.parent) not in answer.text
    control = await lab.call(attack.tool, arguments, off=",".join(attack.layers))
    assert SECRET in control.text, "the attack proves nothing: it fails with its enforcement off"


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("write_file", {"path": "{}/link/new.txt", "content": "x"}),
    ("create_directory", {"path": "{}/link/new.txt"}),
    ("move_file", {"source": "{}/own.txt", "destination": "{}/link/new.txt"}),
]


@pytest.mark.parametrize(("tool", "template"), CHANGES, ids=[tool for tool, _ in CHANGES])
async def test_changes_nothing_outside(lab: Lab, mine: Path, tool: str, template: dict[str, Any]) -> None:
    (mine / "link").symlink_to(lab.outside)
    (mine / "own.txt").write_text("x")
    new = lab.outside / "new.txt"
    arguments = {key: value.format(mine.name) for key, value in template.items()}
    for off in ("", "openat2"):
        assert (await lab.call(tool, arguments, off=off)).is_error
        assert not new.exists()
    await lab.call(tool, arguments, off="resolution")
    assert new.exists()
    new.rmdir() if new.is_dir() else new.unlink()


async def test_deletes_nothing_outside(lab: Lab, mine: Path) -> None:
    victim = _secret_in(lab.outside, "victim.txt")
    (mine / "link").symlink_to(lab.outside)
    arguments = {"path": f"{mine.name}/link/victim.txt"}
    for off in ("", "openat2"):
        assert (await lab.call("delete_file", arguments, off=off)).is_error
        assert victim.exists()
    await lab.call("delete_file", arguments, off="resolution")
    assert not victim.exists()


async def test_both_ends_of_a_move_need_an_allowed_extension(lab: Lab, mine: Path) -> None:
    key, text = _secret_in(mine, "secret.key"), mine / "plain.txt"
    there = {"source": f"{mine.name}/secret.key", "destination": f"{mine.name}/plain.txt"}
    back = {"source": there["destination"], "destination": there["source"]}
    assert (await lab.call("move_file", there)).is_error
    await lab.call("move_file", there, off="extension")
    assert text.exists()
    assert (await lab.call("move_file", back)).is_error
    await lab.call("move_file", back, off="extension")
    assert key.exists()


async def test_writes_no_file_of_another_extension_or_size(lab: Lab, mine: Path) -> None:
    script = {"path": f"{mine.name}/run.sh", "content": "x"}
    big = {"path": f"{mine.name}/big.txt", "content": "é" * (MAX_FILE_SIZE // 2 + 1)}
    for arguments, off in ((script, "extension"), (big, "size")):
        assert (await lab.call("write_file", arguments)).is_error
        assert not (lab.root / arguments["path"]).exists()
        assert not (await lab.call("write_file", arguments, off=off)).is_error
        assert (lab.root / arguments["path"]).exists()


async def test_a_fifo_cannot_hang_the_server(lab: Lab, mine: Path) -> None:
    fifo = mine / "pipe.txt"
    os.mkfifo(fifo)
    arguments = {"path": f"{mine.name}/pipe.txt"}
    for off in ("", "openat2"):
        assert (await lab.call("read_file", arguments, off=off)).is_error
        assert (await lab.call("write_file", {**arguments, "content": "x"}, off=off)).is_error
    assert stat.S_ISFIFO(fifo.lstat().st_mode)
    with pytest.raises(McpError, match="Timed out"):
        await lab.call("read_file", arguments, off="nonblock", seconds=0.5)
    os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))  # lets the hanging server go


async def test_a_fifo_is_not_read(lab: Lab, mine: Path) -> None:
    os.mkfifo(mine / "pipe.txt")
    arguments = {"path": f"{mine.name}/pipe.txt"}
    assert (await lab.call("read_file", arguments)).is_error
    assert not (await lab.call("read_file", arguments, off="kind")).is_error


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device")
async def test_a_device_is_not_read(lab: Lab, mine: Path) -> None:
    os.mknod(mine / "null.txt", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    arguments = {"path": f"{mine.name}/null.txt"}
    for off in ("", "openat2"):
        assert (await lab.call("read_file", arguments, off=off)).is_error
    assert not (await lab.call("read_file", arguments, off="kind")).is_error


@dataclass(frozen=True)
class Race:
    own: int
    refused: int
    foreign: int


ENOUGH = 500  # reads that won and reads that lost the race


async def _race(lab: Lab, mine: Path, off: str) -> Race:
    """Read through names that are exchanged with links until it was enough or led outside; 15 seconds at most."""
    paths = [f"{mine.name}/spin/secret.txt", f"{mine.name}/leaf.txt"]
    own = refused = foreign = 0
    end = time.monotonic() + 15
    with swapping(mine / "spin", mine / "other", mine / "leaf.txt", mine / "link.txt"):
        while time.monotonic() < end and not foreign and min(own, refused) < ENOUGH:
            for answer in await asyncio.gather(*(lab.call("read_file", {"path": p}, off=off) for p in paths * 10)):
                own += answer.text == "own"
                refused += answer.is_error
                foreign += SECRET in answer.text
    return Race(own, refused, foreign)


@pytest.mark.parametrize("off", ["", "openat2"])
async def test_a_swap_during_open_never_leads_outside(lab: Lab, mine: Path, off: str) -> None:
    (mine / "spin").mkdir()
    (mine / "spin" / "secret.txt").write_text("own")
    (mine / "leaf.txt").write_text("own")
    (mine / "other").symlink_to(lab.outside)
    (mine / "link.txt").symlink_to(_secret_in(lab.outside))
    race = await _race(lab, mine, off)
    assert race.foreign == 0
    assert min(race.own, race.refused) > ENOUGH / 20
    control = await _race(lab, mine, "prefix")
    assert control.foreign > 0
