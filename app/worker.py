"""The process that executes background runs: procrastinate's worker over the same parts as the service's."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from fastapi import FastAPI, Request
from procrastinate import App, PsycopgConnector
from procrastinate.exceptions import ConnectorException
from procrastinate.jobs import DeleteJobCondition, Job, Status
from procrastinate.manager import JobManager
from procrastinate.worker import Worker as Engine
from psycopg import AsyncConnection
from psycopg import Error as PsycopgError
from psycopg.conninfo import make_conninfo
from psycopg_pool import PoolTimeout
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from app import lifetime, operations, parts, problems
from app.db import Database, DatabaseUrls, is_away
from app.edge import Edge, bounds
from app.errors import AppError, ConfigurationError
from app.listening import listening
from app.platform_db import PlatformDatabase
from app.runs.dispatch import DEAD_AFTER_S, SWEEP_S, Dispatch
from app.runs.grace import Grace
from app.runs.lifecycle import unclaimable
from app.runs.service import RunService, Worked
from app.runs.state import INTERNAL
from app.sandbox.choice import ProbedSandbox
from app.servers import templates
from app.settings import Settings
from app.telemetry import labels, metrics

_log = structlog.get_logger()
_QUEUE: Final = "runs"
# Nobody is notified of jobs (migration 0013): so long a job waits for a worker with a place, at most.
_POLL_S: Final = 0.2
_HEARTBEAT_S: Final = 2.0
_ASK_AGAIN_S: Final = 1.0
_ENDING_S: Final = 10
# What a database that goes away shows itself as.
_DATABASE_LOST: Final = (ConnectorException, PsycopgError, PoolTimeout, SQLAlchemyError, OSError, TimeoutError)
# What a URL may say beside its place: to libpq by these names; what concerns one driver alone is left out.
_TO_LIBPQ: Final = {
    "host": "host",
    "port": "port",
    "user": "user",
    "password": "password",
    "database": "dbname",
    "ssl": "sslmode",
    "target_session_attrs": "target_session_attrs",
    "passfile": "passfile",
    "krbsrvname": "krbsrvname",
}
_OF_ASYNCPG: Final = {
    "timeout",
    "command_timeout",
    "statement_cache_size",
    "prepared_statement_cache_size",
    "prepared_statement_name_func",
    "max_cached_statement_lifetime",
    "max_cacheable_statement_size",
}


def conninfo(url: str) -> str:
    """The URL of a role, as libpq takes it: the same place, the same credential, as much TLS.

    Raise ConfigurationError for what it could only leave out.
    """
    parsed = make_url(url)
    told = parsed.get_dialect()().create_connect_args(parsed)[1]
    if unknown := sorted(told.keys() - _TO_LIBPQ.keys() - _OF_ASYNCPG):
        raise ConfigurationError(f"A worker's database URL may not say {', '.join(unknown)}.")
    named = {_TO_LIBPQ[name]: _joined(value) for name, value in told.items() if name in _TO_LIBPQ}
    return make_conninfo(**named, connect_timeout=10, application_name="bulkhead worker")


def _joined(value: Any) -> str:
    """Of many hosts and ports libpq takes lists."""
    return ",".join("" if item is None else str(item) for item in value) if isinstance(value, list) else str(value)


class _Jobs(JobManager):
    """Takes none while no place is free for its run, so that another worker does: an engine that begins anew, as where
    it lost the database, knows nothing of the runs that have gone on.
    """

    def __init__(self, connector: PsycopgConnector, places: asyncio.Semaphore) -> None:
        super().__init__(connector)
        self._places = places

    async def fetch_job(self, queues: Iterable[str] | None, worker_id: int) -> Job | None:
        """As the engine asks, again and again."""
        return None if self._places.locked() else await super().fetch_job(queues, worker_id)


class Worker:
    """Takes jobs and works on their runs, `places` at once; sweeps up what dead workers have left.

    A job is done once its run was taken up; that the run ends is up to its lease, whatever becomes of the job.
    """

    def __init__(
        self,
        url: str,
        *,
        runs: RunService,
        dispatch: Dispatch,
        database: Database,
        platform: PlatformDatabase,
        places: int,
        claim_s: int,
        grace: Grace,
    ) -> None:
        self._runs = runs
        self._grace = grace
        self._dispatch = dispatch
        self._database = database
        self._platform = platform
        self._places = places
        self._claim_s = claim_s
        # Of the runs, which go on where the engine with its own places does not.
        self._free = asyncio.Semaphore(places)
        connector = PsycopgConnector(conninfo=conninfo(url), min_size=1, max_size=4, timeout=10, configure=_configure)
        self._app = App(connector=connector)
        self._app.job_manager = _Jobs(connector, self._free)
        self._app.task(name="run", queue=_QUEUE)(self._do)
        self._engine: Engine | None = None
        self._works: dict[UUID, asyncio.Task[None]] = {}
        self._is_stopped = False

    async def keep(self) -> None:
        """Until cancelled; where the database goes away, begin again once it is back. Runs under way go on."""
        while not self._is_stopped:
            try:
                async with self._app.open_async():
                    if not self._is_stopped:
                        await self._take_jobs()
            except _DATABASE_LOST as error:
                _log.warning("worker.database_unavailable", error=type(error).__name__)
                await asyncio.sleep(_ASK_AGAIN_S)
        await asyncio.Event().wait()  # a loop that ends by itself has died

    async def _take_jobs(self) -> None:
        self._engine = Engine(
            self._app,
            queues=[_QUEUE],
            concurrency=self._places,
            fetch_job_polling_interval=_POLL_S,
            listen_notify=False,
            delete_jobs=DeleteJobCondition.ALWAYS,
            install_signal_handlers=False,
            update_heartbeat_interval=_HEARTBEAT_S,
            stalled_worker_timeout=60,
            shutdown_graceful_timeout=0,  # it lets go of jobs, never of runs
        )
        sweeping = asyncio.create_task(self._sweep(), name="sweep")
        try:
            await self._engine.run()  # type: ignore[no-untyped-call]  # nor is stop() below
        finally:
            await lifetime.end(sweeping, again_s=1)  # sooner than whoever ends this loop loses patience

    async def _do(self, tenant_id: str, run_id: str) -> None:
        """What a job asks for. Its end is not the work's: procrastinate ends jobs where it loses the database."""
        run = UUID(run_id)
        await self._free.acquire()
        if self._is_stopped or run in self._works:
            self._free.release()
            return  # fetched in the moment of the end; the next sweep finds it without a job
        work = self._works[run] = asyncio.create_task(self._work(UUID(tenant_id), run), name=f"work {run}")
        work.add_done_callback(partial(self._let_go, run))
        await asyncio.shield(work)

    def _let_go(self, run_id: UUID, _work: asyncio.Task[None]) -> None:
        del self._works[run_id]
        self._free.release()

    async def _work(self, tenant_id: UUID, run_id: UUID) -> None:
        try:
            then = await self._worked(tenant_id, run_id)
            if then is not None:
                await then(tenant_id, run_id)
        except Exception as error:  # noqa: BLE001  as below; the next sweep finds the run without a job
            _tell_failure(error, run_id)

    async def _worked(self, tenant_id: UUID, run_id: UUID) -> Callable[[UUID, UUID], Awaitable[None]] | None:
        """What is to be done with the run then, if anything is."""
        try:
            worked = await self._runs.work(tenant_id, run_id)
        except Exception as error:  # noqa: BLE001  one run's defect must not end the others; it is put off, and tried again
            _tell_failure(error, run_id)
            # What the database has refused, it refuses again: only its absence is nothing that counts.
            return self._put_off if is_away(error) else self._count_failure
        return self._put_off if worked is Worked.BUSY else None

    async def _put_off(self, tenant_id: UUID, run_id: UUID) -> None:
        async with self._database.transaction(tenant_id) as session:
            await self._dispatch.put_off(session, tenant_id, run_id)

    async def _count_failure(self, tenant_id: UUID, run_id: UUID) -> None:
        """Nothing happens to one that was taken up, and whose end has failed: its lease runs out."""
        async with self._database.transaction(tenant_id) as session:
            has_ended = await unclaimable.count(session, self._dispatch, run_id, claim_s=self._claim_s)
        if has_ended:
            metrics.count_run(tenant_id, INTERNAL.state.value, INTERNAL.code)

    async def _sweep(self) -> None:
        while True:
            try:
                await self._bury()
                async with self._platform.transaction() as session:
                    await self._dispatch.sweep(session, grace=self._grace)
            except _DATABASE_LOST as error:
                _log.warning("sweep.database_unavailable", error=type(error).__name__)
            except Exception:  # noqa: BLE001  nothing queued is forgotten for a defect that one round met
                _log.exception("sweep.failed")
            await asyncio.sleep(SWEEP_S)

    async def _bury(self) -> None:
        """End the jobs of dead workers: the sweep makes new ones for their runs, as soon as their leases have run out.

        A new one, not the same again: a worker that was only slow ends its own job, and nobody else's.
        """
        stalled = await self._app.job_manager.get_stalled_jobs(queue=_QUEUE, seconds_since_heartbeat=DEAD_AFTER_S)
        for job in stalled:
            _log.warning("worker.died", job=job.id, worker=job.worker_id)
            with suppress(ConnectorException):  # another worker was faster
                await self._app.job_manager.finish_job(job, Status.FAILED, delete_job=True)

    async def stop(self, *, within_s: float) -> None:
        """Take no more jobs; let runs under way go on for so long, then give them back to the queue."""
        self._is_stopped = True
        if self._engine is not None:
            self._engine.stop()  # type: ignore[no-untyped-call]  # the library does not say
        await self._runs.close(drain_s=within_s)
        deadline = time.monotonic() + _ENDING_S
        while self._works and time.monotonic() < deadline:
            await asyncio.wait(self._works.values(), timeout=0.2)
            await self._runs.close()  # also what was being taken up


def _tell_failure(error: Exception, run_id: UUID) -> None:
    if is_away(error):
        _log.warning("worker.database_unavailable", error=type(error).__name__)
    else:
        _log.error("worker.failed", run_id=str(run_id), exc_info=error)


async def _configure(connection: AsyncConnection[Any]) -> None:
    """The engine names its tables without their schema; not every pooler lets a connection say so as it begins."""
    await connection.execute("set search_path to bulkhead_jobs")
    await connection.commit()


@asynccontextmanager
async def at_work(state: Any, urls: DatabaseUrls, *, drain_s: float) -> AsyncIterator[asyncio.Task[None]]:
    """A worker on these parts, which `/readyz` counts with their other loops; yields its task."""
    worker = Worker(
        urls.platform,
        runs=state.runs,
        dispatch=state.dispatch,
        database=state.database,
        platform=state.platform,
        places=state.settings.worker_runs,
        claim_s=state.settings.run_claim_s,
        grace=state.watch.grace,
    )
    async with AsyncExitStack() as stack:
        task = lifetime.start(stack, worker.keep(), "worker")
        loops, state.background = state.background, (*state.background, task)
        stack.callback(setattr, state, "background", loops)
        stack.push_async_callback(worker.stop, within_s=drain_s)
        yield task


@asynccontextmanager
async def working(
    settings: Settings, *, urls: DatabaseUrls, sandbox: ProbedSandbox, listener: socket.socket
) -> AsyncIterator[asyncio.Task[None]]:
    """Work until the block ends; yields the task that works, which ends early only where it fails."""
    app = _probed(settings, urls, sandbox)
    async with (
        lifetime.alive(app.state, keeps_record=False),
        listening(app, listener, drain_s=1, bounds=bounds(settings)),
        at_work(app.state, urls, drain_s=settings.drain_s) as task,
    ):
        lifetime.settle_collector()
        yield task


def _probed(settings: Settings, urls: DatabaseUrls, sandbox: ProbedSandbox) -> FastAPI:
    """What a worker answers: whether it lives and is ready, and its metrics."""
    app = FastAPI(title="Bulkhead worker", version="0.1.0", openapi_url=None, docs_url=None, redoc_url=None)
    labels.show_tenants(settings.metrics_tenants)
    metrics.begin(app.version, templates.names())
    app.add_middleware(
        Edge,
        max_body_bytes=settings.max_body_bytes,
        trusted_proxies=settings.trusted_proxies,
        has_tls=settings.tls_in_front,
    )
    problems.install(app, failed=_tell)
    app.include_router(operations.probes)
    for name, part in parts.build(settings, urls, sandbox, None).items():
        setattr(app.state, name, part)
    return app


def _tell(_request: Request, problem: AppError, error: Exception) -> None:
    _log.error("worker.probe_failed", code=problem.code, error=type(error).__name__)
