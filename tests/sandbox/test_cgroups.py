"""A server's processes together: each program gets what it wants without a group, and does not within one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from app.sandbox import cgroup_folders
from app.sandbox.cgroup_search import NoCgroups, find
from app.sandbox.cgroups import Cgroup, Cgroups, Usage
from app.sandbox.contract import Launch, Limits
from tests.sandbox.ground import ROOT, SERVICE_IS_ROOT, UID
from tests.sandbox.programs import BACKENDS, backend, profile, run

HERE = Path(__file__).parent
MIB = 1 << 20
Owner = subprocess.Popen[str]
LIMITS = Limits(memory_bytes=48 * MIB, processes=20)


@pytest.fixture(scope="module")
def cgroups() -> Iterator[Cgroups]:
    found = find()
    if isinstance(found, NoCgroups):
        pytest.skip(f"no cgroups here: {found.reason}")
    yield found
    assert found.close()


@pytest.fixture
def group(cgroups: Cgroups) -> Iterator[Cgroup]:
    with ending(cgroups.make("a", "docs", LIMITS)) as made:
        yield made


def start(program: str, group: Cgroup | None = None) -> subprocess.Popen[str]:
    folders = map(str, group.folders) if group else ()
    argv = (sys.executable, "-I", "-S", HERE / "greedy.py", program, *folders)
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def outcome(program: str, group: Cgroup | None = None) -> list[str]:
    with start(program, group) as process:
        said, _ = process.communicate(timeout=60)
    return said.split()


def usage(group: Cgroup) -> Usage:
    found = group.usage()
    assert found is not None
    return found


@contextlib.contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Kills it and its descendants in the end."""
    with process:
        try:
            yield process
        finally:
            for each in family(process) if process.poll() is None else ():
                each.kill()


@contextlib.contextmanager
def ending(group: Cgroup) -> Iterator[Cgroup]:
    try:
        yield group
    finally:
        assert group.end()


def ours(cgroups: Cgroups) -> list[Path]:
    return [folder for instance in cgroups.instances for folder in cgroup_folders.tree(instance)]


# --- limits for all processes of a server together


@pytest.mark.parametrize(
    "program", ["map_much_as_shared", "share_much_among_processes", "flood_a_small_tmpfs_with_empty_files"]
)
def test_the_group_alone_stops_by_its_memory(program: str, group: Cgroup) -> None:
    if "tmpfs" in program and not SERVICE_IS_ROOT:
        pytest.skip("mounts a file system")
    assert outcome(program) == ["succeeded"]
    assert outcome(program, group) == []
    assert usage(group).oom_kills >= 1


@pytest.mark.parametrize("program", ["fork_a_hundred", "start_a_hundred_threads"])
def test_the_group_alone_stops_by_its_number_of_processes(program: str, group: Cgroup) -> None:
    assert outcome(program) == ["succeeded"]
    assert outcome(program, group) == []


def test_the_group_alone_keeps_many_processes_to_their_share_of_the_processors(cgroups: Cgroups) -> None:
    with ending(cgroups.make("a", "docs", dataclasses.replace(LIMITS, cpus=0.1))) as group:
        bare, within = (float(outcome("burn_two_processors", where)[0]) for where in (None, group))
        assert within < 0.2 < bare  # of two: other work on this machine has its part
        assert usage(group).cpu_seconds == pytest.approx(within, abs=0.15)


def test_a_tenant_with_many_processes_takes_no_more_of_a_processor_than_one_with_one(cgroups: Cgroups) -> None:
    apart = share_of_second(cgroups, ("a", "b"))
    same_group = share_of_second(cgroups, None)
    assert same_group < 0.25
    assert 0.35 < apart < 0.65


def share_of_second(cgroups: Cgroups, tenants: tuple[str, str] | None) -> float:
    """Which part of one processor a program gets beside one with six processes."""
    limits = Limits(memory_bytes=64 * MIB, cpus=1)
    with contextlib.ExitStack() as stack:
        groups: list[Cgroup | None] = [None, None]
        if tenants:
            groups = [stack.enter_context(ending(cgroups.make(tenant, "docs", limits))) for tenant in tenants]
        many = stack.enter_context(running(start("burn_one_processor_with_six_processes", groups[0])))
        one = stack.enter_context(running(start("burn_one_processor", groups[1])))
        time.sleep(0.3)  # both have begun
        had_many, had_one = seconds_of(many), seconds_of(one)
        time.sleep(1)
        got_many, got_one = seconds_of(many) - had_many, seconds_of(one) - had_one
    return got_one / (got_many + got_one)


def seconds_of(process: subprocess.Popen[str]) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in family(process))


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


# --- what a server used


def test_usage_counts_all_processes_of_the_group(group: Cgroup) -> None:
    assert usage(group) == Usage(0, 0, 0.0, 0, 0)
    assert outcome("share_much_among_processes", group) == []
    after = usage(group)
    assert 32 * MIB < after.memory_peak_bytes <= LIMITS.memory_bytes
    assert after.memory_bytes < after.memory_peak_bytes
    assert 0 < after.cpu_seconds < 5
    with running(start("wait", group)) as waiting:
        assert waiting.stdout
        assert waiting.stdout.readline() == "waiting\n"
        assert usage(group).processes > after.processes  # those that nobody has reaped yet count


# --- the end


def test_end_kills_what_forks_faster_than_one_can_look_and_leaves_nothing(cgroups: Cgroups) -> None:
    group = cgroups.make("a", "docs", LIMITS)
    process = start("fork_for_ever", group)
    assert process.stdout
    assert process.stdout.readline() == "forking\n"
    assert process.wait(10) == 0
    assert usage(group).processes >= 1
    assert group.end()
    assert process.stdout.read() == ""  # the last to hold it open is dead
    process.stdout.close()
    assert not [folder for folder in group.folders if folder.exists()]
    assert group.usage() is None
    assert group.end()


def test_a_program_that_comes_too_late_is_not_let_in(cgroups: Cgroups) -> None:
    group = cgroups.make("a", "docs", LIMITS)
    assert group.end()
    with start("fork_a_hundred", group) as process:
        assert process.communicate(timeout=10)[0] == ""
    assert process.returncode == 1


def test_the_group_of_a_tenant_goes_with_its_last_server(cgroups: Cgroups) -> None:
    first, second = cgroups.make("a", "docs", LIMITS), cgroups.make("a", "docs", LIMITS)
    tenants = [folder.parent for folder in first.folders]
    assert tenants == [folder.parent for folder in second.folders]
    assert set(first.folders).isdisjoint(second.folders)
    assert first.end()
    assert all(tenant.exists() for tenant in tenants)
    assert second.end()
    assert not any(tenant.exists() for tenant in tenants)


def test_servers_of_one_tenant_come_and_go_in_many_threads_without_a_trace(cgroups: Cgroups) -> None:
    before = ours(cgroups)

    def come_and_go(number: int) -> bool:
        return all(cgroups.make("a", f"docs{number}", LIMITS).end() for _ in range(25))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(come_and_go, range(4)))
    assert ours(cgroups) == before


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/a", "a\n", "a\0", "-a", "a" * 101])
def test_no_name_leads_out_of_our_folder(name: str, cgroups: Cgroups) -> None:
    with pytest.raises(ValueError, match="not a name"):
        cgroups.make(name, "docs", LIMITS)
    with pytest.raises(ValueError, match="not a name"):
        cgroups.make("a", name, LIMITS)


def test_a_group_that_the_kernel_refuses_to_limit_is_not_left_unlimited(cgroups: Cgroups) -> None:
    before = ours(cgroups)
    with pytest.raises(OSError, match="Invalid argument"):
        cgroups.make("a", "docs", Limits(processes=1 << 40))
    assert ours(cgroups) == before


# --- other instances


@contextlib.contextmanager
def owner(program: str, *, memory: int = 1 << 30, uid: int = 0, within: Iterable[Path] = ()) -> Iterator[Owner]:
    join = 'for folder in $FOLDERS; do echo 0 > "$folder/cgroup.procs" || exit 9; done; exec "$@"'
    service = (sys.executable, HERE / "cgroup_owner.py", program, str(memory), str(uid))
    environment = {"PYTHONPATH": str(ROOT), "FOLDERS": " ".join(map(str, within))}
    argv = ("sh", "-c", join, "sh", *service)
    pipe = subprocess.PIPE
    with running(subprocess.Popen(argv, env=environment, stdout=pipe, stderr=pipe, text=True)) as process:
        yield process


def folders_of(process: Owner, cgroups: Cgroups) -> list[Path]:
    bases = cgroups.hierarchies.each()
    instances = [found for base in bases for found in base.glob(f"bulkhead-{process.pid}-*")]
    return [folder for instance in instances for folder in cgroup_folders.tree(instance)]


def line(process: Owner) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip()


def is_alive(pid: int) -> bool:
    """That nobody has reaped it yet makes it no more alive."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() not in {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
    return False


def are_alive(pids: set[int]) -> set[bool]:
    return {is_alive(pid) for pid in pids}


def have_died(pids: set[int]) -> bool:
    """Who has given all back and left its group may be on its last steps for a moment."""
    deadline = time.monotonic() + 2
    while are_alive(pids) != {False} and time.monotonic() < deadline:
        time.sleep(0.01)
    return are_alive(pids) == {False}


def test_what_a_dead_instance_left_is_ended_and_a_live_one_is_left_alone(cgroups: Cgroups) -> None:
    with owner("wait") as dead, owner("wait") as live:
        for process in (dead, live):
            assert (line(process), line(process)) == ("found", "waiting")
        left, kept = (cgroup_folders.processes(folders_of(process, cgroups)) for process in (dead, live))
        cgroups.sweep()
        assert are_alive(left | kept) == {True}
        dead.kill()
        dead.wait()
        assert are_alive(left) == {True}  # they outlive their service
        assert cgroups.sweep() >= 1
        assert have_died(left)
        assert folders_of(dead, cgroups) == []
        assert cgroup_folders.processes(folders_of(live, cgroups)) == kept
        assert are_alive(kept) == {True}
    cgroups.sweep()
    assert folders_of(live, cgroups) == []


# --- in a sandbox


def remove(launch: Launch) -> None:
    """What a launcher that was killed with all of its own could not; in the service its record does."""
    for folder in launch.leaves:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_process_of_a_sandbox_is_in_the_group_and_ends_with_it(name: str, group: Cgroup) -> None:
    code = "import os, time; [os.fork() for _ in range(2)]; print('up', flush=True); time.sleep(20)"
    launch = backend(name).launch(profile("-c", code, cgroup=group.folders))
    pipe = subprocess.PIPE
    with running(subprocess.Popen(launch.argv, env=launch.environment, stdout=pipe, text=True)) as process:
        assert [line(process) for _ in range(4)] == ["up"] * 4
        pids = {each.pid for each in family(process)}
        assert len(pids) >= 5  # what the launcher became, and four
        for folder in group.folders:
            assert cgroup_folders.processes([folder]) >= pids
        now = usage(group)
        assert now.processes >= len(pids)
        assert now.memory_bytes > MIB
        assert now.cpu_seconds > 0
        assert group.end()
        remove(launch)
        assert process.wait(10) != 0
        assert have_died(pids)
    assert not any(folder.parent.exists() for folder in group.folders)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_group_alone_stops_processes_that_each_keep_to_their_limit(name: str, group: Cgroup) -> None:
    code = (HERE / "greedy.py").read_text()
    asked = profile("-c", code, "share_much_among_processes", limits=LIMITS)
    assert run(backend(name).launch(asked)).stdout == "succeeded\n"
    launch = backend(name).launch(dataclasses.replace(asked, cgroup=group.folders))
    assert run(launch).stdout == ""
    remove(launch)
    assert usage(group).oom_kills >= 1


# --- within the service's own group


OUTER = {
    "memory.limit_in_bytes": str(64 * MIB),
    "memory.max": str(64 * MIB),
    "cpu.cfs_quota_us": "50000",  # half of one: less than what the server is allowed
    "cpu.max": "50000 100000",
}


@contextlib.contextmanager
def outer(cgroups: Cgroups, settings: Mapping[str, str]) -> Iterator[list[Path]]:
    """A group like that of a container, delegated to an ordinary user."""
    name = f"outer-{uuid4().hex}"
    folders = [base / name for base in cgroups.hierarchies.each()]
    try:
        for folder in folders:
            folder.mkdir()
            for path in filter(Path.exists, (folder, folder / "cgroup.procs", folder / "cgroup.subtree_control")):
                os.chown(path, UID, UID)
            for file in filter(Path.exists, (folder / setting for setting in settings)):
                cgroup_folders.write(file, settings[file.name])
        yield folders
    finally:
        assert cgroup_folders.end(path for folder in folders for path in cgroup_folders.tree(folder))


@pytest.mark.skipif(not SERVICE_IS_ROOT, reason="makes a group as root and hands it to another user")
@pytest.mark.parametrize("uid", [0, UID], ids=["as_root", "as_an_ordinary_user"])
def test_the_limits_of_the_services_own_group_hold_for_its_servers(uid: int, cgroups: Cgroups) -> None:
    program = "map_much_as_shared"
    with outer(cgroups, {}) as within, owner(program, uid=uid, within=within) as free:
        assert (line(free), line(free)) == ("found", "succeeded")
    with outer(cgroups, OUTER) as within, owner(program, uid=uid, within=within) as confined:
        assert line(confined) == "found"
        assert line(confined).startswith("ended")


# --- why not


def test_says_why_there_are_none(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    assert find(membership=membership) == NoCgroups("the kernel has no cgroups")
    membership.write_text("4:memory:/\n")
    assert find(membership=membership) == NoCgroups(
        "the kernel lacks a controller of memory, processes or processor time"
    )
    membership.write_text("0::/of-another\n")
    assert find(tmp_path, membership) == NoCgroups("the service's own cgroup cannot be seen")
    membership.write_text("0::/../../up\n")
    assert find(tmp_path, membership) == NoCgroups("the service's own cgroup cannot be seen")


def test_folders_that_only_look_like_cgroups_are_none(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/\n")
    (tmp_path / "cgroup.controllers").write_text("memory pids cpu")
    (tmp_path / "cgroup.subtree_control").touch()
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    found = find(tmp_path, membership)
    assert isinstance(found, NoCgroups)
    assert found.reason == "no cgroup can be made: No such file or directory"
    assert not list(tmp_path.glob("bulkhead-*"))


@pytest.mark.skipif(not SERVICE_IS_ROOT, reason="becomes another user")
def test_an_ordinary_user_hears_that_it_may_not(cgroups: Cgroups) -> None:
    with owner("wait", uid=UID) as process:
        assert process.wait(20) == 1
        assert process.stderr
        assert process.stderr.read() == "no cgroup can be made: Permission denied\n"
