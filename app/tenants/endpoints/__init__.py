"""Routes of tenants, users and workspaces."""

from app.tenants.endpoints import erasure, tenants, workspaces

routers = (tenants.router, erasure.router, workspaces.router)
