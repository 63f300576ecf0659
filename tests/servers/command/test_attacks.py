"""What a program of the catalogue can do where it runs; each attack is shown to succeed with that one wall away."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from app.policies.document import PolicyInvalid
from app.policies.servers.command import CommandServer
from app.sandbox.choice import choose
from app.sandbox.contract import Limits, Mount
from app.servers.command import template
from app.servers.errors import ServerUnavailable, ToolTimedOut
from app.servers.installs import INSIDE
from app.servers.live import Bounds
from app.servers.template import Environment, Place
from tests.servers.command.probes import NODE, PYTHON, UID, Lab, act
from tests.servers.site import DOCS, SECRET, Relay, make_trust, serving

TEXT: Final = '\n[parameters.text]\npattern = "(?s).*"\n'
PLAIN: Final = f'{PYTHON}args = ["first", "{{text}}", "last"]\nenv = {{ TOKEN = "optional" }}\nhosts = "any"\n{TEXT}'
WRITER: Final = f'{PYTHON}workspace = "write"\n'
OPTION: Final = f'{PYTHON}args = ["{{text}}"]\n[parameters.text]\npattern = "-[a-z]+"\n'


@pytest.fixture(scope="module")
async def lab(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Lab]:
    folder = tmp_path_factory.mktemp("probes")
    trust = make_trust(folder)
    trust.ca_file.chmod(0o644)
    async with serving(trust) as site:
        relay = Relay(site, {f"{DOCS}:{site.port}"})
        made = Lab(await choose("bubblewrap"), folder, trust.ca_file, relay)
        for name, manifest in {
            "plain": PLAIN,
            "option": OPTION,
            "node": f'{NODE}hosts = "any"\n',
            "writer": WRITER,
        }.items():
            made.install(name, manifest)
        yield made


def plain(text: str = "text", **keys: Any) -> CommandServer:
    return CommandServer(template="command", server="plain", parameters={"text": text}, **keys)


@pytest.mark.parametrize("text", ["$(touch {0})", "`touch {0}`", "; touch {0} #", "a b' \"c", "x\u2028$IFS&&touch {0}"])
async def test_a_value_with_the_signs_of_a_shell_is_one_argument_and_runs_nothing(
    lab: Lab, tmp_path: Path, text: str
) -> None:
    marker = tmp_path / "marker"
    value = text.format(marker)
    async with lab.started(plain(value)) as live:
        assert await act(live, "arguments") == ["first", value, "last"]
    assert not marker.exists()
    if "touch" in text:  # the control: the same value in the hands of a shell
        await asyncio.to_thread(_in_a_shell, f"true {value}".replace("x\u2028$IFS", ""))
        assert marker.exists()


def _in_a_shell(line: str) -> None:
    subprocess.run(["/bin/sh", "-c", line], check=False, timeout=10)


async def test_a_value_that_could_be_an_option_is_refused_unless_its_pattern_says_so(lab: Lab) -> None:
    with pytest.raises(PolicyInvalid) as refused:
        lab.profile(plain("-rf"))
    assert [(fault.path, fault.message) for fault in refused.value.faults] == [
        ("/parameters/text", "must not begin with -")
    ]
    option = CommandServer(template="command", server="option", parameters={"text": "-rf"})
    async with lab.started(option) as live:  # the control
        assert await act(live, "arguments") == ["-rf"]


async def test_of_the_services_environment_it_sees_nothing_but_the_secrets_that_the_policy_names(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BULKHEAD_ROOT_KEYS", "k1:a-key-of-ours")
    declared = plain(env={"TOKEN": "secret:tickets"})
    async with lab.started(declared, secrets={"tickets": "s3cret", "other": "not asked for"}) as live:
        seen = await act(live, "environment")
    known = {"HOME", "LANG", "LC_CTYPE", "PATH", "PWD", "PYTHONDONTWRITEBYTECODE", "LD_LIBRARY_PATH", "TZ"}
    assert set(seen) - known == {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "TOKEN"}
    assert seen["TOKEN"] == "s3cret"
    assert "not asked for" not in str(seen)
    # The control: the same program without the sandbox has all that we have.
    assert "a-key-of-ours" in await asyncio.to_thread(_beside_us, lab.installs.find("plain").folder)


def _beside_us(tree: Path) -> str:
    asked = {"id": 1, "method": "tools/call", "params": {"arguments": {"words": ["environment"]}}}
    argv = [sys.executable, str(tree / "program" / "server.py")]
    said = json.dumps(asked) + "\n"
    return subprocess.run(argv, input=said, capture_output=True, text=True, check=True, timeout=20).stdout


async def test_there_is_neither_a_shell_nor_an_installer_nor_a_package_of_ours_inside(lab: Lab) -> None:
    names = ["/bin/sh", "/usr/bin/env", "/usr/bin/npx", "/opt/venv/bin/pip", "/usr/bin/python3", "/etc/shadow"]
    ours = f"/opt/venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/mcp"
    async with lab.started(plain()) as live:
        assert await act(live, "there", *names, ours, f"{INSIDE}/program/server.py") == [f"{INSIDE}/program/server.py"]


async def test_it_cannot_change_what_was_installed(lab: Lab, tmp_path: Path) -> None:
    own = f"{INSIDE}/program/server.py"
    async with lab.started(plain()) as live:
        for path in (own, f"{INSIDE}/packages/more.py", "/opt/venv/bin/python", "/srv/ca.pem", "/etc/passwd"):
            assert "Error" in await act(live, "write", path), path
    assert lab.installs.verify("plain") is None
    # The control: a tree that is its own to write, by a mount that lets it.
    tree = _its_own(lab.installs.find("plain").folder, tmp_path / "tree")
    profile = lab.profile(plain())
    mounts = (*(mount for mount in profile.mounts if mount.target != INSIDE), Mount(tree, INSIDE, writable=True))
    async with lab.started(plain(), changed={"mounts": mounts}) as live:
        assert await act(live, "write", own) == "written"


def _its_own(tree: Path, copy: Path) -> Path:
    shutil.copytree(tree, copy)
    for path in (copy, *copy.rglob("*")):
        os.chown(path, UID, -1)
    copy.parent.chmod(0o755)
    return copy


async def test_it_writes_to_a_workspace_only_where_the_policy_says_so(lab: Lab, tmp_path: Path) -> None:
    folder = _workspace(tmp_path)
    path = f"{template.WORKSPACE}/a.md"
    async with lab.started(writer(readonly=True), folder=folder) as live:
        assert "Error" in await act(live, "write", path)
    async with lab.started(writer(readonly=False, isolation="run")) as live:  # its own, which ends with it
        assert await act(live, "write", path) == "written"
    assert list(folder.iterdir()) == []
    async with lab.started(writer(readonly=False), folder=folder) as live:  # the control
        assert await act(live, "write", path) == "written"
    assert (folder / "a.md").read_text() == "by the server"


def _workspace(parent: Path) -> Path:
    folder = parent / "docs"
    folder.mkdir()
    os.chown(folder, UID, -1)
    parent.chmod(0o755)
    return folder


def writer(**keys: Any) -> CommandServer:
    return CommandServer(template="command", server="writer", root="docs", **keys)


async def test_it_reaches_by_its_proxy_the_hosts_of_the_policy_and_by_no_way_anything_else(lab: Lab) -> None:
    assert lab.site is not None
    port = lab.site.site.port
    hosts = (f"{DOCS}:{port}",)
    async with lab.started(plain(allowed_hosts=hosts)) as live:
        assert await act(live, "get", f"https://{DOCS}:{port}/secret") == SECRET  # the control
        assert "403" in await act(live, "get", f"https://elsewhere.test:{port}/secret")
        assert "Error" in await act(live, "dial", "127.0.0.1", str(port))
    async with lab.started(plain()) as live:
        assert "Error" in await act(live, "get", f"https://{DOCS}:{port}/secret")
    assert lab.site.asked == [f"{DOCS}:{port}", f"elsewhere.test:{port}"]


async def test_node_goes_by_the_proxy_and_trusts_the_operators_authorities_too(lab: Lab) -> None:
    assert lab.site is not None
    port = lab.site.site.port
    declared = CommandServer(template="command", server="node", allowed_hosts=(f"{DOCS}:{port}",))
    async with lab.started(declared) as live:
        assert await act(live, "get", f"https://{DOCS}:{port}/secret") == SECRET
        assert SECRET not in await act(live, "get", f"https://elsewhere.test:{port}/secret")
    async with replace(lab, ca_file=None).started(declared) as live:  # the public ones did not sign this site
        assert SECRET not in await act(live, "get", f"https://{DOCS}:{port}/secret")


async def test_a_call_ends_with_the_entrys_time_and_of_its_tools_only_those_are_used_that_it_names(lab: Lab) -> None:
    async with lab.started(plain()) as live:
        assert [tool.name for tool in live.tools] == ["act", "other"]  # the control
        live.bounds = Bounds(frozenset({"act"}), call_s=0.000_001)
        assert [tool.name for tool in await live.listed_anew(max_age_s=0) or ()] == ["act"]
        with pytest.raises(ToolTimedOut):
            await live.call("act", {"words": ["arguments"]}, timeout_s=20)


def test_the_limits_of_the_entry_are_those_of_its_processes(lab: Lab) -> None:
    manifest = f"{PYTHON}[limits]\nmemory_mb = 100\nprocesses = 9\n"
    lab.install("small", manifest)
    limits = lab.profile(CommandServer(template="command", server="small")).limits
    assert (limits.memory_bytes, limits.processes) == (100 << 20, 9)
    assert limits.open_files == Limits().open_files


def test_what_comes_with_a_template_is_not_started_as_a_command(lab: Lab) -> None:
    found = lab.installs.find("plain")
    built_in = Environment(found.folder, found.target, found.argv)
    with pytest.raises(ServerUnavailable, match="template of its own"):
        template.profile(plain(), Place(UID, environment=built_in))
    assert template.profile(plain(), Place(UID, environment=found)).argv[-1] == "last"  # the control
