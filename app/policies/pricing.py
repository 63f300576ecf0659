"""A budget of costs needs a price: without one nothing that the model does would count."""

from __future__ import annotations

from datetime import UTC, datetime

from app.errors import Fault
from app.outbound.catalogue import ModelCatalogue
from app.outbound.prices import price_on
from app.policies.caps import Caps
from app.policies.document import PolicyDocument
from app.policies.strict_yaml import pointer


def faults(document: PolicyDocument, catalogue: ModelCatalogue, caps: Caps) -> list[Fault]:
    """Where a budget of costs would hold, the platform's own too, and the model has no price today."""
    _, prices = catalogue.priced(document.model.use, document.model.name)
    if not _bounds_cost(caps.applied(document)) or price_on(datetime.now(UTC).date(), prices) is not None:
        return []
    return [Fault(pointer("model", "use"), "has no price in the platform's catalogue, and a budget of costs holds")]


def _bounds_cost(document: PolicyDocument) -> bool:
    of_users = (override.limits.cost_usd_per_day for override in document.overrides)
    return any(budget is not None for budget in (document.limits.cost_usd_per_day, *of_users))
