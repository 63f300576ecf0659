"""The providers that bindings may name, as the settings have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.secrets.locators import ENVIRONMENT_PREFIX
from app.secrets.providers.aws import SecretsManager
from app.secrets.providers.azure import KeyVaults
from app.secrets.providers.environment import Environment
from app.secrets.providers.file import Files
from app.secrets.providers.reading import Provider
from app.secrets.providers.vault import Vault
from app.settings import Settings, tenants_variables


def from_settings(settings: Settings) -> Mapping[str, Provider[Any]]:
    """By the names that bindings use; raise ConfigurationError for an address that would give a token away."""
    token = settings.secrets_vault_token
    vault = Vault(
        settings.secrets_vault_url,
        token=token.get_secret_value() if token else None,
        token_file=settings.secrets_vault_token_file,
        namespace=settings.secrets_vault_namespace,
    )
    return {
        "environment": Environment(tenants_variables(ENVIRONMENT_PREFIX)),
        "file": Files(settings.secrets_dir),
        "aws": SecretsManager(settings.secrets_aws_endpoint),
        "azure": KeyVaults(settings.secrets_azure_vaults),
        "vault": vault,
    }
