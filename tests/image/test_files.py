"""What the image and compose are made from, read as texts: no engine is needed. The image itself: `make image-test`."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from app import VERSION
from app.settings import Settings

ROOT: Final = Path(__file__).resolve().parents[2]
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()
COMPOSE: Final = ROOT / "docs/deploy/compose"
# What the operator makes; docs/deploy/compose.md says how.
_MADE: Final = {"./roles.sql"}
_TRIM: Final = (ROOT / "docs/deploy/image/trim.py").read_text()
_PINNED: Final = re.compile(r"[a-z0-9./_-]+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}")
_NEW_NAMESPACES: Final = ["clone", "mount", "pivot_root", "sethostname", "umount2", "unshare"]


def _services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
    return services


def test_hadolint_has_nothing_against_the_dockerfile() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_base_is_named_by_its_digest() -> None:
    bases = re.findall(r"^FROM (?:--\S+ )*(\S+)", DOCKERFILE, re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    assert set(bases) - stages == {"${PYTHON_IMAGE}", "scratch"}
    default = re.search(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert default is not None
    assert _PINNED.fullmatch(default[1])


def test_the_versions_are_one() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == VERSION
    assert set(re.findall(r"^ARG VERSION=(\S+)$", DOCKERFILE, re.MULTILINE)) == {version}


def test_what_is_installed_is_locked_and_no_source_is_built() -> None:
    assert DOCKERFILE.count("pip install") == 1
    for option in ("--require-hashes", "--no-deps", "--only-binary :all:"):
        assert option in DOCKERFILE
    assert not re.search(r"^ADD |https?://|curl|wget", DOCKERFILE, re.MULTILINE)
    assert DOCKERFILE.index("pip install") < DOCKERFILE.index("COPY app")


@pytest.mark.parametrize(
    ("path", "is_sent"),
    [
        ("app/cli.py", True),
        ("migrations/env.py", True),
        ("requirements/base.txt", True),
        ("docs/deploy/image/bulkhead", True),
        (".env", False),
        ("app/.env", False),
        (".git/config", False),
        (".bulkhead/demo.env", False),
        ("tests/conftest.py", False),
        ("requirements/dev.txt", False),
        ("app/__pycache__/cli.cpython-311.pyc", False),
        ("docs/deploy/compose/.env", False),
        ("key.pem", False),
    ],
)
def test_only_what_runs_is_sent_to_the_builder(path: str, *, is_sent: bool) -> None:
    assert _is_sent(path) == is_sent


def _is_sent(path: str) -> bool:
    """As engines read the file: the last line that matches the path, or a folder above it, decides."""
    sent = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and _matches(path, pattern):
            sent = line.startswith("!")
    return sent


def _matches(path: str, pattern: str) -> bool:
    parts = path.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(part, pattern[3:]) for part in parts)
    return any(fnmatch.fnmatchcase(each, pattern) and each.count("/") == pattern.count("/") for each in above)


def test_every_source_of_a_copy_is_sent() -> None:
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert _is_sent(source), source


def test_the_profile_means_the_same_to_every_runtime() -> None:
    """Some read Docker's words as well as OCI's, others pass over them, which would open what they restrict."""
    profile = json.loads((ROOT / "k8s/seccomp/bulkhead.json").read_text())
    assert set(profile) == {"defaultAction", "defaultErrnoRet", "architectures", "syscalls"}
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", 1)
    for rule in profile["syscalls"]:
        assert set(rule) <= {"names", "action", "args", "errnoRet"}, rule
    assert profile["syscalls"][-1] == {"names": _NEW_NAMESPACES, "action": "SCMP_ACT_ALLOW"}


def test_the_profile_allows_nothing_that_rules_the_machine() -> None:
    rules = json.loads((ROOT / "k8s/seccomp/bulkhead.json").read_text())["syscalls"]
    free = {
        name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" and "args" not in rule for name in rule["names"]
    }
    closed = """acct add_key bpf chroot clock_settime clone3 delete_module fanotify_init finit_module fsconfig fsmount
        fsopen init_module io_uring_enter io_uring_register io_uring_setup ioperm iopl kexec_file_load kexec_load keyctl
        mount_setattr move_mount open_by_handle_at open_tree perf_event_open process_vm_readv process_vm_writev ptrace
        quotactl reboot request_key setns settimeofday swapoff swapon syslog userfaultfd vhangup"""
    assert not free & set(closed.split())


def test_no_rule_of_the_profile_is_passed_by_the_half_that_the_kernel_does_not_read() -> None:
    """Arguments are 64 bits to a filter, and 32 to most calls: 2**32 + 38 is more than 40, and the family 38."""
    rules = json.loads((ROOT / "k8s/seccomp/bulkhead.json").read_text())["syscalls"]
    comparisons = {each["op"] for rule in rules for each in rule.get("args", ())}
    assert comparisons == {"SCMP_CMP_LT", "SCMP_CMP_EQ"}


@pytest.mark.parametrize("name", sorted(_services()))
def test_every_service_of_compose_is_walled_in(name: str) -> None:
    service = _services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert int(service["user"].partition(":")[0]) > 0
    assert service["pids_limit"] <= 1024
    assert service["mem_limit"]
    assert not service.keys() & {"privileged", "cap_add", "devices", "pid", "ipc", "userns_mode"}
    assert not any("docker.sock" in str(volume) for volume in service.get("volumes", ()))
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), "only a proxy is for others"


@pytest.mark.parametrize("name", sorted(_services()))
def test_every_image_of_compose_is_pinned(name: str) -> None:
    image = _services()[name]["image"]
    assert image.startswith("${BULKHEAD_IMAGE:?") or _PINNED.fullmatch(image.partition(":-")[2].removesuffix("}")), (
        image
    )


def test_every_file_that_compose_mounts_is_there() -> None:
    volumes = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["volumes"]
    for service in _services().values():
        for source in (volume.partition(":")[0] for volume in service.get("volumes", ())):
            assert source in volumes or source in _MADE or (COMPOSE / source).resolve().exists(), source


def test_compose_names_settings_that_there_are() -> None:
    known = {f"BULKHEAD_{name}".upper() for name in Settings.model_fields}
    ours = [service for service in _services().values() if "BULKHEAD_IMAGE" in service["image"]]
    assert len(ours) == 5
    for service in ours:
        assert service["environment"].keys() <= known


def test_compose_gives_each_container_what_it_needs_alone() -> None:
    services = _services()
    assert services["relay"]["environment"].keys() == {"BULKHEAD_EGRESS_SOCKET"}
    owners = [name for name, each in services.items() if "OWNER_PASSWORD" in str(each)]
    keys = [name for name, each in services.items() if "ROOT_KEYS" in str(each)]
    assert (owners, keys) == (["migrate", "bootstrap"], ["bootstrap", "api", "worker"])


def test_compose_keeps_the_heads_of_the_record_where_the_database_is_not() -> None:
    services = _services()
    path = Path(services["api"]["environment"]["BULKHEAD_AUDIT_HEADS_FILE"])
    (volume,) = [source for source, place in _mounts(services["api"]) if place == str(path.parent)]
    assert volume in yaml.safe_load((COMPOSE / "compose.yaml").read_text())["volumes"]
    assert [name for name, each in services.items() if volume in dict(_mounts(each))] == ["api"]


def test_volumes_of_compose_are_the_users_of_the_image() -> None:
    """What no folder of the image lies under is made by the engine, for root."""
    made = re.findall(r'"(/[a-z/-]+)"', re.findall(r"for folder in \((.+)\):", _TRIM)[0])
    for name, service in _services().items():
        if "BULKHEAD_IMAGE" in service["image"]:
            places = {place for _, place in _mounts(service)} - {"/var/run/postgresql"}  # which is Postgres' own
            assert places <= set(made), name


def _mounts(service: dict[str, Any]) -> list[tuple[str, str]]:
    """The source and the place of each."""
    parts = (volume.split(":") for volume in service.get("volumes", ()))
    return [(source, place) for source, place, *_ in parts]


def test_every_variable_of_compose_is_in_its_sample() -> None:
    asked = set(re.findall(r"\$\{([A-Z_]+)", (COMPOSE / "compose.yaml").read_text()))
    offered = set(re.findall(r"^([A-Z_]+)=", (COMPOSE / ".env.example").read_text(), re.MULTILINE))
    with_default = {name for name in asked if name.endswith("_IMAGE")} - {"BULKHEAD_IMAGE"}
    assert asked - with_default == offered


def test_secrets_of_compose_are_files_that_the_page_makes() -> None:
    """A read-only root takes no others, and what stands in an argument is shown to everybody on the host."""
    secrets = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["secrets"]
    made = re.findall(r"> (secrets/\S+)$", (COMPOSE.parent / "compose.md").read_text(), re.MULTILINE)
    assert {each["file"] for each in secrets.values()} == {f"./{name}" for name in made}
    for name, service in _services().items():
        assert not re.search(r"PASSWORD|TOKEN|KEY", str(service.get("command"))), name
        for secret in service.get("secrets", ()):
            assert secret in secrets


def test_dependencies_of_compose_can_be_waited_for() -> None:
    services = _services()
    for service in services.values():
        needs = service.get("depends_on", {})
        for name, how in needs.items() if isinstance(needs, dict) else ():
            awaited = services[name]
            is_ours = "BULKHEAD_IMAGE" in awaited["image"]  # which brings a HEALTHCHECK
            assert how["condition"] != "service_healthy" or "healthcheck" in awaited or is_ours, name
