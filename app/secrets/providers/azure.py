"""Secrets from Azure Key Vault, with the credentials that DefaultAzureCredential finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from anyio import CapacityLimiter, to_thread

from app.secrets.locators import AzureLocator
from app.secrets.providers.reading import ANSWER_S, CONNECT_S, Outcome, Unreadable, not_installed


class KeyVaults:
    """The vaults that the operator names: to no other host does a token of ours go.

    `credential` and `options` are for a test: who asks, and how its vault is reached.
    """

    def __init__(
        self, vaults: Sequence[str], *, credential: Any = None, options: Mapping[str, Any] | None = None
    ) -> None:
        self._vaults = {vault.rstrip("/") for vault in vaults}
        self._threads = CapacityLimiter(4)
        self._client = lru_cache(maxsize=16)(lambda vault: _client(vault, credential, options or {}))

    async def read(self, locator: AzureLocator) -> str:
        """The text of the named version, or of the newest; raise Unreadable."""
        if locator.vault not in self._vaults:
            raise Unreadable(Outcome.NOT_CONFIGURED, "BULKHEAD_SECRETS_AZURE_VAULTS does not name its vault")
        return await to_thread.run_sync(self._read, locator, limiter=self._threads, abandon_on_cancel=True)

    def _read(self, locator: AzureLocator) -> str:
        try:
            from azure.core import exceptions  # noqa: PLC0415  an extra

            client = self._client(locator.vault)
        except ImportError:
            raise not_installed("azure") from None
        try:
            text = client.get_secret(locator.name, locator.version).value
        except exceptions.ResourceNotFoundError:
            raise Unreadable(Outcome.MISSING) from None
        except exceptions.ClientAuthenticationError:
            raise Unreadable(Outcome.DENIED) from None
        except exceptions.HttpResponseError as error:
            raise Unreadable(Outcome.DENIED if error.status_code == 403 else Outcome.UNAVAILABLE) from None
        except (exceptions.AzureError, ValueError) as error:  # the second: it asks for a token of another domain
            raise Unreadable(Outcome.UNAVAILABLE, type(error).__name__) from None
        if not isinstance(text, str):
            raise Unreadable(Outcome.UNUSABLE, "it has no text")
        return text


def _client(vault: str, credential: Any, options: Mapping[str, Any]) -> Any:
    from azure.keyvault.secrets import SecretClient  # noqa: PLC0415  an extra

    if credential is None:
        from azure.identity import DefaultAzureCredential  # noqa: PLC0415  an extra

        credential = DefaultAzureCredential()
    # A redirect would take the token along.
    bounds = {"connection_timeout": CONNECT_S, "read_timeout": ANSWER_S, "retry_total": 1, "permit_redirects": False}
    return SecretClient(vault, credential, **bounds, **options)
