"""Run events: what a client follows, by month."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

revision = '0012'
down_revision = '0011'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"

# As 0001 has it, for both tables.
ENSURE = """
create or replace function bulkhead_ensure_partitions(months_ahead integer) returns void
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    first date;
    partition text;
begin
    perform pg_advisory_xact_lock(hashtextextended('bulkhead_ensure_partitions', 0));
    for month in 0..least(months_ahead, 120) loop
        first := (date_trunc('month', now() at time zone 'UTC') + make_interval(months => month))::date;
        partition := 'audit_events_' || to_char(first, 'YYYY_MM');
        if to_regclass('{schema}.' || partition) is null then
            -- Its foreign key locks tenants, and all others lock tenants before events: the other order deadlocks.
            lock table {schema}.tenants in share row exclusive mode;
            execute format(
                'create table {schema}.%I partition of {schema}.audit_events for values from (%L) to (%L)',
                partition, first::text || 'T00:00:00Z', (first + interval '1 month')::date::text || 'T00:00:00Z');
            execute format(
                'create trigger no_truncate before truncate on {schema}.%I'
                ' for each statement execute function {schema}.bulkhead_refuse_change()', partition);
        end if;{run_events}
    end loop;
end $$
"""
RUN_EVENTS = """
        partition := 'run_events_' || to_char(first, 'YYYY_MM');
        if to_regclass('{schema}.' || partition) is null then
            lock table {schema}.runs in share row exclusive mode;  -- for the same reason
            execute format(
                'create table {schema}.%I partition of {schema}.run_events for values from (%L) to (%L)',
                partition, first::text || 'T00:00:00Z', (first + interval '1 month')::date::text || 'T00:00:00Z');
        end if;"""
# What came where no month was ready goes by rows.
DROP = """
-- Drops the months that have been over for so many days, and says how many. Whoever uses the table is waited for, but
-- not long: in an hour it is asked again.
create function bulkhead_drop_run_events(days integer) returns integer
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    partition regclass;
    oldest timestamptz := now() - make_interval(days => greatest(days, 1));
    dropped integer := 0;
begin
    perform set_config('lock_timeout', '2s', true);
    delete from {schema}.run_events_rest where at < oldest;
    for partition in
        select inhrelid from pg_inherits join pg_class on pg_class.oid = inhrelid
        where inhparent = '{schema}.run_events'::regclass and relname ~ '^run_events_[0-9]{4}_[0-9]{2}$'
          and (to_date(right(relname, 7), 'YYYY_MM') + interval '1 month') at time zone 'UTC' <= oldest
    loop
        -- Its foreign key takes runs with it, and all others lock runs before events.
        lock table {schema}.runs, {schema}.run_events in access exclusive mode;
        execute format('drop table %s', partition);
        dropped := dropped + 1;
    end loop;
    return dropped;
exception when lock_not_available then
    return 0;
end $$
"""


def upgrade() -> None:
    op.create_table('run_events',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('sequence', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('type', sa.String(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('data', sa.String(), nullable=False),
    sa.Column('sealed', sa.LargeBinary(), nullable=True),
    sa.ForeignKeyConstraint(['tenant_id', 'run_id'], ['runs.tenant_id', 'runs.id'], name=op.f('fk_run_events_tenant_id_run_id_runs')),
    sa.PrimaryKeyConstraint('tenant_id', 'run_id', 'sequence', 'at', name=op.f('pk_run_events')),
    postgresql_partition_by='RANGE (at)'
    )
    op.execute("create table run_events_rest partition of run_events default")
    _define(ENSURE.replace("{run_events}", RUN_EVENTS))
    _define(DROP)
    op.execute("select bulkhead_ensure_partitions(2)")
    app, platform = _role("app_role"), _role("platform_role")
    op.execute("revoke all on function bulkhead_drop_run_events(integer) from public")
    op.execute(f"grant execute on function bulkhead_drop_run_events(integer) to {platform}")
    op.execute("alter table run_events enable row level security")
    op.execute("alter table run_events force row level security")
    op.execute(f"create policy one_tenant on run_events using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
    # To write for all runs of a process at one go, and what a dead process has left; never to read what an event says.
    op.execute(f"create policy platform on run_events to {platform} using (true) with check (true)")
    op.execute(f"grant select, insert on run_events to {app}")
    op.execute(f"grant select (tenant_id, run_id, sequence, at), insert on run_events to {platform}")
    # To say that somebody follows a run.
    op.execute(f"grant update (watched_until) on runs to {platform}")


def _define(function: str) -> None:
    schema = op.get_bind().scalar(sa.text("select quote_ident(current_schema())"))
    op.execute(function.replace("{schema}", schema))


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def downgrade() -> None:
    op.execute(f"revoke update (watched_until) on runs from {_role('platform_role')}")
    op.execute("drop function bulkhead_drop_run_events(integer)")
    _define(ENSURE.replace("{run_events}", ""))
    op.drop_table('run_events')
