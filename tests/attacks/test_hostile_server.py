"""A tenant's own tool server is hostile: what it tries in its sandbox fails, and without the sandbox succeeds."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from app.runs.redaction import Redactor
from app.tenants import beneath
from tests.attacks.hijacked import KEY, POLICY, Call, HijackedModel, Played
from tests.attacks.walls import hostile_server, no_sandbox
from tests.service import Service, Tenant

SECRET = f"nonce-{secrets.token_hex(16)}"
LOUD = f"forged-{secrets.token_hex(8)}"
MOST = 70_000  # characters that may come back of what a tool says


def tries(*attacks: str) -> list[Call]:
    return [Call("docs__read_file", json.dumps({"path": f"{attack}.txt"})) for attack in attacks]


@dataclass(frozen=True)
class Lair:
    """Tenants with a hostile server: in the sandbox, in it with a writable workspace, and without it."""

    boxed: Tenant
    writing: Tenant
    bare: Tenant
    outside: Path


@pytest.fixture(scope="module")
async def lair(attacked: Service, model: HijackedModel, tmp_path_factory: pytest.TempPathFactory) -> Lair:
    folder = tmp_path_factory.mktemp("lair")
    (folder / "secret.txt").write_text(SECRET)
    program = tmp_path_factory.mktemp("bare")

    async def tenant(policy: str, *, is_boxed: bool) -> Tenant:
        with ExitStack() as down:
            down.enter_context(hostile_server())
            if not is_boxed:
                down.enter_context(no_sandbox(program))
            made = await attacked.new_tenant(policy=policy, files={"target.txt": str(folder)})
            assert (await model.play(made, tries("own"))).heard == "own"
        return made

    writable = POLICY.replace("root: docs", "root: docs, readonly: false")
    return Lair(
        boxed=await tenant(POLICY, is_boxed=True),
        writing=await tenant(writable, is_boxed=True),
        bare=await tenant(POLICY, is_boxed=False),
        outside=folder,
    )


@contextmanager
def a_secret_in_the_environment() -> Iterator[None]:
    """A process of ours has a secret in its environment."""
    sleep = shutil.which("sleep")
    assert sleep is not None
    process = subprocess.Popen([sleep, "60"], env={"SECRET": SECRET})
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("attack", ["outside", "processes"])
async def test_reads_neither_a_file_nor_a_process_of_the_host(model: HijackedModel, lair: Lair, attack: str) -> None:
    with a_secret_in_the_environment():
        boxed, bare = [await model.play(tenant, tries(attack)) for tenant in (lair.boxed, lair.bare)]
    assert SECRET not in boxed.everything
    assert SECRET in bare.heard


async def test_is_given_nothing_of_our_environment(
    attacked: Service, model: HijackedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for is_boxed in (True, False):
        with ExitStack() as down:
            down.enter_context(hostile_server())
            if not is_boxed:
                down.enter_context(no_sandbox(tmp_path))
            tenant = await attacked.new_tenant(policy=POLICY)
            outcome = await model.play(tenant, tries("environment"))
        assert "PATH" in outcome.heard or "failed" not in outcome.heard
        assert (SECRET in outcome.heard) is not is_boxed


async def test_does_not_write_its_read_only_workspace(attacked: Service, model: HijackedModel, lair: Lair) -> None:
    def planted(tenant: Tenant) -> bool:
        return (attacked.data_dir / "workspaces" / tenant.id / "docs" / "planted.txt").exists()

    assert "failed" in (await model.play(lair.boxed, tries("write"))).heard
    assert not planted(lair.boxed)
    for control in (lair.bare, lair.writing):
        await model.play(control, tries("write"))
        assert planted(control)


async def test_reaches_no_port_of_the_host(attacked: Service, model: HijackedModel, lair: Lair) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SECRET.encode())
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for tenant in (lair.boxed, lair.bare):
            await tenant.admin.put_file("port.txt", str(port))
            outcome = await model.play(tenant, tries("network"))
            assert (SECRET in outcome.heard) is (tenant is lair.bare)


async def test_what_it_says_names_no_path_of_the_host(
    attacked: Service, model: HijackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(attacked.data_dir)
    with hostile_server():
        tenant = await attacked.new_tenant(policy=POLICY, files={"target.txt": f"{path} and {KEY}"})
        outcome = await model.play(tenant, tries("mounts"))
    assert path not in outcome.everything
    assert KEY not in outcome.everything
    monkeypatch.setattr(Redactor, "__call__", lambda _, text: text)
    control = await model.play(tenant, tries("mounts"))
    assert path in control.heard
    assert KEY in control.heard


def _naive_open(directory: int, parts: tuple[str, ...], flags: int) -> int:
    return os.open("/".join(parts) or ".", flags & ~os.O_NOFOLLOW, dir_fd=directory)


async def test_links_that_it_plants_lead_nobody_outside(
    model: HijackedModel, lair: Lair, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin, files = lair.writing.admin, "/v1/workspaces/docs/files"
    await admin.put_file("secret.txt", SECRET, workspace="docs-evil")
    assert (await model.play(lair.writing, tries("links"))).heard == "planted"
    for name in ("link.txt", "link/secret.txt", "up/secret.txt"):
        answers = [
            await admin.get(f"{files}/{name}"),
            await admin.put(f"{files}/{name}", content=b"overwritten"),
            await admin.delete(f"{files}/{name}"),
        ]
        assert SECRET not in "".join(answer.text for answer in answers)
        assert str(lair.outside) not in "".join(answer.text for answer in answers)
    assert (lair.outside / "secret.txt").read_text() == SECRET
    assert (await admin.get("/v1/workspaces/docs-evil/files/secret.txt")).text == SECRET
    listed = await admin.get(files)
    assert "link/secret.txt" not in listed.text
    await model.play(lair.writing, tries("links"))
    monkeypatch.setattr(beneath, "open_at", _naive_open)
    assert (await admin.get(f"{files}/link/secret.txt")).text == SECRET


async def test_a_flood_is_bounded_and_the_next_query_works(model: HijackedModel, lair: Lair) -> None:
    with hostile_server():
        outcome = await model.play(lair.boxed, tries("big"))
        assert len(outcome.heard) < MOST
        assert (await model.play(lair.boxed, tries("own"))).heard == "own"
    (finished,) = await outcome.events("tool.finished")
    (_,) = await outcome.events("run.finished")
    assert finished["data"]["tool"] == "docs__read_file"


ODD = ["others", "twice", "intrude", "content", "halves", "nul"]


@pytest.mark.parametrize("attack", ODD)
async def test_odd_messages_end_in_one_outcome_and_spoil_no_later_call(
    model: HijackedModel, lair: Lair, attack: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with hostile_server():
        outcome = await model.play(lair.boxed, tries(attack))
        later: list[Played] = [await model.play(lair.boxed, tries("own")) for _ in range(3)]
    assert [played.heard for played in later] == ["own"] * 3
    assert "passwd" not in outcome.everything
    (_,) = await outcome.events("tool.finished")
    (_,) = await outcome.events("run.finished")
    assert "forged" not in "".join(capfd.readouterr())
