"""The policy document: what a tenant writes, read strictly and refused with all of its faults at once."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Final, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import ErrorDetails

from app.errors import Fault, Invalid
from app.policies import strict_yaml
from app.policies.hosts import parse_host
from app.policies.patterns import check_glob, compile_pattern

# Keys of the full design that nothing enforces yet: refused by name, so that nobody believes in them.
_LATER: Final = {
    "limits": frozenset({"tenant_requests", "concurrent_runs", "tokens_per_day", "cost_usd_per_day"}),
    "tools": frozenset({"approve"}),
    "servers": frozenset(
        {
            *("command", "args", "env", "url", "headers"),
            *("dsn", "allowed_schemas", "blocked_tables", "connect_timeout_s", "max_connections"),
            *("allowed_domains", "block_private_ips", "javascript", "timeout_s"),
        }
    ),
}
_LATER_TEMPLATES: Final = frozenset({"command", "http", "postgres", "browser"})
_OF_THE_TEMPLATE: Final = frozenset({"union_tag_not_found", "union_tag_invalid"})
_SIZE: Final = re.compile(r"([1-9][0-9]{0,8})(KB|MB)")
_UNITS: Final = {"KB": 1024, "MB": 1024 * 1024}
# Characters a query may have where the policy says nothing; the guide's number for `strict`.
_MAX_LENGTH: Final = {"strict": 1_000, "balanced": 4_000, "off": 20_000}
# Instructions of all patterns times characters of a query. The worst patterns take 5 to 8 ns for each on ASCII and
# 23 ns on the widest characters, so that a screening ends within half a second; an ordinary one takes microseconds.
MAX_MATCHING: Final = 20_000_000


class PolicyInvalid(Invalid):
    """The policy is not valid."""

    code = "policy_invalid"


def _bytes(size: object) -> object:
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if not found:
        raise ValueError('must be a size such as "512KB" or "10MB"')
    return int(found[1]) * _UNITS[found[2]]


def _expression(pattern: str) -> str:
    compile_pattern(pattern)
    return pattern


def _not_empty(extensions: tuple[str, ...]) -> tuple[str, ...]:
    if not extensions:
        raise ValueError("must name at least one extension")
    return extensions


def _hosts(hosts: tuple[str, ...]) -> tuple[str, ...]:
    if not hosts:
        raise ValueError("must name at least one host")
    if len({parse_host(host) for host in hosts}) < len(hosts):
        raise ValueError("names a host and port twice")
    return hosts


def _host(host: str) -> str:
    parse_host(host)
    return host


Size = Annotated[int, BeforeValidator(_bytes), Field(ge=1, le=100 * _UNITS["MB"])]
Expression = Annotated[str, AfterValidator(_expression)]
Expressions = Annotated[tuple[Expression, ...], Field(max_length=50)]
Globs = Annotated[tuple[Annotated[str, AfterValidator(check_glob)], ...], Field(max_length=500)]
Rate = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}/(second|minute|hour|day)$")]
ServerName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$", max_length=32)]
WorkspaceName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Extension = Annotated[str, StringConstraints(pattern=r"^\.[a-z0-9]{1,16}$")]
Extensions = Annotated[tuple[Extension, ...], AfterValidator(_not_empty), Field(max_length=50)]
Host = Annotated[str, AfterValidator(_host)]
Hosts = Annotated[tuple[Host, ...], AfterValidator(_hosts), Field(max_length=50)]
CatalogueName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelChoice(_Section):
    """An entry of the platform's model catalogue; without a name, the entry's own default model."""

    use: CatalogueName = "default"
    name: CatalogueName | None = None
    temperature: float = Field(default=0.0, ge=0, le=2)


class RunLimits(_Section):
    max_steps: int = Field(default=20, ge=1, le=100)
    timeout_s: int = Field(default=300, ge=1, le=3600)
    max_tool_calls: int = Field(default=10, ge=1, le=1000)
    requests: Rate = "10/minute"


class InputRules(_Section):
    """How queries are screened; without `max_length` (characters) the preset's own holds."""

    preset: Literal["strict", "balanced", "off"] = "balanced"
    max_length: int | None = Field(default=None, ge=1, le=100_000)
    block: Expressions = ()
    flag: Expressions = ()

    @property
    def longest(self) -> int:
        """The characters that a query may have."""
        return _longest(self.preset, self.max_length)

    @field_validator("block", "flag")
    @classmethod
    def _affordable(cls, patterns: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Told once, at the key that passes the bound; keys that are at fault themselves are not there to count."""
        before = info.data.get("block", ())
        instructions = sum(compile_pattern(pattern).programsize for pattern in (*before, *patterns))
        allowed = MAX_MATCHING // _longest(info.data.get("preset", "balanced"), info.data.get("max_length"))
        if patterns and instructions > allowed:
            raise ValueError(
                f"the patterns of block and flag take {instructions} instructions; {allowed} are allowed for queries"
                " of that length: simplify them, or lower max_length"
            )
        return patterns


def _longest(preset: str, max_length: int | None) -> int:
    return max_length or _MAX_LENGTH[preset]


class _Server(_Section):
    """What every template has; `isolation` is what a live server, and what it may write to, are shared by."""

    isolation: Literal["tenant", "user", "run"] = "tenant"


class FilesystemServer(_Server):
    """One workspace of the tenant, `root`, as files; `max_file_size` in bytes (1 MB is 1,048,576)."""

    template: Literal["filesystem"]
    root: WorkspaceName
    readonly: bool = True
    max_file_size: Size = 10 * _UNITS["MB"]
    allowed_extensions: Extensions = (".txt", ".md", ".json", ".py")


class FetchServer(_Server):
    """Pages of the hosts named, over https; `max_response_size` in bytes, `allowed_hosts` as `name` or `name:port`."""

    template: Literal["fetch"]
    allowed_hosts: Hosts
    max_response_size: Annotated[Size, Field(le=10 * _UNITS["MB"])] = _UNITS["MB"]


DeclaredServer = FilesystemServer | FetchServer


class ToolRules(_Section):
    """Globs over `server__tool` names, and Cedar text for what globs cannot say."""

    allow: Globs = ()
    deny: Globs = ()
    rules: str = Field(default="", max_length=64 * 1024)


class PolicyDocument(_Section):
    schema_: Literal["bulkhead/1"] = Field(alias="schema")
    model: ModelChoice = ModelChoice()
    instructions: str = Field(default="", max_length=20_000)
    limits: RunLimits = RunLimits()
    input: InputRules = InputRules()
    servers: Annotated[
        dict[ServerName, Annotated[DeclaredServer, Field(discriminator="template")]], Field(max_length=32)
    ] = {}
    tools: ToolRules = ToolRules()


def parse(text: str) -> PolicyDocument:
    """Read a document; PolicyInvalid carries every fault found."""
    try:
        data, faults = strict_yaml.load(text)
    except strict_yaml.Unreadable as error:
        raise PolicyInvalid(faults=[Fault("", str(error))]) from error
    try:
        # Through JSON, because pydantic's strict mode takes a list for a tuple only there.
        document = PolicyDocument.model_validate_json(json.dumps(data))
    except ValidationError as error:
        faults += _faults(error.errors(include_url=False))
        raise PolicyInvalid(faults=faults) from error
    if faults:
        raise PolicyInvalid(faults=faults)
    return document


def digest(text: str) -> str:
    """SHA-256 of the text as it was written, in hex: what a version is known by."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _faults(errors: list[ErrorDetails]) -> list[Fault]:
    return [Fault(strict_yaml.pointer(*_location(error)), _message(error)) for error in errors]


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
            template, known = error["ctx"]["tag"], error["ctx"]["expected_tags"]
            later = template in _LATER_TEMPLATES
            return f"template {template} is not enforced yet" if later else f"must be one of {known}"
        case "value_error":
            return str(error["ctx"]["error"])
    return error["msg"]


def _of_an_extra_key(location: tuple[str | int, ...]) -> str:
    section, key = location[0], location[-1]
    if len(location) > 1 and key in _LATER.get(str(section), ()):
        return f"{key} is not enforced yet"
    if section == "servers" and any(key in template.model_fields for template in get_args(DeclaredServer)):
        return f"{key} is a key of another template"
    return f"{key} is not a known key"
