"""Secrets from the KV v2 engines of one HashiCorp Vault, or of what speaks its API."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread

from app.errors import ConfigurationError
from app.secrets.locators import VaultLocator
from app.secrets.providers.reading import ANSWER_S, CONNECT_S, Outcome, Unreadable, not_installed, text_of


class Vault:
    """`token_file` is read each time, since who renews the token writes it there; it comes before `token`.

    Raise ConfigurationError for an address over which the token would travel in the clear.
    """

    def __init__(
        self,
        url: str | None,
        *,
        token: str | None = None,
        token_file: Path | None = None,
        namespace: str | None = None,
    ) -> None:
        if url is not None and not _is_safe(url):
            raise ConfigurationError("BULKHEAD_SECRETS_VAULT_URL must be https, or http on loopback.")
        self._url = url
        self._token = token
        self._token_file = token_file
        self._namespace = namespace
        self._threads = CapacityLimiter(4)

    def __repr__(self) -> str:
        return "Vault(***)"

    async def read(self, locator: VaultLocator) -> str:
        """A field of the named version, or of the newest; raise Unreadable."""
        return await to_thread.run_sync(self._read, locator, limiter=self._threads, abandon_on_cancel=True)

    def _read(self, locator: VaultLocator) -> str:
        try:
            import hvac  # noqa: PLC0415  an extra
            from requests.exceptions import RequestException  # noqa: PLC0415  comes with it
        except ImportError:
            raise not_installed("vault") from None
        client = hvac.Client(
            url=self._address(),
            token=self._current_token(),
            namespace=self._namespace,
            timeout=(CONNECT_S, ANSWER_S),
            allow_redirects=False,  # the token would go along
            proxies={"http": ""},  # of a proxy that the environment names, too
        )
        try:
            answer = client.secrets.kv.v2.read_secret_version(
                path=locator.path, mount_point=locator.mount, version=locator.version, raise_on_deleted_version=True
            )
        except hvac.exceptions.InvalidPath:
            raise Unreadable(Outcome.MISSING) from None
        except (hvac.exceptions.Forbidden, hvac.exceptions.Unauthorized):
            raise Unreadable(Outcome.DENIED) from None
        except (hvac.exceptions.VaultError, RequestException, ValueError) as error:
            raise Unreadable(Outcome.UNAVAILABLE, type(error).__name__) from None
        finally:
            client.adapter.close()
        return text_of(_data(answer), locator.field)

    def _address(self) -> str:
        if self._url is None:
            raise Unreadable(Outcome.NOT_CONFIGURED, "set BULKHEAD_SECRETS_VAULT_URL")
        return self._url

    def _current_token(self) -> str:
        """Never none: hvac would then look for one in the environment and in a home."""
        try:
            token = self._token_file.read_text().strip() if self._token_file else self._token
        except (OSError, UnicodeDecodeError):
            raise Unreadable(Outcome.NOT_CONFIGURED, "BULKHEAD_SECRETS_VAULT_TOKEN_FILE cannot be read") from None
        if not token:
            raise Unreadable(Outcome.NOT_CONFIGURED, "set BULKHEAD_SECRETS_VAULT_TOKEN or its file")
        return token


def _data(answer: Any) -> dict[str, Any]:
    try:
        found = answer["data"]["data"]
    except (TypeError, KeyError):
        raise Unreadable(Outcome.UNAVAILABLE, "what answers is no KV v2 engine") from None
    return found if isinstance(found, dict) else {}


def _is_safe(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme == "https":
        return bool(parts.hostname)
    try:
        return parts.scheme == "http" and ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False
