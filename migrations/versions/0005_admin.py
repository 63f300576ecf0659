"""Idempotency keys, and the platform's model endpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None

PLATFORM = "'00000000-0000-7000-8000-000000000000'"
CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"


def upgrade() -> None:
    op.create_table('idempotency_keys',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('route', sa.String(), nullable=False),
    sa.Column('key', sa.String(), nullable=False),
    sa.Column('digest', sa.LargeBinary(), nullable=False),
    sa.Column('answer', sa.LargeBinary(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_idempotency_keys_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'user_id', 'route', 'key', name=op.f('pk_idempotency_keys'))
    )
    op.create_index('ix_idempotency_keys_created_at', 'idempotency_keys', ['created_at'], unique=False)
    op.create_table('model_endpoints',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('base_url', sa.String(), nullable=False),
    sa.Column('models', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('is_enabled', sa.Boolean(), nullable=False),
    sa.Column('credential', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint(f'tenant_id = {PLATFORM}', name=op.f('ck_model_endpoints_are_the_platforms')),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_model_endpoints_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_model_endpoints')),
    sa.UniqueConstraint('tenant_id', 'name', name=op.f('uq_model_endpoints_tenant_id_name'))
    )
    app, platform = _role("app_role"), _role("platform_role")
    for table in ("idempotency_keys", "model_endpoints"):
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy one_tenant on {table} using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
    op.execute(f"grant select, insert, update (digest, answer, created_at) on idempotency_keys to {app}")
    # The platform keeps keys of its own, and deletes everybody's once they have expired.
    op.execute(f"grant select, insert, update (digest, answer, created_at), delete on idempotency_keys to {platform}")
    op.execute(f"create policy platform on idempotency_keys to {platform} using (tenant_id = {PLATFORM}) with check (tenant_id = {PLATFORM})")
    for action in ("select", "delete"):
        op.execute(
            f"create policy platform_{action}s_expired on idempotency_keys for {action} to {platform}"
            " using (created_at < now() - interval '24 hours')"
        )
    op.execute(f"grant select, insert, update, delete on model_endpoints to {platform}")
    op.execute(f"create policy platform on model_endpoints to {platform} using (true) with check (true)")


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def downgrade() -> None:
    op.drop_table('model_endpoints')
    op.drop_table('idempotency_keys')
