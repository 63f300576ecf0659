"""Where a bound secret is: one kind of locator a provider, bounded to what its provider can mean by it.

Written by the platform's admin alone, and shown to no tenant.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

ENVIRONMENT_PREFIX: Final = "BULKHEAD_SECRET_"
_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9/_+=.@:-]*$"


class _Locator(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Word = Annotated[str, StringConstraints(pattern=_NAME, max_length=512)]
# A key of an object: any text but an empty one, since others have named it.
Member = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


class EnvironmentLocator(_Locator):
    """A variable of the service's environment; no other than those that are there for tenants."""

    provider: Literal["environment"]
    variable: Annotated[str, StringConstraints(pattern=rf"^{ENVIRONMENT_PREFIX}[A-Z0-9_]+$", max_length=128)]


class FileLocator(_Locator):
    """A file below BULKHEAD_SECRETS_DIR, by its path from there."""

    provider: Literal["file"]
    path: Annotated[
        str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$", max_length=512)
    ]


class AwsLocator(_Locator):
    """A secret of AWS Secrets Manager, by name or ARN; with `field`, one member of its JSON object."""

    provider: Literal["aws"]
    region: Annotated[str, StringConstraints(pattern=r"^[a-z]{2}(-[a-z]+)+-[0-9]{1,2}$", max_length=32)]
    secret_id: Annotated[Word, Field(max_length=2048)]
    field: Member | None = None
    stage: Word = "AWSCURRENT"


class AzureLocator(_Locator):
    """A secret of one of BULKHEAD_SECRETS_AZURE_VAULTS; without `version`, its newest."""

    provider: Literal["azure"]
    vault: Annotated[str, StringConstraints(pattern=r"^https://[a-z0-9.-]+(:[0-9]{1,5})?$", max_length=255)]
    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9-]{1,127}$")]
    version: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]{1,64}$")] | None = None


class VaultLocator(_Locator):
    """A field of a secret in a KV v2 engine of the Vault at BULKHEAD_SECRETS_VAULT_URL."""

    provider: Literal["vault"]
    mount: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*$", max_length=128)] = "secret"
    path: Annotated[
        str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$", max_length=512)
    ]
    field: Member
    version: Annotated[int, Field(ge=1, le=2**31)] | None = None


Locator = Annotated[
    EnvironmentLocator | FileLocator | AwsLocator | AzureLocator | VaultLocator, Field(discriminator="provider")
]
_ADAPTER: Final[TypeAdapter[Locator]] = TypeAdapter(Locator)


def parse(provider: str, fields: object) -> Locator:
    """A stored locator; raise pydantic's ValidationError for one that this code would not have stored."""
    return _ADAPTER.validate_python({"provider": provider, **(fields if isinstance(fields, dict) else {})})


def fields(locator: Locator) -> dict[str, object]:
    """What is stored beside the provider's name."""
    return locator.model_dump(exclude={"provider"}, exclude_none=True)
