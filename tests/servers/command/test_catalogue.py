"""An entry of the catalogue is read strictly: every fault is told, and none of them starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import pytest

from app.policies.servers.command import CommandServer
from app.servers import locks
from app.servers.catalogue import Catalogue, Entry, EntryInvalid, NotInCatalogue
from app.servers.command.template import faults
from tests.servers.command.probes import NODE, PYTHON, write_entry

HASH: Final = f"--hash=sha256:{'0' * 64}"
INTEGRITY: Final = f"sha512-{'A' * 86}=="


def reading(folder: Path, manifest: str, **files: str) -> str:
    """What is wrong with an entry; nothing where it is read."""
    write_entry(folder, "entry", manifest, **files)
    try:
        Catalogue(folder).read("entry")
    except EntryInvalid as error:
        return error.detail
    return ""


ALL: Final = """
kind = "python"
command = "mcp-server-fetch"
args = ["--mode", "{mode}", "--agent", "{agent}"]
workspace = "read"
hosts = ["docs.example.com", "api.example.com:8443"]
env = { API_TOKEN = "required", REGION = "optional" }
isolation = "user"
tools = ["fetch"]
limits = { memory_mb = 256, processes = 32, timeout_s = 20 }

[parameters.mode]
enum = ["fast", "-slow"]
default = "fast"

[parameters.agent]
pattern = "[a-z]+"
"""


def test_an_entry_with_everything_is_read(tmp_path: Path) -> None:
    assert reading(tmp_path, ALL) == ""
    entry = Catalogue(tmp_path).read("entry").entry
    assert entry.arguments({"agent": "me"}) == ["--mode", "fast", "--agent", "me"]
    assert entry.limits.memory_mb == 256


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ('kind = "ruby"\ncommand = "x"', "kind: Input should be 'python' or 'node'"),
        ('kind = "python"\ncommand = "sh"', "sh is not started"),
        ('kind = "python"\ncommand = "sh -c"', "command: "),
        ('kind = "python"\ncommand = "/bin/sh"', "command: "),
        ('kind = "python"\ncommand = "../server.py"', "command: "),
        ('kind = "python"\ncommand = "program/../server.py"', "command: "),
        ('kind = "python"\ncommand = "bash.exe"', "bash.exe is not started"),
        ('kind = "python"\ncommand = "uvx"', "uvx is not started"),
        ('kind = "python"\ncommand = "pip"', "pip is not started"),
        ('kind = "node"\ncommand = "npx"', "npx is not started"),
        ('kind = "node"\ncommand = "npm"', "npm is not started"),
        ('kind = "node"\ncommand = "python"', "an environment of node has no python"),
        ('kind = "python"\ncommand = "python"\nargs = ["-c", "print()"]', "python takes -m and a module first"),
        ('kind = "python"\ncommand = "python"\nargs = ["-m", "{x}"]', "python takes -m and a module first"),
        ('kind = "node"\ncommand = "node"\nargs = ["-e", "1"]', "node takes a script below node_modules/ first"),
        ('kind = "node"\ncommand = "node"\nargs = ["node_modules/../x.js"]', "node takes a script"),
        ('kind = "python"\ncommand = "x"\nargs = "a b"', "args: "),
        ('kind = "python"\ncommand = "x"\nargs = ["--a={b}"]\n[parameters.b]\nenum = ["c"]', "is a whole argument"),
        ('kind = "python"\ncommand = "x"\nargs = ["{b}"]', "b: each parameter is declared"),
        ('kind = "python"\ncommand = "x"\n[parameters.b]\nenum = ["c"]', "b: each parameter is declared"),
        ('kind = "python"\ncommand = "x"\nargs = ["{b}"]\n[parameters.b]\n', "either a pattern or an enum"),
        ('kind = "python"\ncommand = "x"\nargs = ["{b}"]\n[parameters.b]\npattern = "("', "is not a valid RE2"),
        (
            'kind = "python"\ncommand = "x"\nargs = ["{b}"]\n[parameters.b]\npattern = "a"\ndefault = "b"',
            "must match a",
        ),
        ('kind = "python"\ncommand = "x"\nenv = { PATH = "optional" }', "PATH is not an entry's to set"),
        ('kind = "python"\ncommand = "x"\nenv = { LD_PRELOAD = "optional" }', "LD_PRELOAD is not"),
        ('kind = "node"\ncommand = "x"\nenv = { NODE_OPTIONS = "optional" }', "NODE_OPTIONS is not"),
        ('kind = "python"\ncommand = "x"\nenv = { HTTPS_PROXY = "optional" }', "HTTPS_PROXY is not"),
        ('kind = "python"\ncommand = "x"\nhosts = ["127.0.0.1"]', "hosts"),
        ('kind = "python"\ncommand = "x"\nhosts = ["*.example.com"]', "hosts"),
        ('kind = "python"\ncommand = "x"\nlimits = { memory_mb = 100000 }', "limits.memory_mb: "),
        ('kind = "python"\ncommand = "x"\nprivileged = true', "privileged: Extra inputs"),
        ('kind = "python"\ncommand = "program/missing.py"', "program/missing.py is missing"),
        ("kind = ", "server.toml: "),
    ],
)
def test_an_entry_with_a_fault_is_refused_by_it(tmp_path: Path, manifest: str, said: str) -> None:
    assert said in reading(tmp_path, manifest)
    assert reading(tmp_path / "other", PYTHON) == ""  # the control


@pytest.mark.parametrize("name", ["../entry", "/etc", "entry/../entry", "..", ".", "", "Entry", "a" * 33, "entry\n"])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    write_entry(tmp_path / "catalogue", "entry", PYTHON)
    with pytest.raises(NotInCatalogue):
        Catalogue(tmp_path / "catalogue").read(name)
    assert (tmp_path / "catalogue" / "../catalogue/entry" / "server.toml").is_file()  # the control
    assert Catalogue(tmp_path / "catalogue").read("entry").name == "entry"


def test_an_entry_holds_no_link(tmp_path: Path) -> None:
    (write_entry(tmp_path, "entry", PYTHON) / "program" / "more.py").symlink_to("/etc/passwd")
    with pytest.raises(EntryInvalid, match="a link"):
        Catalogue(tmp_path).read("entry")


def test_the_browser_of_bulkhead_is_an_entry_that_none_of_the_folder_replaces(tmp_path: Path) -> None:
    write_entry(tmp_path, "browser", PYTHON)
    assert Catalogue(tmp_path).read("browser").is_built_in
    assert "browser" in Catalogue(tmp_path / "none").names()


def test_a_change_of_any_file_is_another_installation(tmp_path: Path) -> None:
    folder = write_entry(tmp_path, "entry", PYTHON)
    seen = {Catalogue(tmp_path).read("entry").digest}
    for name in ("server.toml", "requirements.txt", "program/server.py"):
        (folder / name).write_text((folder / name).read_text() + "# more\n")
        seen.add(Catalogue(tmp_path).read("entry").digest)
    assert len(seen) == 4


# Locks


@pytest.mark.parametrize(
    "line",
    [
        "a",
        "a==1.0",
        f"a>=1.0 {HASH}",
        f"a==* {HASH}",
        "a==1.0 --hash=md5:00",
        "--index-url https://elsewhere.example/simple",
        "--extra-index-url=https://elsewhere.example/simple",
        "--no-binary :all:",
        "--trusted-host elsewhere.example",
        "-r other.txt",
        "-e .",
        "./a.whl",
        f"a @ https://elsewhere.example/a.whl {HASH}",
        f"a==1.0 {HASH} --global-option=x",
        f"a==1.0 ; python_version > '3' \\\n  --index-url https://elsewhere.example {HASH}",
        f"a==1.0 ; sys_platform == 'x' --index-url=x {HASH}",
        f"# a comment \\\n--index-url https://elsewhere.example/simple\nb==1.0 {HASH}",
        f"b==1.0 {HASH}\u2028--no-index",
    ],
)
def test_a_requirement_is_one_version_with_hashes_and_nothing_else(line: str) -> None:
    assert locks.requirement_faults(f"{line}\n")
    sound = f"# via b\na[x]==1.0 ; python_version > '3' \\\n    {HASH} \\\n    {HASH}\n    # via c\nb==2.0+cpu {HASH}\n"
    assert locks.requirement_faults(sound) == []  # the control


@pytest.mark.parametrize(
    "entry",
    [
        {"version": "1.0.0"},
        {"version": "1.0.0", "integrity": "sha1-AAAAAAAAAAAAAAAAAAAAAAAAAAA="},
        {"version": "1.0.0", "integrity": ""},
        {"version": "git+ssh://elsewhere.example/a.git#1", "integrity": INTEGRITY},
        {"version": "1.0.0", "integrity": INTEGRITY, "resolved": "file:../a"},
        {"version": "1.0.0", "integrity": INTEGRITY, "resolved": "git+ssh://elsewhere.example/a.git"},
        {"version": "1.0.0", "integrity": INTEGRITY, "resolved": "http://elsewhere.example/a.tgz"},
        {"version": "1.0.0", "integrity": INTEGRITY, "resolved": "https://github.com/elsewhere/a.git#1"},
        {"version": "1.0.0", "integrity": INTEGRITY, "resolved": "https://github.com/elsewhere/a.tgz"},
        {"version": "1.0.0", "integrity": INTEGRITY, "link": True},
        {"version": "1.0.0", "integrity": INTEGRITY, "name": "../a"},
        {"version": "1.0.0", "integrity": INTEGRITY, "hasShrinkwrap": True},
        {"version": "1.0.0", "inBundle": True},
        "1.0.0",
    ],
)
def test_a_package_is_one_version_with_its_integrity(entry: object) -> None:
    assert package_faults(entry)
    sound = {"version": "1.0.0", "integrity": INTEGRITY, "resolved": "https://registry.npmjs.org/a/-/a-1.0.0.tgz"}
    assert package_faults(sound) == []  # the control


def package_faults(entry: object, path: str = "node_modules/a", manifest: object = None) -> list[str]:
    lock = {"lockfileVersion": 3, "packages": {"": manifest or {}, path: entry}}
    return locks.package_faults(json.dumps(manifest or {}), json.dumps(lock))


@pytest.mark.parametrize(
    ("spec", "is_taken"),
    [
        *((spec, True) for spec in ("1.0.0", "", "*", "^1.2 || >=2.0.0-rc.1 <3", "1.x - 2", "latest")),
        *((spec, True) for spec in ("npm:b@^1.0.0", "npm:@c/b@1")),
        *((spec, False) for spec in ("git+https://elsewhere.example/a.git", "git@elsewhere.example:a.git", "b/a")),
        *((spec, False) for spec in ("https://elsewhere.example/a.tgz", "file:../a", "..", "./a", "~/a", "/a", "C:a")),
        *((spec, False) for spec in ("a.tgz", "a.TAR.gz", "github:b/a", "npm:a.tgz", "npm:../a@1", "workspace:*", 1)),
    ],
)
def test_what_npm_would_take_from_elsewhere_than_a_registry_is_refused(spec: object, *, is_taken: bool) -> None:
    package = {"version": "1.0.0", "integrity": INTEGRITY}
    for key in ("dependencies", "optionalDependencies", "peerDependencies", "devDependencies"):
        assert (package_faults({**package, key: {"b": spec}}) == []) is is_taken
        assert (package_faults(package, manifest={key: {"b": spec}}) == []) is is_taken


@pytest.mark.parametrize("manifest", [{"workspaces": ["a"]}, {"overrides": {"b": "file:a"}}, {"dependencies": ["a"]}])
def test_what_would_change_what_is_locked_is_refused(manifest: dict[str, object]) -> None:
    package = {"version": "1.0.0", "integrity": INTEGRITY}
    assert package_faults(package, manifest=manifest)
    assert package_faults(package) == []  # the control


@pytest.mark.parametrize(
    ("manifest", "lock"), [("[]", "{}"), ("{}", "no"), ("{}", '{"lockfileVersion": 1, "packages": {}}')]
)
def test_a_lock_that_cannot_be_read_is_a_fault(manifest: str, lock: str) -> None:
    assert locks.package_faults(manifest, lock)
    assert package_faults({"version": "1.0.0", "integrity": INTEGRITY}, path="../a")


# What a policy may say


def entry(**keys: Any) -> Entry:
    return Entry.model_validate_json(json.dumps({"kind": "python", "command": "x", **keys}))


def said(allowed: Entry, **keys: Any) -> dict[str, str]:
    declared = CommandServer.model_validate_json(json.dumps({"template": "command", "server": "it", **keys}))
    return {fault.path: fault.message for fault in faults(declared, allowed)}


PARAMETERS: Final = {"args": ["{p}"], "parameters": {"p": {"pattern": "[a-z]*"}}}


@pytest.mark.parametrize(
    ("allowed", "keys", "sound"),
    [
        ({}, {"root": "docs"}, {}),
        ({"workspace": "read"}, {}, {"root": "docs"}),
        ({"workspace": "read"}, {"root": "docs", "readonly": False}, {"root": "docs"}),
        ({}, {"allowed_hosts": ["a.example"]}, {}),
        ({"hosts": ["a.example"]}, {"allowed_hosts": ["a.example", "b.example"]}, {"allowed_hosts": ["a.example"]}),
        ({"hosts": ["a.example"]}, {"allowed_hosts": ["a.example:8443"]}, {"allowed_hosts": ["a.example:443"]}),
        ({"hosts": ["a.example"]}, {"allowed_hosts": ["b.example"]}, {}),
        ({"isolation": "user"}, {"isolation": "tenant"}, {"isolation": "run"}),
        ({}, {"env": {"TOKEN": "secret:a"}}, {}),
        ({"env": {"TOKEN": "required"}}, {}, {"env": {"TOKEN": "secret:a"}}),
        (PARAMETERS, {}, {"parameters": {"p": "a"}}),
        (PARAMETERS, {"parameters": {"p": "a b"}}, {"parameters": {"p": "a"}}),
        (PARAMETERS, {"parameters": {"p": "a", "q": "a"}}, {"parameters": {"p": "a"}}),
    ],
)
def test_a_policy_may_say_what_the_entry_allows_and_no_more(
    allowed: dict[str, Any], keys: dict[str, Any], sound: dict[str, Any]
) -> None:
    assert len(said(entry(**allowed), **keys)) == 1
    assert said(entry(**allowed), **sound) == {}  # the control


@pytest.mark.parametrize(
    ("parameter", "value", "is_taken"),
    [
        ({"pattern": ".*"}, "-x", False),
        ({"pattern": ".*"}, "x -y", True),
        ({"pattern": "-?[0-9]+"}, "-1", True),
        ({"pattern": "^-?[0-9]+$"}, "-1", True),
        ({"pattern": "[0-9]+"}, "1\u0660", False),
        ({"pattern": "a|b"}, "ab", False),
        ({"enum": ["-v", "b"]}, "-v", True),
        ({"enum": ["-v", "b"]}, "-w", False),
    ],
)
def test_a_value_matches_in_full_and_is_an_option_only_where_the_entry_says_so(
    parameter: dict[str, Any], value: str, *, is_taken: bool
) -> None:
    allowed = entry(args=["{p}"], parameters={"p": parameter})
    assert (said(allowed, parameters={"p": value}) == {}) == is_taken


def test_a_digest_stands_for_the_text_and_not_for_where_it_lies(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        write_entry(tmp_path / folder, "entry", NODE)
    one, other = (Catalogue(tmp_path / folder).read("entry").digest for folder in ("one", "other"))
    assert one == other != hashlib.sha256(b"").hexdigest()[:32]
