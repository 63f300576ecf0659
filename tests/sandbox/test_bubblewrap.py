"""What a program inside is, what reaches it, how it ends, and that each enforcement is the one that counts."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pyseccomp
import pytest
from mcp import ClientSession, StdioServerParameters, stdio_client
from mcp.types import TextContent

from app.sandbox import bubblewrap, runtimes
from app.sandbox.contract import Launch, Limits, Mount, Profile
from tests.sandbox.ground import HERE, LIMITS, ROOT, SERVICE_IS_ROOT, UID, Ground

PIPES: Mapping[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
# Leaves a daemon in a session of its own behind, twice removed, and does not end itself.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    os.fork()
time.sleep(60)
"""


@pytest.fixture(scope="session")
def sandbox() -> bubblewrap.Bubblewrap:
    return bubblewrap.packaged()


def profile(*arguments: str, mounts: tuple[Mount, ...] = (), limits: Limits | None = None) -> Profile:
    python = runtimes.python()
    return Profile(
        argv=(python.interpreter, "-I", *arguments),
        host_uid=UID,
        mounts=(*python.mounts, *mounts),
        files=python.files,
        environment=python.environment,
        limits=limits or Limits(),
    )


def run(launch: Launch) -> subprocess.CompletedProcess[str]:
    return subprocess.run(launch.argv, env=launch.environment, capture_output=True, text=True, timeout=30, check=False)


def test_is_nobody_special_on_the_host(sandbox: bubblewrap.Bubblewrap) -> None:
    launch = sandbox.launch(profile("-c", "print('up', flush=True); input()"))
    with subprocess.Popen(
        launch.argv, env=launch.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        programs = psutil.Process(process.pid).children(recursive=True)
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


def test_has_the_profiles_environment_and_nothing_else(
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


def test_shows_no_secret_of_a_profile_to_other_users_of_the_host(sandbox: bubblewrap.Bubblewrap) -> None:
    nonce = uuid4().hex
    asked = dataclasses.replace(profile("-c", "print('up', flush=True); input()"), environment={"DSN": nonce})
    launch = sandbox.launch(asked)
    assert nonce not in repr(launch)
    assert nonce not in repr(asked)
    with subprocess.Popen(
        launch.argv, env=launch.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        told = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in family)
        process.stdin.close()
    assert b"input()" in told
    assert nonce.encode() not in told


def test_inherits_three_file_descriptors(sandbox: bubblewrap.Bubblewrap) -> None:
    ran = run(sandbox.launch(profile("-c", "import os; print(sorted(os.listdir('/proc/self/fd')))")))
    assert ran.stdout == "['0', '1', '2', '3']\n"  # the last is the listing itself


def test_root_holds_nothing_that_was_not_asked_for(sandbox: bubblewrap.Bubblewrap) -> None:
    code = "import os; print(*sorted(os.listdir('/')), *sorted(os.listdir('/etc')), *sorted(os.listdir('/usr')))"
    ran = run(sandbox.launch(profile("-c", code)))
    etc = {"group", "hosts", "nsswitch.conf", "passwd"}
    assert set(ran.stdout.split()) <= {"dev", "etc", "lib", "lib64", "opt", "proc", "tmp", "usr", "share"} | etc


async def test_runs_a_tool_server_that_writes_to_its_workspace(sandbox: bubblewrap.Bubblewrap, ground: Ground) -> None:
    workspace = Path(ground.bare["workspace"])
    mounts = (Mount(HERE / "tool_server.py", "/srv/server.py"), Mount(workspace, "/workspace", writable=True))
    launch = sandbox.launch(profile("/srv/server.py", mounts=mounts))
    parameters = StdioServerParameters(command=launch.argv[0], args=list(launch.argv[1:]), env=launch.environment)
    async with stdio_client(parameters) as streams, ClientSession(*streams) as session:
        await session.initialize()
        assert [tool.name for tool in (await session.list_tools()).tools] == ["note"]
        result = await session.call_tool("note", {"text": "written inside"})
    assert isinstance(result.content[0], TextContent)
    assert result.content[0].text == "written inside"
    note = workspace / "note.txt"
    assert note.read_text() == "written inside"
    assert note.stat().st_uid == UID


def test_hands_on_how_the_program_ended(sandbox: bubblewrap.Bubblewrap) -> None:
    assert run(sandbox.launch(profile("-c", "raise SystemExit(7)"))).returncode == 7


def test_does_not_start_without_a_source(sandbox: bubblewrap.Bubblewrap, folder: Path) -> None:
    asked = profile("-c", "print('ran')", mounts=(Mount(folder / "absent", "/absent"),))
    ran = run(sandbox.launch(asked))
    assert ran.returncode != 0
    assert ran.stdout == ""


def test_does_not_start_without_its_limits(sandbox: bubblewrap.Bubblewrap) -> None:
    launch = sandbox.launch(profile("-c", "print('ran')"))
    ran = run(_altered(launch, limits={"RLIMIT_UNHEARD_OF": 1}))
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert run(_altered(launch, limits={})).stdout == "ran\n"


def test_does_not_start_under_another_parent(sandbox: bubblewrap.Bubblewrap) -> None:
    launch = sandbox.launch(profile("-c", "print('ran')"))
    ran = run(_altered(launch, parent=1))
    assert (ran.returncode, ran.stdout) == (1, "")


def _altered(launch: Launch, **changes: object) -> Launch:
    order = json.loads(launch.environment["BULKHEAD_SANDBOX"]) | changes
    return Launch(launch.argv, {"BULKHEAD_SANDBOX": json.dumps(order)})


def test_a_nul_would_smuggle_an_option_in_if_the_profile_let_it(sandbox: bubblewrap.Bubblewrap) -> None:
    look = profile("-c", "import os; print(os.path.exists('/host/proc'))")
    injected = "x\0--ro-bind\0/\0/host"
    with pytest.raises(ValueError, match="NUL"):
        dataclasses.replace(look, environment={"A": injected})
    launch = sandbox.launch(look)
    compartment = [*json.loads(launch.environment["BULKHEAD_SANDBOX"])["compartment"], "--setenv", "A", injected]
    assert run(_altered(launch, compartment=compartment)).stdout == "True\n"


# --- the end


def test_nothing_survives_when_the_service_is_killed() -> None:
    nonce = uuid4().hex
    service = _service(DAEMON, nonce)
    _until(lambda: len(_processes_of(nonce)) >= 6, "the program and its daemons are up")
    service.kill()
    service.wait()
    _until_none_of(nonce)


def test_a_daemon_without_a_sandbox_survives_its_service() -> None:
    """The control of the test above: nothing else ends such a daemon."""
    nonce = uuid4().hex
    code = (
        f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {DAEMON!r}, {nonce!r}]); time.sleep(60)"
    )
    service = subprocess.Popen([sys.executable, "-c", code, nonce], start_new_session=True)
    _until(lambda: len(_processes_of(nonce)) == 4, "the service, the program and its daemons are up")
    service.kill()
    service.wait()
    left = _processes_of(nonce)
    for process in left:
        process.kill()
    assert len(left) == 3


def test_nothing_survives_a_kill_at_any_moment_of_the_start() -> None:
    moments = random.Random(20)  # noqa: S311  # a seed makes the moments the same every time
    for _ in range(12):
        nonce = uuid4().hex
        service = _service(DAEMON, nonce)
        time.sleep(moments.uniform(0, 0.06))
        service.kill()
        service.wait()
        _until_none_of(nonce)


def test_ends_with_all_its_children_when_asked_to(sandbox: bubblewrap.Bubblewrap) -> None:
    nonce = uuid4().hex
    launch = sandbox.launch(profile("-c", DAEMON, nonce))
    process = subprocess.Popen(launch.argv, env=launch.environment)
    _until(lambda: len(_processes_of(nonce)) >= 5, "the program and its daemons are up")
    process.send_signal(signal.SIGTERM)
    process.wait(5)
    _until_none_of(nonce)


def _service(code: str, nonce: str) -> subprocess.Popen[bytes]:
    """A service of its own process, at the moment just before it starts the sandbox."""
    service = subprocess.Popen(
        [sys.executable, HERE / "short_lived.py", str(UID), code, nonce],
        env={"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    with service.stdout or tempfile.TemporaryFile() as output:
        assert output.readline() == b"ready\n"
    return service


def _processes_of(nonce: str) -> list[psutil.Process]:
    """By their arguments, or the launcher's environment; not the dead that nobody has waited for."""
    return [process for process in psutil.process_iter() if _is_of(process, nonce)]


def _is_of(process: psutil.Process, nonce: str) -> bool:
    try:
        return nonce in process.cmdline() or nonce in process.environ().get("BULKHEAD_SANDBOX", "")
    except psutil.Error:
        return False


def _until_none_of(nonce: str) -> None:
    _until(lambda: not _processes_of(nonce), "all have ended")


def _until(condition: Callable[[], bool], expectation: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, f"not within 5 s: {expectation}"
        time.sleep(0.02)


# --- each enforcement counts: with it alone off, attacks that test_attacks shows refused succeed inside

SYSTEM_CALLS = (
    "connect_to_a_unix_socket_in_my_workspace",
    "keep_something_in_the_kernels_keyring",
    "open_a_netlink_socket",
    "open_a_userfaultfd",
    "plant_a_fifo_for_the_host_to_hang_on",
    "read_the_memory_of_another_process",
    "run_a_program_that_is_in_no_file",
    "set_up_an_io_uring",
    "share_system_v_memory",
    "trace_a_child",
    "turn_off_address_randomisation",
)
LIMITED = {
    "burn_the_processor": "cpu_seconds",
    "fill_shared_memory": "tmp_bytes",
    "fill_tmp": "tmp_bytes",
    "fork_bomb": "processes",
    "memory_bomb": "data_bytes",
    "open_many_files": "open_files",
    "write_one_big_file": "file_bytes",
}


def attacked(sandbox: bubblewrap.Bubblewrap, attack: str, ground: Ground, **change: object) -> str:
    mounts = tuple(Mount(Path(source), target, writable) for source, target, writable in ground.mounts())
    asked = profile("/opt/attacks.py", attack, json.dumps(ground.inside), mounts=mounts, limits=Limits(**LIMITS))
    return run(sandbox.launch(dataclasses.replace(asked, **change))).stdout  # type: ignore[arg-type]  # fields of Profile


@pytest.mark.parametrize("attack", SYSTEM_CALLS)
def test_the_filter_alone_stops(attack: str, sandbox: bubblewrap.Bubblewrap, ground: Ground) -> None:
    with tempfile.TemporaryFile() as file:
        pyseccomp.SyscallFilter(pyseccomp.ALLOW).export_bpf(file)
        file.seek(0)
        unfiltered = dataclasses.replace(sandbox, system_calls=file.read())
    assert attacked(unfiltered, attack, ground).endswith("succeeded\n")


@pytest.mark.parametrize(("attack", "limit"), LIMITED.items())
def test_the_limit_alone_stops(attack: str, limit: str, sandbox: bubblewrap.Bubblewrap, ground: Ground) -> None:
    wide = Limits(**LIMITS | {limit: 100 * LIMITS[limit]})
    assert attacked(sandbox, attack, ground, limits=wide).endswith("succeeded\n")


def test_the_read_only_mount_alone_stops_a_write(sandbox: bubblewrap.Bubblewrap, ground: Ground) -> None:
    attack = "write_to_a_read_only_mount"
    writable = Mount(Path(ground.bare["reference"]), "/reference", writable=True)
    mounts = (*profile("").mounts, Mount(ground.folder / "attacks.py", "/opt/attacks.py"), writable)
    assert attacked(sandbox, attack, ground, mounts=mounts).endswith("succeeded\n")
    assert "Read-only" in attacked(sandbox, attack, ground)
