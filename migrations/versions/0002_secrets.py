"""Secrets of tenants, sealed, and bindings to providers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"
CHANGED = "id, version, {}, updated_by, updated_at"
SEALED = CHANGED.format("key_id, sealed")
BOUND = CHANGED.format("provider, locator")
# What is sealed is a tenant's to write. Bindings are the platform's: the app role, and so no tenant, can make one.
APP_GRANTS = {"secrets": f"select, insert, update ({SEALED}), delete", "secret_bindings": "select"}
PLATFORM_GRANTS = {
    "secrets": "select (tenant_id, name, id)",
    "secret_bindings": f"select, insert, update ({BOUND}), delete",
}


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def _secure() -> None:
    app, platform = _role("app_role"), _role("platform_role")
    for table in APP_GRANTS:
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(
            f"create policy one_tenant on {table} using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})"
        )
        op.execute(f"grant {APP_GRANTS[table]} on {table} to {app}")
        op.execute(f"grant {PLATFORM_GRANTS[table]} on {table} to {platform}")
        op.execute(f"create policy platform on {table} to {platform} using (true) with check (true)")


def upgrade() -> None:
    op.create_table('secrets',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('key_id', sa.String(), nullable=False),
    sa.Column('sealed', sa.LargeBinary(), nullable=False),
    sa.Column('created_by', sa.Uuid(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_by', sa.Uuid(), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_secrets_tenant_id_tenants')),
    sa.ForeignKeyConstraint(['tenant_id', 'created_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_secrets_tenant_id_created_by_users')),
    sa.ForeignKeyConstraint(['tenant_id', 'updated_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_secrets_tenant_id_updated_by_users')),
    sa.PrimaryKeyConstraint('tenant_id', 'name', name=op.f('pk_secrets'))
    )
    op.create_table('secret_bindings',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('provider', sa.String(), nullable=False),
    sa.Column('locator', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('created_by', sa.Uuid(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('updated_by', sa.Uuid(), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_secret_bindings_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'name', name=op.f('pk_secret_bindings'))
    )
    _secure()


def downgrade() -> None:
    op.drop_table('secret_bindings')
    op.drop_table('secrets')
