"""The audit chain, its signed heads, and the role that seals."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"
TABLES = ("audit_pending", "audit_chain", "audit_heads")

# Runs as the owner, so that no role that serves can add to the queue, or take from it.
ENQUEUE = """
create function bulkhead_enqueue_events() returns trigger
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
begin
    insert into {schema}.audit_pending (tenant_id, event_id, at) select tenant_id, id, at from added;
    return null;
end $$
"""


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def upgrade() -> None:
    op.create_table('audit_pending',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('event_id', sa.Uuid(), nullable=False),
    sa.Column('at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('tenant_id', 'event_id', name=op.f('pk_audit_pending'))
    )
    op.create_table('audit_chain',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('event_id', sa.Uuid(), nullable=False),
    sa.Column('event_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('body_digest', sa.LargeBinary(), nullable=False),
    sa.Column('hash', sa.LargeBinary(), nullable=False),
    sa.Column('sealed_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('seq >= 1', name=op.f('ck_audit_chain_begins_at_one')),
    sa.PrimaryKeyConstraint('tenant_id', 'seq', name=op.f('pk_audit_chain')),
    sa.UniqueConstraint('tenant_id', 'event_id', name=op.f('uq_audit_chain_tenant_id_event_id'))
    )
    op.create_table('audit_heads',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('hash', sa.LargeBinary(), nullable=False),
    sa.Column('signed_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('key_id', sa.String(), nullable=False),
    sa.Column('signature', sa.LargeBinary(), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_audit_heads_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'seq', name=op.f('pk_audit_heads'))
    )
    for table in TABLES:
        op.execute(f"alter table {table} enable row level security")
        op.execute(f"alter table {table} force row level security")
        op.execute(f"create policy one_tenant on {table} using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
    _grant(_role("app_role"), _role("sealer_role"))
    _enqueue()
    for table in ("audit_chain", "audit_heads"):
        op.execute(f"create trigger append_only before update or delete on {table}"
                   " for each row execute function bulkhead_refuse_change()")
        op.execute(f"create trigger no_truncate before truncate on {table}"
                   " for each statement execute function bulkhead_refuse_change()")


def _grant(app: str, sealer: str) -> None:
    schema = op.get_bind().scalar(sa.text("select quote_ident(current_schema())"))
    op.execute(f"grant usage on schema {schema} to {sealer}")
    op.execute(f"grant select on audit_chain, audit_heads to {app}")
    op.execute(f"grant select on audit_events to {sealer}")
    op.execute(f"grant select, delete on audit_pending to {sealer}")
    op.execute(f"grant select, insert on audit_chain, audit_heads to {sealer}")
    # It finds whose events are to be sealed, and verifies all; it writes for the one tenant that it has set.
    for table in ("audit_events", *TABLES):
        op.execute(f"create policy sealer on {table} for select to {sealer} using (true)")


def _enqueue() -> None:
    """What has been recorded before there was a chain is chained, too."""
    schema = op.get_bind().scalar(sa.text("select quote_ident(current_schema())"))
    op.execute(ENQUEUE.replace("{schema}", schema))
    op.execute("create policy enqueue on audit_pending for insert to current_user with check (true)")
    op.execute("create trigger enqueue after insert on audit_events referencing new table as added"
               " for each statement execute function bulkhead_enqueue_events()")
    # Its policies would hide every tenant's events from the owner, too; the lock is held until the commit.
    op.execute("alter table audit_events no force row level security")
    op.execute("insert into audit_pending (tenant_id, event_id, at) select tenant_id, id, at from audit_events")
    op.execute("alter table audit_events force row level security")


def downgrade() -> None:
    op.execute("drop trigger enqueue on audit_events")
    op.execute("drop policy sealer on audit_events")
    op.execute(f"revoke all on audit_events from {_role('sealer_role')}")
    for table in reversed(TABLES):
        op.drop_table(table)
    op.execute("drop function bulkhead_enqueue_events()")
    op.execute(f"revoke usage on schema {op.get_bind().scalar(sa.text('select quote_ident(current_schema())'))} from {_role('sealer_role')}")
