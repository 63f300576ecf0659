"""The platform's catalogue of model endpoints; a policy names an entry and one of its models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from app.errors import Fault
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class ModelEndpoint:
    """An OpenAI-compatible endpoint with the models that it may be asked for."""

    base_url: str
    api_key: str = field(repr=False)
    models: tuple[str, ...]  # the first is the default


@dataclass(frozen=True, slots=True)
class ModelCatalogue:
    """Endpoints by the name that a policy's `model.use` takes."""

    endpoints: Mapping[str, ModelEndpoint]

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
            settings.model_base_url, settings.model_api_key.get_secret_value(), settings.model_names
        )
    if rehearsal is not None:
        endpoints["rehearsal"] = rehearsal
    return ModelCatalogue(endpoints)
