"""Conversations: whose a thread of runs is, and the one way in which its texts are taken away."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

revision = '0014'
down_revision = '0013'
branch_labels = None
depends_on = None

CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"
FUNCTION = """
-- At most so many texts of a deleted conversation of the transaction's tenant, none of a run that is under way; says
-- how many. Where nothing is left, and nothing can come any more, the conversation is marked as emptied.
create function bulkhead_empty_conversation(emptied uuid, most integer) returns integer
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    tenant uuid := nullif(current_setting('app.tenant_id', true), '')::uuid;
    bound integer := least(greatest(most, 1), 10000);
    deleted integer;
begin
    delete from {schema}.contents where (tenant_id, run_id, kind, sequence) in (
        select c.tenant_id, c.run_id, c.kind, c.sequence
        from {schema}.conversations t
        join {schema}.runs r on r.tenant_id = t.tenant_id and r.conversation_id = t.id and r.user_id = t.user_id
        join {schema}.contents c on c.tenant_id = r.tenant_id and c.run_id = r.id
        where t.tenant_id = tenant and t.id = emptied and t.deleted_at is not null and t.emptied_at is null
          and r.state not in ('queued', 'running', 'waiting_approval')
        limit bound
    );
    get diagnostics deleted = row_count;
    if deleted = 0 then
        -- What was told stays told, without its words.
        update {schema}.run_events set sealed = null where (tenant_id, run_id, sequence, at) in (
            select e.tenant_id, e.run_id, e.sequence, e.at
            from {schema}.conversations t
            join {schema}.runs r on r.tenant_id = t.tenant_id and r.conversation_id = t.id and r.user_id = t.user_id
            join {schema}.run_events e on e.tenant_id = r.tenant_id and e.run_id = r.id
            where t.tenant_id = tenant and t.id = emptied and t.deleted_at is not null and t.emptied_at is null
              and r.state not in ('queued', 'running', 'waiting_approval') and e.sealed is not null
            limit bound
        );
        get diagnostics deleted = row_count;
    end if;
    if deleted = 0 then
        -- One statement, one snapshot: a run that has ended just now has its answer in it as well.
        update {schema}.conversations t set emptied_at = now()
        where t.tenant_id = tenant and t.id = emptied and t.deleted_at is not null and t.emptied_at is null
          and not exists (
              select from {schema}.runs r
              where r.tenant_id = t.tenant_id and r.conversation_id = t.id and r.user_id = t.user_id
                and (r.state in ('queued', 'running', 'waiting_approval')
                    or exists (select from {schema}.contents c where c.tenant_id = r.tenant_id and c.run_id = r.id)
                    or exists (select from {schema}.run_events e
                               where e.tenant_id = r.tenant_id and e.run_id = r.id and e.sealed is not null))
          );
    end if;
    return deleted;
end $$
"""
# As 0009 has it; and what its runs were told to whoever followed them loses its words, too.
ERASED = """
create or replace function bulkhead_delete_erased(most integer) returns integer
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    tenant uuid := nullif(current_setting('app.tenant_id', true), '')::uuid;
    deleted integer;
begin
    delete from {schema}.contents where (tenant_id, run_id, kind, sequence) in (
        select c.tenant_id, c.run_id, c.kind, c.sequence
        from {schema}.users u
        join {schema}.runs r on r.tenant_id = u.tenant_id and r.user_id = u.id
        join {schema}.contents c on c.tenant_id = r.tenant_id and c.run_id = r.id
        where u.tenant_id = tenant and u.erased_at is not null
        limit least(greatest(most, 1), 10000)
    );
    get diagnostics deleted = row_count;{events}
    return deleted;
end $$
"""
ERASED_EVENTS = """
    if deleted = 0 then
        update {schema}.run_events set sealed = null where (tenant_id, run_id, sequence, at) in (
            select e.tenant_id, e.run_id, e.sequence, e.at
            from {schema}.users u
            join {schema}.runs r on r.tenant_id = u.tenant_id and r.user_id = u.id
            join {schema}.run_events e on e.tenant_id = r.tenant_id and e.run_id = r.id
            where u.tenant_id = tenant and u.erased_at is not null and e.sealed is not null
            limit least(greatest(most, 1), 10000)
        );
        get diagnostics deleted = row_count;
    end if;"""
# Who was let in before may still be about to begin a run when the user is gone. Erasing changes the name, which is part
# of a key: so it waits for whoever has begun one, and who comes later is refused.
REFUSE = """
create function bulkhead_refuse_erased_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    gone timestamptz;
begin
    select erased_at into gone from {schema}.users
    where tenant_id = new.tenant_id and id = new.user_id for key share;
    if gone is not null then
        raise exception 'the user has been erased' using errcode = 'object_not_in_prerequisite_state';
    end if;
    return new;
end $$
"""
# Until now whoever used an id first had it; a later one's runs stay that one's to read.
EXISTING = """
insert into conversations (tenant_id, id, user_id, created_at, last_used_at)
select distinct on (tenant_id, conversation_id) tenant_id, conversation_id, user_id, created_at,
       max(created_at) over (partition by tenant_id, conversation_id, user_id)
from runs where conversation_id is not null order by tenant_id, conversation_id, id
"""


def upgrade() -> None:
    op.create_table('conversations',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('last_used_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('deleted_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('emptied_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint('emptied_at is null or deleted_at is not null', name=op.f('ck_conversations_deleted_first')),
    sa.ForeignKeyConstraint(['tenant_id', 'user_id'], ['users.tenant_id', 'users.id'], name=op.f('fk_conversations_tenant_id_user_id_users')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_conversations'))
    )
    op.create_index('ix_conversations_tenant_id_user_id_created_at_id', 'conversations', ['tenant_id', 'user_id', 'created_at', 'id'], unique=False, postgresql_where=sa.text('deleted_at is null'))
    op.create_index('ix_conversations_tenant_id_last_used_at', 'conversations', ['tenant_id', 'last_used_at'], unique=False, postgresql_where=sa.text('deleted_at is null'))
    op.create_index('ix_conversations_tenant_id_deleted', 'conversations', ['tenant_id'], unique=False, postgresql_where=sa.text('deleted_at is not null and emptied_at is null'))
    # The owner sees no row of any tenant while its policies are forced on it.
    op.execute("alter table runs no force row level security")
    op.execute(EXISTING)
    op.execute("alter table runs force row level security")
    app, platform = _role("app_role"), _role("platform_role")
    op.execute("alter table conversations enable row level security")
    op.execute("alter table conversations force row level security")
    op.execute(f"create policy one_tenant on conversations using (tenant_id = {CURRENT}) with check (tenant_id = {CURRENT})")
    op.execute(f"create policy platform on conversations for select to {platform} using (true)")
    op.execute(f"grant select, insert, update (last_used_at, deleted_at) on conversations to {app}")
    # Which tenants have something that is old, or deleted and still there.
    op.execute(f"grant select (tenant_id, last_used_at, deleted_at, emptied_at) on conversations to {platform}")
    _define(FUNCTION)
    _define(ERASED.replace("{events}", ERASED_EVENTS))
    _define(REFUSE)
    op.execute("revoke all on function bulkhead_refuse_erased_user() from public")
    op.execute("create trigger refuse_erased_user before insert on runs"
               " for each row execute function bulkhead_refuse_erased_user()")
    op.execute("revoke all on function bulkhead_empty_conversation(uuid, integer) from public")
    op.execute(f"grant execute on function bulkhead_empty_conversation(uuid, integer) to {app}")


def _define(function: str) -> None:
    schema = op.get_bind().scalar(sa.text("select quote_ident(current_schema())"))
    op.execute(function.replace("{schema}", schema))


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def downgrade() -> None:
    op.execute("drop trigger refuse_erased_user on runs")
    op.execute("drop function bulkhead_refuse_erased_user()")
    _define(ERASED.replace("{events}", ""))
    op.execute("drop function bulkhead_empty_conversation(uuid, integer)")
    op.drop_table('conversations')
