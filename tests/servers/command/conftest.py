"""One service for all tests of the folder that need one, and in it each reference server is installed once."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from anyio import to_thread

from app.servers import installs
from tests.runs.faults import ScriptedModel, scripted_model
from tests.servers.command.ground import Ground
from tests.servers.command.probes import PYTHON, write_entry
from tests.servers.site import make_trust, serving
from tests.service import Databases, running_service

# It takes no notice of `agent`.
PROBE: Final = f"""{PYTHON}
args = ["{{agent}}"]
hosts = "any"
env = {{ TOKEN = "optional" }}
[parameters.agent]
pattern = "[A-Za-z0-9./ -]+"
default = "none"
"""


@pytest.fixture(scope="package")
def scripted() -> Iterator[ScriptedModel]:
    with scripted_model() as model:
        yield model


@pytest.fixture(scope="package")
async def ground(
    scripted: ScriptedModel, databases: Databases, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Ground]:
    """With a probe that is installed, and two reference servers that are not."""
    folder = tmp_path_factory.mktemp("command")
    catalogue = folder / "catalogue"
    shutil.copytree(Path(__file__).with_name("catalogue"), catalogue)
    write_entry(catalogue, "probe", PROBE)
    trust = make_trust(folder)
    trust.ca_file.chmod(0o644)
    settings: dict[str, Any] = {
        "server_ca_file": trust.ca_file,
        "server_catalogue": catalogue,
        "egress_private_networks": {"command": ("127.0.0.0/8", "::1/128")},
    }
    async with AsyncExitStack() as stack:
        site = await stack.enter_async_context(serving(trust))
        running = running_service(databases, folder / "data", model=scripted.endpoint, **settings)
        service = await stack.enter_async_context(running)
        made = installs.below(folder / "data", catalogue)
        await to_thread.run_sync(made.install, "probe")
        yield Ground(service, site, catalogue, made)


@pytest.fixture(scope="package")
async def reference(ground: Ground) -> Ground:
    """The same, once the one of npm is installed; that of PyPI takes three times as long."""
    await to_thread.run_sync(ground.installs.install, "files")
    return ground
