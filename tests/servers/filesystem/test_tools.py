from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.servers.filesystem.lab import MAX_FILE_SIZE, Lab

READING = {"read_file", "list_directory", "search_files", "file_info"}
WRITING = {"write_file", "delete_file", "create_directory", "move_file"}


async def _text(lab: Lab, tool: str, **arguments: Any) -> str:
    answer = await lab.call(tool, arguments)
    assert not answer.is_error, answer.text
    return answer.text


async def _refusal(lab: Lab, tool: str, **arguments: Any) -> str:
    answer = await lab.call(tool, arguments)
    assert answer.is_error, answer.text
    return answer.text


async def test_a_file_lives_from_write_to_delete(lab: Lab, mine: Path) -> None:
    here = mine.name
    await _text(lab, "create_directory", path=f"{here}/a/b")
    await _text(lab, "write_file", path=f"{here}/a/b/one.txt", content="first")
    await _text(lab, "write_file", path=f"{here}/a/b/one.txt", content="grün")
    assert await _text(lab, "read_file", path=f"{here}/a/b/one.txt") == "grün"
    assert await _text(lab, "list_directory", path=f"{here}/a/b") == "one.txt (5 bytes)"
    await _text(lab, "move_file", source=f"{here}/a/b/one.txt", destination=f"{here}/two.TXT")
    assert await _text(lab, "list_directory", path=here) == "a/\ntwo.TXT (5 bytes)"
    assert "size: 5 bytes" in await _text(lab, "file_info", path=f"{here}/two.TXT")
    assert "type: folder" in await _text(lab, "file_info", path=f"{here}/a")
    await _text(lab, "delete_file", path=f"{here}/two.TXT")
    assert await _refusal(lab, "read_file", path=f"{here}/two.TXT") == "there is nothing by that name"


async def test_a_list_shows_only_what_may_be_read(lab: Lab, mine: Path) -> None:
    (mine / "shown.txt").write_text("x")
    (mine / "folder").mkdir()
    (mine / "big.txt").write_text("x" * (MAX_FILE_SIZE + 1))
    (mine / "secret.key").write_text("x")
    (mine / "link.txt").symlink_to("shown.txt")
    (mine / "linked").symlink_to("folder")
    (mine / "hard1.txt").write_text("x")
    (mine / "hard2.txt").hardlink_to(mine / "hard1.txt")
    (mine / "new\nline.txt").write_text("x")
    (mine / ".bulkhead-1.txt").write_text("x")
    (mine / "\udcff.txt").write_text("x")
    os.mkfifo(mine / "pipe.txt")
    assert await _text(lab, "list_directory", path=mine.name) == "folder/\nshown.txt (1 bytes)"


async def test_search_finds_names_and_lines(lab: Lab, mine: Path) -> None:
    (mine / "deep").mkdir()
    (mine / "deep" / "a.txt").write_text("nothing\nthe Needle is here\n")
    (mine / "needle.md").write_bytes(b"\xff no text")
    lines = (await _text(lab, "search_files", query="nEEdle", path=mine.name)).splitlines()
    assert lines == [f"{mine.name}/needle.md", f"{mine.name}/deep/a.txt:2: the Needle is here"]
    assert await _text(lab, "search_files", query="needle.*", path=mine.name) == "nothing was found"


async def test_search_is_bounded(lab: Lab, mine: Path) -> None:
    (mine / "many.txt").write_text("needle\n" * 500)
    lines = (await _text(lab, "search_files", query="needle", path=mine.name)).splitlines()
    assert len(lines) == 101
    assert lines[-1] == "... there are more matches"


@pytest.fixture
def deep(mine: Path) -> Iterator[Path]:
    """A tree deeper than Python recurses; climbed down again here, for pytest would recurse to remove it."""
    folder = os.open(mine, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=folder)
        folder = _moved(folder, "d")
    yield mine
    for _ in range(1200):
        folder = _moved(folder, "..")
        os.rmdir("d", dir_fd=folder)
    os.close(folder)


def _moved(folder: int, name: str) -> int:
    there = os.open(name, os.O_RDONLY, dir_fd=folder)
    os.close(folder)
    return there


async def test_a_deep_tree_ends_no_walk(lab: Lab, deep: Path) -> None:
    assert await _text(lab, "search_files", query="x", path=deep.name) == "nothing was found"


REFUSED_PATHS = {
    "/etc/passwd": "must be relative",
    "../a.txt": "'..' is not allowed",
    "a/../b.txt": "'..' is not allowed",
    "./a.txt": "empty part",
    "a//b.txt": "empty part",
    "a/": "empty part",
    "a\\b.txt": "backslash",
    "a\0.txt": "control and invisible",
    "a\u202etxt.txt": "control and invisible",
    "a.txt.": "dot or a space",
    "a.txt ": "dot or a space",
    "a" * 252 + ".txt": "name in the path is too long",
    "ä" * 600 + ".txt": "too long or too deep",
    "a/" * 32 + "a.txt": "too long or too deep",
    ".bulkhead-1.txt": "reserved",
    ".": "folder, not a file",
}


@pytest.mark.parametrize("path", REFUSED_PATHS)
async def test_a_path_is_refused_with_the_reason(lab: Lab, path: str) -> None:
    assert REFUSED_PATHS[path] in await _refusal(lab, "read_file", path=path)


async def test_a_move_replaces_nothing(lab: Lab, mine: Path) -> None:
    (mine / "a.txt").write_text("a")
    (mine / "b.txt").write_text("b")
    await _refusal(lab, "move_file", source=f"{mine.name}/a.txt", destination=f"{mine.name}/b.txt")
    assert (mine / "b.txt").read_text() == "b"


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("read_file", {}),
        ("read_file", {"path": 7}),
        ("read_file", {"path": None}),
        ("read_file", {"path": ["a.txt"]}),
        ("read_file", {"path": ""}),
        ("read_file", {"path": "a.txt", "encoding": "latin-1"}),
        ("list_directory", {"path": None}),
        ("search_files", {"query": ""}),
        ("search_files", {"query": "x" * 201}),
        ("execute", {"path": "a.txt"}),
    ],
)
async def test_arguments_outside_the_schema_are_refused(lab: Lab, tool: str, arguments: dict[str, Any]) -> None:
    await _refusal(lab, tool, **arguments)


async def test_schemas_are_strict(lab: Lab) -> None:
    session = await (await lab.running()).session
    tools = (await session.list_tools()).tools
    assert {tool.name for tool in tools} == READING | WRITING
    for tool in tools:
        Draft202012Validator.check_schema(tool.inputSchema)
        assert tool.inputSchema["additionalProperties"] is False
        assert tool.description


async def test_read_only_has_no_tool_that_writes(lab: Lab, mine: Path) -> None:
    session = await (await lab.running("", "--readonly")).session
    assert {tool.name for tool in (await session.list_tools()).tools} == READING
    arguments = {"path": f"{mine.name}/a.txt", "content": "x"}
    assert (await session.call_tool("write_file", arguments)).isError
    assert not (mine / "a.txt").exists()
    assert not (await lab.call("write_file", arguments)).is_error


async def test_the_journal_has_every_call_in_order(lab: Lab, mine: Path) -> None:
    running = await lab.running("", "--readonly")
    before = len(running.journal())
    session = await running.session
    (mine / "a.txt").write_text("x")
    path = f"{mine.name}/a.txt"
    await session.call_tool("read_file", {"path": path})
    await session.call_tool("read_file", {"path": "../a\n.txt"})
    await session.call_tool("read_file", {"path": 7})
    await session.call_tool("move_file", {"source": "a.txt", "destination": "b.txt"})
    lines = running.journal()[before:]
    assert [line["seq"] for line in lines] == list(range(before + 1, before + 5))
    assert [line["paths"] for line in lines] == [[path], ["../a\n.txt"], [7], ["a.txt", "b.txt"]]
    assert [line["outcome"] for line in lines] == ["ok", "refused", "refused", "refused"]
    assert lines[3] == {
        "seq": before + 4,
        "tool": "move_file",
        "paths": ["a.txt", "b.txt"],
        "outcome": "refused",
        "reason": "there is no such tool",
    }


def _run(lab: Lab, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", str(lab.program), *options]
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=20, check=False)


def test_it_does_not_start_without_sound_limits(lab: Lab) -> None:
    options = ["--root", str(lab.root), "--max-file-size", "1"]
    assert _run(lab, *options, "--allowed-extensions", ".txt").returncode == 0
    for unsound in ([], ["--allowed-extensions", ""], ["--allowed-extensions", ".txt,md"]):
        assert _run(lab, *options, *unsound).returncode == 2


def test_it_imports_nothing_of_the_service(lab: Lab) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import server; print(*sys.modules, sep='\\n')"
    command = [sys.executable, "-I", "-c", code, str(lab.program.parent)]
    modules = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    assert re.search(r"^beneath$", modules, re.MULTILINE)
    assert not re.search(r"^app\b", modules, re.MULTILINE)
