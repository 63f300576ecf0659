"""What `bulkhead db dump` writes is whole and its owner's alone, whoever else writes there."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from app.embedded import dumps
from app.embedded.programs import Programs
from app.errors import ConfigurationError

# A server that says its version and nothing else.
_SERVER: Final = "#!/bin/sh\necho 'postgres (PostgreSQL) {}'\n"


def test_two_dumps_to_one_file_do_not_mix(tmp_path: Path) -> None:
    """Each has a part of its own: else the first to end gives its name to what the other has written so far."""
    file = tmp_path / "database.dump"
    with ExitStack() as slow:
        half = slow.enter_context(dumps._new(file))
        with dumps._new(file) as quick:
            assert os.write(half, b"half") == len(b"half")
            assert os.write(quick, b"whole") == len(b"whole")
        assert file.read_bytes() == b"whole"
        with pytest.raises(ConfigurationError, match="is there already"):
            slow.close()
    assert file.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_link_that_leads_nowhere_is_something_that_is_there(tmp_path: Path) -> None:
    file = tmp_path / "database.dump"
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError, match="is there already"), dumps._new(file):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_server_is_the_one_that_the_folder_names_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are started in the root: by a relative path they were another's, such as tmp/old for /tmp/old."""
    monkeypatch.chdir(tmp_path)
    there = Path(str(tmp_path).removeprefix("/"))
    for folder, version in ((tmp_path, 19), (tmp_path / there, 18)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "postgres").write_text(_SERVER.format(version))
        (folder / "postgres").chmod(0o755)
    assert Programs(packages=None, copies=tmp_path, folder=tmp_path).server({}).major == "19", "the other's"
    server = Programs(packages=None, copies=tmp_path, folder=there).server({})
    assert (server.folder, server.major) == (tmp_path / there, "18")
