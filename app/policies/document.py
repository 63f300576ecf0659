"""The policy document: what a tenant writes, read strictly and refused with all of its faults at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Final, Literal, get_args

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from app.errors import Fault, Invalid
from app.policies import overrides, strict_yaml
from app.policies.overrides import MAX_OVERRIDES, Override, Terms, terms_of
from app.policies.patterns import matching
from app.policies.publishing import PublishingRules
from app.policies.sections import CatalogueName, Globs, Section, ServerName
from app.policies.servers.browser import BrowserServer
from app.policies.servers.command import CommandServer
from app.policies.servers.fetch import FetchServer
from app.policies.servers.filesystem import FilesystemServer
from app.policies.servers.http import HttpServer
from app.policies.servers.postgres import PostgresServer
from app.policies.terms import ApprovalRules, ConversationRules, InputRules, RunLimits

_OF_THE_TEMPLATE: Final = frozenset({"union_tag_not_found", "union_tag_invalid"})


class PolicyInvalid(Invalid):
    """The policy is not valid."""

    code = "policy_invalid"


class ModelChoice(Section):
    """An entry of the platform's model catalogue; without a name, the entry's own default model."""

    use: CatalogueName = "default"
    """The entry of the platform's model catalogue."""
    name: CatalogueName | None = None
    """One of the entry's models; without it, the first."""
    temperature: float = Field(default=0.0, ge=0, le=2)
    """Sent to the model."""


DeclaredServer = BrowserServer | CommandServer | FilesystemServer | FetchServer | HttpServer | PostgresServer


class ToolRules(Section):
    """Globs over `server__tool` names, and Cedar text for what globs cannot say."""

    allow: Globs = ()
    """Tools that may be called; each glob must match a tool."""
    deny: Globs = ()
    """Tools that may not be called, whatever allows them; a glob may match none."""
    approve: Globs = ()
    """Tools each call of which waits for an approval, whatever allows them; each glob must match a tool."""
    idempotent: Globs = ()
    """Tools that may be called again where nobody knows whether a call was made; each glob must match a tool."""
    rules: str = Field(default="", max_length=64 * 1024)
    """Cedar policies over the tools and their arguments."""
    search_above: int = Field(default=40, ge=1, le=512)
    """Callers who may use more tools than this find them by a search; the model is not shown them all at once."""


class PolicyDocument(Section):
    """What a tenant's agent may do, and within what limits."""

    schema_: Literal["bulkhead/1"] = Field(alias="schema")
    """The version of this format."""
    model: ModelChoice = ModelChoice()
    """Which model answers."""
    instructions: str = Field(default="", max_length=20_000)
    """The system prompt; it guides the model and enforces nothing."""
    limits: RunLimits = RunLimits()
    """Bounds on a run, and on the requests of a user."""
    input: InputRules = InputRules()
    """How queries are screened."""
    servers: dict[ServerName, Annotated[DeclaredServer, Field(discriminator="template")]] = Field(
        default={}, max_length=32
    )
    """The tool servers, by name."""
    tools: ToolRules = ToolRules()
    """Which tool calls are allowed."""
    overrides: Annotated[tuple[Override, ...], Field(max_length=MAX_OVERRIDES)] = ()
    """Narrower terms for callers of some roles, and for some users; all that mean a caller hold together."""
    publishing: PublishingRules = PublishingRules()
    """What a new version must show before it may be published."""
    approvals: ApprovalRules = ApprovalRules()
    """How calls wait that need an approval."""
    conversations: ConversationRules = ConversationRules()
    """What runs are told of their conversation, and how long it is kept."""

    def meant_for(self, user_id: str, role: str) -> dict[int, Override]:
        """The overrides that hold for this caller, by their places."""
        return {place: each for place, each in enumerate(self.overrides) if each.means(user_id, role)}

    def terms_for(self, user_id: str, role: str) -> Terms:
        """The limits and the screenings that hold for this caller."""
        return terms_of(self.limits, self.input, self.meant_for(user_id, role))

    def is_idempotent(self, tool: str) -> bool:
        """True where a call of the tool, by its full name, may be made again though the first may have been made."""
        server, _, own_name = tool.partition("__")
        if (declared := self.servers.get(server)) is not None and own_name in declared.only_reading:
            return True
        return any(matching(glob, [tool]) for glob in self.tools.idempotent)

    def is_stateful(self, server: str) -> bool:
        """True where a run that has called the server cannot go on with another process of it.

        False for one that the policy has not: no call of it will be made.
        """
        declared = self.servers.get(server)
        return declared is not None and declared.keeps_state


def parse(text: str) -> PolicyDocument:
    """Read a document; PolicyInvalid carries every fault found."""
    try:
        data, faults = strict_yaml.load(text)
    except strict_yaml.Unreadable as error:
        raise PolicyInvalid(faults=[Fault("", str(error))]) from error
    if crowded := overrides.crowding(data):
        raise PolicyInvalid(faults=[*faults, *crowded])
    try:
        # Through JSON, because pydantic's strict mode takes a list for a tuple only there.
        document = PolicyDocument.model_validate_json(json.dumps(data))
    except ValidationError as error:
        faults += _faults(error.errors(include_url=False))
        raise PolicyInvalid(faults=faults) from error
    faults += overrides.faults(document.limits, document.input, document.overrides)
    if faults:
        raise PolicyInvalid(faults=faults)
    return document


def digest(text: str) -> str:
    """SHA-256 of the text as it was written, in hex: what a version is known by."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _faults(errors: list[ErrorDetails]) -> list[Fault]:
    return [Fault(strict_yaml.pointer(*place), words) for error in errors for place, words in _told(error)]


def _told(error: ErrorDetails) -> Iterator[tuple[tuple[str | int, ...], str]]:
    yield _location(error), _message(error)
    if error["type"] == "union_tag_not_found":  # its keys are not looked at, and one may be meant for `template`
        for key in error["input"]:
            if not _is_of_a_template(key):
                yield (*error["loc"], key), f"{key} is not a known key"


def _location(error: ErrorDetails) -> tuple[str | int, ...]:
    """Where it stands in the document: pydantic puts the name of the template between a server and its keys."""
    loc = tuple(part for part in error["loc"] if part != "[key]")
    if error["type"] in _OF_THE_TEMPLATE:
        return (*loc, "template")
    return (*loc[:2], *loc[3:]) if loc[:1] == ("servers",) else loc


def _message(error: ErrorDetails) -> str:
    match error["type"]:
        case "extra_forbidden":
            return _of_an_extra_key(_location(error))
        case "union_tag_not_found":
            return "Field required"
        case "union_tag_invalid":
            return f"must be one of {error['ctx']['expected_tags']}"
        case "value_error":
            return str(error["ctx"]["error"])
    return error["msg"]


def _of_an_extra_key(location: tuple[str | int, ...]) -> str:
    section, key = location[0], location[-1]
    if section == "servers" and _is_of_a_template(key):
        return f"{key} is a key of another template"
    return f"{key} is not a known key"


def _is_of_a_template(key: str | int) -> bool:
    return any(key in template.model_fields for template in get_args(DeclaredServer))
