"""Routes that ask, read, cancel and tell who asks; what looks at a policy and its calls is here too."""

from app.runs.endpoints import backtests, drafts, me, publishing, receipts, runs

routers = (runs.router, receipts.router, me.router, publishing.router, drafts.router, backtests.router)
