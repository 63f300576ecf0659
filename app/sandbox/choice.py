"""The backend that this process uses: probed once by an attack, and from then on the only way to start anything."""

from __future__ import annotations

from dataclasses import dataclass

from app.sandbox import bubblewrap
from app.sandbox.contract import Launch, Profile, Sandbox, SandboxUnavailable
from app.sandbox.probe import Probe, probe


@dataclass(frozen=True, slots=True)
class ProbedSandbox:
    """A backend with the result of its probe; it launches nothing where the probe has failed."""

    backend: Sandbox | None
    result: Probe

    @property
    def name(self) -> str:
        """The backend's name."""
        return self.result.backend

    def launch(self, profile: Profile) -> Launch:
        """Raise SandboxUnavailable instead of ever starting a server bare."""
        if self.backend is None or not self.result:
            raise SandboxUnavailable(remedy=self.result.remedy)
        return self.backend.launch(profile)


async def choose() -> ProbedSandbox:
    """Probe the backends that there are; never raises, since a service without a sandbox still says why."""
    try:
        backend = bubblewrap.packaged()
    except SandboxUnavailable as error:
        return ProbedSandbox(None, Probe(ok=False, backend="none", reason=error.detail, remedy=error.remedy))
    return ProbedSandbox(backend, await probe(backend))
