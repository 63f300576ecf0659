"""Other processes of the same user: seeing, reading, steering and outliving them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import time
from pathlib import Path

from .calls import Ground, attack, attack_apart, attack_where, call, checked, holds_nonce, libc

_SETSIG = 10


def _process(ground: Ground, name: str) -> Path:
    return Path("/proc", str(ground["victim"]), name)


@attack
def find_a_secret_in_my_own_environment(ground: Ground) -> None:
    holds_nonce(b"\0".join(os.environb.values()), ground)


@attack
def read_the_environment_of_a_host_process(ground: Ground) -> None:
    _find_in_every_process("environ", ground)


@attack
def read_the_arguments_of_every_process(ground: Ground) -> None:
    _find_in_every_process("cmdline", ground)


def _find_in_every_process(name: str, ground: Ground) -> None:
    for folder in Path("/proc").iterdir():
        try:
            return holds_nonce((folder / name).read_bytes(), ground)
        except OSError:
            continue
    raise ProcessLookupError


@attack
def read_through_the_root_of_a_host_process(ground: Ground) -> None:
    holds_nonce(Path(f"/proc/{ground['victim']}/root{ground['secret']}").read_bytes(), ground)


@attack
def read_through_the_root_or_folder_of_every_process(ground: Ground) -> None:
    for folder in Path("/proc").iterdir():
        for path in (folder / f"root{ground['secret']}", folder / "cwd" / "secret.txt", folder / "cwd/../secret.txt"):
            try:
                return holds_nonce(path.read_bytes(), ground)
            except OSError:
                continue
    raise ProcessLookupError


@attack
def read_a_file_that_a_host_process_has_open(ground: Ground) -> None:
    holds_nonce(_process(ground, "fd/0").read_bytes(), ground)


@attack
def read_a_file_that_any_process_has_open(ground: Ground) -> None:
    for number in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if number.is_file():
                return holds_nonce(number.read_bytes(), ground)
        except OSError:
            continue
    raise ProcessLookupError


@attack
def learn_where_a_host_process_keeps_its_memory(ground: Ground) -> None:
    if not _process(ground, "maps").read_bytes():
        raise PermissionError


@attack
def read_the_memory_of_a_host_process_as_a_file(ground: Ground) -> None:
    with _process(ground, "mem").open("rb", buffering=0) as memory:
        memory.seek(_stack(ground))
        memory.read(8)


@attack
def write_to_the_memory_of_a_host_process(ground: Ground) -> None:
    with _process(ground, "mem").open("r+b", buffering=0) as memory:
        memory.seek(_stack(ground))
        same = memory.read(8)
        memory.seek(_stack(ground))
        memory.write(same)


def _stack(ground: Ground) -> int:
    (line,) = (line for line in _process(ground, "maps").read_text().splitlines() if line.endswith("[stack]"))
    return int(line.split("-")[0], 16)


@attack
def see_a_host_process(ground: Ground) -> None:
    holds_nonce(_process(ground, "cmdline").read_bytes(), ground)


@attack
def learn_that_a_host_process_exists(ground: Ground) -> None:
    Path("/proc", str(ground["victim"])).stat()


@attack
def hold_a_host_process_by_a_descriptor(ground: Ground) -> None:
    call("pidfd_open", ground["victim"], 0)


@attack
def take_a_file_out_of_a_host_process(ground: Ground) -> None:
    victim = call("pidfd_open", ground["victim"], 0)
    holds_nonce(os.pread(call("pidfd_getfd", victim, 0, 0), 4096, 0), ground)


@attack
def compare_what_two_processes_hold(ground: Ground) -> None:
    call("kcmp", os.getpid(), ground["victim"], 1, 0, 0)


@attack
def limit_a_host_process(ground: Ground) -> None:
    resource.prlimit(ground["victim"], resource.RLIMIT_NOFILE, (8, 8))


@attack
def slow_a_host_process(ground: Ground) -> None:
    os.setpriority(os.PRIO_PROCESS, ground["victim"], 5)


@attack
def move_a_host_process_to_one_processor(ground: Ground) -> None:
    os.sched_setaffinity(ground["victim"], {0})


@attack
def starve_a_host_process_by_its_class(ground: Ground) -> None:
    os.sched_setscheduler(ground["victim"], os.SCHED_BATCH, os.sched_param(0))


@attack
def have_a_host_process_ended_when_memory_runs_out(ground: Ground) -> None:
    _process(ground, "oom_score_adj").write_text("500")


@attack
def signal_a_host_process(ground: Ground) -> None:
    os.kill(ground["victim"], signal.SIGCONT)


@attack
def signal_a_host_process_by_a_descriptor(ground: Ground) -> None:
    call("pidfd_send_signal", call("pidfd_open", ground["victim"], 0), signal.SIGCONT, None, 0)


@attack
def signal_a_host_process_through_a_pipe(ground: Ground) -> None:
    """Whoever owns a file is signalled when it can be read; the victim says that it was."""
    mark = Path(ground["workspace"], "signalled")
    mark.unlink(missing_ok=True)
    reading, writing = os.pipe()
    fcntl.fcntl(reading, fcntl.F_SETOWN, ground["listener"])
    fcntl.fcntl(reading, _SETSIG, signal.SIGUSR1)
    fcntl.fcntl(reading, fcntl.F_SETFL, fcntl.fcntl(reading, fcntl.F_GETFL) | os.O_ASYNC)
    os.write(writing, b"x")
    deadline = time.monotonic() + 1
    while not mark.exists():
        if time.monotonic() > deadline:
            raise ProcessLookupError
        time.sleep(0.02)


@attack_where("the kernel's settings: some let only a parent trace")
def trace_a_host_process(ground: Ground) -> None:
    checked(libc.ptrace(16, ground["victim"], None, None))
    os.waitpid(ground["victim"], 0)
    checked(libc.ptrace(17, ground["victim"], None, None))


@attack
def trace_a_child(ground: Ground) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0 if libc.ptrace(0, 0, None, None) == 0 else 1)
    if os.waitpid(child, 0)[1] != 0:
        raise PermissionError


@attack
def read_the_memory_of_another_process(ground: Ground) -> None:
    _move_memory("process_vm_readv")


@attack
def write_the_memory_of_another_process(ground: Ground) -> None:
    _move_memory("process_vm_writev")


def _move_memory(name: str) -> None:
    # Ourselves: even with a target that is allowed, the call itself must not be.
    source, target = ctypes.create_string_buffer(b"x" * 8), ctypes.create_string_buffer(8)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(target), 8)
    there = (ctypes.c_size_t * 2)(ctypes.addressof(source), 8)
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    call(name, os.getpid(), here, one, there, one, none)


@attack_where("the kernel's version: 6.13 lets an ordinary user, for itself")
def advise_on_the_memory_of_another_process(ground: Ground) -> None:
    me = call("pidfd_open", os.getpid(), 0)
    memory = libc.mmap
    memory.restype = ctypes.c_void_p
    page = memory(None, 4096, 3, 0x22, -1, 0)
    call("process_madvise", me, (ctypes.c_size_t * 2)(page, 4096), ctypes.c_ulong(1), 20, 0)  # MADV_COLD


@attack_apart
def outlive_the_service(ground: Ground) -> None:
    """A grandchild in a session of its own, deaf to every signal that can be ignored, which says that it lives."""
    signal.alarm(0)
    beat = os.open(ground["workspace"] + "/heartbeat", os.O_CREAT | os.O_WRONLY, 0o666)
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        for number in set(range(1, 32)) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        _beat(beat)
        os._exit(0)
    time.sleep(5)


def _beat(file: int) -> None:
    """Until the file is deleted, and at most for as long as a test may take."""
    deadline = time.monotonic() + 20
    while os.fstat(file).st_nlink and time.monotonic() < deadline:
        os.write(file, b".")
        time.sleep(0.05)
