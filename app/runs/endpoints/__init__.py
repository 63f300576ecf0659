"""Routes that ask, read, cancel and tell who asks; publishing is here too, since it may end runs."""

from app.runs.endpoints import me, publishing, runs

routers = (runs.router, me.router, publishing.router)
