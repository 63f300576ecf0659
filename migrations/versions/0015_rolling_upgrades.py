"""The schema says which code still works on it, so that old processes may serve while new ones come up.

`works_from` is the oldest revision whose code works on the schema that a migration leaves; each migration from here on
declares it, and env.py writes it down in the migration's own transaction. docs/deploy/upgrades.md is the procedure.
"""

from __future__ import annotations

from alembic import op

revision = '0015'
down_revision = '0014'
branch_labels = None
depends_on = None
works_from = '0015'


def upgrade() -> None:
    # Beside the version, so that both are read and changed as one; app and platform may read the table already.
    op.execute("alter table alembic_version add column works_from varchar(32)")


def downgrade() -> None:
    op.execute("alter table alembic_version drop column works_from")
