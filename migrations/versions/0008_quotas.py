"""Budgets, reservations and usage, and the prices of stored model endpoints."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = '0008'
down_revision = '0007'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"
# The app role reserves and settles; the platform role settles for processes that died, and sums up over all tenants.
APP_GRANTS = {
    # An update that updates nothing: a lock that makes the row where it is not there.
    "budget_accounts": "select, insert, update",
    "budget_reservations": "select, insert, update (input_tokens, output_tokens, cost, tool_calls), delete",
    "budget_days": "select, insert, update (tokens, cost, tool_calls)",
    "usage_models": "select, insert, update (runs, turns, input_tokens, output_tokens, cost, tool_calls)",
    "usage_tools": "select, insert, update (allowed, denied, failed, duration_ms)",
}
PLATFORM_GRANTS = APP_GRANTS | {"budget_reservations": "select, delete"}


def upgrade() -> None:
    op.create_table('budget_accounts',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_budget_accounts_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', name=op.f('pk_budget_accounts'))
    )
    op.create_table('budget_reservations',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('model', sa.String(), nullable=False),
    sa.Column('input_tokens', sa.BigInteger(), nullable=False),
    sa.Column('output_tokens', sa.BigInteger(), nullable=False),
    sa.Column('cost', sa.BigInteger(), nullable=False),
    sa.Column('tool_calls', sa.BigInteger(), server_default='0', nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('input_tokens >= 0 and output_tokens >= 0 and cost >= 0 and tool_calls >= 0', name=op.f('ck_budget_reservations_not_negative')),
    sa.ForeignKeyConstraint(['tenant_id', 'run_id'], ['runs.tenant_id', 'runs.id'], name=op.f('fk_budget_reservations_tenant_id_run_id_runs')),
    sa.PrimaryKeyConstraint('tenant_id', 'run_id', name=op.f('pk_budget_reservations'))
    )
    op.create_table('budget_days',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('tokens', sa.BigInteger(), nullable=False),
    sa.Column('cost', sa.BigInteger(), nullable=False),
    sa.Column('tool_calls', sa.BigInteger(), server_default='0', nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_budget_days_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'day', name=op.f('pk_budget_days'))
    )
    _create_usage('usage_models', 'model', ('runs', 'turns', 'input_tokens', 'output_tokens', 'cost'))
    op.add_column('usage_models', sa.Column('tool_calls', sa.BigInteger(), server_default='0', nullable=False))
    _create_usage('usage_tools', 'tool', ('allowed', 'denied', 'failed', 'duration_ms'))
    op.add_column('model_endpoints', sa.Column('prices', postgresql.JSONB(astext_type=sa.Text()), server_default='{}', nullable=False))
    app, platform = _role("app_role"), _role("platform_role")
    for table in APP_GRANTS:
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy one_tenant on {table} using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
        op.execute(f"create policy platform on {table} to {platform} using (true) with check (true)")
        op.execute(f"grant {APP_GRANTS[table]} on {table} to {app}")
        op.execute(f"grant {PLATFORM_GRANTS[table]} on {table} to {platform}")


def _create_usage(table: str, of: str, counts: tuple[str, ...]) -> None:
    op.create_table(table,
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column(of, sa.String(), nullable=False),
    *(sa.Column(count, sa.BigInteger(), nullable=False) for count in counts),
    sa.ForeignKeyConstraint(['tenant_id', 'user_id'], ['users.tenant_id', 'users.id'], name=op.f(f'fk_{table}_tenant_id_user_id_users')),
    sa.PrimaryKeyConstraint('tenant_id', 'day', 'user_id', of, name=op.f(f'pk_{table}'))
    )


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def downgrade() -> None:
    op.drop_column('model_endpoints', 'prices')
    for table in reversed(APP_GRANTS):
        op.drop_table(table)
