# ruff: noqa: INP001  a program of the image, not a module
"""Takes out of the image whatever the service does not need; run as the last step of the build, inside it.

What stays is the interpreter with its library, the installed packages, shared libraries, certificates, time zones, the
record of the system's packages and their copyright notices. Without a shell nobody can be given one.
"""

from __future__ import annotations

import compileall
import os
import py_compile
import shutil
import sys
import sysconfig
from pathlib import Path

# `ldconfig` tells Python where libseccomp is.
_PROGRAMS = {"ldconfig", Path(os.path.realpath(sys.executable)).name}
_FOLDERS_OF_PROGRAMS = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/bin", "/sbin")
_OURS = {"bulkhead", "healthy"}
_NEEDLESS = (
    *("/boot", "/home", "/media", "/mnt", "/opt/venv/include", "/root", "/srv", "/usr/games"),
    *("/etc/apt", "/etc/cron.d", "/etc/cron.daily", "/etc/init.d", "/etc/kernel", "/etc/logrotate.d", "/etc/pam.d"),
    *("/etc/dpkg", "/etc/pip.conf", "/etc/security", "/etc/skel", "/etc/systemd"),
    *("/usr/include", "/usr/lib/apt", "/usr/lib/dpkg", "/usr/lib/init", "/usr/lib/systemd", "/usr/libexec"),
    *("/usr/lib/python3", "/usr/local/include", "/usr/local/share", "/usr/share/bash-completion", "/usr/share/bug"),
    *("/usr/share/debconf", "/usr/share/info", "/usr/share/lintian", "/usr/share/locale", "/usr/share/man"),
    *("/usr/share/menu", "/usr/share/pam", "/usr/share/pam-configs", "/usr/share/perl", "/usr/share/perl5"),
    *("/usr/share/python-wheels", "/usr/share/python3", "/usr/src"),
    *("/var/backups", "/var/cache", "/var/lib/apt", "/var/lib/dpkg/info", "/var/lib/pam", "/var/log", "/var/mail"),
)
# Of the interpreter's own library.
_NEEDLESS_MODULES = ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tkinter", "turtledemo")
_USER = 10001
# Without the time of the source: nothing is writable later, and a copy of the image's files may change times.
_UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH


def _trim() -> None:
    standard = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    _put_in_ours()
    needless = (*map(Path, _NEEDLESS), *(standard / name for name in _NEEDLESS_MODULES))
    for path in (*needless, *packages.glob("pip*"), *Path("/usr/lib").glob("*/perl*")):
        _remove(path)
    _keep_notices(Path("/usr/share/doc"))
    compileall.compile_dir("/opt/bulkhead", quiet=1, invalidation_mode=_UNCHECKED)
    os.chdir("/")
    _remove(Path("/build"))
    _remove_programs()


def _put_in_ours() -> None:
    for name in _OURS:
        shutil.copy(Path(__file__).with_name(name), f"/opt/venv/bin/{name}")
        Path(f"/opt/venv/bin/{name}").chmod(0o755)
    with Path("/etc/passwd").open("a") as users, Path("/etc/group").open("a") as groups:
        users.write(f"bulkhead:x:{_USER}:{_USER}:Bulkhead:/tmp:/nonexistent\n")
        groups.write(f"bulkhead:x:{_USER}:\n")
    # A volume that is new takes its owner from the folder that it covers.
    for folder in ("/var/lib/bulkhead", "/var/lib/bulkhead-heads", "/run/bulkhead"):
        Path(folder).mkdir(mode=0o700, parents=True)
        os.chown(folder, _USER, _USER)


def _keep_notices(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_symlink() or (path.is_file() and path.name != "copyright"):
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _remove_programs() -> None:
    interpreter = os.path.realpath(sys.executable)
    for folder in map(Path, _FOLDERS_OF_PROGRAMS):
        for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
            if path.name not in _PROGRAMS and os.path.realpath(path) != interpreter:
                _remove(path)
    for path in Path("/opt/venv/bin").iterdir():
        if path.name not in _OURS and os.path.realpath(path) != interpreter:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    _trim()
