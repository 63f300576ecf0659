"""What the roles of the service may do, and nothing else: compared with the database by tests/test_database.py."""

from __future__ import annotations

from typing import Final

GRANTS: Final = """\
app alembic_version SELECT
app api_keys INSERT, SELECT, UPDATE(expires_at, revoked_at)
app approvals INSERT, SELECT, UPDATE(arguments_mac, decided_at, decided_by, is_edited, state)
app audit_chain SELECT
app audit_checkpoints SELECT
app audit_events INSERT, SELECT
app audit_heads SELECT
app budget_accounts INSERT, SELECT, UPDATE
app budget_days INSERT, SELECT, UPDATE(cost, tokens, tool_calls)
app budget_reservations DELETE, INSERT, SELECT, UPDATE(cost, input_tokens, output_tokens, tool_calls)
app bulkhead_defer_run EXECUTE
app bulkhead_delete_erased EXECUTE
app bulkhead_empty_conversation EXECUTE
app bulkhead_erase_user EXECUTE
app contents INSERT, SELECT
app conversations INSERT, SELECT, UPDATE(deleted_at, last_used_at)
app idempotency_keys INSERT, SELECT, UPDATE(answer, created_at, digest)
app issuers DELETE, INSERT, SELECT
app kill_switches INSERT, SELECT, UPDATE(lifted_at)
app policy_backtests INSERT, SELECT
app policy_checks INSERT, SELECT, UPDATE(checked_at, checked_by, tools)
app policy_publications INSERT, SELECT
app policy_versions INSERT, SELECT
app published_policies INSERT, SELECT, UPDATE
app quarantines INSERT, SELECT, UPDATE
app run_events INSERT, SELECT
app runs INSERT, SELECT, UPDATE
app secret_bindings SELECT
app secrets DELETE, INSERT, SELECT, UPDATE(id, key_id, sealed, updated_at, updated_by, version)
app tenants SELECT, UPDATE(generation)
app tool_calls INSERT, SELECT, UPDATE(decision, duration_ms, is_counted, outcome, rule)
app usage_models INSERT, SELECT, UPDATE(cost, input_tokens, output_tokens, runs, tool_calls, turns)
app usage_tools INSERT, SELECT, UPDATE(allowed, denied, duration_ms, failed)
app users INSERT, SELECT, UPDATE(disabled_at, role, wrapped_key)
platform alembic_version SELECT
platform api_keys SELECT, UPDATE(last_used_at)
platform approvals SELECT, UPDATE(state)
platform audit_events INSERT
platform budget_accounts INSERT, SELECT, UPDATE
platform budget_days INSERT, SELECT, UPDATE(cost, tokens, tool_calls)
platform budget_reservations DELETE, SELECT
platform bulkhead_defer_run EXECUTE
platform bulkhead_drop_run_events EXECUTE
platform bulkhead_ensure_partitions EXECUTE
platform bulkhead_erase_tenant EXECUTE
platform conversations SELECT(deleted_at, emptied_at, last_used_at, tenant_id)
platform idempotency_keys DELETE, INSERT, SELECT, UPDATE(answer, created_at, digest)
platform issuers SELECT
platform kill_switches SELECT
platform model_endpoints DELETE, INSERT, SELECT, UPDATE
platform run_events INSERT, SELECT(at, run_id, sequence, tenant_id)
platform runs SELECT, UPDATE(code, deferred_at, finished_at, lease_until, state, watched_until)
platform secret_bindings DELETE, INSERT, SELECT, UPDATE(id, locator, provider, updated_at, updated_by, version)
platform secrets SELECT(id, name, tenant_id)
platform tenants INSERT, SELECT, UPDATE(generation, status)
platform tool_calls SELECT, UPDATE(outcome)
platform usage_models INSERT, SELECT, UPDATE(cost, input_tokens, output_tokens, runs, tool_calls, turns)
platform usage_tools INSERT, SELECT, UPDATE(allowed, denied, duration_ms, failed)
platform users SELECT(disabled_at, id, issuer, role, subject, tenant_id)
sealer audit_chain INSERT, SELECT
sealer audit_checkpoints INSERT, SELECT
sealer audit_events SELECT
sealer audit_heads INSERT, SELECT
sealer audit_pending DELETE, SELECT
sealer bulkhead_drop_empty_partitions EXECUTE
sealer bulkhead_prune_audit EXECUTE"""
