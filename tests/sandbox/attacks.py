"""Attacks, run as a script: first bare, where each must succeed, then inside, where none may.

    python attacks.py NAME GROUND [UID]

GROUND is JSON: what there is to attack, and by what path. With UID, root becomes that user first. An attack
returns when it has succeeded and raises OSError when it was refused. The script says "started" and then, in
the first case, "succeeded"; a limit may end it in between.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Ground = dict[str, Any]
ATTACKS: dict[str, Callable[[Ground], object]] = {}
libc = ctypes.CDLL(None, use_errno=True)
MIB = 1 << 20
# The same on every architecture from 424 on; the older ones by machine.
_NUMBERS = {
    "x86_64": {"keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323, "process_vm_readv": 310},
    "aarch64": {"keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282, "process_vm_readv": 270},
}
NUMBERS = {"io_uring_setup": 425, "clone3": 435, **_NUMBERS[os.uname().machine]}
CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x20000, 0x10000000, 0x40000000


def attack(function: Callable[[Ground], object]) -> Callable[[Ground], object]:
    ATTACKS[function.__name__] = function
    return function


def checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def call(name: str, *arguments: Any) -> int:
    return checked(int(libc.syscall(NUMBERS[name], *arguments)))


def holds_nonce(text: bytes, ground: Ground) -> None:
    if ground["nonce"].encode() not in text:
        raise FileNotFoundError


# --- files


@attack
def read_a_file_of_the_host(ground: Ground) -> None:
    holds_nonce(Path(ground["secret"]).read_bytes(), ground)


@attack
def read_another_tenants_folder_beside_mine(ground: Ground) -> None:
    holds_nonce(Path(ground["workspace"], "..", "tenant-b", "notes.txt").read_bytes(), ground)


@attack
def read_through_a_symlink(ground: Ground) -> None:
    link = Path(ground["workspace"], "symlink")
    link.unlink(missing_ok=True)
    link.symlink_to(ground["secret"])
    holds_nonce(link.read_bytes(), ground)


@attack
def read_through_a_hardlink(ground: Ground) -> None:
    link = Path(ground["workspace"], "hardlink")
    link.unlink(missing_ok=True)
    link.hardlink_to(ground["secret"])
    holds_nonce(link.read_bytes(), ground)


@attack
def read_through_the_root_of_a_host_process(ground: Ground) -> None:
    holds_nonce(Path(f"/proc/{ground['victim']}/root{ground['secret']}").read_bytes(), ground)


@attack
def read_shared_memory_of_the_host(ground: Ground) -> None:
    holds_nonce(Path(ground["shared_memory"]).read_bytes(), ground)


@attack
def write_to_a_read_only_mount(ground: Ground) -> None:
    Path(ground["reference"], "written").write_text("x")


@attack
def make_a_read_only_file_writable_and_write(ground: Ground) -> None:
    manual = Path(ground["reference"], "manual.txt")
    manual.chmod(0o666)
    manual.write_text("x")


@attack
def remount_writable_in_a_namespace(ground: Ground) -> None:
    checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNS))
    checked(libc.mount(b"none", b"/tmp", b"tmpfs", 0, None))


@attack
def change_root_in_a_namespace(ground: Ground) -> None:
    checked(libc.unshare(CLONE_NEWUSER))
    os.chroot(ground["workspace"])


@attack
def run_a_shell(ground: Ground) -> None:
    subprocess.run(["/bin/sh", "-c", "exit 0"], check=False)


@attack
def run_a_program_that_is_in_no_file(ground: Ground) -> None:
    os.write(os.memfd_create("program"), b"#!/bin/sh\n")


@attack
def plant_a_fifo_for_the_host_to_hang_on(ground: Ground) -> None:
    fifo = Path(ground["workspace"], "fifo")
    fifo.unlink(missing_ok=True)
    os.mkfifo(fifo)


@attack
def use_a_file_descriptor_that_was_left_open(ground: Ground) -> None:
    for number in range(3, 64):
        try:
            text = os.pread(number, 4096, 0)
        except OSError:
            continue
        if ground["nonce"].encode() in text:
            return
    raise FileNotFoundError


# --- other processes


@attack
def read_the_environment_of_a_host_process(ground: Ground) -> None:
    for folder in Path("/proc").iterdir():
        try:
            holds_nonce((folder / "environ").read_bytes(), ground)
        except OSError:
            continue
        return
    raise ProcessLookupError


@attack
def see_a_host_process(ground: Ground) -> None:
    holds_nonce(Path(f"/proc/{ground['victim']}/cmdline").read_bytes(), ground)


@attack
def signal_a_host_process(ground: Ground) -> None:
    os.kill(ground["victim"], signal.SIGCONT)


@attack
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
    # Ourselves: even with a target that is allowed, the call itself must not be.
    source, target = ctypes.create_string_buffer(b"x" * 8), ctypes.create_string_buffer(8)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(target), 8)
    there = (ctypes.c_size_t * 2)(ctypes.addressof(source), 8)
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    call("process_vm_readv", os.getpid(), here, one, there, one, none)


# --- network


@attack
def connect_to_a_host_port(ground: Ground) -> None:
    socket.create_connection(("127.0.0.1", ground["tcp"]), timeout=2).close()


@attack
def connect_to_a_host_port_by_ipv6(ground: Ground) -> None:
    socket.create_connection(("::1", ground["tcp6"]), timeout=2).close()


@attack
def exchange_datagrams_with_the_host(ground: Ground) -> None:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(1)
    client.sendto(b"ping", ("127.0.0.1", ground["udp"]))
    client.recvfrom(16)


@attack
def connect_to_an_abstract_unix_socket(ground: Ground) -> None:
    socket.socket(socket.AF_UNIX).connect("\0" + ground["abstract"])


@attack
def connect_to_a_unix_socket_in_my_workspace(ground: Ground) -> None:
    socket.socket(socket.AF_UNIX).connect(ground["workspace"] + "/host.sock")


@attack
def leave_a_unix_socket_in_my_workspace(ground: Ground) -> None:
    path = Path(ground["workspace"], "mine.sock")
    path.unlink(missing_ok=True)
    socket.socket(socket.AF_UNIX).bind(str(path))


@attack
def open_a_vsock(ground: Ground) -> None:
    socket.socket(40, socket.SOCK_STREAM)


@attack
def open_a_netlink_socket(ground: Ground) -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)


@attack
def open_a_socket_of_the_kernels_crypto(ground: Ground) -> None:
    socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET)


# --- the kernel


@attack
def make_a_user_namespace(ground: Ground) -> None:
    checked(libc.unshare(CLONE_NEWUSER))


@attack
def clone_into_a_user_namespace(ground: Ground) -> None:
    # glibc's own clone wants a stack; the flags are what counts.
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    _reap(checked(int(libc.syscall(number, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0))))


@attack
def clone3_into_a_user_namespace(ground: Ground) -> None:
    arguments = struct.pack("8Q", CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    _reap(call("clone3", arguments, ctypes.c_size_t(len(arguments))))


@attack
def make_a_network_namespace(ground: Ground) -> None:
    checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNET))


def _reap(child: int) -> None:
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@attack
def keep_something_in_the_kernels_keyring(ground: Ground) -> None:
    call("keyctl", 1, 0)  # KEYCTL_JOIN_SESSION_KEYRING


@attack
def set_up_an_io_uring(ground: Ground) -> None:
    call("io_uring_setup", 4, ctypes.create_string_buffer(120))


@attack
def open_a_userfaultfd(ground: Ground) -> None:
    call("userfaultfd", 1)  # UFFD_USER_MODE_ONLY


@attack
def load_a_bpf_program(ground: Ground) -> None:
    program = struct.pack("QQ", 0xB7, 0x95)  # r0 = 0; exit
    text, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    order = struct.pack("IIQQ", 1, 2, ctypes.addressof(text), ctypes.addressof(licence)) + bytes(96)
    call("bpf", 5, order, len(order))


@attack
def count_events_of_the_kernel(ground: Ground) -> None:
    order = struct.pack("IIQ", 1, 120, 0) + bytes(104)
    call("perf_event_open", order, 0, -1, -1, 0)


@attack
def type_into_a_terminal(ground: Ground) -> None:
    child, _ = pty.fork()
    if child == 0:
        try:
            fcntl.ioctl(0, 0x5412, b"x")  # TIOCSTI
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise PermissionError


@attack
def share_system_v_memory(ground: Ground) -> None:
    segment = checked(libc.shmget(0, 4096, 0o1600))
    checked(libc.shmctl(segment, 0, None))


@attack
def turn_off_address_randomisation(ground: Ground) -> None:
    checked(libc.personality(0x0040000))


# --- more than its share; every bomb is bounded


@attack
def fork_bomb(ground: Ground) -> None:
    children = []
    try:
        for _ in range(100):
            child = os.fork()
            if child == 0:
                time.sleep(10)
                os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@attack
def memory_bomb(ground: Ground) -> None:
    with mmap.mmap(-1, 192 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for offset in range(0, len(memory), mmap.PAGESIZE):
            memory[offset] = 1


@attack
def write_one_big_file(ground: Ground) -> None:
    with Path(ground["workspace"], "big").open("wb", buffering=0) as file:
        try:
            for _ in range(16):
                if file.write(bytes(MIB)) < MIB:
                    raise OSError("short write")
        finally:
            file.truncate(0)


@attack
def fill_tmp(ground: Ground) -> None:
    _fill(Path(ground["tmp"]))


@attack
def fill_shared_memory(ground: Ground) -> None:
    _fill(Path("/dev/shm"))  # noqa: S108  # it is what is attacked


def _fill(folder: Path) -> None:
    files = [folder / f"bulkhead-fill-{number}" for number in range(6)]
    try:
        for file in files:
            file.write_bytes(bytes(4 * MIB))
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@attack
def open_many_files(ground: Ground) -> None:
    numbers = [os.open("/dev/null", os.O_RDONLY) for _ in range(200)]
    os.closerange(numbers[0], numbers[-1] + 1)


@attack
def burn_the_processor(ground: Ground) -> None:
    while time.process_time() < 1.2:
        pass


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(4, 1, 0, 0, 0)  # dumpable again, as a program that this user started would be


def main() -> None:
    name, ground, *uid = sys.argv[1:]
    if uid:
        "127.0.0.1".encode("idna")  # what is imported only when used must be there before the files are not
        become(int(uid[0]))
    os.write(1, b"started\n")
    try:
        ATTACKS[name](json.loads(ground))
    except (OSError, MemoryError) as refusal:
        os.write(1, f"refused: {refusal!r}\n".encode())
    else:
        os.write(1, b"succeeded\n")


if __name__ == "__main__":
    main()
