"""Whether the record is chained, signed and kept; and what is told beside it, in metrics and traces."""

from __future__ import annotations

import time
from typing import Final
from urllib.parse import urlsplit

import httpx
from sqlalchemy import text

from app.audit import stored
from app.audit.signing import PublicKeys, Signers, read_keys
from app.audit.verify import Break
from app.checklist import processes
from app.checklist.findings import Item, Verdict, failed, judged, passed, warned
from app.checklist.ground import Ground
from app.errors import ConfigurationError
from app.keyring import Keyring
from app.settings import Settings

_SECONDS: Final = 4
_LEAST_TOKEN: Final = 16
_PATIENCE_S: Final = 60  # the item's own time is shorter
_GUIDES_METRICS: Final = ("mcp_requests_total", "mcp_request_duration_seconds", "mcp_security_violations_total")
_WHOSE_FIX: Final = "See which program listens at the service's port; run this as the service's user, or as root."
# The newest head of each tenant, by probes of the index: there may be very many heads.
_ENDS: Final = text("""
with recursive found as (
    (select tenant_id from audit_heads order by tenant_id limit 1)
    union all
    select following.tenant_id from found, lateral (
        select tenant_id from audit_heads where tenant_id > found.tenant_id order by tenant_id limit 1
    ) following
)
select found.tenant_id, newest.key_id, extract(epoch from newest.signed_at)::float as signed_at
from found, lateral (
    select key_id, signed_at from audit_heads where tenant_id = found.tenant_id order by seq desc limit 1
) newest
order by newest.signed_at desc
""")
# What is of a time to come has been put there, so as never to be late.
_WAITING: Final = text("""
select count(*), coalesce(max(abs(extract(epoch from clock_timestamp() - at))), 0)::float from audit_pending
""")


def public_keys(settings: Settings) -> PublicKeys:
    """Those of the settings; raise ConfigurationError where there are none."""
    keys = settings.audit_keys or settings.root_keys
    source = f"BULKHEAD_{'AUDIT' if settings.audit_keys else 'ROOT'}_KEYS"
    if keys is None:
        raise ConfigurationError("There are no keys.")
    retired = read_keys(settings.audit_retired_keys_file) if settings.audit_retired_keys_file else None
    return Signers(Keyring.parse(keys.get_secret_value(), source=source), retired=retired).public


async def _chain(ground: Ground) -> Verdict:
    """The ends of the chains that were signed last, as many as there is time for."""
    keys, ends = public_keys(ground.settings), time.monotonic() + _SECONDS
    tenants = [end.tenant_id for end in await ground.database.rows("sealer", _ENDS)]
    faults, looked_at = [], 0
    async with stored.reading(ground.database.engines["sealer"]) as connection:
        for tenant_id in tenants:
            if time.monotonic() > ends:
                break
            looked_at += 1
            found = await stored.verify_end(connection, tenant_id, keys=keys)
            faults += [str(found)] if isinstance(found, Break) else []
    detail = f"The last rows of {looked_at} of {len(tenants)} chains hold; `bulkhead audit verify` looks at all."
    return judged(faults[:5], detail)


async def _lag(ground: Ground) -> Verdict:
    count, age_s = (await ground.database.rows("sealer", _WAITING))[0]
    if age_s > stored.PATIENCE_S:
        return failed(f"{count} events are not chained, the oldest for {age_s:.0f} s.")
    if age_s > max(60, 10 * ground.settings.audit_seal_s):
        return warned(f"{count} events are not chained yet, the oldest for {age_s:.0f} s.")
    return passed(f"{count} events wait to be chained.")


async def _signer(ground: Ground) -> Verdict:
    settings = ground.settings
    known = public_keys(settings)
    strangers = {end.key_id for end in await ground.database.rows("sealer", _ENDS) if end.key_id not in known}
    if strangers:
        return failed(f"Heads are signed by keys that are not in the settings: {', '.join(sorted(strangers)[:5])}.")
    if settings.audit_keys is None:
        return warned("The keys that sign the record follow from the root keys.")
    if settings.root_keys is not None and _shared(settings):
        return failed("A key that signs the record is a root key.")
    return passed("The record is signed with keys of its own, which are not in the database.")


def _shared(settings: Settings) -> bool:
    """Whatever their ids are."""
    texts = [keys.get_secret_value() for keys in (settings.root_keys, settings.audit_keys) if keys]
    roots, signing = ({entry.partition(":")[2].strip() for entry in each.split(",")} for each in texts)
    return bool(roots & signing)


async def _heads(ground: Ground) -> Verdict:
    path = ground.settings.audit_heads_file
    if path is None:
        return warned("The heads of the chains are kept in the database alone, where its superuser can cut them off.")
    try:
        age_s = time.time() - path.stat().st_mtime
    except OSError:
        return failed("The file of heads is not there, or cannot be read.")
    if path.stat().st_mode & 0o022:
        return failed("Others can write to the file of heads.")
    newest = max((end.signed_at for end in await ground.database.rows("sealer", _ENDS)), default=0.0)
    behind_s = newest - path.stat().st_mtime
    if behind_s > 3 * ground.settings.audit_heads_s + 60:
        return failed(f"The file of heads is {behind_s:.0f} s behind the chains.")
    return passed(f"The heads are in a file as well, which was written to {age_s:.0f} s ago.")


async def _metrics(ground: Ground) -> Verdict:
    token = ground.settings.metrics_token
    if token is None:
        return warned("BULKHEAD_METRICS_TOKEN is not set: nobody can read the metrics.")
    if len(token.get_secret_value()) < _LEAST_TOKEN:
        return failed(f"BULKHEAD_METRICS_TOKEN has less than {_LEAST_TOKEN} characters.")
    if ground.url is None:
        return passed("The metrics are for the bearer of a token.")
    try:
        return await _scraped(ground.process, ground.url, token.get_secret_value())
    except httpx.TransportError:
        return failed("Nothing answers where the settings say that the service is.")


async def _scraped(process: int | None, url: str, token: str) -> Verdict:
    """The token goes to the service's process alone: any program may have taken the port."""
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=_PATIENCE_S) as client:
        without = await client.get("/metrics")
        if urlsplit(url).port not in {port for _, port in processes.listening(process)}:
            return failed("What answers is not known to be the service, so it was not sent the token.", _WHOSE_FIX)
        given = await client.get("/metrics", headers={"Authorization": f"Bearer {token}"})
    if (without.status_code, given.status_code) != (401, 200):
        return failed(f"/metrics answered {without.status_code} without the token and {given.status_code} with it.")
    missing = [f"there is no metric {name}" for name in _GUIDES_METRICS if f"# HELP {name}" not in given.text]
    return judged(missing, "/metrics answers the bearer of the token and nobody else, with the guide's metrics.")


async def _traces(ground: Ground) -> Verdict:
    settings = ground.settings
    faults = ["traces carry queries, answers and tool calls"] if settings.trace_content else []
    if settings.otlp_endpoint and settings.otlp_endpoint.startswith("http://") and settings.otlp_headers:
        faults.append("the credential of the collector goes over plain http")
    if settings.metrics_user_labels:
        faults.append("metrics carry ids of users")
    return judged(faults, "No text of a tenant is in traces, and no user in metrics.", worst=warned)


ITEMS: Final = (
    Item(
        "audit-chain",
        (9,),
        "The record's chains hold",
        "Treat it as an incident: docs/operations.md. `bulkhead audit verify` names the first row that does not hold.",
        _chain,
    ),
    Item(
        "audit-lag",
        (9,),
        "What is recorded is chained soon",
        "See that a service runs, and its log for `audit.`: without a sealer the record grows unsigned.",
        _lag,
    ),
    Item(
        "audit-signer",
        (9,),
        "The record is signed with keys of its own",
        "Set BULKHEAD_AUDIT_KEYS to a key from `bulkhead root-key`, and keep the public halves of earlier keys"
        " (BULKHEAD_AUDIT_RETIRED_KEYS_FILE).",
        _signer,
    ),
    Item(
        "audit-heads-file",
        (9,),
        "The chains' heads are kept outside of the database",
        "Set BULKHEAD_AUDIT_HEADS_FILE to where the database's superuser cannot write.",
        _heads,
    ),
    Item(
        "metrics-token",
        (10,),
        "Metrics are for the bearer of a token",
        "Set BULKHEAD_METRICS_TOKEN to 32 random characters, and give them to Prometheus.",
        _metrics,
    ),
    Item(
        "told-to-others",
        (9, 10),
        "Traces and metrics carry no text of a tenant",
        "Unset BULKHEAD_TRACE_CONTENT and BULKHEAD_METRICS_USER_LABELS; send traces over https.",
        _traces,
    ),
)
