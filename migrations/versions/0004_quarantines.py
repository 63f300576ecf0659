"""Tools of servers that are no longer the pinned ones, and when the pins of a policy were last changed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"


def upgrade() -> None:
    op.create_table('quarantines',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('server', sa.String(), nullable=False),
    sa.Column('policy_version', sa.Integer(), nullable=False),
    sa.Column('found', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('digest', sa.String(), nullable=False),
    sa.Column('found_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('resolution', sa.String(), nullable=True),
    sa.Column('resolved_by', sa.Uuid(), nullable=True),
    sa.Column('resolved_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("resolution in ('accepted', 'dismissed', 'superseded')", name=op.f('ck_quarantines_resolution')),
    sa.CheckConstraint('(resolution is null) = (resolved_at is null)', name=op.f('ck_quarantines_resolved')),
    sa.ForeignKeyConstraint(['tenant_id', 'resolved_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_quarantines_tenant_id_resolved_by_users')),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_quarantines_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_quarantines'))
    )
    op.create_index('uq_quarantines_tenant_id_server', 'quarantines', ['tenant_id', 'server'], unique=True, postgresql_where=sa.text('resolution is null'))
    op.execute("alter table quarantines enable row level security")
    op.execute("alter table quarantines force row level security")
    op.execute(f"create policy one_tenant on quarantines using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
    app = '"' + context.config.attributes["app_role"].replace('"', '""') + '"'
    op.execute(f"grant select, insert, update on quarantines to {app}")
    op.add_column('published_policies', sa.Column('pinned_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False))


def downgrade() -> None:
    op.drop_column('published_policies', 'pinned_at')
    op.drop_table('quarantines')
