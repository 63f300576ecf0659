"""The backend that this process uses: probed once by an attack, and from then on the only way to start anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

from app.sandbox import bubblewrap, landlock
from app.sandbox.contract import Launch, Profile, Sandbox, SandboxUnavailable
from app.sandbox.probe import Probe, probe

Name = Literal["auto", "bubblewrap", "landlock"]
# The better first, each with what helps where it starts nothing; none: the probe knows.
_BACKENDS: Final[dict[str, tuple[Callable[[], Sandbox], str]]] = {
    "bubblewrap": (bubblewrap.packaged, ""),
    "landlock": (landlock.built_in, landlock.REMEDY),
}


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


async def choose(name: Name = "auto") -> ProbedSandbox:
    """Probe the named backend, or all until one holds; never raises, since a service without one still says why."""
    refused: list[ProbedSandbox] = []
    for candidate in _BACKENDS if name == "auto" else (name,):
        probed = await _probed(candidate)
        if probed.result:
            return _instead_of(refused, probed)
        refused.append(probed)
    return refused[0] if len(refused) == 1 else ProbedSandbox(None, _none_of([each.result for each in refused]))


async def _probed(name: str) -> ProbedSandbox:
    make, remedy = _BACKENDS[name]
    try:
        backend = make()
    except SandboxUnavailable as error:
        return ProbedSandbox(None, Probe(ok=False, backend=name, reason=error.detail, remedy=error.remedy))
    return ProbedSandbox(backend, await probe(backend, remedy=remedy))


def _instead_of(refused: list[ProbedSandbox], probed: ProbedSandbox) -> ProbedSandbox:
    reasons = [f"not {each.name}: {each.result.reason}" for each in refused]
    notes = [note for note in (probed.result.note, *reasons) if note]
    return replace(probed, result=replace(probed.result, note="; ".join(notes)))


def _none_of(results: list[Probe]) -> Probe:
    """Every backend's reason and remedy, by its name."""
    return Probe(
        ok=False,
        backend="none",
        reason="; ".join(f"{each.backend}: {each.reason}" for each in results),
        remedy="; or ".join(f"for {each.backend}: {each.remedy}" for each in results),
        note=results[0].note,
    )
