"""Routes that ask, read, cancel and tell who asks; what looks at a policy and its calls is here too."""

from app.runs.endpoints import (
    approvals,
    asking,
    backtests,
    conversations,
    drafts,
    events,
    me,
    publishing,
    receipts,
    runs,
)

routers = (
    asking.router,
    runs.router,
    events.router,
    approvals.router,
    conversations.router,
    receipts.router,
    me.router,
    publishing.router,
    drafts.router,
    backtests.router,
)
