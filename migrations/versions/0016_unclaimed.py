"""Claims of a run that fail are told apart from processes that died with it, and bounded by time."""

from __future__ import annotations

from alembic import op

revision = '0016'
down_revision = '0015'
branch_labels = None
depends_on = None
works_from = '0015'


def upgrade() -> None:
    # Code of before counts such claims among the deaths, as it did; no row is written for a default that is constant.
    op.execute("alter table runs add column unclaimed_s integer not null default 0")


def downgrade() -> None:
    op.execute("alter table runs drop column unclaimed_s")
