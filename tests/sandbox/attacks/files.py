"""Files that are none of the server's, or that it may only read."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from .calls import Ground, attack, attack_where, call, checked, holds_nonce, libc

_SAME = "read me"  # what stands in it: an attack that succeeds bare must leave something for the next


@attack
def read_a_file_of_the_host(ground: Ground) -> None:
    holds_nonce(Path(ground["secret"]).read_bytes(), ground)


@attack
def read_another_tenants_folder_beside_mine(ground: Ground) -> None:
    holds_nonce(Path(ground["workspace"], "..", "tenant-b", "notes.txt").read_bytes(), ground)


@attack
def climb_from_an_open_folder(ground: Ground) -> None:
    folder = os.open(ground["workspace"], os.O_RDONLY | os.O_DIRECTORY)
    os.fchdir(folder)
    holds_nonce(Path("../tenant-b/notes.txt").read_bytes(), ground)


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
def win_a_race_by_swapping_a_link(ground: Ground) -> None:
    """One process swaps what a name leads to, another opens it over and over."""
    folder, door = Path(ground["workspace"]), Path(ground["workspace"], "swapped")
    deadline = time.monotonic() + 1
    child = os.fork()
    if child == 0:
        for number in range(100_000):
            if time.monotonic() > deadline:
                break
            fresh = folder / f"swap-{number % 2}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(ground["secret"] if number % 2 else "own.txt")
            fresh.replace(door)
        os._exit(0)
    try:
        while time.monotonic() < deadline:
            try:
                return holds_nonce(door.read_bytes(), ground)
            except OSError:
                continue
    finally:
        os.waitpid(child, 0)
        door.unlink(missing_ok=True)
    raise FileNotFoundError


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
def take_a_handle_of_a_file_of_the_host(ground: Ground) -> None:
    handle, mount = ctypes.create_string_buffer(b"\x80", 136), ctypes.c_int()  # room for 128 bytes
    call("name_to_handle_at", -100, ground["secret"].encode(), handle, ctypes.byref(mount), 0)


@attack_where("a capability over the whole file system")
def open_a_file_by_its_handle(ground: Ground) -> None:
    handle, mount = ctypes.create_string_buffer(b"\x80", 136), ctypes.c_int()  # room for 128 bytes
    here = os.open(ground["workspace"], os.O_RDONLY)
    call("name_to_handle_at", -100, (ground["workspace"] + "/own.txt").encode(), handle, ctypes.byref(mount), 0)
    call("open_by_handle_at", here, handle, os.O_RDONLY)


@attack
def watch_another_tenants_folder(ground: Ground) -> None:
    watch = checked(libc.inotify_init1(0))
    checked(libc.inotify_add_watch(watch, str(Path(ground["secret"]).parent / "tenant-b").encode(), 0x100))


@attack_where("the kernel's version: 5.13 lets an ordinary user")
def watch_files_by_fanotify(ground: Ground) -> None:
    call("fanotify_init", 0x200, 0)  # FAN_REPORT_FID


@attack
def read_shared_memory_of_the_host(ground: Ground) -> None:
    holds_nonce(Path(ground["shared_memory"]).read_bytes(), ground)


@attack
def learn_where_the_host_keeps_my_workspace(ground: Ground) -> None:
    texts = [os.path.realpath(ground["workspace"])]
    for name in ("mountinfo", "maps"):
        try:
            texts.append(Path("/proc/self", name).read_text())
        except OSError:
            continue
    if not any(ground["folder"] in text for text in texts):
        raise FileNotFoundError


@attack
def write_to_a_read_only_mount(ground: Ground) -> None:
    Path(ground["reference"], "written").write_text("x")


@attack
def make_a_read_only_file_writable_and_write(ground: Ground) -> None:
    manual = Path(ground["reference"], "manual.txt")
    manual.chmod(0o666)
    manual.write_text(_SAME)


@attack
def change_the_mode_of_a_read_only_file(ground: Ground) -> None:
    Path(ground["reference"], "manual.txt").chmod(0o600)


@attack
def truncate_a_read_only_file(ground: Ground) -> None:
    os.truncate(Path(ground["reference"], "manual.txt"), len(_SAME))


@attack
def reopen_a_read_only_file_for_writing(ground: Ground) -> None:
    file = os.open(ground["reference"] + "/manual.txt", os.O_RDONLY)
    os.write(os.open(f"/proc/self/fd/{file}", os.O_WRONLY), _SAME.encode())


@attack
def delete_a_read_only_file(ground: Ground) -> None:
    manual = Path(ground["reference"], "manual.txt")
    manual.unlink()
    manual.write_text(_SAME)


@attack
def put_my_file_in_the_place_of_a_read_only_one(ground: Ground) -> None:
    mine = Path(ground["workspace"], "forged.txt")
    mine.write_text(_SAME)
    mine.replace(Path(ground["reference"], "manual.txt"))


@attack
def link_a_read_only_file_into_my_workspace_and_write(ground: Ground) -> None:
    link = Path(ground["workspace"], "linked.txt")
    link.unlink(missing_ok=True)
    link.hardlink_to(Path(ground["reference"], "manual.txt"))
    link.write_text(_SAME)


@attack_where("the file system: not every one has attributes")
def hide_something_in_the_attributes_of_a_file(ground: Ground) -> None:
    os.setxattr(ground["workspace"] + "/own.txt", "user.hidden", b"x")


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
