"""The section of a server of the template `command`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from app.policies.sections import Hosts, SecretReference, WorkspaceName
from app.policies.servers.declared import Server

EntryName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}$")]
ParameterName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
# One argument of a program, and never more than one: there is no shell that could split it.
ParameterValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=500)]
VariableName = Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")]


class CommandServer(Server):
    """An entry of the platform's server catalogue, by name; what else it may say here, the entry says.

    `root` is the workspace that the program sees, `env` its variables from the tenant's secrets.
    """

    template: Literal["command"]
    """A program of the platform's server catalogue."""
    server: EntryName
    """The entry of the catalogue."""
    parameters: dict[ParameterName, ParameterValue] = Field(default={}, max_length=32)
    """What the entry leaves open, each one argument."""
    root: WorkspaceName | None = None
    """A workspace of the tenant, for an entry that takes one."""
    readonly: bool = True
    """Whether the program only reads its workspace."""
    allowed_hosts: Hosts = ()
    """Whole host names in lower case, with a port where it is not 443, of those that the entry allows."""
    env: dict[VariableName, SecretReference] = Field(default={}, max_length=32)
    """Variables that the entry names, each from a secret of the tenant."""

    @property
    def keeps_state(self) -> bool:
        """What a run has written to a workspace of its own is gone with its server."""
        return self.stateful or (self.isolation == "run" and not self.readonly)
