"""Checkpoints of pruned chains, the one way to delete what is old, and indexes to search the record by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"

# Whatever a checkpoint says, nothing of the last 30 days goes: this is the database's own bound, by its own clock.
FUNCTIONS = """
create function bulkhead_check_checkpoint() returns trigger
language plpgsql set search_path = pg_catalog, {schema}, pg_temp as $$
begin
    if new.pruned_at not between now() - interval '1 hour' and now() + interval '1 minute' then
        raise exception 'a checkpoint is made now' using errcode = 'insufficient_privilege';
    end if;
    if not exists (select from {schema}.audit_chain
                   where tenant_id = new.tenant_id and seq = new.seq and hash = new.hash) then
        raise exception 'a checkpoint names a link of the chain' using errcode = 'insufficient_privilege';
    end if;
    -- The sealer goes on from the last link.
    if not exists (select from {schema}.audit_chain where tenant_id = new.tenant_id and seq > new.seq) then
        raise exception 'the last link of a chain stays' using errcode = 'insufficient_privilege';
    end if;
    if exists (select from {schema}.audit_chain
               where tenant_id = new.tenant_id and seq <= new.seq and event_at > now() - interval '30 days') then
        raise exception 'what is younger than 30 days stays' using errcode = 'insufficient_privilege';
    end if;
    return new;
end $$;

-- Instead of refusing every deletion: the row must lie at or before a checkpoint, and be old.
create function bulkhead_keep_event() returns trigger
language plpgsql set search_path = pg_catalog, {schema}, pg_temp as $$
begin
    if old.at > now() - interval '30 days' or not exists (
        select from {schema}.audit_chain
        where tenant_id = old.tenant_id and event_id = old.id
          and seq <= (select max(seq) from {schema}.audit_checkpoints where tenant_id = old.tenant_id)
    ) then
        raise exception 'audit events are append-only' using errcode = 'insufficient_privilege';
    end if;
    return old;
end $$;

create function bulkhead_keep_link() returns trigger
language plpgsql set search_path = pg_catalog, {schema}, pg_temp as $$
begin
    if not exists (select from {schema}.audit_checkpoints where tenant_id = old.tenant_id and seq >= old.seq) then
        raise exception 'audit events are append-only' using errcode = 'insufficient_privilege';
    end if;
    return old;
end $$;

-- Deletes at most so many events up to the newest checkpoint of the transaction's tenant, the oldest first, with
-- their links and heads, and says how many. The triggers above decide about every row of it.
create function bulkhead_prune_audit(most integer) returns integer
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    tenant uuid := nullif(current_setting('app.tenant_id', true), '')::uuid;
    through bigint;
    pruned integer;
begin
    perform pg_advisory_xact_lock(hashtextextended('bulkhead_prune_audit' || tenant, 0));
    select max(seq) into through from {schema}.audit_checkpoints where tenant_id = tenant;
    select max(seq) into through from (
        select seq from {schema}.audit_chain
        where tenant_id = tenant and seq <= through order by seq limit least(greatest(most, 1), 10000)
    ) batch;
    delete from {schema}.audit_events event using {schema}.audit_chain link
    where link.tenant_id = tenant and link.seq <= through
      and event.tenant_id = tenant and event.id = link.event_id and event.at = link.event_at;
    delete from {schema}.audit_chain where tenant_id = tenant and seq <= through;
    get diagnostics pruned = row_count;
    delete from {schema}.audit_heads where tenant_id = tenant and seq <= through;
    return pruned;
end $$;

-- Drops the months that are over for 30 days and have nothing left, and says how many.
create function bulkhead_drop_empty_partitions() returns integer
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    partition regclass;
    is_used boolean;
    dropped integer := 0;
begin
    perform set_config('lock_timeout', '2s', true);
    for partition in
        select inhrelid from pg_inherits join pg_class on pg_class.oid = inhrelid
        where inhparent = '{schema}.audit_events'::regclass and relname ~ '^audit_events_[0-9]{4}_[0-9]{2}$'
          and to_date(right(relname, 7), 'YYYY_MM') + interval '1 month' < now() - interval '30 days'
    loop
        execute format('select exists (select from %s)', partition) into is_used;
        continue when is_used;
        -- Its foreign key takes tenants with it, and all others lock tenants before events.
        lock table {schema}.tenants, {schema}.audit_events in access exclusive mode;
        execute format('select exists (select from %s)', partition) into is_used;
        continue when is_used;
        execute format('drop table %s', partition);
        dropped := dropped + 1;
    end loop;
    return dropped;
exception when lock_not_available then
    return 0;  -- tomorrow, then
end $$;
"""


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def upgrade() -> None:
    op.create_table('audit_checkpoints',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('seq', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('hash', sa.LargeBinary(), nullable=False),
    sa.Column('pruned_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('key_id', sa.String(), nullable=False),
    sa.Column('signature', sa.LargeBinary(), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_audit_checkpoints_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'seq', name=op.f('pk_audit_checkpoints'))
    )
    _secure()
    # By what the record is searched, each in the order of the pages.
    op.drop_index('ix_audit_events_tenant_id_run_id', table_name='audit_events')
    for column in ('run_id', 'actor_id', 'type'):
        op.create_index(f'ix_audit_events_tenant_id_{column}_id', 'audit_events', ['tenant_id', column, 'id'], unique=False)
    # Of the data, what is searched by. Columns and no indexed expressions: under row-level security an index serves
    # none that might tell of its operands, and those on jsonb might. Computed by the database, they say what the text does.
    for name in ('tool', 'decision'):
        computed = sa.Computed(f"body::jsonb -> 'data' ->> '{name}'", persisted=True)
        op.add_column('audit_events', sa.Column(name, sa.String(), computed, nullable=True))
    op.create_index('ix_audit_events_tenant_id_tool_id', 'audit_events', ['tenant_id', 'tool', 'id'], unique=False,
                    postgresql_where=sa.text("tool is not null"))
    # Most decisions are to allow.
    op.create_index('ix_audit_events_tenant_id_decision_id', 'audit_events', ['tenant_id', 'decision', 'id'], unique=False,
                    postgresql_where=sa.text("decision <> 'allowed'"))


def _secure() -> None:
    app, sealer = _role("app_role"), _role("sealer_role")
    schema = op.get_bind().scalar(sa.text("select quote_ident(current_schema())"))
    for statement in FUNCTIONS.replace("{schema}", schema).split("\n\n"):
        op.execute(statement)
    table = "audit_checkpoints"
    op.execute(f"alter table {table} enable row level security")
    op.execute(f"alter table {table} force row level security")
    op.execute(f"create policy one_tenant on {table} using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
    op.execute(f"create policy sealer on {table} for select to {sealer} using (true)")
    op.execute(f"grant select on {table} to {app}")
    op.execute(f"grant select, insert on {table} to {sealer}")
    op.execute(f"create trigger is_true before insert on {table} for each row execute function bulkhead_check_checkpoint()")
    op.execute(f"create trigger append_only before update or delete on {table}"
               " for each row execute function bulkhead_refuse_change()")
    op.execute(f"create trigger no_truncate before truncate on {table}"
               " for each statement execute function bulkhead_refuse_change()")
    for kept, function in (("audit_events", "event"), ("audit_chain", "link"), ("audit_heads", "link")):
        op.execute(f"drop trigger append_only on {kept}")
        op.execute(f"create trigger append_only before update on {kept}"
                   " for each row execute function bulkhead_refuse_change()")
        op.execute(f"create trigger prune_only before delete on {kept}"
                   f" for each row execute function bulkhead_keep_{function}()")
    for function in ("bulkhead_prune_audit(integer)", "bulkhead_drop_empty_partitions()"):
        op.execute(f"revoke all on function {function} from public")
        op.execute(f"grant execute on function {function} to {sealer}")


def downgrade() -> None:
    for name in ('decision', 'tool'):
        op.drop_index(f'ix_audit_events_tenant_id_{name}_id', table_name='audit_events')
        op.drop_column('audit_events', name)
    for column in ('run_id', 'actor_id', 'type'):
        op.drop_index(f'ix_audit_events_tenant_id_{column}_id', table_name='audit_events')
    op.create_index('ix_audit_events_tenant_id_run_id', 'audit_events', ['tenant_id', 'run_id'], unique=False)
    for kept in ("audit_events", "audit_chain", "audit_heads"):
        op.execute(f"drop trigger prune_only on {kept}")
        op.execute(f"drop trigger append_only on {kept}")
        op.execute(f"create trigger append_only before update or delete on {kept}"
                   " for each row execute function bulkhead_refuse_change()")
    op.drop_table('audit_checkpoints')
    op.execute("drop function bulkhead_drop_empty_partitions(), bulkhead_prune_audit(integer), bulkhead_keep_link(),"
               " bulkhead_keep_event(), bulkhead_check_checkpoint()")
