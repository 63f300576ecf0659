"""Devices and terminals."""

from __future__ import annotations

import fcntl
import os
import pty
from pathlib import Path

from .calls import Ground, attack, attack_where, in_a_child

_TIOCSTI, _TIOCLINUX, _GET_FLAGS = 0x5412, 0x541C, 0x80086601


def _in_a_terminal(request: int, argument: bytes) -> None:
    child, _ = pty.fork()
    if child == 0:
        try:
            fcntl.ioctl(0, request, argument)
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise PermissionError


@attack_where("the kernel's settings: newer ones refuse anyone")
def type_into_a_terminal(ground: Ground) -> None:
    _in_a_terminal(_TIOCSTI, b"x")


@attack_where("a console of the machine")
def paste_into_a_console(ground: Ground) -> None:
    _in_a_terminal(_TIOCLINUX, b"\3")


@attack
def make_a_terminal(ground: Ground) -> None:
    os.openpty()


@attack
def take_over_the_terminal_of_the_host(ground: Ground) -> None:
    def take() -> None:
        os.setsid()
        fcntl.ioctl(os.open(ground["terminal"], os.O_RDWR), 0x540E, 0)  # TIOCSCTTY

    in_a_child(take)


@attack
def read_what_is_known_of_the_hosts_devices(ground: Ground) -> None:
    if not list(Path("/sys/class/net").iterdir()):
        raise FileNotFoundError


@attack_where("root")
def read_a_disk_of_the_host(ground: Ground) -> None:
    disks = [path for path in Path("/dev").iterdir() if path.is_block_device()]
    if not disks:
        raise FileNotFoundError
    disks[0].open("rb").close()


@attack_where("root")
def read_the_memory_of_the_machine(ground: Ground) -> None:
    Path("/dev/mem").open("rb").close()


@attack_where("root")
def write_to_the_log_of_the_kernel(ground: Ground) -> None:
    Path("/dev/kmsg").open("wb").close()


@attack_where("the machine: who may use its devices")
def open_a_device_that_makes_machines_or_networks(ground: Ground) -> None:
    for name in ("fuse", "kvm", "net/tun", "vhost-net", "userfaultfd", "vsock"):
        try:
            return Path("/dev", name).open("r+b", buffering=0).close()
        except OSError:
            continue
    raise FileNotFoundError


@attack_where("root")
def make_a_device(ground: Ground) -> None:
    os.mknod(ground["workspace"] + "/null", 0o20666, os.makedev(1, 3))


@attack_where("the file system: not every one has flags")
def order_a_file_system_about(ground: Ground) -> None:
    fcntl.ioctl(os.open(ground["workspace"] + "/own.txt", os.O_RDONLY), _GET_FLAGS, bytes(8))
