"""What the kernel shares between processes that know a name or hold the same file."""

from __future__ import annotations

import ctypes
import fcntl
import os
from pathlib import Path

from .calls import Ground, attack, attack_where, call, checked, libc

_PRIVATE, _CREATE = 0, 0o1600


@attack
def share_system_v_memory(ground: Ground) -> None:
    segment = checked(libc.shmget(_PRIVATE, 4096, _CREATE))
    checked(libc.shmctl(segment, 0, None))


@attack
def leave_a_system_v_message(ground: Ground) -> None:
    queue = checked(libc.msgget(_PRIVATE, _CREATE))
    checked(libc.msgctl(queue, 0, None))


@attack
def share_a_system_v_semaphore(ground: Ground) -> None:
    semaphore = checked(libc.semget(_PRIVATE, 1, _CREATE))
    checked(libc.semctl(semaphore, 0, 0))


@attack
def open_a_posix_message_queue(ground: Ground) -> None:
    name = f"attack-{os.getpid()}".encode()
    call("mq_open", name, os.O_CREAT | os.O_RDWR, 0o600, None)
    libc.mq_unlink(b"/" + name)


@attack
def make_a_posix_semaphore_of_the_host(ground: Ground) -> None:
    """One that others open by its name: a file in /dev/shm, as the host sees it."""
    name = Path("/dev/shm", f"sem.{ground['nonce']}")  # noqa: S108  # where it lives
    name.write_bytes(bytes(32))
    is_the_hosts = Path(ground["shared_memory"]).exists()
    name.unlink()
    if not is_the_hosts:
        raise FileNotFoundError


@attack
def lock_a_file_that_others_read(ground: Ground) -> None:
    file = os.open(ground["reference"] + "/manual.txt", os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@attack_where("the file system: a lease is for those that have them")
def hold_up_the_host_with_a_lease(ground: Ground) -> None:
    """Whoever opens the file waits until it is given back, 45 seconds by default."""
    file = os.open(ground["workspace"] + "/leased.txt", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.fcntl(file, 1024, fcntl.F_WRLCK)
    fcntl.fcntl(file, 1024, fcntl.F_UNLCK)


@attack
def be_told_what_happens_in_a_folder(ground: Ground) -> None:
    folder = os.open(str(Path(ground["secret"]).parent / "tenant-b"), os.O_RDONLY)
    fcntl.fcntl(folder, 1026, 0x80000000 | 1)  # F_NOTIFY, the forgotten brother of inotify


@attack_where("the kernel's version: 6.5")
def learn_what_others_have_read(ground: Ground) -> None:
    file = os.open(ground["reference"] + "/manual.txt", os.O_RDONLY)
    span, answer = (ctypes.c_uint64 * 2)(0, 4096), ctypes.create_string_buffer(40)
    call("cachestat", file, span, answer, 0)


@attack_where("the kernel's configuration")
def keep_something_in_the_kernels_keyring(ground: Ground) -> None:
    call("keyctl", 1, 0)  # KEYCTL_JOIN_SESSION_KEYRING


@attack_where("the kernel's configuration")
def leave_a_key_for_others_of_my_user(ground: Ground) -> None:
    call("add_key", b"user", b"attack", b"x", 1, -3)  # the process's keyring: gone with it
