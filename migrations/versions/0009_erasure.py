"""What the erasure of users and tenants needs: no role but the owner, through these functions, takes anything away."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op

revision = '0009'
down_revision = '0008'
branch_labels = None
depends_on = None

FUNCTIONS = """
-- Of the transaction's tenant. Says how many keys the user had, or null where there is nobody to erase.
create function bulkhead_erase_user(erased uuid) returns integer
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    tenant uuid := nullif(current_setting('app.tenant_id', true), '')::uuid;
    revoked integer;
begin
    -- A name that nobody can have taken before.
    update {schema}.users
    set name = 'erased-' || gen_random_uuid(), issuer = null, subject = null, wrapped_key = null,
        disabled_at = coalesce(disabled_at, now()), erased_at = now()
    where tenant_id = tenant and id = erased and erased_at is null;
    if not found then
        return null;
    end if;
    update {schema}.api_keys set name = 'erased', revoked_at = coalesce(revoked_at, now())
    where tenant_id = tenant and user_id = erased;
    get diagnostics revoked = row_count;
    -- Their answers may name the user, whoever asked.
    delete from {schema}.idempotency_keys
    where tenant_id = tenant and (user_id = erased or route ~ '^POST /v1/(tenants/[^/]+/)?users$');
    return revoked;
end $$;

-- At most so many texts of erased users of the transaction's tenant; says how many. Nothing opens them any more.
create function bulkhead_delete_erased(most integer) returns integer
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
    get diagnostics deleted = row_count;
    return deleted;
end $$;

-- A disabled tenant and all of its users. Says how many they were, or null where there is no such tenant.
create function bulkhead_erase_tenant(erased uuid) returns integer
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    before text := coalesce(current_setting('app.tenant_id', true), '');
    gone integer;
begin
    perform set_config('app.tenant_id', erased::text, true);
    -- Waits for whoever is about to add something, and lets nobody begin to.
    perform from {schema}.tenants where id = erased and status = 'disabled' for update;
    if not found then
        perform set_config('app.tenant_id', before, true);
        return null;
    end if;
    select count(*) into gone from {schema}.users where tenant_id = erased;
    perform {schema}.bulkhead_erase_user(id) from {schema}.users where tenant_id = erased;
    delete from {schema}.idempotency_keys where tenant_id = erased;
    delete from {schema}.issuers where tenant_id = erased;
    delete from {schema}.secrets where tenant_id = erased;
    delete from {schema}.secret_bindings where tenant_id = erased;
    delete from {schema}.published_policies where tenant_id = erased;
    update {schema}.policy_versions set document = '' where tenant_id = erased;
    update {schema}.policy_checks set tools = '[]' where tenant_id = erased;
    update {schema}.policy_backtests set result = '{}' where tenant_id = erased;
    update {schema}.quarantines set found = '[]' where tenant_id = erased;
    update {schema}.kill_switches set reason = '' where tenant_id = erased;
    update {schema}.tenants
    set status = 'erased', slug = 'erased-' || gen_random_uuid(), key_id = '', wrapped_key = '',
        generation = generation + 1
    where id = erased;
    -- The platform's own answers name the tenants that it has made.
    perform set_config('app.tenant_id', '{platform}', true);
    delete from {schema}.idempotency_keys where tenant_id = '{platform}' and route = 'POST /v1/tenants';
    perform set_config('app.tenant_id', before, true);
    return gone;
end $$;

-- Who was let in before may still be at work when the tenant is gone: a body that comes slowly, a check of tools.
create function bulkhead_refuse_erased() returns trigger
language plpgsql security definer set search_path = pg_catalog, {schema}, pg_temp as $$
declare
    found_status text;
begin
    select status into found_status from {schema}.tenants where id = new.tenant_id for key share;
    if found_status = 'erased' then
        raise exception 'the tenant has been erased' using errcode = 'object_not_in_prerequisite_state';
    end if;
    return new;
end $$;
"""
GRANTS = {
    "bulkhead_erase_user(uuid)": "app_role",
    "bulkhead_delete_erased(integer)": "app_role",
    "bulkhead_erase_tenant(uuid)": "platform_role",
}
PLATFORM = "00000000-0000-7000-8000-000000000000"
# Where something of a tenant could be left that is gone with it.
REFUSING = {
    "users": "insert",
    "api_keys": "insert",
    "issuers": "insert",
    "secrets": "insert",
    "secret_bindings": "insert",
    "policy_versions": "insert",
    "policy_checks": "insert or update",
    "policy_backtests": "insert or update",
    "published_policies": "insert or update",
    "quarantines": "insert or update",
    "kill_switches": "insert",
}
STATUS = "status in ('active', 'disabled'{})"
ERASED = "erased_at is null or (wrapped_key is null and subject is null and disabled_at is not null)"


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def upgrade() -> None:
    op.add_column('users', sa.Column('erased_at', sa.DateTime(timezone=True), nullable=True))
    # By the database too nobody comes back: neither key nor name, nor a right to act.
    op.create_check_constraint(op.f('ck_users_erased'), 'users', ERASED)
    op.drop_constraint(op.f('ck_tenants_status'), 'tenants')
    op.create_check_constraint(op.f('ck_tenants_status'), 'tenants', STATUS.format(", 'erased'"))
    schema = op.get_bind().scalar(sa.text("select quote_ident(current_schema())"))
    for statement in FUNCTIONS.replace("{schema}", schema).replace("{platform}", PLATFORM).split("\n\n"):
        op.execute(statement)
    op.execute("revoke all on function bulkhead_refuse_erased() from public")
    for table, change in REFUSING.items():
        op.execute(
            f"create trigger refuse_erased before {change} on {table}"
            " for each row execute function bulkhead_refuse_erased()"
        )
    for function, role in GRANTS.items():
        op.execute(f"revoke all on function {function} from public")
        op.execute(f"grant execute on function {function} to {_role(role)}")


def downgrade() -> None:
    for table in REFUSING:
        op.execute(f"drop trigger refuse_erased on {table}")
    op.execute("drop function bulkhead_refuse_erased()")
    op.execute(f"drop function {', '.join(reversed(GRANTS))}")
    op.drop_constraint(op.f('ck_tenants_status'), 'tenants')
    op.create_check_constraint(op.f('ck_tenants_status'), 'tenants', STATUS.format(""))
    op.drop_constraint(op.f('ck_users_erased'), 'users')
    op.drop_column('users', 'erased_at')
