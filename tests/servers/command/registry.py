"""A registry of npm on loopback with one package, which has a script that is run when it is installed."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

NAME = "tool"
_MANIFEST: dict[str, Any] = {
    "name": NAME,
    "version": "1.0.0",
    "bin": {"tool": "tool.js"},
    "scripts": {"install": "node leave.js"},
}


def _archive(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


@dataclass
class Registry:
    """Where it is, and the lock that fits its package."""

    url: str
    integrity: str

    def lock(self, integrity: str | None = None) -> dict[str, str]:
        """package.json and package-lock.json, as files of an entry."""
        root = {"name": "entry", "version": "1.0.0", "dependencies": {NAME: "1.0.0"}}
        locked = {"version": "1.0.0", "integrity": integrity or self.integrity, "hasInstallScript": True}
        packages = {"": root, f"node_modules/{NAME}": locked}
        lock = {"name": "entry", "version": "1.0.0", "lockfileVersion": 3, "packages": packages}
        return {"package__json": json.dumps(root), "package-lock__json": json.dumps(lock)}


@contextmanager
def serving_package(marker: Path) -> Iterator[Registry]:
    """The registry; its package's script leaves the marker."""
    leave = f"require('node:fs').writeFileSync({json.dumps(str(marker))}, 'ran')"
    archive = _archive({"package.json": json.dumps(_MANIFEST), "leave.js": leave, "tool.js": ""})
    integrity = "sha512-" + base64.b64encode(hashlib.sha512(archive).digest()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.endswith(".tgz"):
                self._send(archive)
                return
            dist = {"tarball": f"{registry.url}{NAME}/-/{NAME}-1.0.0.tgz", "integrity": integrity}
            versions = {"1.0.0": {**_MANIFEST, "dist": dist}}
            self._send(json.dumps({"name": NAME, "dist-tags": {"latest": "1.0.0"}, "versions": versions}).encode())

        def _send(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name is the library's
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    registry = Registry(f"http://127.0.0.1:{server.server_port}/", integrity)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
