"""What the service needs of others: reached from here, or not. No call costs anything."""

from __future__ import annotations

import asyncio
import re
from typing import Final
from urllib.parse import urlsplit

import httpx
from sqlalchemy import text

from app.auth.jwks import MAX_DOCUMENT_BYTES, InvalidKeySet, parse_jwks
from app.checklist.findings import Item, Verdict, counted, failed, judged, passed, warned
from app.checklist.ground import Ground
from app.errors import ConfigurationError, Unavailable
from app.limits.shared import FAILURES, SharedWindows
from app.limits.turns import TIMEOUT_S
from app.outbound.client import fetch, outbound_client
from app.secrets import locators
from app.secrets.providers import configured
from app.secrets.providers.reading import Unreadable

_ANSWER_S: Final = 4
_MOST: Final = 20
_BOUND: Final = text("""
select distinct on (provider) provider, locator from secret_bindings order by provider, updated_at desc
""")
_MODELS: Final = text("select name, base_url from model_endpoints where is_enabled order by name limit :most")
_KEY_SETS: Final = text("select distinct jwks_uri from issuers where jwks_uri is not null order by 1 limit :most")


async def _providers(ground: Ground) -> Verdict:
    """One secret of each provider that is bound, the one that was bound last, is really read."""
    rows = await ground.database.rows("platform", _BOUND)
    providers, faults = configured.from_settings(ground.settings), []
    for row in rows:
        try:
            await providers[row.provider].read(locators.parse(row.provider, row.locator))
        except (Unreadable, ConfigurationError) as error:
            outcome = error.outcome if isinstance(error, Unreadable) else "not configured"
            faults.append(f"the provider {row.provider} does not give a secret that is bound ({outcome})")
        except ValueError:
            faults.append(f"a binding to the provider {row.provider} cannot be read")
    if not rows:
        return passed("No secret is bound to a provider.")
    return judged(faults, f"{counted(len(rows), 'provider')}, and the secret that was bound last came from each.")


async def _models(ground: Ground) -> Verdict:
    """Asked at its base, without a credential: whatever it answers, it is there."""
    settings = ground.settings
    urls = {row.name: row.base_url for row in await ground.database.rows("platform", _MODELS, most=_MOST)}
    if settings.model_api_key is not None:
        urls["default"] = settings.model_base_url
    async with outbound_client(allow_loopback=settings.model_loopback, read_timeout_s=_ANSWER_S) as client:
        there = await asyncio.gather(*(_is_there(client, url) for url in urls.values()))
    faults = [
        f"the model endpoint {name} is not reached" for name, is_there in zip(urls, there, strict=True) if not is_there
    ]
    if faults:
        return failed("; ".join(faults))
    if urls:
        return passed(f"{', '.join(sorted(urls))}: reached. No call was made that costs.")
    if ground.answering is not None and "rehearsal" in ground.answering.models:
        return warned("Only the rehearsal model of the demo answers.")
    return failed("There is no model endpoint.")


async def _is_there(client: httpx.AsyncClient, url: str) -> bool:
    try:
        async with client.stream("GET", url):
            return True
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


async def _key_sets(ground: Ground) -> Verdict:
    """Tenants name them, so what is wrong is theirs to mend."""
    urls = [url for (url,) in await ground.database.rows("platform", _KEY_SETS, most=_MOST)]
    async with outbound_client(allow_loopback=ground.settings.jwks_loopback) as client:
        held = await asyncio.gather(*(_is_key_set(client, url) for url in urls))
    faults = [f"the key set at {_host(url)} cannot be used" for url, holds in zip(urls, held, strict=True) if not holds]
    if not urls:
        return passed("No issuer names a key set.")
    return judged(faults, f"Fetched and read: {counted(len(urls), 'key set')}.", worst=warned)


async def _is_key_set(client: httpx.AsyncClient, url: str) -> bool:
    try:
        parse_jwks(await fetch(client, url, max_bytes=MAX_DOCUMENT_BYTES, within_s=_ANSWER_S))
    except (Unavailable, InvalidKeySet):
        return False
    return True


def _host(url: str) -> str:
    """Text of a tenant, for an operator's terminal."""
    return re.sub(r"[^A-Za-z0-9.:-]", "?", urlsplit(url).netloc)[:100]


async def _limits(ground: Ground) -> Verdict:
    settings = ground.settings
    if settings.limits_url is None:
        if settings.replicas > 1:
            return failed(f"{settings.replicas} processes serve, and each counts by itself.")
        return passed("One process serves, which counts by itself.")
    try:
        windows = SharedWindows(settings.limits_url.get_secret_value(), timeout_s=50 * TIMEOUT_S)
    except ConfigurationError as error:
        return failed(error.detail)
    try:
        await windows.check()
    except FAILURES as error:
        return failed(f"The storage of the limits does not answer ({type(error).__name__}).")
    finally:
        await windows.close()
    return passed("The storage of the limits counts.")


ITEMS: Final = (
    Item(
        "secret-providers",
        (2,),
        "The providers of secrets that are bound give them",
        "Set what docs/secrets.md says for the provider, and let this host reach it.",
        _providers,
    ),
    Item(
        "limits-storage",
        (8,),
        "All processes count requests together",
        "Set BULKHEAD_LIMITS_URL to a Valkey that all of them reach, and BULKHEAD_REPLICAS to their number.",
        _limits,
    ),
    Item(
        "models-reached",
        (1,),
        "The model endpoints are reached",
        "Set BULKHEAD_MODEL_API_KEY and BULKHEAD_MODEL_BASE_URL; let this host reach it.",
        _models,
    ),
    Item(
        "issuers-reached",
        (),
        "The key sets of issuers are reached",
        "Tell the tenant whose issuer it is: none of its tokens is taken once the cached keys are old.",
        _key_sets,
    ),
)
