"""Runs in the background: queued, claimed under a fencing number, waiting for approvals, resumed from their journal."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

revision = '0011'
down_revision = '0010'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"
STATES = ("'queued', 'running', 'waiting_approval', 'succeeded', 'failed', 'denied', 'cancelled', 'timed_out',"
          " 'interrupted'")
KINDS = "'query', 'arguments', 'result', 'answer', 'turn', 'edited_arguments', 'reason'"


def upgrade() -> None:
    op.add_column('runs', sa.Column('kind', sa.String(), server_default='interactive', nullable=False))
    op.add_column('runs', sa.Column('attempt', sa.Integer(), server_default='1', nullable=False))
    op.add_column('runs', sa.Column('deaths', sa.Integer(), server_default='0', nullable=False))
    op.add_column('runs', sa.Column('deferred_at', sa.DateTime(timezone=True), nullable=True))
    op.add_column('runs', sa.Column('started_at', sa.DateTime(timezone=True), nullable=True))
    op.add_column('runs', sa.Column('watched_until', sa.DateTime(timezone=True), nullable=True))
    _check('runs', 'kind', "kind in ('interactive', 'background')")
    _check('runs', 'state', f"state in ({STATES})", replaces=True)
    op.create_index('ix_runs_tenant_id_state_id', 'runs', ['tenant_id', 'state', 'id'], unique=False)
    op.create_index('ix_runs_tenant_id_id_background', 'runs', ['tenant_id', 'id'], unique=False, postgresql_where=sa.text("kind = 'background'"))
    op.add_column('tool_calls', sa.Column('turn', sa.Integer(), nullable=True))
    op.add_column('tool_calls', sa.Column('position', sa.Integer(), nullable=True))
    op.add_column('tool_calls', sa.Column('is_counted', sa.Boolean(), server_default='false', nullable=False))
    _check('tool_calls', 'decision', "decision in ('allowed', 'denied', 'waiting')", replaces=True)
    _check('contents', 'kind', f"kind in ({KINDS})", replaces=True)
    op.create_table('approvals',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('sequence', sa.Integer(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('tool', sa.String(), nullable=False),
    sa.Column('rule', sa.String(), nullable=False),
    sa.Column('arguments_mac', sa.LargeBinary(), nullable=False),
    sa.Column('definition_hash', sa.String(), nullable=False),
    sa.Column('policy_version', sa.Integer(), nullable=False),
    sa.Column('state', sa.String(), server_default='waiting', nullable=False),
    sa.Column('is_edited', sa.Boolean(), server_default='false', nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('decided_by', sa.Uuid(), nullable=True),
    sa.Column('decided_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("state in ('waiting', 'approved', 'denied', 'expired', 'voided', 'used')", name=op.f('ck_approvals_state')),
    sa.ForeignKeyConstraint(['tenant_id', 'decided_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_approvals_tenant_id_decided_by_users')),
    sa.ForeignKeyConstraint(['tenant_id', 'run_id', 'sequence'], ['tool_calls.tenant_id', 'tool_calls.run_id', 'tool_calls.sequence'], name=op.f('fk_approvals_tenant_id_run_id_sequence_tool_calls')),
    sa.ForeignKeyConstraint(['tenant_id', 'user_id'], ['users.tenant_id', 'users.id'], name=op.f('fk_approvals_tenant_id_user_id_users')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_approvals')),
    sa.UniqueConstraint('tenant_id', 'run_id', 'sequence', name=op.f('uq_approvals_tenant_id_run_id_sequence'))
    )
    op.create_index('ix_approvals_expires_at', 'approvals', ['expires_at'], unique=False, postgresql_where=sa.text("state = 'waiting'"))
    app, platform = _role("app_role"), _role("platform_role")
    op.execute("alter table approvals enable row level security")
    op.execute("alter table approvals force row level security")
    op.execute(f"create policy one_tenant on approvals using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
    op.execute(f"create policy platform on approvals to {platform} using (true) with check (true)")
    op.execute(f"grant select, insert, update (state, is_edited, arguments_mac, decided_by, decided_at) on approvals to {app}")
    op.execute(f"grant select, update (state) on approvals to {platform}")
    op.execute(f"grant update (decision, rule, is_counted) on tool_calls to {app}")
    # To queue again what a dead worker has left, and what somebody has decided on or let expire.
    op.execute(f"grant update (deferred_at) on runs to {platform}")


def _check(table: str, of: str, condition: str, *, replaces: bool = False) -> None:
    if replaces:
        op.drop_constraint(op.f(f'ck_{table}_{of}'), table)
    op.create_check_constraint(op.f(f'ck_{table}_{of}'), table, condition)


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def downgrade() -> None:
    op.drop_index('ix_approvals_expires_at', table_name='approvals', postgresql_where=sa.text("state = 'waiting'"))
    op.drop_table('approvals')
    op.execute(f"revoke update (decision, rule, is_counted) on tool_calls from {_role('app_role')}")
    _check('contents', 'kind', "kind in ('query', 'arguments', 'result', 'answer')", replaces=True)
    _check('tool_calls', 'decision', "decision in ('allowed', 'denied')", replaces=True)
    op.drop_column('tool_calls', 'is_counted')
    op.drop_column('tool_calls', 'position')
    op.drop_column('tool_calls', 'turn')
    op.drop_index('ix_runs_tenant_id_id_background', table_name='runs', postgresql_where=sa.text("kind = 'background'"))
    op.drop_index('ix_runs_tenant_id_state_id', table_name='runs')
    _check('runs', 'state', f"state in ({STATES.replace(chr(39) + 'queued' + chr(39) + ', ', '')})", replaces=True)
    for column in ('watched_until', 'started_at', 'deferred_at', 'deaths', 'attempt', 'kind'):
        op.drop_column('runs', column)
