"""The platform's catalogue of model endpoints; a policy names an entry and one of its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

import httpx
from pydantic import ValidationError

from app.errors import ConfigurationError, Fault
from app.outbound.addresses import is_loopback, is_public
from app.outbound.prices import PRICES, PriceIn, Prices
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class ModelEndpoint:
    """An OpenAI-compatible endpoint with the models that it may be asked for."""

    base_url: str
    api_key: str = field(repr=False)
    models: tuple[str, ...]  # the first is the default
    prices: Prices = field(default_factory=dict, hash=False)  # by model


class ModelCatalogue:
    """Endpoints by the name that a policy's `model.use` takes: those of the settings, and those that are stored.

    The stored ones come and go while the service is up; one of the settings is never hidden by one of them.
    """

    def __init__(self, own: Mapping[str, ModelEndpoint]) -> None:
        self._own = dict(own)
        self._stored: Mapping[str, ModelEndpoint] = {}

    @property
    def endpoints(self) -> Mapping[str, ModelEndpoint]:
        """All that a policy may name now."""
        return {**self._stored, **self._own}

    def is_own(self, name: str) -> bool:
        """True for an entry that only the settings change."""
        return name in self._own

    def replace_stored(self, stored: Mapping[str, ModelEndpoint]) -> None:
        """What is stored now, as a whole."""
        self._stored = dict(stored)

    def priced(self, use: str, name: str | None) -> tuple[str, Sequence[PriceIn]]:
        """The full name of a policy's model and its dated prices; of one that is not there, none."""
        endpoint = self.endpoints.get(use)
        if endpoint is None:
            return (f"{use}/{name}" if name else use), ()
        model = name or endpoint.models[0]
        return f"{use}/{model}", endpoint.prices.get(model, ())

    def faults(self, use: str, name: str | None) -> list[Fault]:
        """What a policy that names this model gets wrong; empty where it may."""
        endpoint = self.endpoints.get(use)
        if endpoint is None:
            there = ", ".join(sorted(self.endpoints)) or "none"
            hint = "; set BULKHEAD_MODEL_API_KEY to have it" if use == "default" else ""
            return [Fault("/model/use", f"{use!r} is not in the catalogue of models (there: {there}){hint}")]
        if name is not None and name not in endpoint.models:
            return [Fault("/model/name", f"this endpoint offers {', '.join(endpoint.models)}")]
        return []


def from_settings(settings: Settings, rehearsal: ModelEndpoint | None) -> ModelCatalogue:
    """The entry `default` where a credential is set, the entry `rehearsal` in the demo."""
    endpoints: dict[str, ModelEndpoint] = {}
    if settings.model_api_key is not None:
        endpoints["default"] = ModelEndpoint(
            settings.model_base_url,
            settings.model_api_key.get_secret_value(),
            settings.model_names,
            _prices(settings.model_prices),
        )
    if rehearsal is not None:
        endpoints["rehearsal"] = rehearsal
    return ModelCatalogue(endpoints)


def _prices(texts: Mapping[str, Sequence[Mapping[str, str]]]) -> Prices:
    try:
        return PRICES.validate_python(texts)
    except ValidationError:
        raise ConfigurationError(
            "BULKHEAD_MODEL_PRICES must be JSON such as"
            ' {"model": [{"from": "2026-01-01", "input": "0.4", "output": "1.6"}]}.'
        ) from None


def base_url_fault(text: str, *, allow_loopback: bool) -> str | None:
    """What is wrong with a base URL, as far as it shows it: what a name resolves to is vetted at each connection."""
    try:
        url = httpx.URL(text)
        host = url.host
    except (httpx.InvalidURL, UnicodeError):  # the latter for names that are no IDNA, and for lone surrogates
        return "is not a URL"
    if url.scheme not in ("https", "http") or not host:
        return "must begin with https:// and a host"
    if url.userinfo or url.query or url.fragment or "?" in text or "#" in text:
        return "must have no user, no query and no fragment"
    try:
        address = ip_address(host)
    except ValueError:
        is_local = host == "localhost"
        is_refused = is_local and not allow_loopback
    else:
        is_local = is_loopback(address)
        is_refused = not is_public(address) and not (is_local and allow_loopback)
    if is_refused:
        return "names an address that may not be called"
    return "must be https" if url.scheme == "http" and not is_local else None
