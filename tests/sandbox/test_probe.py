"""The probe says yes only where the attacks fail and a program runs; otherwise why not, and what to do."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import pytest

from app.sandbox import bubblewrap, canary
from app.sandbox.contract import Launch, Profile, SandboxUnavailable
from app.sandbox.probe import Probe, probe
from tests.sandbox.ground import ROOT, UID, as_attacker

PROBE = """
import asyncio
from app.sandbox import bubblewrap
from app.sandbox.probe import probe
result = asyncio.run(probe(bubblewrap.packaged()))
print(result.ok, result.reason, result.remedy, sep="\\n")
"""
# What a container runtime's default profile does to a process that may not administrate.
NO_NAMESPACES = """
import errno, pyseccomp as s
rules = s.SyscallFilter(s.ALLOW)
rules.add_rule(s.ERRNO(errno.EPERM), "unshare")
rules.add_rule(s.ERRNO(errno.EPERM), "clone", s.Arg(0, s.MASKED_EQ, 0x10000000, 0x10000000))
rules.load()
"""


class Nothing:
    """Isolates nothing: the program starts on the host, with paths inside turned into paths of the host."""

    name: ClassVar[str] = "nothing"

    def launch(self, profile: Profile) -> Launch:
        sources = {mount.target: str(mount.source) for mount in profile.mounts}
        words = [sys.executable]
        for word in profile.argv[1:]:
            for target, source in sources.items():
                word = word.replace(target, source)  # noqa: PLW2901  # one path after the other
            words.append(word)
        return Launch(tuple(words), {})


class Missing:
    name: ClassVar[str] = "missing"

    def launch(self, profile: Profile) -> Launch:
        raise SandboxUnavailable("no sandbox", remedy="get one")


async def test_is_content_with_bubblewrap() -> None:
    assert await probe(bubblewrap.packaged(), host_uid=UID) == Probe(ok=True, backend="bubblewrap")


def test_is_content_when_the_service_is_an_ordinary_user(ordinary_python: Path) -> None:
    ran = subprocess.run(
        [ordinary_python, "-I", "-c", PROBE], capture_output=True, text=True, timeout=30, check=True, **as_attacker()
    )
    assert ran.stdout.split() == ["True"]


async def test_names_every_attempt_that_nothing_stopped() -> None:
    result = await probe(Nothing(), host_uid=UID)
    assert not result
    for attempt in canary.ATTEMPTS:
        assert attempt.__name__.replace("_", " ") in result.reason


async def test_a_sandbox_that_only_answers_is_not_enough() -> None:
    result = await probe(_Saying("import sys; sys.exit(0)"), host_uid=UID)
    assert not result
    assert "no program starts inside" in result.reason
    result = await probe(_Saying("print('[]')"), host_uid=UID)
    assert not result


@dataclasses.dataclass
class _Saying:
    code: str
    name: ClassVar[str] = "saying"

    def launch(self, profile: Profile) -> Launch:
        return Launch((sys.executable, "-c", self.code), {})


async def test_passes_on_the_remedy_of_a_missing_backend() -> None:
    result = await probe(Missing(), host_uid=UID)
    assert result == Probe(ok=False, backend="missing", reason="no sandbox", remedy="get one")


async def test_says_so_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    result = await probe(bubblewrap.packaged(), host_uid=UID)
    assert result.reason == "there is no folder for temporary files"
    assert "/tmp" in result.remedy  # noqa: S108  # what an operator is told


async def test_shows_no_path_of_the_host_when_nothing_starts(tmp_path: Path) -> None:
    broken = dataclasses.replace(bubblewrap.packaged(), binary=tmp_path / "absent")
    result = await probe(broken, host_uid=UID)
    assert not result
    assert str(tmp_path) not in result.reason


@pytest.mark.parametrize(
    ("setting", "forbids", "remedy"),
    [
        ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
        ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
        ),
    ],
)
async def test_names_the_kernel_setting_to_change(tmp_path: Path, setting: str, forbids: str, remedy: str) -> None:
    file = tmp_path / "sys" / setting
    file.parent.mkdir(parents=True)
    file.write_text(f"{forbids}\n")
    result = await probe(_Saying("import sys; sys.exit('no')"), host_uid=UID, proc=tmp_path)
    assert result.remedy == remedy


async def test_says_no_where_namespaces_are_refused() -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        NO_NAMESPACES + PROBE,
        env={"PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await child.communicate()
    ok, reason, remedy = output.decode().splitlines()
    assert ok == "False"
    assert "no program starts inside" in reason
    assert "seccomp profile" in remedy
