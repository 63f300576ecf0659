"""What the programs of ours have in common, whatever their template: our own Python, and one script at one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from app.sandbox import runtimes
from app.sandbox.contract import Mount, Profile
from app.servers import lean
from app.servers.template import Place

# Where a program finds the authorities that the operator trusts, if `trusted` is among its mounts.
CA_FILE: Final = "/srv/ca.pem"
# A server of ours has none; pydantic would look for them in all that is installed: a twentieth of a start.
_NO_PLUGINS: Final = {"PYDANTIC_DISABLE_PLUGINS": "__all__"}


def profile(
    script: Path,
    options: Sequence[str],
    place: Place,
    *,
    mounts: Sequence[Mount] = (),
    files: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Profile:
    """The script with these options, which it must not be able to choose; `mounts` and the rest come on top."""
    python = runtimes.python()
    return Profile(
        argv=(python.interpreter, "-I", "/srv/lean.py", "/srv/server.py", *options),
        host_uid=place.host_uid,
        mounts=(
            *python.mounts,
            Mount(Path(lean.__file__), "/srv/lean.py"),
            Mount(script, "/srv/server.py"),
            *mounts,
        ),
        files={**python.files, **(files or {})},
        environment={**python.environment, **_NO_PLUGINS, **(environment or {})},
        network=place.network,
    )


def trusted(place: Place) -> tuple[Mount, ...]:
    """The authorities to trust instead of the public ones; the host's user of the server must be able to read them."""
    return (Mount(place.ca_file.resolve(), CA_FILE),) if place.ca_file else ()
