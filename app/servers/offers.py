"""What of the server catalogue a tenant's policy may name, as its author needs to know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.servers import installs
from app.servers.catalogue import Catalogue, Entry, EntryInvalid, NotInCatalogue


@dataclass(frozen=True, slots=True)
class Offer:
    """An entry that is valid; only what is installed starts."""

    name: str
    entry: Entry
    is_installed: bool


class ServerOffers:
    """Reads the catalogue each time: the platform's admin may be at work in it."""

    def __init__(self, data_dir: Path, folder: Path | None) -> None:
        self._catalogue = Catalogue(folder or data_dir / "catalogue")
        self._installs = installs.below(data_dir, folder)

    def all(self) -> Sequence[Offer]:
        """By name; not those that come with a template, which no policy names. It reads the disk."""
        installed = {listed.name for listed in self._installs.states() if listed.state == "installed"}
        entries = {name: entry for name in self._catalogue.names() if (entry := self._entry(name)) is not None}
        return [Offer(name, entry, name in installed) for name, entry in entries.items()]

    def _entry(self, name: str) -> Entry | None:
        try:
            source = self._catalogue.read(name)
        except (EntryInvalid, NotInCatalogue):
            return None
        return None if source.is_built_in else source.entry
