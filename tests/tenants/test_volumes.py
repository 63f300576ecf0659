"""What a server may write is bounded by its tenant's volume; its life, and where there can be none."""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from app.embedded.machine import Machine
from app.errors import AppError, ConfigurationError, Invalid, NotFound
from app.sandbox import bubblewrap, runtimes
from app.sandbox.contract import Mount, Profile
from app.settings import Settings
from app.tenants import images
from app.tenants.folders import STAGING, USERS
from app.tenants.volumes import VolumeUnavailable, WritableRefused
from app.tenants.workspaces import WorkspaceFull, WorkspaceStore
from tests.service import POLICY, Databases, running_service
from tests.tenants.volumes import MIB, NOBODY, OTHER, SIZE, TENANT, Stores, get, loops, needs_root, put, until, volumes

# A server that writes


FILL = """
import sys
left = int(sys.argv[1])
try:
    for number in range(1000):
        with open(f"/workspace/{number}", "wb", buffering=0) as file:
            while left > 0:
                written = file.write(bytes(min(left, 65536, 4194304 - file.tell())))
                left -= written
                if not written or file.tell() >= 4194304:
                    break
        if left <= 0:
            break
except OSError as error:
    print(error.errno)
else:
    print("never full")
"""
FLOOD = """
import sys
try:
    for number in range(int(sys.argv[1])):
        open(f"/workspace/{number}", "w").close()
except OSError as error:
    print(error.errno)
else:
    print("never full")
"""
RUN = """
import os, sys
with open("/workspace/program", "w") as file:
    file.write(f"#!{sys.executable}\\nprint('ran')\\n")
os.chmod("/workspace/program", 0o700)
try:
    os.execv("/workspace/program", ["program"])
except OSError as error:
    print(error.errno)
"""
FULL, NOT_PERMITTED = "28", "13"


def _served(workspace: Path, program: str, *arguments: object) -> str:
    """What a program in the sandbox says that may write to the workspace."""
    python = runtimes.python()
    profile = Profile(
        argv=(python.interpreter, "-I", "-c", program, *map(str, arguments)),
        host_uid=workspace.stat().st_uid or NOBODY,
        mounts=(*python.mounts, Mount(workspace, "/workspace", writable=True)),
        files=python.files,
        environment=python.environment,
    )
    launch = bubblewrap.packaged().launch(profile)
    done = subprocess.run(launch.argv, env=launch.environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout, done.stderr
    return done.stdout.strip()


@needs_root
@pytest.mark.parametrize(
    ("attack", "offered"), [(FILL, 2 * SIZE.bytes), (FLOOD, 2 * SIZE.files)], ids=["bytes", "files"]
)
async def test_a_server_that_fills_the_disk_fills_its_tenants_volume_and_nothing_else(
    stores: Stores, data: Path, attack: str, offered: int
) -> None:
    store = stores()
    await put(store, "mine.txt", tenant_id=OTHER)
    await store.writable(OTHER, "docs")
    hers = await store.writable(TENANT, "docs", owner_uid=23_001)
    assert _served(hers, attack, offered) == FULL
    assert (data / "volumes" / f"{TENANT}.img").stat().st_blocks * 512 <= SIZE.bytes
    with pytest.raises(WorkspaceFull):
        await put(store, "upload.txt", b"x" * MIB)
    await put(store, "upload.txt", b"x" * MIB, tenant_id=OTHER)
    assert await get(store, "mine.txt", tenant_id=OTHER) == b"x"
    await store.delete(TENANT, "docs", path="0", recorded=nullcontext())
    await put(store, "upload.txt")
    # The control: where the operator vouches for a quota that is not there, the same server is not stopped.
    unbounded = await stores("volume").writable(uuid4(), "docs", owner_uid=23_001)
    assert _served(unbounded, attack, offered) == "never full"


@needs_root
async def test_a_server_runs_no_program_that_it_wrote(stores: Stores) -> None:
    workspace = await stores().writable(TENANT, "docs", owner_uid=23_001)
    assert _served(workspace, RUN) == NOT_PERMITTED
    flags = os.statvfs(workspace).f_flag
    assert flags & os.ST_NOSUID
    assert flags & os.ST_NODEV
    control = await stores("volume").writable(OTHER, "docs", owner_uid=23_001)
    assert _served(control, RUN) == "ran"


@needs_root
async def test_uploads_count_against_the_same_volume(stores: Stores) -> None:
    store = stores()
    await store.writable(TENANT, "docs")
    with pytest.raises(WorkspaceFull):
        await put(store, "big.bin", b"x" * 2 * SIZE.bytes)
    await put(store, "small.bin")
    plain = stores("volume")
    await put(plain, "big.bin", b"x" * 2 * SIZE.bytes, tenant_id=OTHER)


# Its life


@needs_root
async def test_many_who_need_it_at_once_make_it_once(stores: Stores, data: Path) -> None:
    await asyncio.gather(*(stores().writable(TENANT, f"w{number % 3}") for number in range(8)))
    assert len(images.mounts_below(data)) == len(loops(data)) == 1


def _with_a_copy_of_all_mounts() -> subprocess.Popen[bytes]:
    unshare = shutil.which("unshare")
    assert unshare is not None
    return subprocess.Popen([unshare, "-m", "sleep", "30"])


@needs_root
async def test_a_mount_that_another_namespace_still_holds_is_the_same_file_system(stores: Stores, data: Path) -> None:
    """A sandbox' launcher has a copy of all mounts: a second file system on the same image would destroy it."""
    store = stores()
    await store.writable(TENANT, "docs")
    await put(store, "a.txt", b"before")
    holding = _with_a_copy_of_all_mounts()
    try:
        await until(lambda: Path(f"/proc/{holding.pid}/ns/mnt").readlink() != Path("/proc/self/ns/mnt").readlink())
        await store.close()
        held = loops(data)
        assert len(held) == 1
        again = stores()
        assert await get(again, "a.txt") == b"before"
        assert loops(data) == held
    finally:
        holding.kill()
        holding.wait()
    await again.close()
    await until(lambda: loops(data) == set())


@needs_root
async def test_a_damaged_volume_is_refused_and_never_made_anew(stores: Stores, data: Path) -> None:
    store = stores()
    docs = await store.writable(TENANT, "docs")
    await put(store, "a.txt")
    await store.close()
    await until(lambda: loops(data) == set())  # a sandbox that starts elsewhere holds a copy of all mounts for a moment
    image = data / "volumes" / f"{TENANT}.img"
    with image.open("r+b") as file:
        file.write(b"\xff" * 64 * 1024)
    damaged = image.read_bytes()
    store = stores()
    for attempt in (store.writable(TENANT, "docs"), put(store, "b.txt"), get(store, "a.txt")):
        with pytest.raises(VolumeUnavailable) as refused:
            await attempt
        assert str(data) not in refused.value.detail
    assert image.read_bytes() == damaged
    assert list(docs.parent.iterdir()) == []
    await put(store, "b.txt", tenant_id=OTHER)


@needs_root
def test_a_reset_unmounts_before_it_deletes_and_deletes_nothing_that_is_in_use(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = data / "workspaces" / str(TENANT)
    volumes(data).ensure(TENANT)
    (data / "machine.env").touch()
    machine = Machine(Settings(_env_file=None, data_dir=data))
    monkeypatch.setattr(images, "_BUSY_SECONDS", 0.1)
    with (docs / "open.txt").open("w"), pytest.raises(ConfigurationError, match="in use"):
        machine.reset()
    assert (docs / "open.txt").exists()
    machine.reset()
    assert not data.exists()
    assert loops(data) == set()
    data.mkdir()


# Where there are none


_HOLDER = """
import os, sys, fcntl
from app.tenants import images
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
print("locked", flush=True)
images.run("sleep", "2", keep=(lock,) if sys.argv[2] == "keeps" else ())
"""


@pytest.mark.parametrize("locks", ["keeps", "loses"])
def test_what_a_killed_service_had_started_keeps_its_turn(data: Path, locks: str) -> None:
    """Else the next start would clear away what a copy still writes to."""
    command = [sys.executable, "-c", _HOLDER, str(data / "lock"), locks]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 10
        while not children.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)  # it has yet to become `sleep`
        process.kill()
        process.wait()
        with (data / "lock").open() as lock:
            taken = nullcontext() if locks == "loses" else pytest.raises(BlockingIOError)
            with taken:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_an_ordinary_user_is_told_what_is_missing(data: Path) -> None:
    with _as_ordinary_user():
        found = volumes(data, "auto").refusal()
    assert found is not None
    assert "root" in found.reason
    assert "BULKHEAD_WORKSPACE_QUOTA=volume" in found.remedy
    assert volumes(data, "volume").refusal() is None


@contextmanager
def _as_ordinary_user() -> Iterator[None]:
    uid = os.geteuid()
    os.seteuid(uid or NOBODY)
    try:
        yield
    finally:
        os.seteuid(uid)


_PROBE = """
import sys
from pathlib import Path
from app.tenants import images
refusal = images.probe(Path(sys.argv[1]))
print(refusal.reason if refusal else "holds")
"""


@needs_root
def test_root_without_the_right_to_mount_is_refused(data: Path) -> None:
    def probed(before: Callable[[], None] | None) -> str:
        command = [sys.executable, "-c", _PROBE, str(data / "volumes")]
        root = Path(__file__).parents[2]
        return subprocess.run(command, preexec_fn=before, capture_output=True, text=True, cwd=root, check=True).stdout

    assert "no file system" in probed(_drop_sys_admin)
    assert probed(None) == "holds\n"
    assert list((data / "volumes").iterdir()) == []


def _drop_sys_admin() -> None:
    pr_capbset_drop, cap_sys_admin = 24, 21
    assert ctypes.CDLL(None).prctl(pr_capbset_drop, cap_sys_admin, 0, 0, 0) == 0


@pytest.fixture
def no_volumes(data: Path) -> Path:
    """The probe fails for root, too: there is no folder for images."""
    (data / "volumes").touch()
    return data


async def test_where_no_quota_holds_no_workspace_is_writable(stores: Stores, no_volumes: Path) -> None:
    store = stores("auto")
    await put(store, "a.txt")
    for user_id in (None, uuid4()):
        with pytest.raises(WritableRefused) as refused:
            await store.writable(TENANT, "docs", user_id=user_id)
        assert str(no_volumes) not in refused.value.detail
    reason = await store.writable_refusal()
    assert reason
    assert reason in refused.value.detail
    assert await get(store, "a.txt") == b"x"
    assert await stores("volume").writable_refusal() is None
    assert (await stores("volume").writable(TENANT, "docs")).is_dir()


@pytest.mark.parametrize("isolation", ["tenant", "user"])
async def test_a_policy_with_a_server_that_writes_is_refused_at_publish_where_no_quota_holds(
    databases: Databases, no_volumes: Path, isolation: str
) -> None:
    writing = POLICY.replace("root: docs", f"root: docs, readonly: false, isolation: {isolation}")
    async with running_service(databases, no_volumes, workspace_quota="auto") as service:
        tenant = await service.new_tenant(files={"a.md": "text"})  # with a policy that only reads
        version = (await tenant.admin.make("/v1/policies", content=writing.encode()))["version"]
        refused = await tenant.admin.post(f"/v1/policies/{version}/publish", json={})
        assert (refused.status_code, refused.json()["code"]) == (409, "writable_refused")
        assert refused.json()["detail"].startswith("docs may not write")
        assert str(no_volumes) not in refused.text
        assert (await tenant.user.ask("What does a.md say?")).status_code == 200
        await tenant.admin.publish(writing.replace(f"isolation: {isolation}", "isolation: run"))


async def test_who_asks_for_images_by_name_gets_them_or_no_service(databases: Databases, no_volumes: Path) -> None:
    with pytest.raises(ConfigurationError, match="BULKHEAD_WORKSPACE_QUOTA=image"):
        async with running_service(databases, no_volumes, workspace_quota="image"):
            pass


@needs_root
async def test_a_server_that_reads_sees_the_files_after_their_move(databases: Databases, data: Path) -> None:
    reading = "What does a.md say?"
    async with running_service(databases, data) as service:
        tenant = await service.new_tenant(files={"a.md": "the first word"})
        assert "the first word" in (await tenant.user.ask(reading)).json()["answer"]
        store: WorkspaceStore = service.app.state.workspaces
        await store.writable(UUID(tenant.id), "notes")  # as for a version that is not published in the end
        assert "the first word" in (await tenant.user.ask(reading)).json()["answer"]
        await tenant.admin.put_file("a.md", "the second word")
        assert "the second word" in (await tenant.user.ask(reading)).json()["answer"]


@needs_root
async def test_a_service_unmounts_what_its_servers_wrote_to(databases: Databases, data: Path) -> None:
    writing = POLICY.replace("root: docs", "root: docs, readonly: false")
    async with running_service(databases, data, workspace_quota="image") as service:
        tenant = await service.new_tenant(policy=writing, files={"a.md": "text"})
        folder = data / "workspaces" / tenant.id
        assert images.is_mounted(folder)
        assert (await tenant.user.ask("What does a.md say?")).status_code == 200
    assert not images.is_mounted(folder)
    await until(lambda: not loops(data))


async def test_a_store_without_volumes_lets_nobody_write(tmp_path: Path) -> None:
    store = WorkspaceStore(tmp_path, max_workspaces=1, max_file_bytes=1, max_total_bytes=1, max_files=1)
    with pytest.raises(WritableRefused):
        await store.writable(TENANT, "docs")
    assert await store.writable_refusal()


# A user's own


async def test_a_users_workspace_is_reached_by_no_name_and_no_other_user(stores: Stores) -> None:
    store = stores("volume")
    ann, bob = uuid4(), uuid4()
    shared = await store.create(TENANT, "docs")
    hers = await store.writable(TENANT, "docs", user_id=ann)
    his = await store.writable(TENANT, "docs", user_id=bob)
    assert len({shared, hers, his}) == 3
    (hers / "a.txt").write_text("hers")
    with pytest.raises(NotFound):
        await get(store, "a.txt")
    for name in (USERS, f"{USERS}/{ann}/docs", STAGING):
        with pytest.raises(Invalid):
            await store.list_files(TENANT, name, limit=10)
    for name in ("w1", "w2"):  # and it takes no place of the tenant's
        await store.create(TENANT, name)
    with pytest.raises(AppError):
        await store.create(TENANT, "w3")
    for folder in (hers.parent, hers.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o711
    assert stat.S_IMODE(hers.stat().st_mode) == 0o700
    assert not list(his.iterdir())


@needs_root
async def test_a_users_workspace_lies_in_the_tenants_volume_and_is_the_servers(stores: Stores) -> None:
    workspace = await stores().writable(TENANT, "docs", user_id=uuid4(), owner_uid=23_001)
    assert workspace.stat().st_uid == 23_001
    assert _served(workspace, FILL, 2 * SIZE.bytes) == FULL


def test_mount_points_with_spaces_are_found(data: Path) -> None:
    if os.geteuid() != 0:
        assert images.mounts_below(data) == []
        return
    place, image = data / "a b\\c", data / "image"
    place.mkdir()
    images.make(image, SIZE)
    images.mount(image, place)
    assert images.mounts_below(data) == [place]
    images.unmount_below(data)
    assert images.mounts_below(data) == []
