"""The chat models that this process talks to, one object for each (endpoint, model, temperature)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from typing import Final

import httpx

from app.outbound.catalogue import ModelCatalogue, ModelEndpoint
from app.runs.agent.governed import GovernedChat
from app.runs.agent.turns import Endpoint
from app.runs.state import MODEL_FAILED, Ending, RunEnded

# Tenants choose the temperature.
_MAX_CHATS: Final = 100


class Chats:
    """Builds chat models over one outbound client and keeps the latest used: their set-up costs more than a turn."""

    def __init__(
        self,
        catalogue: ModelCatalogue,
        client: httpx.AsyncClient,
        *,
        timeout_s: float,
        retries: int,
        traced: Collection[str] = (),
    ) -> None:
        self._catalogue = catalogue
        self._client = client
        self._timeout_s = timeout_s
        self._retries = retries
        self._traced = frozenset(traced)
        self._chats: OrderedDict[tuple[ModelEndpoint, str, float, bool], GovernedChat] = OrderedDict()

    def get(self, use: str, name: str | None, *, temperature: float) -> GovernedChat:
        """Raise RunEnded where the catalogue has lost what a published policy names."""
        if self._catalogue.faults(use, name):
            raise RunEnded(
                Ending(MODEL_FAILED.state, MODEL_FAILED.code, MODEL_FAILED.http_status, "The policy's model is gone.")
            )
        endpoint = self._catalogue.endpoints[use]
        # By value: a changed entry is another one.
        key = (endpoint, name or endpoint.models[0], temperature, use in self._traced)
        if key not in self._chats:
            self._chats[key] = self._build(*key[:3], passes_trace=key[3])
            if len(self._chats) > _MAX_CHATS:
                self._chats.popitem(last=False)
        self._chats.move_to_end(key)
        return self._chats[key]

    def _build(self, endpoint: ModelEndpoint, name: str, temperature: float, *, passes_trace: bool) -> GovernedChat:
        chat = GovernedChat(
            model=name,
            base_url=endpoint.base_url,
            api_key=lambda: endpoint.api_key,
            temperature=temperature,
            http_async_client=self._client,
            passes_trace=passes_trace,
        )
        url = httpx.URL(f"{endpoint.base_url.rstrip('/')}/chat/completions")
        told = _told(chat) | {"Authorization": f"Bearer {endpoint.api_key}"}
        headers = httpx.Headers({**self._client.headers, **httpx.Headers(told, encoding="utf-8")}, encoding="utf-8")
        return chat.sent_to(Endpoint(self._client, url, headers, httpx.Timeout(self._timeout_s), self._retries))


def _told(chat: GovernedChat) -> dict[str, str]:
    """The headers of OpenAI's client, but for those that describe this machine."""
    headers = chat.root_async_client.default_headers
    return {
        name: value
        for name, value in headers.items()
        if isinstance(value, str) and not name.lower().startswith("x-stainless")
    }
