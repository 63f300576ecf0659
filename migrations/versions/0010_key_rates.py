"""A rate that a key may be given when it is made: queries with this key, besides what its user may."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0010'
down_revision = '0009'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('api_keys', sa.Column('rate', sa.String(), nullable=True))


def downgrade() -> None:
    op.drop_column('api_keys', 'rate')
