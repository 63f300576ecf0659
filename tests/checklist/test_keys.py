"""Secrets in a checkout: as they stand there, as they are about to be committed, and what only looks like one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from pydantic import SecretStr

from app.auth import keys
from app.checklist.findings import Verdict
from app.checklist.ground import Ground
from app.checklist.keys import ITEMS, values
from app.keyring import new_entry
from app.settings import Settings

CHECK = {item.id: item.check for item in ITEMS}
ROOT_KEY = new_entry("k1")
WORD = "a-password-of-the-owner"
Git = Callable[..., None]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    subprocess.run([shutil.which("git") or "", "-C", str(tmp_path), "init", "-q"], check=True)
    return tmp_path


@pytest.fixture
def git(checkout: Path) -> Git:
    def run(*words: str) -> None:
        subprocess.run([shutil.which("git") or "", "-C", str(checkout), *words], check=True)

    return run


async def found(item: str, checkout: Path) -> Verdict:
    settings = Settings(
        _env_file=None,
        data_dir=checkout / "data",
        root_keys=SecretStr(ROOT_KEY),
        database_owner_url=SecretStr(f"postgresql+asyncpg://owner:{WORD}@db.example/bulkhead"),
        database_app_url=SecretStr("postgresql+asyncpg://app:0123456789@db.example/bulkhead"),
        database_platform_url=SecretStr("postgresql+asyncpg://platform:0123456789@db.example/bulkhead"),
        database_sealer_url=SecretStr("postgresql+asyncpg://sealer:0123456789@db.example/bulkhead"),
    )
    ground = SimpleNamespace(settings=settings, checkout=checkout, env_file=checkout / ".env")
    return await CHECK[item](cast("Ground", ground))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (ROOT_KEY.partition(":")[2], "a configured secret stands in notes.md"),
        (f"the password is {WORD}.", "a configured secret stands in notes.md"),
        (keys.mint().text, "what looks like a key stands in notes.md"),
        ("-----BEGIN EC " + "PRIVATE KEY-----", "what looks like a key stands in notes.md"),
        ("AKIA" + "IOSFODNN7ABCDEFG", "what looks like a key stands in notes.md"),
        ("OPENAI_API_KEY=sk-proj-" + "a1" * 24, "what looks like a key stands in notes.md"),
        (f"bh_{'a' * 12}_{'b' * 46}", ""),
        ("set BULKHEAD_ROOT_KEYS, which is no secret; postgresql+asyncpg://owner@db.example/bulkhead", ""),
    ],
    ids=range(8),  # some of the texts are new in each process
)
async def test_a_secret_or_a_key_in_a_file_is_found_and_what_is_none_is_not(
    checkout: Path, git: Git, text: str, why: str
) -> None:
    (checkout / "notes.md").write_text(f"first line\n{text}\n")
    assert (await found("keys-not-in-git", checkout)).status == "pass", "it is not under version control yet"
    git("add", "notes.md")
    verdict = await found("keys-not-in-git", checkout)
    assert (verdict.status, verdict.detail if why else "") == ("fail" if why else "pass", why)
    if not why.startswith("a configured"):
        return
    (checkout / "notes.md").write_text("it is gone from here, and not from what will be committed\n")
    assert (await found("keys-not-in-git", checkout)).detail == why


async def test_an_env_file_is_private_and_ignored_or_said(checkout: Path, git: Git) -> None:
    assert (await found("env-file", checkout)).status == "pass"
    file = checkout / ".env"
    file.write_text("A=b\n")
    file.chmod(0o600)
    assert "is not ignored" in (await found("env-file", checkout)).detail
    (checkout / ".gitignore").write_text(".env\n")
    assert (await found("env-file", checkout)).status == "pass"
    git("add", "--force", ".env")
    assert "is under version control" in (await found("env-file", checkout)).detail


def test_every_kind_of_secret_is_known_without_what_stands_around_it() -> None:
    settings = Settings(
        _env_file=None,
        root_keys=SecretStr(f"{ROOT_KEY}, {new_entry('k2')}"),
        metrics_token=SecretStr("token"),
        limits_url=SecretStr("async+valkey://user:word@host:1/0"),
        otlp_headers=SecretStr("authorization=Bearer abc,x=y"),
    )
    found_values = list(values(settings))
    assert {ROOT_KEY.partition(":")[2], "token", "word", "Bearer abc", "y"} < set(found_values)
    assert len([value for value in found_values if len(value) == 43]) == 2


async def test_a_program_that_the_checkout_names_is_not_started(checkout: Path, git: Git) -> None:
    """What git asks for changes is a program that `core.fsmonitor` names; the control is git by itself."""
    (checkout / ".env").write_text("A=b\n")
    (checkout / ".env").chmod(0o600)
    (checkout / ".gitignore").write_text(".env\n")
    git("add", ".gitignore")
    mark, program = checkout / "started", checkout / "program"
    program.write_text(f"#!/bin/sh\ntouch {mark}\n")
    program.chmod(0o755)
    git("config", "core.fsmonitor", str(program))
    git("ls-files")
    assert mark.exists()
    mark.unlink()
    for item in ("env-file", "keys-not-in-git"):
        assert (await found(item, checkout)).status == "pass"
    assert not mark.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a checkout of somebody else's")
async def test_an_env_file_in_anothers_checkout_is_not_called_safe(checkout: Path, git: Git) -> None:
    (checkout / ".env").write_text("A=b\n")
    (checkout / ".env").chmod(0o600)
    git("add", ".env")
    assert (await found("env-file", checkout)).status == "fail", "the control: it is ours, and git is asked"
    os.chown(checkout, 65534, 65534)
    os.chown(checkout / ".git", 65534, 65534)
    verdict = await found("env-file", checkout)
    assert (verdict.status, "git does not say" in verdict.detail) == ("warn", True)
