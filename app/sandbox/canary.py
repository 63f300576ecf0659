"""Run inside by the probe, as a script: tries to get out and prints, as JSON, what it managed.

    python canary.py HOST FOLDER

HOST is JSON, in hexadecimal since no backend may take its paths for paths inside. Every attempt succeeds where
nothing stops it, so one that fails was stopped.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

_CLONE_NEWUSER = 0x10000000


def reads_a_file_of_the_host(host: dict[str, Any]) -> None:
    Path(host["file"]).read_bytes()


def writes_to_a_read_only_folder(host: dict[str, Any]) -> None:
    Path(host["folder"], "written").touch()


def reaches_a_port_of_the_host(host: dict[str, Any]) -> None:
    socket.create_connection(("127.0.0.1", host["port"]), timeout=2).close()


def sees_a_process_of_the_host(host: dict[str, Any]) -> None:
    # By its moment of start too: inside, the same number is another process.
    if Path("/proc", str(host["pid"]), "stat").read_text().rpartition(")")[2].split()[19] != host["started"]:
        raise ProcessLookupError


def gains_a_namespace(_: dict[str, Any]) -> None:
    if ctypes.CDLL(None).unshare(_CLONE_NEWUSER) != 0:
        raise PermissionError


ATTEMPTS = (
    reads_a_file_of_the_host,
    writes_to_a_read_only_folder,
    reaches_a_port_of_the_host,
    sees_a_process_of_the_host,
    gains_a_namespace,
)


def main() -> None:
    host = json.loads(bytes.fromhex(sys.argv[1])) | {"folder": sys.argv[2]}
    managed = []
    for attempt in ATTEMPTS:
        try:
            attempt(host)
        except OSError:
            continue
        managed.append(attempt.__name__)
    os.write(1, json.dumps({"managed": managed}).encode())


if __name__ == "__main__":
    main()
