"""The relay with few threads for names, and a name server that never answers for what is in `slow.test`."""

from __future__ import annotations

import socket
import time
from typing import Any

from app import egress
from app.outbound import doors

_real = socket.getaddrinfo


def _getaddrinfo(host: bytes, *rest: Any) -> Any:
    if host.endswith(b"slow.test."):
        time.sleep(30)
    return _real("127.0.0.1", *rest)


if __name__ == "__main__":
    socket.getaddrinfo = _getaddrinfo  # type: ignore[assignment]  # it takes what the relay asks with
    egress._RESOLVERS = 16  # type: ignore[misc]  # so that a few seconds of attack would do
    doors._RESOLVE_S = 0.1  # type: ignore[misc, assignment]  # as above
    egress.main()
