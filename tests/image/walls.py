"""Each wall around the image, with the control that falls where it is not there. Run by `make image-test`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from app.embedded.machine import rehearsal
from app.embedded.postgres import EmbeddedPostgres
from tests.image import containers
from tests.image.containers import PROFILE, Ended
from tests.image.site import Beside, Site, moby_like, site, without

_WRITE = "open('/opt/bulkhead/planted', 'w')"
_TAKE = "taken = bytearray(400 << 20); print(len(taken))"
_FORK = """
import os, signal
made = []
try:
    for _ in range(300):
        child = os.fork()
        if not child:
            signal.pause()
        made.append(child)
except OSError:
    pass
for child in made:
    os.kill(child, signal.SIGKILL)
print(len(made))
"""
_SOCKETS = """
import ctypes, errno
call = ctypes.CDLL(None, use_errno=True).socket
call.argtypes = [ctypes.c_long] * 3
for family in (40, 40 + (1 << 32)):
    print("made" if call(family, 1, 0) >= 0 else errno.errorcode[ctypes.get_errno()])
"""
_PROBE = ("sandbox", "probe")
_ADDED = ("clone", "mount", "pivot_root", "sethostname", "umount2", "unshare")


def test_the_root_is_read_only_even_to_root() -> None:
    as_root = ["--user", "0"]
    assert containers.python(_WRITE, options=as_root, hardened=False).status == 0, "the control"
    refused = containers.python(_WRITE, options=as_root)
    assert refused.status == 1
    assert "Read-only file system" in refused.complaint


def test_files_of_the_image_are_not_the_users_to_write() -> None:
    assert containers.python(_WRITE, options=["--user", "0"], hardened=False).status == 0, "the control"
    assert "Permission denied" in containers.python(_WRITE, hardened=False).complaint


def test_memory_is_bounded() -> None:
    assert containers.python(_TAKE).status == 0, "the control: 1 GiB is enough"
    assert containers.python(_TAKE, options=["--memory", "128m", "--memory-swap", "128m"]).status == 137


def test_processes_are_bounded() -> None:
    assert int(containers.python(_FORK).output) == 300, "the control"
    assert int(containers.python(_FORK, options=["--pids-limit", "64"]).output) < 64


def test_there_is_no_shell_to_be_given() -> None:
    run = "import subprocess; subprocess.run(['/bin/sh', '-c', 'true'])"
    assert "FileNotFoundError" in containers.python(run).complaint
    assert "FileNotFoundError" in containers.python("import os; os.execvp('bash', ['bash'])").complaint


def _probe(*options: str) -> str:
    ended = containers.run(*_PROBE, options=options)
    assert ended.status == 0, ended.complaint
    return ended.output.partition(":")[0]


def test_our_profile_is_what_bubblewrap_takes_and_no_more(tmp_path: Path) -> None:
    unmasked = ("--security-opt", "unmask=/proc/*")
    assert json.loads(PROFILE.read_text())["syscalls"][-1]["names"] == list(_ADDED)
    assert _probe("--security-opt", f"seccomp={PROFILE}", *unmasked) == "bubblewrap"
    for call in _ADDED:
        assert _probe("--security-opt", f"seccomp={without(tmp_path, call)}", *unmasked) == "landlock", call


def test_our_profile_lets_nobody_make_these_sockets_however_they_are_asked_for(tmp_path: Path) -> None:
    """A vsock reaches a hypervisor. The control is a profile that lets all be that is not exactly the family."""
    loose = json.loads(PROFILE.read_text())
    loose["syscalls"].append(
        {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [{"index": 0, "value": 40, "op": "SCMP_CMP_GT"}]}
    )
    (tmp_path / "loose.json").write_text(json.dumps(loose))
    assert _made(tmp_path / "loose.json") == [False, True], "the control"
    assert _made(PROFILE) == [False, False]


def _made(profile: Path) -> list[bool]:
    """Whether the filter lets the kernel see vsock: as it is, and with a bit that the kernel does not read."""
    ended = containers.python(_SOCKETS, options=["--security-opt", f"seccomp={profile}"])
    return [line != "EPERM" for line in ended.output.split()]


def test_bubblewrap_takes_an_unmasked_proc_too(tmp_path: Path) -> None:
    assert _probe("--security-opt", f"seccomp={PROFILE}") == "landlock"
    assert _probe("--security-opt", f"seccomp={moby_like(tmp_path)}") == "landlock"


@pytest.fixture(scope="module")
def here(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A deployment whose database is migrated."""
    with ExitStack() as stack:
        beside = Beside()
        stack.callback(beside.end)
        model = stack.enter_context(beside.inside(rehearsal()))
        made = stack.enter_context(site(beside, postgres, tmp_path_factory.mktemp("refusals"), model))
        made.bootstrapped()
        yield made


def _serve(here: Site, *missing: str, **instead: str) -> Ended:
    env = {name: value for name, value in here.env.items() if name not in missing} | instead
    return containers.run("serve", env=env, options=here.options)


def test_it_serves_nobody_without_its_keys(here: Site) -> None:
    assert containers.run("serve").status == 1, "with nothing at all"
    for name in ("BULKHEAD_DATABASE_APP_URL", "BULKHEAD_ROOT_KEYS", "BULKHEAD_MODEL_API_KEY"):
        refused = _serve(here, name)
        assert (refused.status, name.removeprefix("BULKHEAD_") in refused.complaint) == (1, True), refused


def test_it_serves_nobody_elsewhere_without_tls_in_front(here: Site) -> None:
    refused = _serve(here, "BULKHEAD_HOST")  # then it is what the image says
    assert (refused.status, "BULKHEAD_TLS_IN_FRONT" in refused.complaint) == (1, True), refused


def test_it_takes_no_database_that_it_cannot_verify(here: Site) -> None:
    refused = _serve(here, PGSSLROOTCERT="/etc/ssl/certs/ca-certificates.crt")
    assert (refused.status, "certificate" in refused.complaint) == (1, True), refused


def test_a_setting_that_is_none_is_refused(here: Site) -> None:
    refused = _serve(here, BULKHEAD_SANDBOXES="off")
    assert (refused.status, "BULKHEAD_SANDBOXES" in refused.complaint) == (1, True), refused


def test_what_answers_nobody_is_not_healthy(here: Site) -> None:
    with containers.running("egress", env=here.env, options=here.options) as relay:
        relay.until((here.folder / "run/egress.sock").exists)
        relay.until(relay.is_healthy)
        (here.folder / "run/egress.sock").unlink()
        assert not relay.is_healthy()
