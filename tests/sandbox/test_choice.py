"""Which backend is used where, and what is said where there is none."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from app.sandbox import choice
from app.sandbox.contract import Profile, SandboxUnavailable
from app.sandbox.probe import Probe, probe
from tests.sandbox.ground import ROOT, SERVICE_IS_ROOT, UID, as_attacker
from tests.sandbox.programs import backend

# A restricted pod: an ordinary user without capabilities, no new privileges, and a filter that refuses what the
# default one of container runtimes refuses to such a user.
POD = """
import ctypes, errno, pyseccomp as s
rules = s.SyscallFilter(s.ALLOW)
for call in ("unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "keyctl", "bpf", "ptrace"):
    rules.add_rule(s.ERRNO(errno.EPERM), call)
rules.add_rule(s.ERRNO(errno.EPERM), "clone", s.Arg(0, s.MASKED_EQ, 0x10000000, 0x10000000))
rules.add_rule(s.ERRNO(errno.ENOSYS), "clone3")
"""
NO_LANDLOCK = """
for call in (444, 445, 446):
    rules.add_rule(s.ERRNO(errno.EPERM), call)
"""
CHOOSE = """
rules.load()
import asyncio, subprocess, sys
from app.sandbox import runtimes
from app.sandbox.choice import choose
from app.sandbox.contract import Profile
chosen = asyncio.run(choose(sys.argv[1]))
print(chosen.name, chosen.result.ok, chosen.result.reason, chosen.result.remedy, chosen.result.note, sep="|")
if chosen.result:
    python = runtimes.python()
    launch = chosen.launch(Profile((python.interpreter, "-c", "print('ran')"), 1, python.mounts, python.files))
    print(subprocess.run(launch.argv, env=launch.environment, capture_output=True, check=True, text=True).stdout)
"""


@pytest.fixture(scope="module")
def pod(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """An interpreter, and options to start it as an ordinary user."""
    if SERVICE_IS_ROOT:
        return str(request.getfixturevalue("ordinary_python")), as_attacker()
    return sys.executable, {"env": {"PYTHONPATH": str(ROOT)}}


def chosen_in(pod: tuple[str, dict[str, Any]], name: str, code: str) -> list[str]:
    python, options = pod
    isolated = ["-I"] if SERVICE_IS_ROOT else []
    ran = subprocess.run(
        [python, *isolated, "-c", code + CHOOSE, name],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        **options,
    )
    said = str(ran.stdout)
    return said.replace("\n", "|").strip("|").split("|")


def test_a_restricted_pod_gets_landlock_and_is_told_why(pod: tuple[str, dict[str, Any]]) -> None:
    name, ok, reason, remedy, note, output = chosen_in(pod, "auto", POD)
    assert (name, ok, reason, remedy, output) == ("landlock", "True", "", "", "ran")
    assert note.startswith("not bubblewrap: no program starts inside")


def test_a_restricted_pod_that_insists_on_bubblewrap_gets_none(pod: tuple[str, dict[str, Any]]) -> None:
    name, ok, reason, remedy, note = [*chosen_in(pod, "bubblewrap", POD), ""][:5]
    assert (name, ok, note) == ("bubblewrap", "False", "")
    assert "no program starts inside" in reason
    assert "seccomp profile" in remedy


def test_where_nothing_holds_every_reason_and_remedy_is_told(pod: tuple[str, dict[str, Any]]) -> None:
    name, ok, reason, remedy, *_ = chosen_in(pod, "auto", POD + NO_LANDLOCK)
    assert (name, ok) == ("none", "False")
    assert "bubblewrap: no program starts inside" in reason
    assert "landlock: Landlock is refused" in reason
    assert "for bubblewrap:" in remedy
    assert "for landlock:" in remedy


@pytest.mark.parametrize(("name", "expected"), [("auto", "bubblewrap"), ("bubblewrap",) * 2, ("landlock",) * 2])
async def test_honours_the_setting(name: choice.Name, expected: str) -> None:
    chosen = await choice.choose(name)
    assert (chosen.name, chosen.result.ok, chosen.result.note) == (expected, True, "")


def test_starts_nothing_where_the_probe_has_failed() -> None:
    asked = Profile(argv=("/opt/program",), host_uid=UID)
    held = choice.ProbedSandbox(backend("landlock"), Probe(ok=True, backend="landlock"))
    assert held.launch(asked).argv
    with pytest.raises(SandboxUnavailable):
        dataclasses.replace(held, result=Probe(ok=False, backend="landlock")).launch(asked)


@pytest.mark.parametrize(
    "version",
    [
        "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016\n",
        "Linux version 4.19.0-gvisor #1 SMP Sun Jan 10 15:06:54 PST 2016\n",
    ],
)
async def test_marks_gvisor_as_not_proven(version: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(version)
    result = await probe(backend("landlock"), host_uid=UID, proc=tmp_path)
    assert result.ok
    assert "gVisor" in result.note
    assert (await probe(backend("landlock"), host_uid=UID)).note == ""
