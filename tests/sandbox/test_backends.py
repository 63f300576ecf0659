"""What every backend holds to: what reaches a program, what it may do, and that nothing of it stays."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from mcp import ClientSession, StdioServerParameters, stdio_client
from mcp.types import CallToolResult, TextContent

from app.policies.servers.filesystem import FilesystemServer
from app.sandbox import orders
from app.sandbox.contract import Launch, Mount, Sandbox
from app.servers.filesystem import template
from app.servers.template import Place
from tests.sandbox import programs
from tests.sandbox.ground import HERE, ROOT, SERVICE_IS_ROOT, UID, Ground
from tests.sandbox.programs import BACKENDS, altered, profile, run

# Leaves a daemon in a session of its own behind, twice removed, and does not end itself.
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    os.fork()
time.sleep(60)
"""
# Ends at once, and leaves behind what is another process at every moment.
ALWAYS_ANOTHER = """
import os, time
end = time.monotonic() + 60
while time.monotonic() < end:
    if os.fork():
        os._exit(0)
"""


@pytest.fixture(scope="module", params=BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def sandbox(name: str) -> Sandbox:
    return programs.backend(name)


@pytest.fixture
def scratch(folder: Path) -> Path:
    """Where a service that is told so keeps its temporary files."""
    made = folder / uuid4().hex
    made.mkdir()
    made.chmod(0o1777)
    return made


def test_has_the_profiles_environment_and_nothing_of_the_services(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-service")
    code = "import os; print({name: value for name, value in os.environ.items() if name not in ('PWD', 'TMPDIR')})"
    launch = sandbox.launch(dataclasses.replace(profile("-c", code), environment={"DSN": "of-the-tenant"}))
    ran = run(Launch(launch.argv, {**os.environ, **launch.environment}))
    assert ran.stdout == "{'DSN': 'of-the-tenant'}\n", ran.stderr


def test_shows_no_secret_of_a_profile_to_other_users_of_the_host(sandbox: Sandbox) -> None:
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


def test_inherits_three_file_descriptors(sandbox: Sandbox) -> None:
    code = (
        "import os, fcntl\nfor n in range(256):\n    try: fcntl.fcntl(n, 1)\n    except OSError: continue\n    print(n)"
    )
    launch = sandbox.launch(profile("-c", code))
    with tempfile.TemporaryFile() as leaked:
        os.set_inheritable(leaked.fileno(), True)
        ran = subprocess.run(
            launch.argv, env=launch.environment, close_fds=False, capture_output=True, timeout=30, check=True
        )
    assert ran.stdout == b"0\n1\n2\n"


async def session_with(launch: Launch, tool: str, arguments: dict[str, object]) -> tuple[list[str], CallToolResult]:
    parameters = StdioServerParameters(command=launch.argv[0], args=list(launch.argv[1:]), env=launch.environment)
    async with stdio_client(parameters) as streams, ClientSession(*streams) as session:
        await session.initialize()
        tools = [tool.name for tool in (await session.list_tools()).tools]
        return tools, await session.call_tool(tool, arguments)


def text_of(result: CallToolResult) -> str:
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


async def test_runs_a_tool_server_that_writes_to_its_workspace(sandbox: Sandbox, ground: Ground) -> None:
    workspace = Path(ground.bare["workspace"])
    mounts = (Mount(HERE / "tool_server.py", "/srv/server.py"), Mount(workspace, "/workspace", writable=True))
    launch = sandbox.launch(profile("/srv/server.py", "/workspace", mounts=mounts))
    tools, result = await session_with(launch, "note", {"text": "written inside"})
    assert tools == ["note"]
    assert text_of(result) == "written inside"
    note = workspace / "note.txt"
    assert note.read_text() == "written inside"
    assert note.stat().st_uid == UID
    note.unlink()


@pytest.mark.parametrize("readonly", [True, False])
async def test_runs_the_filesystem_server_as_it_is(sandbox: Sandbox, ground: Ground, *, readonly: bool) -> None:
    server = FilesystemServer(template="filesystem", root="docs", readonly=readonly)
    workspace = Path(ground.bare["workspace"])
    launch = sandbox.launch(template.profile(server, Place(UID, folder=workspace)))
    _, result = await session_with(launch, "read_file", {"path": "own.txt"})
    assert text_of(result) == "mine"
    tools, result = await session_with(launch, "write_file", {"path": "new.txt", "content": "x"})
    assert result.isError == readonly
    assert ("write_file" in tools) != readonly
    assert (workspace / "new.txt").exists() != readonly
    (workspace / "new.txt").unlink(missing_ok=True)


async def test_the_filesystem_server_reads_nothing_beside_its_workspace(sandbox: Sandbox, ground: Ground) -> None:
    server = FilesystemServer(template="filesystem", root="docs")
    workspace = Path(ground.bare["workspace"])
    (workspace / "out.txt").symlink_to(ground.bare["secret"])
    launch = sandbox.launch(template.profile(server, Place(UID, folder=workspace)))
    try:
        _, result = await session_with(launch, "read_file", {"path": "out.txt"})
    finally:
        (workspace / "out.txt").unlink()
    assert result.isError
    assert ground.bare["nonce"] not in text_of(result)


def test_hands_on_how_the_program_ended(sandbox: Sandbox) -> None:
    assert run(sandbox.launch(profile("-c", "raise SystemExit(7)"))).returncode == 7
    killed = run(sandbox.launch(profile("-c", "import os, time; os.kill(os.getpid(), 9); time.sleep(9)")))
    assert killed.returncode == 137


def test_does_not_start_without_a_source(sandbox: Sandbox, folder: Path) -> None:
    ran = run(sandbox.launch(profile("-c", "print('ran')", mounts=(Mount(folder / "absent", "/absent"),))))
    assert ran.returncode != 0
    assert ran.stdout == ""


def test_does_not_start_without_its_limits(sandbox: Sandbox) -> None:
    launch = sandbox.launch(profile("-c", "print('ran')"))
    known = {"RLIMIT_NPROC": 64}
    ran = run(altered(launch, limits=known | {"RLIMIT_UNHEARD_OF": 1}))
    assert ran.returncode != 0
    assert ran.stdout == ""
    assert run(altered(launch, limits=known)).stdout == "ran\n"


def test_does_not_start_under_another_parent(sandbox: Sandbox) -> None:
    ran = run(altered(sandbox.launch(profile("-c", "print('ran')")), parent=1))
    assert (ran.returncode, ran.stdout) == (1, "")


# --- the end


def test_nothing_survives_when_the_service_is_killed(name: str, scratch: Path) -> None:
    nonce = uuid4().hex
    service = _service(name, DAEMON, nonce, scratch)
    _until(lambda: len(_processes_of(nonce)) >= 6 - _hidden(name), "the program and its daemons are up")
    service.kill()
    service.wait()
    _until_nothing_is_left(nonce, scratch)


def test_a_daemon_without_a_sandbox_survives_its_service() -> None:
    """The control of the tests around it: nothing else ends such a daemon."""
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


def test_nothing_survives_a_kill_at_any_moment_of_the_start(name: str, scratch: Path) -> None:
    moments = random.Random(20)  # noqa: S311  # a seed makes the moments the same every time
    for _ in range(12):
        nonce = uuid4().hex
        service = _service(name, DAEMON, nonce, scratch)
        time.sleep(moments.uniform(0, 0.06))
        service.kill()
        service.wait()
        _until_nothing_is_left(nonce, scratch)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ends_with_all_its_children_when_asked_to(sandbox: Sandbox, name: str, how: signal.Signals) -> None:
    nonce = uuid4().hex
    launch = sandbox.launch(profile("-c", DAEMON, nonce))
    process = subprocess.Popen(launch.argv, env=launch.environment)
    _until(lambda: len(_processes_of(nonce)) >= 5 - _hidden(name), "the program and its daemons are up")
    process.send_signal(how)
    process.wait(5)
    _until_nothing_is_left(nonce)


def test_what_is_another_process_at_every_moment_is_caught(sandbox: Sandbox) -> None:
    nonce = uuid4().hex
    assert run(sandbox.launch(profile("-c", ALWAYS_ANOTHER, nonce))).returncode == 0
    _until_nothing_is_left(nonce)


def _service(name: str, code: str, nonce: str, scratch: Path) -> subprocess.Popen[bytes]:
    """A service of its own process, at the moment just before it starts the sandbox."""
    service = subprocess.Popen(
        [sys.executable, HERE / "short_lived.py", name, str(UID), code, nonce],
        env={"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
    )
    with service.stdout or tempfile.TemporaryFile() as output:
        assert output.readline() == b"ready\n"
    return service


def _hidden(name: str) -> int:
    """Landlock's launcher and guard hide their environment from their own user, and so from us if we are no root."""
    return 2 if name == "landlock" and not SERVICE_IS_ROOT else 0


def _processes_of(nonce: str) -> list[psutil.Process]:
    """By their arguments, or the launcher's environment; not the dead that nobody has waited for."""
    return [process for process in psutil.process_iter() if _is_of(process, nonce)]


def _is_of(process: psutil.Process, nonce: str) -> bool:
    try:
        return nonce in process.cmdline() or nonce.encode().hex() in process.environ().get(orders.NAME, "")
    except psutil.Error:
        return False


def _until_nothing_is_left(nonce: str, scratch: Path | None = None) -> None:
    _until(lambda: not _processes_of(nonce), "all have ended")
    if scratch is not None:
        _until(lambda: list(scratch.iterdir()) == [], "no file is left")


def _until(condition: Callable[[], bool], expectation: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, f"not within 5 s: {expectation}"
        time.sleep(0.02)
