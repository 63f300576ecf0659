"""First tables, forced row-level security, append-only audit events in monthly partitions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = '0001'
down_revision = None
branch_labels = None
depends_on = None


TENANT_TABLES = (
    "users", "api_keys", "issuers", "policy_versions", "published_policies", "kill_switches", "runs", "tool_calls",
    "contents", "audit_events",
)
PLATFORM = "'00000000-0000-7000-8000-000000000000'"
CURRENT = "(select nullif(current_setting('app.tenant_id', true), '')::uuid)"

APP_GRANTS = {
    "tenants": "select, update (generation)",
    "users": "select, insert, update (role, disabled_at, wrapped_key)",
    "api_keys": "select, insert, update (expires_at, revoked_at)",
    "issuers": "select, insert, delete",
    "policy_versions": "select, insert",
    "published_policies": "select, insert, update",
    "kill_switches": "select, insert, update (lifted_at)",
    "runs": "select, insert, update",
    "tool_calls": "select, insert, update (outcome, duration_ms)",
    "contents": "select, insert",
    "audit_events": "select, insert",
}
# What crosses tenants: finding a credential's owner, tenants themselves, ending a dead process's runs.
PLATFORM_GRANTS = {
    "tenants": "select, insert, update (status, generation)",
    "users": "select (tenant_id, id, role, issuer, subject, disabled_at)",
    "api_keys": "select, update (last_used_at)",
    "issuers": "select",
    "kill_switches": "select",
    "runs": "select, update (state, code, lease_until, finished_at)",
    "tool_calls": "select, update (outcome)",
    "audit_events": "insert",
}

FUNCTIONS = """
create function bulkhead_refuse_change() returns trigger language plpgsql as $$
begin
    raise exception 'audit events are append-only' using errcode = 'insufficient_privilege';
end $$;

-- Makes the partitions of this month and of the months ahead; owned by the owner, so that the service may ask
-- for partitions without any right to make other tables.
create function bulkhead_ensure_partitions(months_ahead integer) returns void
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
        end if;
    end loop;
end $$;
"""


def _role(attribute: str) -> str:
    """The role's name comes from its URL; it is quoted as an identifier."""
    name: str = context.config.attributes[attribute]
    return '"' + name.replace('"', '""') + '"'


def _secure() -> None:
    app, platform = _role("app_role"), _role("platform_role")
    schema = op.get_bind().scalar(sa.text("select quote_ident(current_schema())"))
    for statement in FUNCTIONS.replace("{schema}", schema).split("\n\n"):
        op.execute(statement)
    op.execute("revoke all on function bulkhead_ensure_partitions(integer) from public")
    op.execute(f"grant execute on function bulkhead_ensure_partitions(integer) to {platform}")
    op.execute(f"create table audit_events_rest partition of audit_events default")
    op.execute("select bulkhead_ensure_partitions(2)")
    op.execute("create trigger append_only before update or delete on audit_events"
               " for each row execute function bulkhead_refuse_change()")
    for table in ("audit_events", "audit_events_rest"):
        op.execute(f"create trigger no_truncate before truncate on {table}"
                   " for each statement execute function bulkhead_refuse_change()")
    _force("tenants", "id")
    for table in TENANT_TABLES:
        _force(table, "tenant_id")
    # Whoever decides a call must see that the platform has stopped everything.
    op.execute(
        f"create policy platform_stops on kill_switches for select to {app}"
        f" using (tenant_id = {PLATFORM} and lifted_at is null and {CURRENT} is not null)"
    )
    op.execute(f"grant usage on schema {schema} to {app}, {platform}")
    op.execute(f"grant select on alembic_version to {app}, {platform}")
    for table, privileges in APP_GRANTS.items():
        op.execute(f"grant {privileges} on {table} to {app}")
    for table, privileges in PLATFORM_GRANTS.items():
        op.execute(f"grant {privileges} on {table} to {platform}")
        op.execute(f"create policy platform on {table} to {platform} using (true) with check (true)")


def _force(table: str, column: str) -> None:
    op.execute(f"alter table {table} enable row level security")
    op.execute(f"alter table {table} force row level security")
    op.execute(f"create policy one_tenant on {table} using ({column} = {CURRENT}) with check ({column} = {CURRENT})")


def upgrade() -> None:
    op.create_table('tenants',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('slug', sa.String(), nullable=False),
    sa.Column('status', sa.String(), server_default='active', nullable=False),
    sa.Column('generation', sa.Integer(), server_default='1', nullable=False),
    sa.Column('sandbox_uid', sa.Integer(), sa.Identity(always=True, start=2000000), nullable=False),
    sa.Column('key_id', sa.String(), nullable=False),
    sa.Column('wrapped_key', sa.LargeBinary(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("status in ('active', 'disabled')", name=op.f('ck_tenants_status')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_tenants')),
    sa.UniqueConstraint('sandbox_uid', name=op.f('uq_tenants_sandbox_uid')),
    sa.UniqueConstraint('slug', name=op.f('uq_tenants_slug'))
    )
    op.create_table('audit_events',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('type', sa.String(), nullable=False),
    sa.Column('actor_id', sa.Uuid(), nullable=True),
    sa.Column('run_id', sa.Uuid(), nullable=True),
    sa.Column('body', sa.String(), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_audit_events_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', 'at', name=op.f('pk_audit_events')),
    postgresql_partition_by='RANGE (at)'
    )
    op.create_index('ix_audit_events_tenant_id_run_id', 'audit_events', ['tenant_id', 'run_id'], unique=False)
    op.create_table('issuers',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('issuer', sa.String(), nullable=False),
    sa.Column('audience', sa.String(), nullable=False),
    sa.Column('jwks', postgresql.JSONB(astext_type=sa.Text()), nullable=True),
    sa.Column('jwks_uri', sa.String(), nullable=True),
    sa.Column('role_claim', sa.String(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint('(jwks is null) <> (jwks_uri is null)', name=op.f('ck_issuers_one_source_of_keys')),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_issuers_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_issuers')),
    sa.UniqueConstraint('issuer', 'audience', name=op.f('uq_issuers_issuer_audience'))
    )
    op.create_table('kill_switches',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('scope', sa.String(), nullable=False),
    sa.Column('target', sa.String(), nullable=True),
    sa.Column('reason', sa.String(), nullable=False),
    sa.Column('engaged_by', sa.Uuid(), nullable=False),
    sa.Column('engaged_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('lifted_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("(scope = 'all') = (tenant_id = '00000000-0000-7000-8000-000000000000')", name=op.f('ck_kill_switches_only_the_platform_stops_all')),
    sa.CheckConstraint("(scope in ('server', 'tool')) = (target is not null)", name=op.f('ck_kill_switches_target')),
    sa.CheckConstraint("scope in ('all', 'tenant', 'server', 'tool')", name=op.f('ck_kill_switches_scope')),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_kill_switches_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_kill_switches'))
    )
    op.create_table('users',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('role', sa.String(), nullable=False),
    sa.Column('issuer', sa.String(), nullable=True),
    sa.Column('subject', sa.String(), nullable=True),
    sa.Column('wrapped_key', sa.LargeBinary(), nullable=True),
    sa.Column('disabled_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("(role = 'platform_admin') = (tenant_id = '00000000-0000-7000-8000-000000000000')", name=op.f('ck_users_platform_admins_belong_to_no_tenant')),
    sa.CheckConstraint("role in ('platform_admin', 'tenant_admin', 'auditor', 'user')", name=op.f('ck_users_role')),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_users_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_users')),
    sa.UniqueConstraint('tenant_id', 'name', name=op.f('uq_users_tenant_id_name'))
    )
    op.create_index('uq_users_tenant_id_issuer_subject', 'users', ['tenant_id', 'issuer', 'subject'], unique=True, postgresql_where=sa.text('subject is not null'))
    op.create_table('api_keys',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('lookup', sa.String(), nullable=False),
    sa.Column('mac_key_id', sa.String(), nullable=False),
    sa.Column('mac', sa.LargeBinary(), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('last_used_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id', 'user_id'], ['users.tenant_id', 'users.id'], name=op.f('fk_api_keys_tenant_id_user_id_users')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_api_keys')),
    sa.UniqueConstraint('lookup', name=op.f('uq_api_keys_lookup'))
    )
    op.create_table('policy_versions',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('version', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('document', sa.String(), nullable=False),
    sa.Column('digest', sa.String(), nullable=False),
    sa.Column('created_by', sa.Uuid(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id', 'created_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_policy_versions_tenant_id_created_by_users')),
    sa.ForeignKeyConstraint(['tenant_id'], ['tenants.id'], name=op.f('fk_policy_versions_tenant_id_tenants')),
    sa.PrimaryKeyConstraint('tenant_id', 'version', name=op.f('pk_policy_versions'))
    )
    op.create_table('published_policies',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('version', sa.Integer(), nullable=False),
    sa.Column('pinned_tools', postgresql.JSONB(astext_type=sa.Text()), nullable=False),
    sa.Column('published_by', sa.Uuid(), nullable=False),
    sa.Column('published_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.ForeignKeyConstraint(['tenant_id', 'published_by'], ['users.tenant_id', 'users.id'], name=op.f('fk_published_policies_tenant_id_published_by_users')),
    sa.ForeignKeyConstraint(['tenant_id', 'version'], ['policy_versions.tenant_id', 'policy_versions.version'], name=op.f('fk_published_policies_tenant_id_version_policy_versions')),
    sa.PrimaryKeyConstraint('tenant_id', name=op.f('pk_published_policies'))
    )
    op.create_table('runs',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('key_id', sa.Uuid(), nullable=True),
    sa.Column('conversation_id', sa.Uuid(), nullable=True),
    sa.Column('policy_version', sa.Integer(), nullable=False),
    sa.Column('state', sa.String(), nullable=False),
    sa.Column('code', sa.String(), nullable=True),
    sa.Column('cancel_cause', sa.String(), nullable=True),
    sa.Column('model', sa.String(), nullable=False),
    sa.Column('input_tokens', sa.Integer(), server_default='0', nullable=False),
    sa.Column('output_tokens', sa.Integer(), server_default='0', nullable=False),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.Column('finished_at', sa.DateTime(timezone=True), nullable=True),
    sa.CheckConstraint("state in ('running', 'waiting_approval', 'succeeded', 'failed', 'denied', 'cancelled', 'timed_out', 'interrupted')", name=op.f('ck_runs_state')),
    sa.ForeignKeyConstraint(['tenant_id', 'key_id'], ['api_keys.tenant_id', 'api_keys.id'], name=op.f('fk_runs_tenant_id_key_id_api_keys')),
    sa.ForeignKeyConstraint(['tenant_id', 'policy_version'], ['policy_versions.tenant_id', 'policy_versions.version'], name=op.f('fk_runs_tenant_id_policy_version_policy_versions')),
    sa.ForeignKeyConstraint(['tenant_id', 'user_id'], ['users.tenant_id', 'users.id'], name=op.f('fk_runs_tenant_id_user_id_users')),
    sa.PrimaryKeyConstraint('tenant_id', 'id', name=op.f('pk_runs'))
    )
    op.create_index('ix_runs_lease_until', 'runs', ['lease_until'], unique=False, postgresql_where=sa.text("state = 'running'"))
    op.create_index('ix_runs_tenant_id_conversation_id', 'runs', ['tenant_id', 'conversation_id'], unique=False)
    op.create_index('ix_runs_tenant_id_user_id_id', 'runs', ['tenant_id', 'user_id', 'id'], unique=False)
    op.create_table('contents',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('kind', sa.String(), nullable=False),
    sa.Column('sequence', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('sealed', sa.LargeBinary(), nullable=False),
    sa.CheckConstraint("kind in ('query', 'arguments', 'result', 'answer')", name=op.f('ck_contents_kind')),
    sa.ForeignKeyConstraint(['tenant_id', 'run_id'], ['runs.tenant_id', 'runs.id'], name=op.f('fk_contents_tenant_id_run_id_runs')),
    sa.PrimaryKeyConstraint('tenant_id', 'run_id', 'kind', 'sequence', name=op.f('pk_contents'))
    )
    op.create_table('tool_calls',
    sa.Column('tenant_id', sa.Uuid(), nullable=False),
    sa.Column('run_id', sa.Uuid(), nullable=False),
    sa.Column('sequence', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('tool', sa.String(), nullable=False),
    sa.Column('decision', sa.String(), nullable=False),
    sa.Column('rule', sa.String(), nullable=False),
    sa.Column('outcome', sa.String(), nullable=True),
    sa.Column('duration_ms', sa.Integer(), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), server_default=sa.text('now()'), nullable=False),
    sa.CheckConstraint("decision in ('allowed', 'denied')", name=op.f('ck_tool_calls_decision')),
    sa.CheckConstraint("outcome in ('succeeded', 'failed', 'timed_out', 'denied', 'unknown')", name=op.f('ck_tool_calls_outcome')),
    sa.ForeignKeyConstraint(['tenant_id', 'run_id'], ['runs.tenant_id', 'runs.id'], name=op.f('fk_tool_calls_tenant_id_run_id_runs')),
    sa.PrimaryKeyConstraint('tenant_id', 'run_id', 'sequence', name=op.f('pk_tool_calls'))
    )
    _secure()


def downgrade() -> None:
    op.drop_table('tool_calls')
    op.drop_table('contents')
    op.drop_index('ix_runs_tenant_id_user_id_id', table_name='runs')
    op.drop_index('ix_runs_tenant_id_conversation_id', table_name='runs')
    op.drop_index('ix_runs_lease_until', table_name='runs', postgresql_where=sa.text("state = 'running'"))
    op.drop_table('runs')
    op.drop_table('published_policies')
    op.drop_table('policy_versions')
    op.drop_table('api_keys')
    op.drop_index('uq_users_tenant_id_issuer_subject', table_name='users', postgresql_where=sa.text('subject is not null'))
    op.drop_table('users')
    op.drop_table('kill_switches')
    op.drop_table('issuers')
    op.drop_index('ix_audit_events_tenant_id_run_id', table_name='audit_events')
    op.drop_table('audit_events')
    op.drop_table('tenants')
    op.execute("drop function bulkhead_ensure_partitions(integer), bulkhead_refuse_change()")
