"""Where programs of a catalogue are tried through the whole service, and how a model is made to call them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.servers.installs import Installs
from tests.runs.faults import ScriptedModel
from tests.servers.site import Site
from tests.service import DEFAULT_MODEL_POLICY, Service, Tenant


@dataclass
class Ground:
    """A service, its catalogue, what is installed of that, and a site on loopback."""

    service: Service
    site: Site
    catalogue: Path
    installs: Installs


def policy(declared: str) -> str:
    """With that one server, of the name `ours`."""
    text = DEFAULT_MODEL_POLICY.replace("docs: {template: filesystem, root: docs}", f"ours: {{{declared}}}")
    return text.replace('"docs__*"', '"ours__*"')


async def called(tenant: Tenant, model: ScriptedModel, tool: str, **arguments: Any) -> str:
    """What the model was told of the call."""
    model.calls(f"ours__{tool}", **arguments)
    model.says("done")
    answer = await tenant.user.ask("Do it.")
    assert answer.status_code == 200, answer.text
    text: str = model.bodies[-1]["messages"][-1]["content"]
    return text


async def publishing(tenant: Tenant, document: str) -> dict[str, Any]:
    """The answer to publishing it."""
    created = await tenant.admin.make("/v1/policies", content=document.encode())
    response = await tenant.admin.post(f"/v1/policies/{created['version']}/publish", json={})
    answer: dict[str, Any] = {"status": response.status_code, **response.json()}
    return answer
