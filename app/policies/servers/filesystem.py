"""The section of a server of the template `filesystem`."""

from __future__ import annotations

from typing import ClassVar, Literal

from app.policies.sections import MB, Extensions, Size, WorkspaceName
from app.policies.servers.declared import Server


class FilesystemServer(Server):
    """One workspace of the tenant, `root`, as files; `max_file_size` in bytes (1 MB is 1,048,576)."""

    only_reading: ClassVar[frozenset[str]] = frozenset({"read_file", "list_directory", "search_files", "file_info"})
    template: Literal["filesystem"]
    """The files of one workspace; it has no network."""
    root: WorkspaceName
    """A workspace of the tenant; made if it is not there."""
    readonly: bool = True
    """Whether the tools only read."""
    max_file_size: Size = 10 * MB
    """Of a file that is read or written, in KB or MB, up to 100MB."""
    allowed_extensions: Extensions = (".txt", ".md", ".json", ".py")
    """Lower case, with the dot."""

    @property
    def keeps_state(self) -> bool:
        """What a run has written to a workspace of its own is gone with its server."""
        return self.stateful or (self.isolation == "run" and not self.readonly)
