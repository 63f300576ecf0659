"""An environment is built from its lock or not at all, and is started only as it was built."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from typer.testing import CliRunner

from app.cli import cli
from app.errors import AppError
from app.sandbox import runtimes
from app.servers import installs, locks, trees
from app.servers.catalogue import Catalogue, EntryInvalid, NotInCatalogue
from app.servers.errors import ServerUnavailable
from app.servers.installs import InstallFailed, Installs
from tests.servers.command.probes import NODE, PYTHON, write_entry
from tests.servers.command.registry import Registry, serving_package

TOOL: Final = 'kind = "node"\ncommand = "tool"\n'


@pytest.fixture
def made(tmp_path: Path) -> Installs:
    """With an entry `own` in its catalogue, which needs no packages."""
    write_entry(tmp_path / "catalogue", "own", PYTHON)
    return fresh(tmp_path)


def fresh(folder: Path) -> Installs:
    """As another process finds it."""
    return Installs(Catalogue(folder / "catalogue"), folder / "installed")


def left(folder: Path, name: str) -> list[str]:
    """What an installation has left, but for its lock."""
    home = folder / "installed" / name
    return sorted(path.name for path in home.iterdir() if path.name != ".lock") if home.exists() else []


def test_what_is_installed_is_readable_for_all_writable_for_none_and_found(made: Installs, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        assert made.install("own")
    finally:
        os.umask(before)
    assert made.verify("own") is None
    found = made.find("own")
    assert (found.folder / "program" / "server.py").is_file()
    for path in (found.folder.parent, *found.folder.parent.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o644), path
    assert not made.install("own")  # it is there


def test_two_at_once_build_one(made: Installs, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        built = list(pool.map(lambda _: fresh(tmp_path).install("own"), range(4)))
    assert sorted(built) == [False, False, False, True]
    assert len(left(tmp_path, "own")) == 1
    assert made.verify("own") is None


def test_what_a_killed_installation_left_is_cleared_by_the_next(made: Installs, tmp_path: Path) -> None:
    stale = tmp_path / "installed" / "own" / ".building-killed" / "made"
    stale.mkdir(parents=True)
    made.install("own")
    assert len(left(tmp_path, "own")) == 1
    assert not stale.exists()


def test_nothing_starts_that_is_not_installed_or_has_changed_in_the_catalogue(made: Installs, tmp_path: Path) -> None:
    remedy = "run `bulkhead servers install own`"
    with pytest.raises(ServerUnavailable, match=remedy):
        made.find("own")
    made.install("own")
    assert made.find("own").argv[-1] == "/srv/server/program/server.py"
    program = tmp_path / "catalogue" / "own" / "program" / "server.py"
    program.write_text(program.read_text() + "# more\n")
    with pytest.raises(ServerUnavailable, match=remedy):
        made.find("own")
    assert [entry.state for entry in made.states() if entry.name == "own"] == ["changed since it was installed"]
    made.install("own")
    made.find("own")


def test_what_is_wrong_with_an_entry_is_told_to_the_operator_and_to_nobody_else(made: Installs, tmp_path: Path) -> None:
    made.install("own")
    (tmp_path / "catalogue" / "own" / "server.toml").write_text(f"{PYTHON}private = 'of the operator'\n")
    with pytest.raises(ServerUnavailable) as refused:
        made.find("own")
    assert "private" not in refused.value.detail
    assert [entry.note for entry in made.states() if "private" in entry.note]  # the control


def _change(tree: Path) -> str:
    (tree / "program" / "server.py").write_text("import os")
    return "program/server.py has changed"


def _change_but_not_its_size(tree: Path) -> str:
    path = tree / "program" / "server.py"
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return "program/server.py has changed"


def _add(tree: Path) -> str:
    (tree / "packages" / "sitecustomize.py").write_text("import os")
    (tree / "packages" / "sitecustomize.py").chmod(0o644)
    return "packages/sitecustomize.py was not installed"


def _link(tree: Path) -> str:
    (tree / "packages" / "a").symlink_to("/etc")
    return "packages/a is neither a file nor a folder"


def _remove(tree: Path) -> str:
    (tree / "program" / "server.mjs").unlink()
    return "program/server.mjs is missing"


def _open(tree: Path) -> str:
    (tree / "program").chmod(0o777)
    return "program may be written by others"


@pytest.mark.parametrize("tamper", [_change, _change_but_not_its_size, _add, _link, _remove, _open])
def test_what_was_tampered_with_is_named_refused_by_the_next_process_and_built_anew(
    made: Installs, tmp_path: Path, tamper: object
) -> None:
    made.install("own")
    made.find("own")  # the control
    assert callable(tamper)
    said = tamper(made.find("own").folder)
    assert made.verify("own") == said
    with pytest.raises(ServerUnavailable, match="is not what was installed"):
        fresh(tmp_path).find("own")
    assert made.install("own")
    assert made.verify("own") is None
    fresh(tmp_path).find("own")


def test_an_environment_without_its_record_is_none(made: Installs, tmp_path: Path) -> None:
    made.install("own")
    (made.find("own").folder.parent / "record.json").unlink()
    with pytest.raises(ServerUnavailable, match="is not installed"):
        made.find("own")


@pytest.mark.parametrize("name", ["../catalogue/own", "/etc", "none"])
def test_a_name_leads_nowhere_else(made: Installs, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    for ask in (made.install, made.verify):
        with pytest.raises(NotInCatalogue):
            ask(name)
    with pytest.raises(ServerUnavailable):
        made.find(name)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_program_that_no_package_has_is_not_installed(tmp_path: Path) -> None:
    for name, manifest in {"a": 'kind = "python"\ncommand = "tool"\n', "b": TOOL}.items():
        write_entry(tmp_path / "catalogue", name, manifest)
        with pytest.raises(InstallFailed, match="has the program 'tool'"):
            fresh(tmp_path).install(name)
        assert left(tmp_path, name) == []


def test_a_link_in_a_tree_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("/etc")
    with pytest.raises(trees.NotPlain):
        trees.settle(tmp_path)


# What the installers are given


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the script of a package would leave."""
    return tmp_path / "marker"


@pytest.fixture
def registry(marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    with serving_package(marker) as served:
        monkeypatch.setenv("npm_config_registry", served.url)
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "cache"))
        yield served


def test_the_script_of_a_package_of_npm_is_not_run(registry: Registry, marker: Path, tmp_path: Path) -> None:
    folder = write_entry(tmp_path / "catalogue", "tool", TOOL, **registry.lock())
    fresh(tmp_path).install("tool")
    assert fresh(tmp_path).find("tool").argv[-1] == "/srv/server/node_modules/tool/tool.js"
    assert not marker.exists()
    work = tmp_path / "work"  # the control
    work.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copy(folder / name, work)
    node, npm = installs._node()
    environment = {**os.environ, "PATH": f"{node.parent}:{os.environ['PATH']}"}
    subprocess.run([node, npm, "ci", "--loglevel=error"], cwd=work, check=True, timeout=60, env=environment)
    assert marker.exists()


def test_a_package_of_npm_with_another_hash_is_not_installed(registry: Registry, tmp_path: Path) -> None:
    write_entry(tmp_path / "catalogue", "tool", TOOL, **registry.lock(f"sha512-{'A' * 86}=="))
    with pytest.raises(InstallFailed, match="EINTEGRITY"):
        fresh(tmp_path).install("tool")
    assert left(tmp_path, "tool") == []


def _without_a_hash(registry: Registry) -> dict[str, str]:
    files = registry.lock()
    lock = json.loads(files["package-lock__json"])
    del lock["packages"]["node_modules/tool"]["integrity"]
    lock["packages"]["node_modules/tool"]["inBundle"] = True
    return {**files, "package-lock__json": json.dumps(lock)}


def _by_its_address(registry: Registry) -> dict[str, str]:
    files = registry.lock(f"sha512-{'A' * 86}==")
    address = f'"tool": "{registry.url}tool/-/tool-1.0.0.tgz"'
    return {name: text.replace('"tool": "1.0.0"', address) for name, text in files.items()}


@pytest.mark.parametrize("lock", [_without_a_hash, _by_its_address])
def test_a_lock_whose_hash_npm_would_not_check_is_refused(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: Callable[[Registry], dict[str, str]]
) -> None:
    write_entry(tmp_path / "catalogue", "tool", TOOL, **lock(registry))
    with pytest.raises(EntryInvalid):
        fresh(tmp_path).install("tool")
    assert left(tmp_path, "tool") == []
    monkeypatch.setattr(locks, "package_faults", lambda *_: [])  # the control: npm takes it
    fresh(tmp_path).install("tool")
    assert fresh(tmp_path).find("tool").argv[-1] == "/srv/server/node_modules/tool/tool.js"


BACKEND: Final = """
from pathlib import Path
Path({marker!r}).write_text("ran")
raise SystemExit("no metadata")
"""


@pytest.fixture
def source_package(marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line of a lock for a source distribution whose build leaves the marker; pip finds it, and nothing else."""
    project = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    metadata = "Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n"
    files = {"pyproject.toml": project, "backend.py": BACKEND.format(marker=str(marker)), "PKG-INFO": metadata}
    found = tmp_path / "found"
    found.mkdir()
    path = found / "tool-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"tool-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(found), "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(name, value)
    return f"tool==1.0 --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def test_a_package_of_pypi_that_would_have_to_be_built_is_not(
    source_package: str, marker: Path, tmp_path: Path
) -> None:
    lock = write_entry(tmp_path / "catalogue", "tool", PYTHON, requirements__txt=source_package) / "requirements.txt"
    with pytest.raises(InstallFailed, match="No matching distribution"):
        fresh(tmp_path).install("tool")
    assert left(tmp_path, "tool") == []
    assert not marker.exists()
    argv = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "t"), "-r", str(lock)]
    subprocess.run(argv, check=False, capture_output=True, timeout=60)  # the control
    assert marker.exists()


def _wheel(folder: Path) -> Path:
    import zipfile  # noqa: PLC0415  for this alone

    path = folder / "tool-1.0-py3-none-any.whl"
    info = "tool-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tool.py", "def main(): ...\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tool\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/entry_points.txt", "[console_scripts]\ntool = tool:main\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_a_package_of_pypi_with_another_hash_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    digest = hashlib.sha256(_wheel(tmp_path).read_bytes()).hexdigest()
    manifest = 'kind = "python"\ncommand = "tool"\n'
    lock = write_entry(tmp_path / "catalogue", "tool", manifest) / "requirements.txt"
    lock.write_text(f"tool==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(InstallFailed, match="DO NOT MATCH THE HASHES"):
        fresh(tmp_path).install("tool")
    assert left(tmp_path, "tool") == []
    lock.write_text(f"tool==1.0 --hash=sha256:{digest}\n")  # the control
    fresh(tmp_path).install("tool")
    assert "tool:main" in fresh(tmp_path).find("tool").argv


def test_an_old_node_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "bin" / "node"
    npm = tmp_path / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    for path, text in {node: "#!/bin/sh\necho v20.20.2\n", npm: ""}.items():
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    write_entry(tmp_path / "catalogue", "own", NODE)
    fresh(tmp_path).install("own")  # the control
    monkeypatch.setattr(runtimes, "installed_node", lambda: node)
    (tmp_path / "catalogue" / "own" / "program" / "server.mjs").write_text("// another\n")
    with pytest.raises(InstallFailed, match=r"v20\.20\.2: install 24\.5 or later"):
        fresh(tmp_path).install("own")


# The command


def test_the_command_installs_lists_and_verifies(
    made: Installs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BULKHEAD_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("BULKHEAD_SERVER_CATALOGUE", str(tmp_path / "catalogue"))
    monkeypatch.chdir(tmp_path)
    assert "own: not installed" in said("list")
    assert said("install", "own") == "own is installed.\n"
    assert "as it was built" in said("install", "own")
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert "own: installed" in said("list")
    assert "as it was installed" in said("verify", "own")
    _change(next((tmp_path / "data").glob("servers/installed/own/*/tree")))
    failed = CliRunner().invoke(cli, ["servers", "verify", "own"]).exception
    assert isinstance(failed, AppError)  # which the command prints in one line
    assert failed.detail == "own is not what was installed: program/server.py has changed."


def said(*words: str) -> str:
    ran = CliRunner().invoke(cli, ["servers", *words])
    assert ran.exit_code == 0, ran.output
    return ran.output
