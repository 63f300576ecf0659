"""An MCP server for one folder. Untrusted like any other: it imports nothing of `app`.

    python -I /srv/server.py --root /workspace --readonly --max-file-size 10000000 --allowed-extensions .txt,.md

`beneath.py` of app/tenants lies beside it. Each call leaves a line of JSON on stderr, the server's own journal:
{"seq", "tool", "paths", "outcome"}, with "reason" where the outcome is "refused".
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

if TYPE_CHECKING:
    from app.tenants import beneath
else:
    sys.path.insert(0, str(Path(__file__).parent))  # `python -I` leaves the script's folder out
    import beneath

LISTED = 1_000
SCANNED = 20_000
FOUND = 100
SEARCHED_BYTES = 32_000_000
SHOWN_OF_LINE = 200
PATHS = ("path", "source", "destination")


@dataclass(frozen=True, slots=True)
class Rules:
    readonly: bool
    max_file_size: int
    extensions: frozenset[str] | None  # in lower case with the dot; None: any


class Folder:
    """What the tools do. Every method takes text, gives text, and raises Refusal or OSError."""

    def __init__(self, root: Path, rules: Rules) -> None:
        self._root = os.open(root, beneath.DIRECTORY)
        self._rules = rules

    def read_file(self, path: str) -> str:
        return _decoded(self._read(self._file_parts(path)))

    def list_directory(self, path: str) -> str:
        entries = beneath.scan(self._root, beneath.split(path), limit=SCANNED)
        lines = [_listed(entry) for entry in entries if entry.is_folder or self._is_readable(entry)]
        if len(lines) > LISTED:
            lines[LISTED:] = [f"... and {len(lines) - LISTED} more"]
        return "\n".join(lines) or "the folder is empty"

    def search_files(self, query: str, path: str) -> str:
        lines = list(islice(self._matches(query.lower(), beneath.split(path)), FOUND + 1))
        if len(lines) > FOUND:
            lines[FOUND:] = ["... there are more matches"]
        return "\n".join(lines) or "nothing was found"

    def file_info(self, path: str) -> str:
        parts = beneath.split(path)
        found = beneath.status(self._root, parts)
        entry = beneath.Entry(parts, found)
        if not entry.is_folder:
            self._check_extension(parts)
            beneath.check_ordinary(found)
        kind = "folder" if entry.is_folder else "file"
        modified = entry.modified.isoformat(timespec="seconds")
        return f"type: {kind}\nsize: {found.st_size} bytes\nmodified: {modified}"

    def write_file(self, path: str, content: str) -> str:
        parts = self._file_parts(path)
        data = _encoded(content)
        self._check_size(len(data))
        with suppress(FileNotFoundError):
            beneath.check_ordinary(beneath.status(self._root, parts))
        with (
            beneath.opened_directory(self._root, parts[:-1]) as parent,
            beneath.staged(parent) as (name, file),
        ):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.rename(name, parts[-1], src_dir_fd=parent, dst_dir_fd=parent)
        return f"{len(data)} bytes written"

    def delete_file(self, path: str) -> str:
        parts = self._file_parts(path)
        beneath.check_ordinary(beneath.status(self._root, parts))
        with beneath.opened_directory(self._root, parts[:-1]) as parent:
            os.unlink(parts[-1], dir_fd=parent)
        return "deleted"

    def create_directory(self, path: str) -> str:
        os.close(beneath.make_directories(self._root, beneath.split(path)))
        return "the folder is there"

    def move_file(self, source: str, destination: str) -> str:
        old, new = self._file_parts(source), self._file_parts(destination)
        beneath.check_ordinary(beneath.status(self._root, old))
        with suppress(FileNotFoundError):
            beneath.status(self._root, new)
            raise beneath.Exists("there is something at the destination already")
        with (
            beneath.opened_directory(self._root, old[:-1]) as origin,
            beneath.opened_directory(self._root, new[:-1]) as target,
        ):
            os.rename(old[-1], new[-1], src_dir_fd=origin, dst_dir_fd=target)
        return "moved"

    def _read(self, parts: Sequence[str]) -> bytes:
        with beneath.open_file(self._root, parts) as file:
            self._check_size(os.fstat(file.fileno()).st_size)
            data = file.read(self._rules.max_file_size + 1)
        self._check_size(len(data))  # it may have grown since
        return data

    def _matches(self, needle: str, start: tuple[str, ...]) -> Iterator[str]:
        try:
            for entry in self._searched(start):
                if needle in entry.parts[-1].lower():
                    yield entry.path
                yield from self._matching_lines(needle, entry)
        except beneath.TooMany as reason:
            yield f"... the search stopped here: {reason}"

    def _searched(self, start: tuple[str, ...]) -> Iterator[beneath.Entry]:
        left = SEARCHED_BYTES
        for entry in beneath.walk(self._root, start, limit=SCANNED):
            if self._is_readable(entry):
                left -= entry.status.st_size
                if left < 0:
                    raise beneath.TooMany("there is more text than one search reads")
                yield entry

    def _matching_lines(self, needle: str, entry: beneath.Entry) -> Iterator[str]:
        # What is no text, or changed under us, has no lines to show.
        with suppress(beneath.Refusal, OSError):
            for number, line in enumerate(_decoded(self._read(entry.parts)).splitlines(), 1):
                if needle in line.lower():
                    yield f"{entry.path}:{number}: {line.strip()[:SHOWN_OF_LINE]}"

    def _file_parts(self, path: str) -> tuple[str, ...]:
        parts = beneath.split_file(path)
        self._check_extension(parts)
        return parts

    def _is_readable(self, entry: beneath.Entry) -> bool:
        try:
            self._check_extension(entry.parts)
            self._check_size(entry.status.st_size)
        except beneath.Refusal:
            return False
        return entry.is_file

    def _check_extension(self, parts: Sequence[str]) -> None:
        allowed = self._rules.extensions
        if allowed is not None and _extension(parts[-1]) not in allowed:
            raise beneath.NotPermitted(f"only files that end in {', '.join(sorted(allowed))} are allowed")

    def _check_size(self, size: int) -> None:
        if size > self._rules.max_file_size:
            raise beneath.TooBig(f"a file may have {self._rules.max_file_size} bytes at most")


def _extension(name: str) -> str:
    stem, dot, last = name.rpartition(".")
    return dot + last.lower() if stem and last.isascii() else ""


def _listed(entry: beneath.Entry) -> str:
    name = entry.parts[-1]
    return f"{name}/" if entry.is_folder else f"{name} ({entry.status.st_size} bytes)"


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise beneath.NotOrdinary("the file is not UTF-8 text") from None


def _encoded(content: str) -> bytes:
    try:
        return content.encode()
    except UnicodeEncodeError:
        raise beneath.NotOrdinary("the content is not valid text") from None


def _text(description: str, *, default: str | None = None, longest: int = beneath.MAX_PATH_BYTES) -> dict[str, Any]:
    schema = {"type": "string", "description": description, "minLength": 1, "maxLength": longest}
    return schema if default is None else {**schema, "default": default}


def _tool(name: str, description: str, *, writes: bool = False, **properties: dict[str, Any]) -> types.Tool:
    return types.Tool(
        name=name,
        description=description,
        inputSchema={
            "type": "object",
            "properties": properties,
            "required": [key for key, schema in properties.items() if "default" not in schema],
            "additionalProperties": False,
        },
        annotations=types.ToolAnnotations(readOnlyHint=not writes, openWorldHint=False),
    )


PATH = "Path of the file, relative to the root, such as 'reports/june.md'."
FOLDER = "Path of the folder, relative to the root; '.' is the root."


def tools(rules: Rules) -> list[types.Tool]:
    content = {**_text("The whole new text of the file.", longest=rules.max_file_size), "minLength": 0}
    offered = [
        _tool("read_file", "Read a text file.", path=_text(PATH)),
        _tool("list_directory", "List the files and folders in a folder.", path=_text(FOLDER, default=".")),
        _tool(
            "search_files",
            "Find files below a folder whose name or text contains a phrase; upper and lower case are alike.",
            query=_text("The phrase, taken literally.", longest=200),
            path=_text(FOLDER, default="."),
        ),
        _tool("file_info", "Tell type, size and time of change of a file or folder.", path=_text(PATH)),
        _tool("write_file", "Create or replace a text file.", writes=True, path=_text(PATH), content=content),
        _tool("delete_file", "Delete a file.", writes=True, path=_text(PATH)),
        _tool("create_directory", "Create a folder and those above it.", writes=True, path=_text(FOLDER)),
        _tool(
            "move_file",
            "Move or rename a file; the destination must be free.",
            writes=True,
            source=_text(PATH),
            destination=_text("New path of the file, relative to the root."),
        ),
    ]
    return [tool for tool in offered if not rules.readonly or _only_reads(tool)]


def _only_reads(tool: types.Tool) -> bool:
    return tool.annotations is not None and tool.annotations.readOnlyHint is True


def checked(schema: dict[str, Any], arguments: dict[str, Any]) -> dict[str, str]:
    """The arguments as the schema wants them, defaults filled in; raises Refusal."""
    properties = schema["properties"]
    if unknown := arguments.keys() - properties.keys():
        raise beneath.BadPath(f"unknown arguments: {', '.join(sorted(unknown))[:SHOWN_OF_LINE]}")
    filled = {name: arguments.get(name, wanted.get("default")) for name, wanted in properties.items()}
    for name, value in filled.items():
        _check_text(name, value, properties[name])
    return filled


def _check_text(name: str, value: object, wanted: dict[str, Any]) -> None:
    if not isinstance(value, str):
        raise beneath.BadPath(f"'{name}' must be given as text")
    if not wanted["minLength"] <= len(value) <= wanted["maxLength"]:
        raise beneath.BadPath(f"'{name}' must be {wanted['minLength']} to {wanted['maxLength']} characters long")


class Desk:
    """Takes calls: checks the arguments, does the work, keeps the journal."""

    def __init__(self, folder: Folder, rules: Rules) -> None:
        self._tools = {tool.name: tool for tool in tools(rules)}
        self._folder = folder
        self._calls = 0

    async def list_tools(self, _: types.ListToolsRequest) -> types.ServerResult:
        return types.ServerResult(types.ListToolsResult(tools=list(self._tools.values())))

    async def call_tool(self, request: types.CallToolRequest) -> types.ServerResult:
        name, arguments = request.params.name, request.params.arguments or {}
        refused = None
        try:
            with beneath.refusals():
                text = self._work(name, arguments)
        except beneath.Refusal as reason:
            text = refused = str(reason)
        self._journal(name, arguments, refused)
        content: list[types.ContentBlock] = [types.TextContent(type="text", text=text)]
        return types.ServerResult(types.CallToolResult(content=content, isError=refused is not None))

    def _work(self, name: str, arguments: dict[str, Any]) -> str:
        tool = self._tools.get(name)
        if tool is None:
            raise beneath.Missing("there is no such tool")
        work: Callable[..., str] = getattr(self._folder, tool.name)
        return work(**checked(tool.inputSchema, arguments))

    def _journal(self, name: str, arguments: dict[str, Any], refused: str | None) -> None:
        self._calls += 1
        line: dict[str, object] = {"seq": self._calls, "tool": name}
        line["paths"] = [arguments[key] for key in PATHS if key in arguments]
        line["outcome"] = "ok" if refused is None else "refused"
        if refused is not None:
            line["reason"] = refused
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()


async def serve(desk: Desk) -> None:
    server: Server[object] = Server("filesystem", version="1")
    # Registered without the decorators: they check arguments before us, and a call must not miss the journal.
    server.request_handlers[types.ListToolsRequest] = desk.list_tools
    server.request_handlers[types.CallToolRequest] = desk.call_tool
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())


def _extensions(value: str) -> frozenset[str] | None:
    """`.txt,.md` as a set, `*` as None: any."""
    if value == "*":
        return None
    extensions = frozenset(value.lower().split(","))
    if not all(one.startswith(".") and one[1:] and "." not in one[1:] for one in extensions):
        raise argparse.ArgumentTypeError("must be '*' or a list such as .txt,.md")
    return extensions


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--readonly", action="store_true")
    parser.add_argument("--max-file-size", type=int, required=True, metavar="BYTES")
    parser.add_argument("--allowed-extensions", type=_extensions, required=True, metavar=".EXT,...")
    given = parser.parse_args()
    rules = Rules(given.readonly, given.max_file_size, given.allowed_extensions)
    anyio.run(serve, Desk(Folder(given.root, rules), rules))


if __name__ == "__main__":
    main()
