"""Every operation that the service answers, as its router knows them: nothing can be mounted past a walk over these."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from app.scopes import Role

ADMIN, AUDITOR, USER, PLATFORM = Role.TENANT_ADMIN, Role.AUDITOR, Role.USER, Role.PLATFORM_ADMIN


class Operation(NamedTuple):
    """A method and a path template."""

    method: str
    path: str

    @property
    def parameters(self) -> list[str]:
        """The names in its path."""
        return re.findall(r"{(\w+)(?::path)?}", self.path)

    def url(self, values: dict[str, str]) -> str:
        """Its path with these values."""
        return re.sub(r"{(\w+)(?::path)?}", lambda match: values[match[1]], self.path)


def operations(app: FastAPI) -> set[Operation]:
    """Hidden ones too."""
    contexts = iter_route_contexts(app.routes)
    return {Operation(method, route.path or "") for route in contexts for method in route.methods or ()}


# No credential is asked for. /metrics has a token of its own.
PUBLIC: Final = {
    Operation("GET", "/healthz"),
    Operation("HEAD", "/healthz"),
    Operation("GET", "/readyz"),
    Operation("HEAD", "/readyz"),
    Operation("GET", "/.well-known/jwks.json"),
    Operation("GET", "/.well-known/bulkhead-audit-keys.json"),
    Operation("GET", "/openapi.json"),
    Operation("HEAD", "/openapi.json"),
    # What every installation shows alike: nothing is in it that is not in the sources.
    Operation("GET", "/docs"),
    Operation("GET", "/docs/start.js"),
    Operation("GET", "/docs/swagger-ui-bundle.js"),
    Operation("GET", "/docs/swagger-ui.css"),
    Operation("GET", "/docs/favicon.png"),
}
METRICS: Final = Operation("GET", "/metrics")
# Who may call, in the words of the design and not in those of the code.
ROLES: Final = {
    Operation("POST", "/query"): {ADMIN, USER},
    Operation("POST", "/v1/query"): {ADMIN, USER},
    Operation("POST", "/v1/runs"): {ADMIN, USER},
    Operation("GET", "/v1/runs"): {ADMIN, AUDITOR, USER},
    Operation("GET", "/v1/runs/{run_id}"): {ADMIN, AUDITOR, USER},
    Operation("GET", "/v1/runs/{run_id}/events"): {ADMIN, AUDITOR, USER},
    Operation("POST", "/v1/runs/{run_id}/cancel"): {ADMIN, USER},
    Operation("GET", "/v1/approvals"): {ADMIN, AUDITOR, USER},
    Operation("GET", "/v1/approvals/{approval_id}"): {ADMIN, AUDITOR, USER},
    Operation("POST", "/v1/approvals/{approval_id}/approve"): {ADMIN, USER},
    Operation("POST", "/v1/approvals/{approval_id}/deny"): {ADMIN, USER},
    Operation("POST", "/v1/conversations"): {ADMIN, USER},
    Operation("GET", "/v1/conversations"): {ADMIN, AUDITOR, USER},
    Operation("GET", "/v1/conversations/{conversation_id}"): {ADMIN, AUDITOR, USER},
    Operation("DELETE", "/v1/conversations/{conversation_id}"): {ADMIN, USER},
    Operation("GET", "/v1/me"): {ADMIN, AUDITOR, USER, PLATFORM},
    Operation("POST", "/v1/policies"): {ADMIN},
    Operation("GET", "/v1/policies"): {ADMIN, AUDITOR},
    Operation("GET", "/v1/policies/schema"): {ADMIN, AUDITOR},
    Operation("GET", "/v1/policies/{version}"): {ADMIN, AUDITOR},
    Operation("GET", "/v1/policies/published"): {ADMIN, AUDITOR},
    Operation("POST", "/v1/policies/{version}/publish"): {ADMIN},
    Operation("POST", "/v1/policies/validate"): {ADMIN},
    Operation("POST", "/v1/policies/rollback"): {ADMIN},
    Operation("POST", "/v1/policies/{version}/check"): {ADMIN},
    Operation("GET", "/v1/policies/{version}/diff"): {ADMIN, AUDITOR},
    Operation("POST", "/v1/policies/{version}/dry-run"): {ADMIN, AUDITOR},
    Operation("POST", "/v1/policies/{version}/backtest"): {ADMIN},
    Operation("GET", "/v1/policies/{version}/explain"): {ADMIN, AUDITOR},
    Operation("GET", "/v1/runs/{run_id}/tool_calls/{sequence}/explain"): {ADMIN, AUDITOR},
    Operation("GET", "/v1/usage"): {ADMIN, AUDITOR, USER},
    Operation("GET", "/v1/tenants/{tenant_id}/usage"): {PLATFORM},
    Operation("GET", "/v1/platform/usage"): {PLATFORM},
    Operation("GET", "/v1/checklist"): {PLATFORM},
    Operation("GET", "/v1/models"): {ADMIN, AUDITOR, PLATFORM},
    Operation("GET", "/v1/platform/models"): {PLATFORM},
    Operation("POST", "/v1/platform/models"): {PLATFORM},
    Operation("GET", "/v1/platform/models/{endpoint_id}"): {PLATFORM},
    Operation("PATCH", "/v1/platform/models/{endpoint_id}"): {PLATFORM},
    Operation("DELETE", "/v1/platform/models/{endpoint_id}"): {PLATFORM},
    Operation("POST", "/v1/switches"): {ADMIN, PLATFORM},
    Operation("GET", "/v1/switches"): {ADMIN, PLATFORM},
    Operation("DELETE", "/v1/switches/{switch_id}"): {ADMIN, PLATFORM},
    Operation("POST", "/v1/tenants"): {PLATFORM},
    Operation("GET", "/v1/tenants"): {PLATFORM},
    Operation("GET", "/v1/tenants/{tenant_id}"): {PLATFORM},
    Operation("POST", "/v1/tenants/{tenant_id}/disable"): {PLATFORM},
    Operation("POST", "/v1/tenants/{tenant_id}/erase"): {PLATFORM},
    Operation("POST", "/v1/tenants/{tenant_id}/enable"): {PLATFORM},
    Operation("POST", "/v1/tenants/{tenant_id}/users"): {PLATFORM},
    Operation("POST", "/v1/tenants/{tenant_id}/keys"): {PLATFORM},
    Operation("POST", "/v1/users"): {ADMIN, PLATFORM},
    Operation("GET", "/v1/users"): {ADMIN, AUDITOR, PLATFORM},
    Operation("GET", "/v1/users/{user_id}"): {ADMIN, AUDITOR, PLATFORM},
    Operation("PATCH", "/v1/users/{user_id}"): {ADMIN, PLATFORM},
    Operation("POST", "/v1/users/{user_id}/disable"): {ADMIN, PLATFORM},
    Operation("POST", "/v1/users/{user_id}/erase"): {ADMIN, PLATFORM},
    Operation("POST", "/v1/users/{user_id}/enable"): {ADMIN, PLATFORM},
    Operation("GET", "/v1/workspaces"): {ADMIN},
    Operation("DELETE", "/v1/workspaces/{name}"): {ADMIN},
    Operation("PUT", "/v1/workspaces/{name}/files/{path:path}"): {ADMIN},
    Operation("GET", "/v1/workspaces/{name}/files/{path:path}"): {ADMIN},
    Operation("DELETE", "/v1/workspaces/{name}/files/{path:path}"): {ADMIN},
    Operation("GET", "/v1/workspaces/{name}/files"): {ADMIN},
    Operation("PUT", "/v1/secrets/{name}"): {ADMIN},
    Operation("GET", "/v1/secrets"): {ADMIN},
    Operation("GET", "/v1/secrets/{name}"): {ADMIN},
    Operation("DELETE", "/v1/secrets/{name}"): {ADMIN},
    Operation("PUT", "/v1/tenants/{tenant_id}/secret-bindings/{name}"): {PLATFORM},
    Operation("GET", "/v1/tenants/{tenant_id}/secret-bindings"): {PLATFORM},
    Operation("GET", "/v1/tenants/{tenant_id}/secret-bindings/{name}"): {PLATFORM},
    Operation("DELETE", "/v1/tenants/{tenant_id}/secret-bindings/{name}"): {PLATFORM},
    Operation("GET", "/v1/server-catalogue"): {ADMIN},
    Operation("GET", "/v1/servers"): {ADMIN},
    Operation("GET", "/v1/servers/{name}/stderr"): {ADMIN},
    Operation("GET", "/v1/quarantines"): {ADMIN},
    Operation("POST", "/v1/quarantines/{quarantine_id}/accept"): {ADMIN},
    Operation("POST", "/v1/quarantines/{quarantine_id}/dismiss"): {ADMIN},
    Operation("POST", "/v1/keys"): {ADMIN, PLATFORM},
    Operation("GET", "/v1/keys"): {ADMIN, AUDITOR, PLATFORM},
    Operation("POST", "/v1/keys/{key_id}/rotate"): {ADMIN, PLATFORM},
    Operation("DELETE", "/v1/keys/{key_id}"): {ADMIN, PLATFORM},
    Operation("GET", "/v1/issuers"): {ADMIN, AUDITOR},
    Operation("POST", "/v1/issuers"): {ADMIN},
    Operation("GET", "/v1/issuers/{issuer_id}"): {ADMIN, AUDITOR},
    Operation("DELETE", "/v1/issuers/{issuer_id}"): {ADMIN},
    Operation("GET", "/v1/audit/events"): {ADMIN, AUDITOR, PLATFORM},
    Operation("GET", "/v1/audit/export"): {ADMIN, AUDITOR, PLATFORM},
    Operation("GET", "/v1/tenants/{tenant_id}/audit/events"): {PLATFORM},
    Operation("GET", "/v1/runs/{run_id}/receipt"): {ADMIN, AUDITOR, USER},
}
