"""The engine of background runs: procrastinate's own tables, in a schema of their own, and who may do what there."""

from __future__ import annotations

from importlib import metadata, resources

import sqlalchemy as sa
from alembic import context, op

revision = '0013'
down_revision = '0012'
branch_labels = None
depends_on = None

# Its schema.sql is taken as that version has it; another one may need other tables.
VERSION = "3.10.0"
JOBS = "bulkhead_jobs"
CURRENT = "nullif(current_setting('app.tenant_id', true), '')::uuid"

# The app role has no right in the schema of jobs: this is its only way there, and it leads to its own tenant's runs.
# The rows of runs are seen under the tenant that is set, by the owner too; the platform role has none set.
FUNCTION = """
create function bulkhead_defer_run(of_tenant uuid, run uuid, most integer) returns boolean
language plpgsql security definer set search_path = pg_catalog, {jobs}, pg_temp as $$
declare
    before text := coalesce(current_setting('app.tenant_id', true), '');
    is_deferred boolean;
begin
    if session_user = {platform} then
        perform set_config('app.tenant_id', of_tenant::text, true);
    elsif of_tenant is distinct from {current} then
        raise exception 'that run is another tenant''s' using errcode = 'insufficient_privilege';
    end if;
    is_deferred := {schema}.bulkhead_put_job(of_tenant, run, most);
    perform set_config('app.tenant_id', before, true);
    return is_deferred;
end $$;

-- A job for a run that is queued, or whose process has died, where the tenant has fewer than `most` that are at work
-- or have a job. Who finds the run locked leaves it: somebody else is giving it a job, or ends it.
create function bulkhead_put_job(of_tenant uuid, run uuid, most integer) returns boolean
language plpgsql set search_path = pg_catalog, {jobs}, pg_temp as $$
declare
    at_work bigint;
begin
    perform from {schema}.runs r
    where r.tenant_id = of_tenant and r.id = run
      and (r.state = 'queued' or (r.kind = 'background' and r.state = 'running' and r.lease_until < now()))
    for update skip locked;
    if not found then
        return false;
    end if;
    select (select count(*) from procrastinate_jobs j
            join {schema}.runs r on r.tenant_id = of_tenant and r.id = (j.args->>'run_id')::uuid
            where j.args->>'tenant_id' = of_tenant::text and r.state = 'queued')
         + (select count(*) from {schema}.runs r
            where r.tenant_id = of_tenant and r.kind = 'background' and r.state = 'running')
    into at_work;
    if at_work >= most then
        return false;
    end if;
    begin
        perform procrastinate_defer_jobs_v1(array[row(
            'runs', 'run', 0, null, run::text, jsonb_build_object('tenant_id', of_tenant, 'run_id', run), null
        )::procrastinate_job_to_defer_v1]);
    exception when unique_violation then
        null;  -- it has one that waits
    end;
    update {schema}.runs set deferred_at = now() where tenant_id = of_tenant and id = run;
    return true;
end $$;
"""
# What procrastinate's worker does, and nothing else: jobs are made by the function above alone.
PLATFORM_TABLES = {
    "procrastinate_workers": "select, insert, update (last_heartbeat), delete",
    "procrastinate_jobs": "select, update (status, worker_id), delete",
    "procrastinate_events": "insert",
    "procrastinate_periodic_defers": "select (job_id), update (job_id)",
}
PLATFORM_FUNCTIONS = (
    "procrastinate_fetch_job_v2", "procrastinate_finish_job_v1", "procrastinate_register_worker_v1",
    "procrastinate_unregister_worker_v1", "procrastinate_update_heartbeat_v1", "procrastinate_prune_stalled_workers_v1",
)


def upgrade() -> None:
    if (found := metadata.version("procrastinate")) != VERSION:
        raise RuntimeError(f"procrastinate is {found}: this migration makes the tables of {VERSION}.")
    app, platform = (context.config.attributes[name] for name in ("app_role", "platform_role"))
    schema = op.get_bind().scalar(sa.text("select quote_ident(current_schema())"))
    op.execute(f"create schema {JOBS}")
    _run_script((resources.files("procrastinate.sql") / "schema.sql").read_text(encoding="utf-8"))
    # To count a tenant's jobs, and to find whether a run has one that is being done.
    op.execute(f"create index jobs_of_tenant on {JOBS}.procrastinate_jobs ((args->>'tenant_id'))")
    op.execute(f"create index jobs_of_run on {JOBS}.procrastinate_jobs (queueing_lock)")
    # Notifications take one lock of the whole server with each commit, and workers ask often enough without.
    op.execute(f"alter table {JOBS}.procrastinate_jobs disable trigger procrastinate_jobs_notify_queue_job_inserted_v1")
    op.execute(f"revoke all on all functions in schema {JOBS} from public")
    names = {"schema": schema, "jobs": JOBS, "platform": _quoted(platform, "'"), "current": CURRENT}
    for statement in FUNCTION.format(**names).split("\n\n"):
        op.execute(statement)
    op.execute("revoke all on function bulkhead_put_job, bulkhead_defer_run from public")
    for role in (app, platform):
        op.execute(f"grant execute on function bulkhead_defer_run to {_quoted(role)}")
    op.execute(f"grant usage on schema {JOBS} to {_quoted(platform)}")
    op.execute(f"grant usage on sequence {JOBS}.procrastinate_events_id_seq to {_quoted(platform)}")
    for table, privileges in PLATFORM_TABLES.items():
        op.execute(f"grant {privileges} on {JOBS}.{table} to {_quoted(platform)}")
    for function in PLATFORM_FUNCTIONS:
        op.execute(f"grant execute on function {JOBS}.{function} to {_quoted(platform)}")


def _run_script(script: str) -> None:
    """In the schema of jobs. It has many statements, which the driver takes at once only without parameters."""
    before = op.get_bind().scalar(sa.text("select current_setting('search_path')"))
    set_path = sa.text("select set_config('search_path', :path, true)")
    op.get_bind().execute(set_path, {"path": JOBS})
    op.get_bind().connection.dbapi_connection.run_async(lambda connection: connection.execute(script))
    op.get_bind().execute(set_path, {"path": before})


def _quoted(name: str, mark: str = '"') -> str:
    """A role's name comes from its URL."""
    return mark + name.replace(mark, mark * 2) + mark


def downgrade() -> None:
    op.execute("drop function bulkhead_defer_run, bulkhead_put_job")
    op.execute(f"drop schema {JOBS} cascade")
