"""The walls between a path in a tool call and a file, which a control takes down one by one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.policies.servers.filesystem import FilesystemServer
from app.sandbox.choice import ProbedSandbox
from app.sandbox.contract import Launch, Mount, Profile
from app.servers import templates
from app.servers.filesystem import template
from app.servers.template import Place
from tests.servers.filesystem import lab

_PROGRAMS = "/srv"


@contextmanager
def without_gate() -> Iterator[None]:
    """The gate does not look at paths."""
    with pytest.MonkeyPatch.context() as patch:
        open_template = dataclasses.replace(template.TEMPLATE, check_call=lambda *_: None)
        patch.setitem(templates._TEMPLATES, "filesystem", open_template)
        yield


@contextmanager
def weak_server(off: str) -> Iterator[None]:
    """Servers that start in the block lack enforcements of their own; weakened.py has their names."""

    def profile(declared: FilesystemServer, place: Place) -> Profile:
        strong = template.profile(declared, place)
        program = f"{_PROGRAMS}/weakened.py"
        interpreter, isolated, _, _, *options = strong.argv
        return dataclasses.replace(
            strong,
            argv=(interpreter, isolated, program, _PROGRAMS, off, *options),
            mounts=(*strong.mounts, Mount(lab.HERE / "weakened.py", program)),
        )

    with pytest.MonkeyPatch.context() as patch:
        weak = dataclasses.replace(template.TEMPLATE, profile=profile)
        patch.setitem(templates._TEMPLATES, "filesystem", weak)
        yield


@contextmanager
def hostile_server() -> Iterator[None]:
    """Servers that start in the block are an attacker's program, in the place of the template's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template, "_SERVER", Path(__file__).with_name("hostile_server.py"))
        yield


@contextmanager
def no_sandbox(folder: Path) -> Iterator[None]:
    """Servers that start in the block run on the host, as whoever we are; their program is copied to `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProbedSandbox, "launch", _bare(folder))
        yield


def _bare(folder: Path) -> Callable[[ProbedSandbox, Profile], Launch]:
    def launch(_: ProbedSandbox, profile: Profile) -> Launch:
        on_host = {_PROGRAMS: str(folder)} | {mount.target: str(mount.source) for mount in profile.mounts}
        for target, source in list(on_host.items()):
            if target.startswith(f"{_PROGRAMS}/"):
                on_host[target] = str(shutil.copy(source, str(folder / Path(target).name)))
        arguments = (on_host.get(part, part) for part in profile.argv[1:])
        return Launch((sys.executable, *arguments), {**os.environ, **profile.environment})

    return launch
