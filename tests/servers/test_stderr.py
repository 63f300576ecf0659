"""What servers write to stderr is bounded, and costs nobody else anything."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.servers import stderr
from app.servers.stderr import StderrTail

_MUCH = "import os\nfor number in range({times}): os.write(2, b'x' * 65536)"
_TINY = "import os\nwhile True: os.write(2, b'x')"
_BOTH_BYTES = 2_000_000


@contextmanager
def _server(path: Path, program: str) -> Iterator[subprocess.Popen[bytes]]:
    tail = StderrTail(path)
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", program], stderr=tail.writer) as process:
        tail.close()
        try:
            yield process
        finally:
            process.kill()


def _until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.stderr*"))


def test_servers_that_share_a_name_do_not_end_each_other(tmp_path: Path) -> None:
    """Each starts the file anew: what one has renamed is gone for the other."""
    path, program = tmp_path / "docs.stderr", _MUCH.format(times=100)
    with _server(path, program) as first, _server(path, program) as second, _server(path, program) as third:
        assert [server.wait(20) for server in (first, second, third)] == [0, 0, 0]
    assert 0 < _bytes(tmp_path) <= _BOTH_BYTES


def test_a_file_that_was_removed_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "docs.stderr"
    with _server(path, "import os, time\nwhile True: os.write(2, b'x'); time.sleep(0.05)") as server:
        assert _until(lambda: path.exists() and path.stat().st_size > 0)
        path.unlink()
        assert _until(lambda: path.exists() and path.stat().st_size > 0)
        assert server.poll() is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("is_full", [True, False])
def test_a_full_disk_does_not_stop_a_server_in_its_write(tmp_path: Path, *, is_full: bool) -> None:
    path = tmp_path / "docs.stderr"
    if is_full:
        path.symlink_to("/dev/full")
    with _server(path, _MUCH.format(times=10)) as server:
        assert server.wait(20) == 0
    assert (_bytes(tmp_path) > 0) is not is_full


def _copied(monkeypatch: pytest.MonkeyPatch, path: Path, *, for_s: float) -> int:
    """How often a chunk of a flood of single bytes is kept."""
    kept: list[int] = []
    monkeypatch.setattr(StderrTail, "_keep", lambda _self, chunk: kept.append(len(chunk)))
    with _server(path, _TINY):
        assert _until(lambda: len(kept) > 0)
        kept.clear()
        time.sleep(for_s)
        return len(kept)


def test_a_flood_of_single_bytes_is_read_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _copied(monkeypatch, tmp_path / "docs.stderr", for_s=0.5) < 200
    monkeypatch.setattr(stderr, "_PAUSE_S", 0)  # the control
    monkeypatch.setattr(stderr, "_SHORT_PAUSE_S", 0)
    assert _copied(monkeypatch, tmp_path / "more.stderr", for_s=0.5) > 500


def test_of_all_names_that_a_tenant_has_used_the_newest_stay(tmp_path: Path) -> None:
    for number in range(stderr._MAX_FILES + 20):
        for kind in ("stderr", "stderr.1"):
            old = tmp_path / f"{number}.{kind}"
            old.write_text("old")
            os.utime(old, (number, number))
    (tmp_path / "else").touch()
    with _server(tmp_path / "new.stderr", "") as server:
        server.wait(20)
        assert _until(lambda: len(list(tmp_path.glob("*.stderr*"))) == stderr._MAX_FILES)
    assert (tmp_path / "new.stderr").exists()
    assert (tmp_path / "83.stderr.1").exists()
    assert not (tmp_path / "0.stderr").exists()
    assert (tmp_path / "else").exists()


def test_a_thread_ends_with_its_server(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with _server(tmp_path / "docs.stderr", "") as server:
        server.wait(20)
        assert _until(lambda: set(threading.enumerate()) <= before)
