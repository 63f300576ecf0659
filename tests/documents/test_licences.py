"""The page of licences names what is shipped, as it is installed."""

from __future__ import annotations

import pytest

from tests.documents import licences


def test_the_page_is_what_is_installed() -> None:
    assert licences.PAGE.read_text() == licences.page(), "write it anew: python -m tests.documents.licences"


def test_every_pinned_package_for_linux_is_on_the_page() -> None:
    text = licences.PAGE.read_text()
    environment = {"sys_platform": "linux", "python_full_version": "3.13.1", "python_version": "3.13"}
    pins = [pin for name in licences.SHIPPED for pin in licences.pinned(name)]
    needed = {pin.name for pin in pins if pin.marker is None or pin.marker.evaluate(environment)}
    assert len(needed) > 100
    assert {name for name in needed if f"| `{name}` |" not in text} == set()


def test_a_package_that_names_no_licence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licences, "_BY_FILE", {})
    with pytest.raises(AssertionError, match="cedarpy names no licence"):
        licences.licence("cedarpy")
