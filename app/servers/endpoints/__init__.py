"""The routes on tool servers."""

from app.servers.endpoints import catalogue, quarantines, servers

routers = (servers.router, quarantines.router, catalogue.router)
