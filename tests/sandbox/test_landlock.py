"""What a program under Landlock is, where the backend refuses, and that each enforcement is the one that counts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from app.sandbox import landlock
from app.sandbox.contract import Launch, Limits, Mount, SandboxUnavailable
from tests.sandbox.ground import LIMITS, SERVICE_IS_ROOT, UID, Ground
from tests.sandbox.programs import (
    altered,
    attacked,
    attacking,
    no_filter,
    order_of,
    outcome,
    profile,
    run,
)

# Leaves more folders within each other than a path has room for, and one that may not be entered.
NESTED = """
import os
os.mkdir('closed', 0)
for _ in range(700):
    os.mkdir('nested')
    os.chdir('nested')
open('file', 'w').close()
"""


@pytest.fixture(scope="module")
def sandbox() -> landlock.Landlock:
    return landlock.built_in()


@contextmanager
def started(launch: Launch) -> Iterator[list[psutil.Process]]:
    """The launcher, the guard, the program and its children, while the program waits."""
    with subprocess.Popen(
        launch.argv, env=launch.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        launcher = psutil.Process(process.pid)
        yield [launcher, *launcher.children(recursive=True)]
        process.stdin.close()


def waiting(code: str = "") -> tuple[str, str]:
    return "-c", f"{code}\nprint('up', flush=True); input()"


def _status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_is_nobody_special_on_the_host(sandbox: landlock.Landlock) -> None:
    with started(sandbox.launch(profile(*waiting()))) as family:
        statuses = [_status(process.pid) for process in family]
        assert os.getsid(family[-1].pid) == family[-1].pid
    for status in statuses:
        assert set(status["Uid"].split()) == {str(UID)}
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        if SERVICE_IS_ROOT:
            assert (status["Groups"], set(status["Gid"].split())) == ("", {str(UID)})
    assert statuses[-1]["Seccomp"] == "2"


def test_hides_the_order_from_others_of_the_same_user(sandbox: landlock.Landlock) -> None:
    """To those who are no root, what is not dumpable belongs to root."""
    with started(sandbox.launch(profile(*waiting()))) as (launcher, guard, program):
        owners = [Path(f"/proc/{process.pid}/environ").stat().st_uid for process in (launcher, guard, program)]
    assert owners == [0, 0, UID]


def test_can_list_no_folder_of_the_host(sandbox: landlock.Landlock) -> None:
    code = """
import os, sys
for path in sys.argv[1].split("+"):
    try:
        print(path, os.listdir(path))
    except PermissionError:
        print("refused")
"""
    ran = run(sandbox.launch(profile("-c", code, "/proc+/+/etc+/dev/shm+/usr+/home+/tmp")))
    assert ran.stdout == "refused\n" * 7


def test_a_temporary_folder_is_its_own_and_goes_with_it(sandbox: landlock.Landlock) -> None:
    ran = run(sandbox.launch(profile("-c", f"import os; print(os.getcwd(), os.stat('.').st_mode & 0o777)\n{NESTED}")))
    folder, mode = ran.stdout.split()
    assert ran.stderr == ""
    assert int(mode) == 0o700
    assert Path(folder).name == "tmp"
    assert not Path(folder).parent.exists()


def test_nothing_stays_when_the_guard_is_killed(sandbox: landlock.Landlock) -> None:
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)\n"
    with started(sandbox.launch(profile(*waiting(code)))) as (launcher, guard, *programs):
        folder = Path(programs[0].cwd()).parent
        assert folder.name.startswith("bulkhead-")
        assert len(programs) == 2
        guard.kill()
        assert psutil.wait_procs([launcher, *programs], timeout=5)[1] == []
        assert not folder.exists()


# --- where it refuses


@pytest.mark.parametrize("abi", [3, 4, 5])
def test_refuses_to_serve_several_tenants_where_signals_are_not_scoped(abi: int) -> None:
    with pytest.raises(SandboxUnavailable, match="may signal those of another") as refused:
        landlock.built_in(abi=abi)
    assert "6.12" in refused.value.remedy
    assert landlock.built_in(abi=6).abi == 6


@pytest.mark.parametrize("abi", [3, 5])
def test_serves_one_tenant_there_and_the_signal_would_come_through(abi: int, ground: Ground) -> None:
    lesser = landlock.built_in(abi=abi, one_tenant=True)
    assert attacked(lesser, "signal_a_host_process", ground) == "succeeded"
    assert attacked(lesser, "read_a_file_of_the_host", ground).startswith("refused")
    assert attacked(lesser, "connect_to_a_host_port", ground).startswith("refused")


@pytest.mark.parametrize("abi", [1, 2])
def test_refuses_where_files_could_be_truncated(abi: int) -> None:
    with pytest.raises(SandboxUnavailable, match="truncated"):
        landlock.built_in(abi=abi, one_tenant=True)


@pytest.mark.parametrize("change", ["mount", "file"])
def test_refuses_to_show_anything_within_a_writable_folder(
    change: str, sandbox: landlock.Landlock, ground: Ground
) -> None:
    mounts = [Mount(Path(ground.bare["workspace"]), "/workspace", writable=True)]
    asked = profile("-c", "pass", mounts=tuple(mounts))
    if change == "mount":
        inner = Mount(Path(ground.bare["reference"]), "/workspace/reference")
        asked = dataclasses.replace(asked, mounts=(*asked.mounts, inner))
    else:
        asked = dataclasses.replace(asked, files={**asked.files, "/workspace/settings.ini": ""})
    with pytest.raises(SandboxUnavailable, match="writable folder"):
        sandbox.launch(asked)


def test_a_mount_within_another_covers_what_was_there(sandbox: landlock.Landlock, ground: Ground) -> None:
    """The outer folder holds two tenants; the one covered is not to be read by either name."""
    mounts = (Mount(ground.folder, "/all"), Mount(Path(ground.bare["reference"]), "/all/tenant-b"))
    code = (
        "import os, sys\nprint('manual.txt' in os.listdir(sys.argv[1]), 'notes.txt' in os.listdir(sys.argv[1]))\n"
        "for path in sys.argv[2:]: open(path).close()"
    )
    ran = run(
        sandbox.launch(profile("-c", code, "/all/tenant-b", "/all/tenant-a/own.txt", "/all/secret.txt", mounts=mounts))
    )
    assert (ran.stdout, ran.stderr) == ("True False\n", "")
    hidden = str(ground.folder / "tenant-b" / "notes.txt").encode().hex()
    ran = run(sandbox.launch(profile("-c", f"open(bytes.fromhex('{hidden}'))", mounts=mounts)))
    assert "PermissionError" in ran.stderr


# --- each enforcement counts: with it alone off, attacks that test_attacks shows refused succeed inside

SYSTEM_CALLS = (
    "change_the_mode_of_a_file_of_the_host",
    "change_the_mode_of_a_read_only_file",
    "change_the_times_of_a_file_of_the_host",
    "connect_to_a_unix_socket_in_my_workspace",
    "exchange_datagrams_with_the_host",
    "keep_something_in_the_kernels_keyring",
    "limit_a_host_process",
    "make_a_user_namespace",
    "open_a_netlink_socket",
    "open_a_userfaultfd",
    "read_the_memory_of_another_process",
    "run_a_program_that_is_in_no_file",
    "send_a_datagram_to_a_unix_socket_in_my_workspace",
    "set_up_an_io_uring",
    "share_system_v_memory",
    "slow_a_host_process",
    "trace_a_child",
    "turn_off_address_randomisation",
    "watch_another_tenants_folder",
)
LIMITED = {
    "burn_the_processor": "cpu_seconds",
    "fork_bomb": "processes",
    "memory_bomb": "data_bytes",
    "open_many_files": "open_files",
    "write_one_big_file": "file_bytes",
}
FILES = (
    "read_a_file_of_the_host",
    "read_shared_memory_of_the_host",
    "read_through_a_symlink",
    "run_a_shell",
    "see_a_host_process",
)
TWICE_REFUSED = ("connect_to_a_host_port", "connect_to_an_abstract_unix_socket")


@pytest.mark.parametrize("attack", SYSTEM_CALLS)
def test_the_filter_alone_stops(attack: str, sandbox: landlock.Landlock, ground: Ground) -> None:
    launch = sandbox.launch(attacking(attack, ground))
    assert outcome(altered(launch, system_calls=no_filter()), attack) == "succeeded"


@pytest.mark.parametrize(("attack", "limit"), LIMITED.items())
def test_the_limit_alone_stops(attack: str, limit: str, sandbox: landlock.Landlock, ground: Ground) -> None:
    wide = Limits(**LIMITS | {limit: 100 * LIMITS[limit]})
    assert attacked(sandbox, attack, ground, limits=wide) == "succeeded"


@pytest.mark.parametrize("attack", FILES)
def test_the_rules_alone_stop(attack: str, sandbox: landlock.Landlock, ground: Ground) -> None:
    """One rule for all of the host is as good as none."""
    asked = attacking(attack, ground)
    all_of_it = dataclasses.replace(asked, mounts=(*asked.mounts, Mount(Path("/"), "/host")))
    assert outcome(sandbox.launch(all_of_it), attack) == "succeeded"


@pytest.mark.parametrize(
    ("attack", "of"), [("truncate_a_file_of_the_host", "secret"), ("write_to_a_read_only_mount", "reference")]
)
def test_the_rules_alone_stop_writing(attack: str, of: str, sandbox: landlock.Landlock, ground: Ground) -> None:
    asked = attacking(attack, ground)
    writable = Mount(Path(ground.bare[of]), "/host", writable=True)
    launch = sandbox.launch(dataclasses.replace(asked, mounts=(*asked.mounts, writable)))
    assert outcome(launch, attack) == "succeeded"


def test_the_scope_alone_stops_a_signal(sandbox: landlock.Landlock, ground: Ground) -> None:
    attack = "signal_a_host_process"
    launch = sandbox.launch(attacking(attack, ground))
    assert outcome(_handling(launch, scopes=0), attack) == "succeeded"
    assert outcome(launch, attack).startswith("refused")


@pytest.mark.parametrize("attack", TWICE_REFUSED)
def test_filter_and_landlock_each_stop_a_connection(attack: str, sandbox: landlock.Landlock, ground: Ground) -> None:
    filtered = sandbox.launch(attacking(attack, ground))
    unfiltered = altered(filtered, system_calls=no_filter())
    assert outcome(unfiltered, attack).startswith("refused")
    assert outcome(_handling(filtered, tcp=0, scopes=0), attack).startswith("refused")
    assert outcome(_handling(unfiltered, tcp=0, scopes=0), attack) == "succeeded"


def _handling(launch: Launch, **changes: Any) -> Launch:
    rights = order_of(launch)["rights"]
    handled = dict(zip(("files", "tcp", "scopes"), rights["handled"], strict=True)) | changes
    return altered(launch, rights=rights | {"handled": list(handled.values())})
