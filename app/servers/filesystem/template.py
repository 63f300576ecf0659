"""The template `filesystem`: one workspace of the tenant, bound into the sandbox and nothing else of the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from app.policies.decision import Denial
from app.policies.paths import check_path
from app.policies.servers.filesystem import FilesystemServer
from app.sandbox.contract import Limits, Mount, Profile, Scratch
from app.servers import own
from app.servers.template import Place, Template, Workspace
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


def workspace(server: FilesystemServer) -> Workspace | None:
    """The workspace `root`, but for a run's own, which the sandbox makes."""
    is_of_the_run = server.isolation == "run" and not server.readonly
    return None if is_of_the_run else Workspace(server.root, is_writable=not server.readonly)


def profile(server: FilesystemServer, place: Place) -> Profile:
    """Read-only is a property of the mount, the size of a file one of the process: the server is not trusted.

    Without a folder it has an empty one that ends with it; one to read from must be there.
    """
    folder = place.folder
    if folder is None and server.readonly:
        raise ValueError("there is nothing to read in an empty workspace")
    options = (
        *("--root", _WORKSPACE),
        *("--max-file-size", str(server.max_file_size)),
        *("--allowed-extensions", ",".join(server.allowed_extensions)),
        *(("--readonly",) if server.readonly else ()),
    )
    shown = (Mount(folder, _WORKSPACE, writable=not server.readonly),) if folder else ()
    program = own.profile(_SERVER, options, place, mounts=(Mount(Path(beneath.__file__), "/srv/beneath.py"), *shown))
    return replace(
        program,
        scratch=() if folder else (_OF_THE_RUN,),
        limits=Limits(file_bytes=server.max_file_size),
        working_directory=_WORKSPACE,
    )


TEMPLATE: Final = Template[FilesystemServer](profile=profile, check_call=check_call, workspace=workspace)
