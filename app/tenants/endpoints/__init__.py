"""Routes of tenants, users and workspaces."""

from app.tenants.endpoints import tenants, workspaces

routers = (tenants.router, workspaces.router)
