"""Mounts, roots and namespaces. Each attack first takes every capability that a namespace of its own would give."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from pathlib import Path

from .calls import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MACHINE,
    Ground,
    attack_where,
    become_all_mighty,
    call,
    checked,
    libc,
)

_NAMESPACES = "the kernel's settings: some refuse an ordinary user's namespaces"


@attack_where(_NAMESPACES)
def make_a_user_namespace(ground: Ground) -> None:
    checked(libc.unshare(CLONE_NEWUSER))


@attack_where(_NAMESPACES)
def clone_into_a_user_namespace(ground: Ground) -> None:
    # glibc's own clone wants a stack; the flags are what counts.
    number = {"x86_64": 56, "aarch64": 220}[MACHINE]
    _reap(checked(int(libc.syscall(number, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0))))


@attack_where(_NAMESPACES)
def clone3_into_a_user_namespace(ground: Ground) -> None:
    arguments = struct.pack("8Q", CLONE_NEWUSER, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    _reap(call("clone3", arguments, ctypes.c_size_t(len(arguments))))


def _reap(child: int) -> None:
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


@attack_where(_NAMESPACES)
def make_a_network_namespace(ground: Ground) -> None:
    checked(libc.unshare(CLONE_NEWUSER | CLONE_NEWNET))


@attack_where(_NAMESPACES)
def enter_the_namespace_of_a_child(ground: Ground) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        libc.unshare(CLONE_NEWUSER)
        os.write(writing, b"x")
        signal.pause()
    os.read(reading, 1)
    try:
        checked(libc.setns(os.open(f"/proc/{child}/ns/user", os.O_RDONLY), 0))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@attack_where("a capability over the host's network")
def enter_the_network_of_the_host(ground: Ground) -> None:
    checked(libc.setns(os.open(f"/proc/{ground['victim']}/ns/net", os.O_RDONLY), 0))


@attack_where(_NAMESPACES)
def mount_over_a_folder(ground: Ground) -> None:
    become_all_mighty()
    checked(libc.mount(b"none", ground["tmp"].encode(), b"tmpfs", 0, None))


@attack_where(_NAMESPACES)
def remount_writable_in_a_namespace(ground: Ground) -> None:
    become_all_mighty()
    reference = ground["reference"].encode()
    checked(libc.mount(reference, reference, None, 0x1000, None))  # MS_BIND
    checked(libc.mount(None, reference, None, 0x1020, None))  # writable: MS_BIND | MS_REMOUNT
    Path(ground["reference"], "written").write_text("x")


@attack_where(_NAMESPACES)
def unmount_what_covers_the_host(ground: Ground) -> None:
    become_all_mighty()
    checked(libc.mount(b"none", ground["tmp"].encode(), b"tmpfs", 0, None))
    checked(libc.umount2(ground["tmp"].encode(), 2))  # MNT_DETACH


@attack_where(_NAMESPACES)
def mount_by_the_new_calls(ground: Ground) -> None:
    become_all_mighty()
    system = call("fsopen", b"tmpfs", 0)
    call("fsconfig", system, 6, None, None, 0)  # FSCONFIG_CMD_CREATE
    mount = call("fsmount", system, 0, 0)
    call("move_mount", mount, b"", -100, ground["tmp"].encode(), 4)  # MOVE_MOUNT_F_EMPTY_PATH


@attack_where("the kernel's version: 5.2")
def open_a_tree_of_mounts(ground: Ground) -> None:
    call("open_tree", -100, b"/", 0)


@attack_where("the kernel's version: 6.8")
def list_the_mounts_by_a_call_newer_than_the_filter(ground: Ground) -> None:
    order, found = struct.pack("IIQQQ", 32, 0, 0xFFFFFFFFFFFFFFFF, 0, 0), (ctypes.c_uint64 * 8)()
    call("listmount", order, found, ctypes.c_size_t(8), 0)


@attack_where(_NAMESPACES)
def pivot_to_a_root_of_my_own(ground: Ground) -> None:
    become_all_mighty()
    checked(libc.mount(b"none", ground["tmp"].encode(), b"tmpfs", 0, None))
    os.chdir(ground["tmp"])
    call("pivot_root", b".", b".")


@attack_where(_NAMESPACES)
def change_root_in_a_namespace(ground: Ground) -> None:
    become_all_mighty()
    os.chroot(ground["workspace"])


@attack_where(_NAMESPACES)
def name_the_machine(ground: Ground) -> None:
    become_all_mighty(CLONE_NEWUTS)
    checked(libc.sethostname(b"attacked", 8))


@attack_where(_NAMESPACES)
def write_a_setting_of_the_kernel(ground: Ground) -> None:
    """As root of a namespace, where the settings of its own network are writable."""
    uid, gid = os.getuid(), os.getgid()
    libc.unshare(CLONE_NEWUSER | CLONE_NEWNET)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


@attack_where("root")
def choose_what_runs_at_a_crash(ground: Ground) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern")
    pattern.write_text(pattern.read_text())


@attack_where("root, who makes a group that its user may join")
def move_to_another_cgroup(ground: Ground) -> None:
    with Path(ground["cgroup"], "cgroup.procs").open("w") as file:
        file.write("0")
