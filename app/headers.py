"""What every answer says to close what we do not use, whoever makes the answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

_CLOSING: Final = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
# A year, and this name alone: of its subdomains we know nothing.
_TLS_ALONE: Final = {"Strict-Transport-Security": "max-age=31536000"}


def closing(*, has_tls: bool) -> Mapping[str, str]:
    """The headers; with TLS in front also the one that tells browsers to come by TLS alone."""
    return _CLOSING | _TLS_ALONE if has_tls else _CLOSING
