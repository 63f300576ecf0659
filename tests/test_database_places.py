"""Where the database is, in whatever spelling, is known: no tool server may be let through to it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from sqlalchemy import text

from app.db import DatabaseUrls, Unreachable, create_engine
from app.errors import ConfigurationError

_URL = "postgresql+asyncpg://someone:secret@"


def _urls(url: str) -> DatabaseUrls:
    return DatabaseUrls(None, url, url, url)


@pytest.mark.parametrize(
    "spelling",
    [
        "127.0.0.1:{port}/x",
        "/x?host=127.0.0.1&port={port}",
        "/x?host=127.0.0.1:{port}",
        "/x?host=127.0.0.1:{port}&host=127.0.0.1:1",
        "127.0.0.1/x?port={port}",
        "elsewhere.invalid:1/x?host=127.0.0.1&port={port}",
    ],
)
async def test_where_the_driver_connects_is_what_is_known(spelling: str) -> None:
    met = asyncio.Event()

    def meet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        met.set()
        writer.close()

    async with await asyncio.start_server(meet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = _URL + spelling.format(port=port)
        assert ("127.0.0.1", port) in _urls(url).places()
        engine = create_engine(url, pool_size=1)
        with suppress(Unreachable):
            async with engine.connect() as connection:
                await connection.execute(text("select 1"))
        await engine.dispose()
        assert met.is_set()


@pytest.mark.parametrize(
    ("rest", "places"),
    [
        ("db/x", [("db", 5432)]),
        ("[::1]:6000/x", [("::1", 6000)]),
        ("/x?host=10.0.0.5:5432&host=10.0.0.6:5433", [("10.0.0.5", 5432), ("10.0.0.6", 5433)]),
        ("/x?host=a,b&port=1,2", [("a", 1), ("b", 2)]),
        ("/x?host=/run/postgresql", []),
        ("/x?host=/run/postgresql:5432&host=b:1", [("b", 1)]),
    ],
)
def test_every_host_is_known_and_a_socket_is_none(rest: str, places: list[tuple[str, int]]) -> None:
    assert _urls(_URL + rest).places() == places


def test_all_roles_count_and_each_place_once() -> None:
    urls = DatabaseUrls(f"{_URL}a/x", f"{_URL}b/x", f"{_URL}a:5432/x", f"{_URL}a/x")
    assert urls.places() == [("a", 5432), ("b", 5432)]


@pytest.mark.parametrize(
    "url",
    [
        f"{_URL}/x",  # the driver asks its environment, then tries localhost
        f"{_URL}/x?dsn=postgresql://h:1/x",
        f"{_URL}a/x?service=else",
        f"{_URL}/x?host=a:1&host=b:none",
        "secret",
    ],
)
def test_a_url_that_does_not_say_where_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        _urls(url).places()
    assert "secret" not in str(refused.value)
