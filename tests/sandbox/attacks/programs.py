"""Programs that the server shall not run, or not so."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
from pathlib import Path

from .calls import MACHINE, Ground, attack, attack_where, call, checked, in_a_child, libc, tiny_program


@attack
def run_a_shell(ground: Ground) -> None:
    subprocess.run(["/bin/sh", "-c", "exit 0"], check=False)


@attack
def run_a_program_that_is_in_no_file(ground: Ground) -> None:
    program = os.memfd_create("program")
    os.write(program, tiny_program())
    subprocess.run([f"/proc/self/fd/{program}"], pass_fds=(program,), check=False)


@attack
def run_a_program_without_its_name(ground: Ground) -> None:
    file = os.open(_written(ground["tmp"]), os.O_RDONLY)
    words = (ctypes.c_char_p * 2)(b"tiny", None)

    def run() -> None:
        call("execveat", file, b"", words, None, 0x1000)  # AT_EMPTY_PATH; it ends with its user's last eight bits

    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(255)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (255, -31):
        raise PermissionError


@attack
def run_a_native_program_that_i_wrote_to_tmp(ground: Ground) -> None:
    subprocess.run([_written(ground["tmp"])], check=False)


@attack
def run_a_native_program_that_i_wrote_to_my_workspace(ground: Ground) -> None:
    subprocess.run([_written(ground["workspace"])], check=False)


def _written(folder: str) -> Path:
    program = Path(folder, "tiny")
    program.unlink(missing_ok=True)
    program.write_bytes(tiny_program())
    program.chmod(0o700)
    return program


@attack_where("root, who plants it")
def run_a_setuid_program_in_my_workspace(ground: Ground) -> None:
    if subprocess.run([ground["workspace"] + "/suid"], check=False).returncode != 0:
        raise PermissionError


@attack_where("the machine: x86 kernels that take 32-bit calls")
def call_the_kernel_by_its_32_bit_numbers(ground: Ground) -> None:
    """A filter that does not look at the kind of a call takes 32-bit exit_group for a harmless 64-bit call."""
    if MACHINE != "x86_64":
        raise OSError("no such calls on this machine")
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(bytes.fromhex("b814000000cd80c3"))  # getpid() by int 0x80
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def ask() -> None:
        if ctypes.CFUNCTYPE(ctypes.c_int)(address)() != os.getpid():
            raise PermissionError

    in_a_child(ask)


@attack
def forget_to_end_with_my_parent(ground: Ground) -> None:
    checked(libc.prctl(1, 0, 0, 0, 0))  # PR_SET_PDEATHSIG


@attack
def adopt_what_others_leave(ground: Ground) -> None:
    checked(libc.prctl(36, 1, 0, 0, 0))  # PR_SET_CHILD_SUBREAPER


@attack
def put_a_filter_of_mine_on_others(ground: Ground) -> None:
    """A filter may answer a child's calls with whatever its writer likes."""
    allow = (ctypes.c_uint64 * 1)(0x7FFF0000_00000006)
    program = (ctypes.c_uint64 * 2)(1, ctypes.addressof(allow))
    libc.prctl(38, 1, 0, 0, 0)  # no new privileges, without which only root may
    call("seccomp", 1, 0, program)
