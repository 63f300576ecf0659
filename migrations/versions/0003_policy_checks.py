"""What a version was checked and replayed against, the log of what has held, and the role that a run began under."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"
APP_GRANTS = {
    "policy_checks": "select, insert, update (tools, checked_by, checked_at)",
    "policy_publications": "select, insert",
    "policy_backtests": "select, insert",
}


def _secure() -> None:
    name: str = context.config.attributes["app_role"]
    app = '"' + name.replace('"', '""') + '"'
    for table, privileges in APP_GRANTS.items():
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy one_tenant on {table} using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
        op.execute(f"grant {privileges} on {table} to {app}")


def _take_over() -> None:
    """What holds already was checked and published, too. The owner sees rows only while nothing forces it not to."""
    op.execute("alter table published_policies no force row level security")
    op.execute(
        "insert into policy_checks (tenant_id, version, tools, checked_by, checked_at)"
        " select tenant_id, version, pinned_tools, published_by, published_at from published_policies"
    )
    op.execute(
        "insert into policy_publications (tenant_id, id, version, published_by, published_at)"
        " select tenant_id, gen_random_uuid(), version, published_by, published_at from published_policies"
    )
    op.execute("alter table published_policies force row level security")


def upgrade() -> None:
    op.create_table('policy_checks',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('version', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('tools', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('checked_by', sa.Uuid(), nullable=False),
    sa.Column('checked_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id', 'checked_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_policy_checks_tenant_id_checked_by_users')),
    sa.ForeignKeyConstraint(['tenant_id', 'version'], ['policy_versions.tenant_id', 'policy_versions.version'], name=op.f('fk_policy_checks_tenant_id_version_policy_versions')),
    sa.PrimaryKeyConstraint('tenant_id', 'version', name=op.f('pk_policy_checks'))
    )
    op.create_table('policy_publications',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('replaced', sa.Integer(), nullable=True),
    sa.Column('published_by', sa.Uuid(), nullable=False),
    sa.Column('published_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id', 'published_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_policy_publications_tenant_id_published_by_users')),
    sa.ForeignKeyConstraint(['tenant_id', 'replaced'], ['policy_versions.tenant_id', 'policy_versions.version'], name=op.f('fk_policy_publications_tenant_id_replaced_policy_versions')),
    sa.ForeignKeyConstraint(['tenant_id', 'version'], ['policy_versions.tenant_id', 'policy_versions.version'], name=op.f('fk_policy_publications_tenant_id_version_policy_versions')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_policy_publications'))
    )
    op.create_table('policy_backtests',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('against', sa.Integer(), nullable=False),
    sa.Column('tools_digest', sa.String(), nullable=False),
    sa.Column('is_full', sa.Boolean(), nullable=False),
    sa.Column('flipped', sa.Integer(), nullable=False),
    sa.Column('result', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('created_by', sa.Uuid(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id', 'against'], ['policy_versions.tenant_id', 'policy_versions.version'], name=op.f('fk_policy_backtests_tenant_id_against_policy_versions')),
    sa.ForeignKeyConstraint(['tenant_id', 'created_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_policy_backtests_tenant_id_created_by_users')),
    sa.ForeignKeyConstraint(['tenant_id', 'version'], ['policy_versions.tenant_id', 'policy_versions.version'], name=op.f('fk_policy_backtests_tenant_id_version_policy_versions')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_policy_backtests'))
    )
    op.create_index('ix_policy_backtests_tenant_id_version', 'policy_backtests', ['tenant_id', 'version', 'id'], unique=False)
    op.add_column('runs', sa.Column('role', sa.String(), nullable=True))
    op.create_check_constraint(op.f('ck_runs_role'), 'runs', "role in ('platform_admin', 'tenant_admin', 'auditor', 'user')")
    _take_over()
    _secure()


def downgrade() -> None:
    op.drop_constraint(op.f('ck_runs_role'), 'runs')
    op.drop_column('runs', 'role')
    op.drop_table('policy_backtests')
    op.drop_table('policy_publications')
    op.drop_table('policy_checks')
