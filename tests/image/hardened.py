"""The image at work, hardened: migrations, service, worker and relay, each in a container of its own, on both walls.

Run by `make image-test`; it takes root, podman and runc, and so has no name that the suite collects.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest

from app.embedded.machine import rehearsal
from app.embedded.postgres import EmbeddedPostgres
from tests.image import containers
from tests.image.containers import UID, Container
from tests.image.site import Beside, Site, site, walls
from tests.slow_model import slow_model

_SECRET: Final = "The spare key hangs behind the barometer, 7f31."
_STATUS: Final = "print(open('/proc/1/status').read())"
_WRITE: Final = """
import errno, sys
for folder in ("/", "/opt/bulkhead", "/opt/venv/bin", "/usr/lib", "/etc", "/var", "/dev/shm", "/home"):
    try:
        open(folder + "/planted", "w").close()
    except OSError as error:
        print(folder, errno.errorcode[error.errno])
    else:
        print(folder, "written")
"""


@dataclass(frozen=True, slots=True)
class Deployment:
    """What runs, and a user of a tenant with a document."""

    backend: str
    site: Site
    relay: Container
    service: Container
    worker: Container
    user_key: str
    ready_s: float


@pytest.fixture(scope="module")
def beside() -> Iterator[Beside]:
    """A loop for what the containers ask."""
    made = Beside()
    yield made
    made.end()


@pytest.fixture(scope="module", params=["landlock", "bubblewrap"])
def deployment(
    request: pytest.FixtureRequest,
    beside: Beside,
    postgres: EmbeddedPostgres,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Deployment]:
    """One on nodes of either kind."""
    folder = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        model = stack.enter_context(beside.inside(rehearsal()))
        here = stack.enter_context(site(beside, postgres, folder, model))
        wall = walls(folder)[request.param]
        platform_key = here.bootstrapped(*wall)
        options = [*here.options, *wall]
        relay = stack.enter_context(containers.running("egress", env=here.env, options=options))
        relay.until((folder / "run/egress.sock").exists)
        service = stack.enter_context(containers.running(env=here.env, options=options))  # `serve` is the default
        ready_s = service.until(lambda: here.readiness()[0] == 200)
        worker = stack.enter_context(containers.running("worker", env=here.env, options=options))
        worker.until(lambda: worker.is_healthy("ready"))
        user_key = here.new_tenant(platform_key, {"key.md": _SECRET})
        yield Deployment(request.param, here, relay, service, worker, user_key, ready_s)


def _told(container: Container) -> dict[str, str]:
    lines = container.python(_STATUS).output.splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_a_query_is_answered_by_a_sandboxed_tool(deployment: Deployment) -> None:
    with deployment.site.client(deployment.user_key) as user:
        answer = user.post("/query", json={"query": "What does key.md say?"})
    assert answer.status_code == 200, answer.text
    assert _SECRET in answer.json()["answer"]
    assert [(call["tool"], call["decision"]) for call in answer.json()["tool_calls"]] == [
        ("docs__read_file", "allowed")
    ]
    _, readiness = deployment.site.readiness()
    assert readiness["sandbox_detail"]["backend"] == deployment.backend
    figures = f"{deployment.ready_s:.1f} s from start to ready, {containers.size() / 1e6:.0f} MB"
    print(f"\n{deployment.backend}: {figures}")  # noqa: T201  for docs/deploy/image.md; shown by pytest -s


def test_the_relay_of_another_container_is_used(deployment: Deployment) -> None:
    assert deployment.site.readiness()[1]["sandbox_detail"]["egress"] is True
    assert "app.egress" not in deployment.service.python(_EACH_PROCESS).output, "else it has one of its own"


_EACH_PROCESS: Final = """
from pathlib import Path
for process in Path("/proc").glob("[0-9]*"):
    state = (process / "stat").read_text().rpartition(")")[2].split()[0]
    print(state, (process / "cmdline").read_text().replace("\\0", " "))
"""


def test_a_background_run_is_executed_by_the_worker(deployment: Deployment) -> None:
    with deployment.site.client(deployment.user_key) as user:
        run = user.post("/v1/runs", json={"query": "What does key.md say?"}).json()
        for _ in range(300):
            found: dict[str, Any] = user.get(f"/v1/runs/{run['run_id']}").json()
            if found["status"] in {"succeeded", "failed"}:
                break
            time.sleep(0.1)
    assert (found["status"], _SECRET in found["answer"]) == ("succeeded", True), found


def test_no_process_has_a_right_that_it_could_lose(deployment: Deployment) -> None:
    for container in (deployment.relay, deployment.service, deployment.worker):
        told = _told(container)
        assert told["Uid"].split() == told["Gid"].split() == [str(UID)] * 4
        assert {told[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")


# What the image itself, and how it is run, must make pass; the others hang on what is around it.
_OF_THE_IMAGE: Final = {
    *("process-user", "process-rights", "read-only-root", "programs-owned", "python-supported", "schema-version"),
    *("dependencies-pinned", "dependencies-intact", "libraries-silent", "sandbox-egress", "metadata-refused"),
    *("path-canary", "service-ready", "trusted-hosts", "docs-page", "database-link", "required-keys"),
}


def test_the_doctor_works_in_it_and_finds_nothing_to_mend(deployment: Deployment) -> None:
    ended = deployment.service.execute("bulkhead", "doctor", "--json", "--patience", "60")
    items = {each["id"]: each for each in json.loads(ended.output)["items"]}
    assert (ended.status, [each for each in items.values() if each["status"] == "fail"]) == (0, [])
    assert [items[name] for name in _OF_THE_IMAGE if items[name]["status"] != "pass"] == []
    installed = int(items["dependencies-pinned"]["detail"].partition(" packages are installed as they are pinned")[0])
    # Some pins are of other platforms and Pythons, so there are fewer of them than pins.
    assert _pins("base") < installed <= _pins("cloud"), "also of the clouds' SDKs"
    env = deployment.site.env
    for secret in (env["BULKHEAD_ROOT_KEYS"].partition(":")[2], env["BULKHEAD_DATABASE_APP_URL"], deployment.user_key):
        assert secret not in ended.output + ended.complaint


def _pins(requirements: str) -> int:
    pinned = (containers.ROOT / f"requirements/{requirements}.txt").read_text()
    return len(set(re.findall(r"^([a-z0-9._-]+)==", pinned, re.MULTILINE)))


def test_the_doctor_fails_for_what_is_not_in_order(deployment: Deployment) -> None:
    broken = {"BULKHEAD_MODEL_API_KEY": "change-me"}
    ended = deployment.service.execute("bulkhead", "doctor", "--json", "--patience", "60", env=broken)
    failed = {each["id"] for each in json.loads(ended.output)["items"] if each["status"] == "fail"}
    assert (ended.status, "required-keys" in failed) == (1, True)


def test_nothing_of_the_image_can_be_written(deployment: Deployment) -> None:
    # As root of the container, whom no mode of a file would stop: walls.py sees the same succeed without the wall.
    ended = deployment.service.python(_WRITE, user="0")
    outcomes = dict(line.split() for line in ended.output.splitlines())
    assert outcomes.pop("/dev/shm") == "written", "the control: memory of its own"  # noqa: S108  the container's
    assert len(outcomes) == 7
    assert "written" not in outcomes.values(), outcomes


def test_nothing_is_left_of_processes_that_have_ended(deployment: Deployment) -> None:
    lines = deployment.service.python(_EACH_PROCESS).output.splitlines()
    assert [line for line in lines if line.startswith("Z")] == [], "the first process has to bury whom it inherits"


def _signal_service(container: Container, name: str) -> None:
    """The first process passes on what it can; these two are not told it."""
    child = "open('/proc/1/task/1/children').read().split()[0]"
    assert container.python(f"import os, signal; os.kill(int({child}), signal.{name})").status == 0


def test_health_is_that_of_what_runs(deployment: Deployment) -> None:
    for container in (deployment.relay, deployment.service, deployment.worker):
        assert container.is_healthy()
    _signal_service(deployment.service, "SIGSTOP")
    try:
        assert not deployment.service.is_healthy(), "it answers nobody now"
        assert deployment.worker.is_healthy()
    finally:
        _signal_service(deployment.service, "SIGCONT")
    assert deployment.service.is_healthy("ready")


def test_the_log_tells_no_secret(deployment: Deployment) -> None:
    env = deployment.site.env
    secrets = [env["BULKHEAD_ROOT_KEYS"].partition(":")[2], env["BULKHEAD_DATABASE_APP_URL"], deployment.user_key]
    for container in (deployment.relay, deployment.service, deployment.worker):
        assert not [secret for secret in secrets if secret in container.log]
        assert "Traceback" not in container.log
    for line in deployment.service.log.splitlines():
        json.loads(line)


def test_asked_to_end_it_lets_runs_end_and_exits_clean(
    beside: Beside, postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ending")
    with beside.inside(slow_model()) as (slow, model), site(beside, postgres, folder, model) as here:
        wall = walls(folder)["landlock"]
        platform_key = here.bootstrapped(*wall)
        env = {name: value for name, value in here.env.items() if name != "BULKHEAD_EGRESS_SOCKET"}
        with containers.running("serve", env=env, options=[*here.options, *wall]) as service:
            service.until(lambda: here.readiness()[0] == 200)
            user_key = here.new_tenant(platform_key, {"note.md": "Held."})
            answers: list[httpx.Response] = []

            def ask() -> None:
                with here.client(user_key) as user:
                    answers.append(user.post("/query", json={"query": "slowly"}))

            asking = threading.Thread(target=ask)
            asking.start()
            service.until(slow.turns["slowly"].arrived.is_set)
            threading.Timer(2, lambda: beside.loop.call_soon_threadsafe(slow.release_all)).start()
            status, seconds = service.stop()
            asking.join(10)
            assert (status, answers[0].status_code, answers[0].json()["answer"]) == (0, 200, "done")
            assert 1.5 < seconds < 30, "it waited for the run, and no longer"
            assert "Traceback" not in service.log


def test_worker_and_relay_end_clean(deployment: Deployment) -> None:  # the last: they are gone then
    for container in (deployment.worker, deployment.relay):
        status, seconds = container.stop()
        assert (status, seconds < 30) == (0, True), container.log[-2000:]
