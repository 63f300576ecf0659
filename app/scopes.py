"""Scopes, `<domain>:<action>`, and which role holds which."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Role(StrEnum):
    """What a user may do; a user has exactly one."""

    PLATFORM_ADMIN = "platform_admin"
    TENANT_ADMIN = "tenant_admin"
    AUDITOR = "auditor"
    USER = "user"


class Scope(StrEnum):
    """One kind of action on one domain."""

    RUNS_CREATE = "runs:create"
    RUNS_READ = "runs:read"
    RUNS_READ_ALL = "runs:read_all"
    RUNS_CANCEL_ALL = "runs:cancel_all"
    APPROVALS_READ = "approvals:read"
    APPROVALS_DECIDE = "approvals:decide"
    APPROVALS_DECIDE_ALL = "approvals:decide_all"
    POLICIES_READ = "policies:read"
    POLICIES_WRITE = "policies:write"
    POLICIES_PUBLISH = "policies:publish"
    WORKSPACES_READ = "workspaces:read"
    WORKSPACES_WRITE = "workspaces:write"
    SERVERS_READ = "servers:read"
    USERS_READ = "users:read"
    USERS_WRITE = "users:write"
    KEYS_READ = "keys:read"
    KEYS_WRITE = "keys:write"
    ISSUERS_READ = "issuers:read"
    ISSUERS_WRITE = "issuers:write"
    AUDIT_READ = "audit:read"
    USAGE_READ = "usage:read"
    USAGE_READ_ALL = "usage:read_all"
    SECRETS_READ = "secrets:read"
    SECRETS_WRITE = "secrets:write"
    SWITCHES_WRITE = "switches:write"
    MODELS_READ = "models:read"
    MODELS_WRITE = "models:write"
    TENANTS_READ = "tenants:read"
    TENANTS_WRITE = "tenants:write"


_USER: Final = frozenset(
    {Scope.RUNS_CREATE, Scope.RUNS_READ, Scope.APPROVALS_READ, Scope.APPROVALS_DECIDE, Scope.USAGE_READ}
)
_AUDITOR: Final = frozenset(
    {
        Scope.RUNS_READ,
        Scope.RUNS_READ_ALL,
        Scope.APPROVALS_READ,
        Scope.USAGE_READ,
        Scope.USAGE_READ_ALL,
        Scope.POLICIES_READ,
        Scope.USERS_READ,
        Scope.KEYS_READ,
        Scope.ISSUERS_READ,
        Scope.AUDIT_READ,
        Scope.MODELS_READ,
    }
)
_TENANT_ADMIN: Final = (
    _USER
    | _AUDITOR
    | {
        Scope.RUNS_CANCEL_ALL,
        Scope.APPROVALS_DECIDE_ALL,
        Scope.POLICIES_WRITE,
        Scope.POLICIES_PUBLISH,
        Scope.WORKSPACES_READ,
        Scope.WORKSPACES_WRITE,
        Scope.SERVERS_READ,
        Scope.USERS_WRITE,
        Scope.KEYS_WRITE,
        Scope.ISSUERS_WRITE,
        Scope.SECRETS_READ,
        Scope.SECRETS_WRITE,
        Scope.SWITCHES_WRITE,
    }
)
_PLATFORM_ADMIN: Final = frozenset(
    {
        Scope.TENANTS_READ,
        Scope.TENANTS_WRITE,
        Scope.USERS_READ,
        Scope.USERS_WRITE,
        Scope.KEYS_READ,
        Scope.KEYS_WRITE,
        Scope.SWITCHES_WRITE,
        Scope.AUDIT_READ,
        Scope.MODELS_READ,
        Scope.MODELS_WRITE,
    }
)
SCOPES_OF: Final = {
    Role.USER: _USER,
    Role.AUDITOR: _AUDITOR,
    Role.TENANT_ADMIN: frozenset(_TENANT_ADMIN),
    Role.PLATFORM_ADMIN: _PLATFORM_ADMIN,
}
