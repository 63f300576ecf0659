"""The template `filesystem`: one workspace of the tenant, bound into the sandbox and nothing else of the host."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from app.policies.decision import Denial
from app.policies.document import FilesystemServer
from app.policies.paths import check_path
from app.sandbox import runtimes
from app.sandbox.contract import Limits, Mount, Profile, Scratch
from app.tenants import beneath

_SERVER: Final = Path(__file__).with_name("server.py")
_WORKSPACE: Final = "/workspace"
# The workspace of a run that writes: empty at its start, gone at its end.
_OF_THE_RUN: Final = Scratch(_WORKSPACE, bytes=64 << 20, files=10_000)
_PATH_ARGUMENTS: Final = ("path", "source", "destination")
_FOLDER_TOOLS: Final = frozenset({"list_directory", "search_files", "create_directory", "file_info"})


def check_call(server: FilesystemServer, tool: str, arguments: Mapping[str, Any]) -> Denial | None:
    """What the template's own rules have against a call; asked before the server sees it."""
    extensions = None if tool in _FOLDER_TOOLS else frozenset(server.allowed_extensions)
    for name in _PATH_ARGUMENTS:
        if name in arguments and (denial := check_path(arguments[name], allowed_extensions=extensions)):
            return denial
    return None


def profile(server: FilesystemServer, *, workspace: Path | None, host_uid: int) -> Profile:
    """Read-only is a property of the mount, the size of a file one of the process: the server is not trusted.

    Without a `workspace` it has an empty one that ends with it; one to read from must be there.
    """
    if workspace is None and server.readonly:
        raise ValueError("there is nothing to read in an empty workspace")
    python = runtimes.python()
    flags = ("--readonly",) if server.readonly else ()
    return Profile(
        argv=(
            python.interpreter,
            "-I",
            "/srv/server.py",
            *("--root", _WORKSPACE),
            *("--max-file-size", str(server.max_file_size)),
            *("--allowed-extensions", ",".join(server.allowed_extensions)),
            *flags,
        ),
        host_uid=host_uid,
        mounts=(
            *python.mounts,
            Mount(_SERVER, "/srv/server.py"),
            Mount(Path(beneath.__file__), "/srv/beneath.py"),
            *((Mount(workspace, _WORKSPACE, writable=not server.readonly),) if workspace else ()),
        ),
        scratch=() if workspace else (_OF_THE_RUN,),
        files=python.files,
        environment=python.environment,
        limits=Limits(file_bytes=server.max_file_size),
        working_directory=_WORKSPACE,
    )
