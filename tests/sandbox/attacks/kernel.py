"""Parts of the kernel that a tool server has no use for: each is a way in when it has a fault."""

from __future__ import annotations

import ctypes
import os
import struct
import time

from .calls import MACHINE, Ground, attack, attack_where, call, checked, libc

_CONFIGURATION = "the kernel's configuration"
_PRIVILEGE = "a capability"


@attack_where(_CONFIGURATION)
def set_up_an_io_uring(ground: Ground) -> None:
    call("io_uring_setup", 4, ctypes.create_string_buffer(120))


@attack_where(_CONFIGURATION)
def set_up_asynchronous_io(ground: Ground) -> None:
    call("io_setup", 1, ctypes.byref(ctypes.c_ulong(0)))


@attack_where(_CONFIGURATION)
def open_a_userfaultfd(ground: Ground) -> None:
    call("userfaultfd", 1)  # UFFD_USER_MODE_ONLY


@attack_where("the kernel's settings: most refuse an ordinary user")
def load_a_bpf_program(ground: Ground) -> None:
    program = struct.pack("QQ", 0xB7, 0x95)  # r0 = 0; exit
    text, licence = ctypes.create_string_buffer(program), ctypes.create_string_buffer(b"GPL")
    order = struct.pack("IIQQ", 1, 2, ctypes.addressof(text), ctypes.addressof(licence)) + bytes(96)
    call("bpf", 5, order, len(order))


@attack_where("the kernel's settings: most refuse an ordinary user")
def count_events_of_the_kernel(ground: Ground) -> None:
    order = struct.pack("IIQ", 1, 120, 0) + bytes(104)
    call("perf_event_open", order, 0, -1, -1, 0)


@attack_where("the kernel's settings: some hide its log")
def read_the_log_of_the_kernel(ground: Ground) -> None:
    call("syslog", 10, None, 0)  # its size


@attack
def turn_off_address_randomisation(ground: Ground) -> None:
    checked(libc.personality(0x0040000))


@attack_where("the machine: x86")
def change_the_table_of_segments(ground: Ground) -> None:
    if MACHINE != "x86_64":
        raise OSError("no such call on this machine")
    checked(int(libc.syscall(154, 0, ctypes.create_string_buffer(16), 16)))  # modify_ldt: what it is now


@attack
def lock_memory_in_place(ground: Ground) -> None:
    memory = ctypes.create_string_buffer(4096)
    checked(libc.mlock(memory, 4096))


@attack_where(_CONFIGURATION)
def keep_memory_that_the_kernel_cannot_read(ground: Ground) -> None:
    call("memfd_secret", 0)


@attack
def give_the_kernel_pages_without_copying(ground: Ground) -> None:
    reading, writing = os.pipe()
    page = ctypes.create_string_buffer(4096)
    span = (ctypes.c_size_t * 2)(ctypes.addressof(page), 4096)
    call("vmsplice", writing, span, ctypes.c_ulong(1), 0)
    os.close(reading)


@attack
def splice_a_file_into_a_pipe(ground: Ground) -> None:
    _, writing = os.pipe()
    os.splice(os.open(ground["reference"] + "/manual.txt", os.O_RDONLY), writing, 1)


@attack_where(_CONFIGURATION)
def settle_the_quotas_of_the_host(ground: Ground) -> None:
    call("quotactl", 0x80000100, None, 0, None)  # Q_SYNC of everything


@attack_where(_PRIVILEGE)
def set_the_clock(ground: Ground) -> None:
    now = struct.pack("qq", int(time.time()), 0)
    call("clock_settime", 0, now)


@attack_where(_PRIVILEGE)
def set_the_time_zone_of_the_kernel(ground: Ground) -> None:
    call("settimeofday", None, struct.pack("ii", 0, 0))


@attack_where(_PRIVILEGE)
def have_every_process_written_down(ground: Ground) -> None:
    call("acct", None)


@attack_where(_PRIVILEGE)
def swap_to_a_file_of_mine(ground: Ground) -> None:
    call("swapon", (ground["workspace"] + "/own.txt").encode(), 0)


@attack_where(_PRIVILEGE)
def load_a_kernel(ground: Ground) -> None:
    call("kexec_load", 0, 0, None, 0)


@attack_where(_PRIVILEGE)
def load_a_module(ground: Ground) -> None:
    call("finit_module", os.open(ground["workspace"] + "/own.txt", os.O_RDONLY), b"", 0)


@attack_where(_PRIVILEGE)
def use_the_ports_of_the_machine(ground: Ground) -> None:
    if MACHINE != "x86_64":
        raise OSError("no such call on this machine")
    checked(int(libc.syscall(173, 0x80, 1, 1)))  # ioperm
