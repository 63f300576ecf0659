"""Attacks, run as a script: first bare, where each must succeed, then inside, where none may.

    python attacks.py GROUND [KEY=VALUE]...

GROUND is JSON: what there is to attack, and by what path; in hexadecimal, since no backend may take its paths for
paths inside. Each KEY=VALUE replaces one of its values; `uid` is whom root becomes first, `only` names the one attack
to make. Each is made by a process of its own, which says "NAME started" and then "NAME succeeded" or "NAME refused";
a limit may end it in between. An attack returns when it has succeeded and raises OSError when it was refused.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import pty
import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.sandbox import bombs
else:
    sys.path.append(str(Path(__file__).parent))  # inside it is run by `python -I`, which leaves that out
    import bombs

Ground = dict[str, Any]
ATTACKS: dict[str, Callable[[Ground], object]] = dict(bombs.BOMBS)
libc = ctypes.CDLL(None, use_errno=True)
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
def change_the_mode_of_a_file_of_the_host(ground: Ground) -> None:
    Path(ground["secret"]).chmod(0o644)


@attack
def change_the_times_of_a_file_of_the_host(ground: Ground) -> None:
    os.utime(ground["secret"], (1, 1))


@attack
def truncate_a_file_of_the_host(ground: Ground) -> None:
    os.truncate(ground["secret"], Path(ground["secret"]).stat().st_size)


@attack
def learn_that_a_file_of_the_host_exists(ground: Ground) -> None:
    Path(ground["secret"]).stat()


@attack
def watch_another_tenants_folder(ground: Ground) -> None:
    watch = checked(libc.inotify_init1(0))
    checked(libc.inotify_add_watch(watch, str(Path(ground["secret"]).parent / "tenant-b").encode(), 0x100))


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
def change_the_mode_of_a_read_only_file(ground: Ground) -> None:
    Path(ground["reference"], "manual.txt").chmod(0o600)


@attack
def truncate_a_read_only_file(ground: Ground) -> None:
    os.truncate(Path(ground["reference"], "manual.txt"), 0)


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
    for number in range(3, 4096):  # the suite has hundreds open when it comes here
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
def learn_that_a_host_process_exists(ground: Ground) -> None:
    Path("/proc", str(ground["victim"])).stat()


@attack
def limit_a_host_process(ground: Ground) -> None:
    resource.prlimit(ground["victim"], resource.RLIMIT_NOFILE, (8, 8))


@attack
def slow_a_host_process(ground: Ground) -> None:
    os.setpriority(os.PRIO_PROCESS, ground["victim"], 5)


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
def send_a_datagram_to_a_unix_socket_in_my_workspace(ground: Ground) -> None:
    # A pair is connected to itself; for datagrams, that keeps nobody from naming another address.
    socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", ground["workspace"] + "/datagrams.sock")


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


def become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(4, 1, 0, 0, 0)  # dumpable again, as a program that this user started would be


def make(name: str, ground: Ground) -> None:
    signal.alarm(10)
    if "uid" in ground:
        become(int(ground["uid"]))
    os.write(1, f"{name} started\n".encode())
    try:
        ATTACKS[name](ground)
    except (OSError, MemoryError) as refusal:
        os.write(1, f"{name} refused {refusal!r}\n".encode())
    else:
        os.write(1, f"{name} succeeded\n".encode())


def main() -> None:
    text, *words = sys.argv[1:]
    ground = json.loads(bytes.fromhex(text)) | dict(word.split("=", 1) for word in words)
    "127.0.0.1".encode("idna")  # what is imported only when used must be there before the files are not
    for name in [ground["only"]] if "only" in ground else ATTACKS:
        child = os.fork()
        if child == 0:
            try:
                make(name, ground)
            finally:
                os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
