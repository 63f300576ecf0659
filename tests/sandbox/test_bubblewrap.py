"""What a program in bubblewrap is and sees, and that each enforcement is the one that counts."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from app.sandbox import bubblewrap
from app.sandbox.contract import Limits, Mount, Scratch
from tests.sandbox.ground import LIMITS, SERVICE_IS_ROOT, UID, Ground
from tests.sandbox.programs import altered, attacked, attacking, family, no_filter, order_of, outcome, profile, run


@pytest.fixture(scope="session")
def sandbox() -> bubblewrap.Bubblewrap:
    return bubblewrap.packaged()


def test_is_nobody_special_on_the_host(sandbox: bubblewrap.Bubblewrap) -> None:
    launch = sandbox.launch(profile("-c", "print('up', flush=True); input()"))
    with subprocess.Popen(
        launch.argv, env=launch.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        _, *programs = family(process.pid)
        seen = [(_status(program.pid), _namespaces(program.pid)) for program in programs]
        supervisor = _status(process.pid)
        process.stdin.close()
    assert len(seen) == 2
    ours = _namespaces(os.getpid())
    for status, namespaces in seen:
        assert set(status["Uid"].split()) == {str(UID)}
        assert set(status["Gid"].split()) == {str(UID if SERVICE_IS_ROOT else os.getegid())}
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert not set(ours.items()) & set(namespaces.items())
    # What stays outside to wait for it is not root either.
    assert set(supervisor["Uid"].split()) == {str(UID)}
    if SERVICE_IS_ROOT:
        assert {status["Groups"] for status in (supervisor, *(status for status, _ in seen))} == {""}


def _status(pid: int) -> Mapping[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _namespaces(pid: int) -> Mapping[str, str]:
    return {
        name: str(Path(f"/proc/{pid}/ns/{name}").readlink())
        for name in ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
    }


def test_finds_nothing_of_the_services_environment_in_any_process(
    sandbox: bubblewrap.Bubblewrap, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-service")
    code = "import os, pathlib; print(dict(os.environ)); "
    code += "print([each.read_bytes() for each in pathlib.Path('/proc').glob('[0-9]*/environ')])"
    asked = dataclasses.replace(profile("-c", code), environment={"DSN": "of-the-tenant"})
    launch = sandbox.launch(asked)
    ran = subprocess.run(
        launch.argv, env=os.environ | launch.environment, capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.stdout.splitlines()[0] == "{'DSN': 'of-the-tenant', 'PWD': '/tmp'}"
    assert "of-the-service" not in ran.stdout
    assert "BULKHEAD_SANDBOX" not in ran.stdout


def test_root_holds_nothing_that_was_not_asked_for(sandbox: bubblewrap.Bubblewrap) -> None:
    code = "import os; print(*sorted(os.listdir('/')), *sorted(os.listdir('/etc')), *sorted(os.listdir('/usr')))"
    ran = run(sandbox.launch(profile("-c", code)))
    etc = {"group", "hosts", "nsswitch.conf", "passwd"}
    assert set(ran.stdout.split()) <= {"dev", "etc", "lib", "lib64", "opt", "proc", "tmp", "usr", "share"} | etc


def test_a_nul_would_smuggle_an_option_in_if_the_profile_let_it(sandbox: bubblewrap.Bubblewrap) -> None:
    look = profile("-c", "import os; print(os.path.exists('/host/proc'))")
    injected = "x\0--ro-bind\0/\0/host"
    with pytest.raises(ValueError, match="NUL"):
        dataclasses.replace(look, environment={"A": injected})
    launch = sandbox.launch(look)
    compartment = [*order_of(launch)["compartment"], "--setenv", "A", injected]
    assert run(altered(launch, compartment=compartment)).stdout == "True\n"


# --- each enforcement counts: with it alone off, attacks that test_attacks shows refused succeed inside

SYSTEM_CALLS = (
    "connect_to_a_unix_socket_in_my_workspace",
    "keep_something_in_the_kernels_keyring",
    "open_a_netlink_socket",
    "open_a_userfaultfd",
    "plant_a_fifo_for_the_host_to_hang_on",
    "read_the_memory_of_another_process",
    "run_a_program_that_is_in_no_file",
    "send_a_datagram_to_a_unix_socket_in_my_workspace",
    "set_up_an_io_uring",
    "share_system_v_memory",
    "trace_a_child",
    "turn_off_address_randomisation",
)
# Does what no limit of a process counts: the zeros of that device are shared, like any file that is mapped so.
SHARE_ZEROS = """
import mmap, os
with mmap.mmap(os.open("/dev/zero", os.O_RDWR), 192 << 20, flags=mmap.MAP_SHARED) as memory:
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1
print("succeeded")
"""
LIMITED = {
    "burn_the_processor": "cpu_seconds",
    "fill_shared_memory": "tmp_bytes",
    "fill_tmp": "tmp_bytes",
    "flood_tmp_with_empty_files": "tmp_files",
    "fork_bomb": "processes",
    "memory_bomb": "data_bytes",
    "open_many_files": "open_files",
    "write_one_big_file": "file_bytes",
}


@pytest.mark.parametrize("attack", SYSTEM_CALLS)
def test_the_filter_alone_stops(attack: str, sandbox: bubblewrap.Bubblewrap, ground: Ground) -> None:
    launch = sandbox.launch(attacking(attack, ground))
    assert outcome(altered(launch, system_calls=no_filter()), attack) == "succeeded"


@pytest.mark.parametrize(("attack", "limit"), LIMITED.items())
def test_the_limit_alone_stops(attack: str, limit: str, sandbox: bubblewrap.Bubblewrap, ground: Ground) -> None:
    wide = Limits(**LIMITS | {limit: 100 * LIMITS[limit]})
    assert attacked(sandbox, attack, ground, limits=wide) == "succeeded"


def test_the_read_only_mount_alone_stops_a_write(sandbox: bubblewrap.Bubblewrap, ground: Ground) -> None:
    attack = "write_to_a_read_only_mount"
    writable = Mount(Path(ground.bare["reference"]), "/reference", writable=True)
    mounts = (*attacking(attack, ground).mounts, writable)
    assert attacked(sandbox, attack, ground, mounts=mounts) == "succeeded"
    assert "Read-only" in attacked(sandbox, attack, ground)


def test_the_missing_device_alone_stops_memory_that_nothing_counts(sandbox: bubblewrap.Bubblewrap) -> None:
    launch = sandbox.launch(profile("-c", SHARE_ZEROS, limits=Limits(**LIMITS)))
    assert "FileNotFoundError" in run(launch).stderr
    compartment = [*order_of(launch)["compartment"], "--dev-bind", "/dev/zero", "/dev/zero"]
    assert run(altered(launch, compartment=compartment)).stdout == "succeeded\n"


def test_the_network_namespace_alone_keeps_it_from_the_hosts_ports(
    sandbox: bubblewrap.Bubblewrap, ground: Ground
) -> None:
    attack = "connect_to_a_host_port"
    unfiltered = altered(sandbox.launch(attacking(attack, ground)), system_calls=no_filter())
    assert outcome(unfiltered, attack).startswith("refused")
    *python, _, folder, module = unfiltered.argv
    code = "import sys; sys.path.append(sys.argv[1]); import launcher; launcher._CLONE_NEWNET = 0; launcher.start()"
    in_the_hosts = dataclasses.replace(unfiltered, argv=(*python, code, folder, module))
    assert outcome(in_the_hosts, attack) == "succeeded"


# --- folders of its own

FILL = """
import os, sys
folder = sys.argv[1]
print(oct(os.stat(folder).st_mode & 0o777), os.stat(folder).st_uid, os.listdir(folder))
for file in range(64):
    try:
        os.close(os.open(f"{folder}/{file}", os.O_CREAT | os.O_WRONLY))
    except OSError as error:
        print(file, error.strerror)
        break
os.truncate(f"{folder}/0", 0)
try:
    with open(f"{folder}/0", "wb", buffering=0) as big:
        print(sum(big.write(bytes(4096)) for _ in range(512)))
except OSError as error:
    print(os.stat(f"{folder}/0").st_size, error.strerror)
"""


def test_a_scratch_is_empty_ones_own_and_bounded_in_bytes_and_files(
    sandbox: bubblewrap.Bubblewrap, folder: Path
) -> None:
    within = folder / "around"
    (within / "cache").mkdir(parents=True)
    within.chmod(0o755)
    mounts = (Mount(within, "/around"),)
    for target in ("/scratch", "/around/cache"):
        room = (Scratch(target, bytes=1 << 20, files=16),)
        ran = run(sandbox.launch(profile("-c", FILL, target, mounts=mounts, scratch=room)))
        assert ran.stdout.splitlines() == [
            "0o700 1000 []",
            "15 No space left on device",
            "1048576 No space left on device",
        ]
    assert list((within / "cache").iterdir()) == []


def test_joins_its_control_groups_before_anything_else(sandbox: bubblewrap.Bubblewrap, tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").touch()
    asked = profile("-c", "print('ran')", cgroup=(tmp_path,))
    assert run(sandbox.launch(asked)).stdout == "ran\n"
    assert (tmp_path / "cgroup.procs").read_text() == "0"
    absent = dataclasses.replace(asked, cgroup=(tmp_path, tmp_path / "absent"))
    ran = run(sandbox.launch(absent))
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", "sandbox: No such file or directory\n")
