"""A tenant's admin is told which programs of the catalogue a policy may name, and nothing of where they lie."""

from __future__ import annotations

from tests.servers.command.probes import write_entry
from tests.service import Service

ENTRY = """\
kind = "python"
command = "python"
args = ["-m", "program", "{mode}"]
workspace = "read"
hosts = ["example.com"]
isolation = "user"
[parameters.mode]
enum = ["fast", "slow"]
default = "fast"
[env]
TOKEN = "required"
"""


async def test_valid_entries_are_listed_with_what_they_leave_open(service: Service) -> None:
    write_entry(service.data_dir / "catalogue", "offered", ENTRY)
    write_entry(service.data_dir / "catalogue", "broken", 'kind = "shell"')
    tenant = await service.new_tenant(policy=None)
    answer = await tenant.admin.get("/v1/server-catalogue")
    assert answer.json()["items"] == [
        {
            "name": "offered",
            "is_installed": False,
            "parameters": {"mode": {"pattern": None, "enum": ["fast", "slow"], "default": "fast"}},
            "workspace": "read",
            "hosts": ["example.com"],
            "env": {"TOKEN": "required"},
            "isolation": "user",
        }
    ]
    assert str(service.data_dir) not in answer.text
