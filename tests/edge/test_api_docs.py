"""The page /docs shows the API, and loads, runs and asks nothing that is not of this service."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

import fastapi_offline
import pytest

from app import api_docs
from app.headers import closing
from app.settings import Settings
from tests.openapi import unconnected_app
from tests.routes import operations
from tests.service import Client, Service, new_client

BROWSER: Final = shutil.which("chromium-headless-shell")
PACKAGED: Final = Path(fastapi_offline.__file__).parent / "static"


@pytest.fixture
async def stranger(service: Service) -> Client:
    return await service.client("nobody")


async def test_the_page_names_only_what_is_here_and_says_so_to_browsers(stranger: Client) -> None:
    page = await stranger.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert sorted(named) == sorted(f"/docs/{name}" for name in api_docs.ASSETS)
    assert not re.search(r"<script(?! src=)|<style|\son\w+=|https?://", page.text)
    policy = dict(part.strip().partition(" ")[::2] for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"


async def test_its_files_are_those_of_the_package_byte_for_byte(stranger: Client) -> None:
    for name, kind in api_docs.ASSETS.items():
        answer = await stranger.get(f"/docs/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        if name != "start.js":
            assert answer.content == (PACKAGED / name).read_bytes()
        again = await stranger.get(f"/docs/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/docs/", "/docs/redoc.standalone.js", "/docs/..%2fcore.py", "/docs/start.js/", "/redoc"]
)
async def test_nothing_else_of_the_package_is_there(stranger: Client, path: str) -> None:
    assert (await stranger.get(path)).status_code == 404


def test_it_can_be_switched_off() -> None:
    assert Settings(_env_file=None).api_docs
    on, off = (
        {operation.path for operation in operations(unconnected_app(api_docs=is_on)) if "docs" in operation.path}
        for is_on in (True, False)
    )
    assert on == {"/docs", *(f"/docs/{name}" for name in api_docs.ASSETS)}
    assert off == set()


async def rendered(url: str, folder: Path) -> tuple[str, str]:
    """The page as the browser has built it, and what its console says."""
    assert BROWSER is not None
    process = await asyncio.create_subprocess_exec(
        *(BROWSER, "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
        *("--virtual-time-budget=10000", "--enable-logging=stderr", f"--user-data-dir={folder}", "--dump-dom", url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(90):
        dom, console = await process.communicate()
    return dom.decode(), "\n".join(line for line in console.decode().splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(
    BROWSER is None, reason="There is no headless browser here: apt-get install chromium-headless-shell"
)
async def test_a_browser_shows_the_whole_api_and_has_nothing_to_complain_of(service: Service, tmp_path: Path) -> None:
    dom, console = await rendered(f"{service.url}/docs", tmp_path)
    shown = set(re.findall(r'data-path="([^"]*)"', dom))
    assert {path.replace("\u200b", "") for path in shown} == set(service.app.openapi()["paths"])
    assert console == ""


@pytest.mark.long
@pytest.mark.skipif(
    BROWSER is None, reason="There is no headless browser here: apt-get install chromium-headless-shell"
)
async def test_under_the_policy_of_all_other_answers_the_browser_runs_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The control of the one above: it is the policy that browsers go by."""
    monkeypatch.setattr(api_docs, "POLICY", closing(has_tls=False)["Content-Security-Policy"])
    dom, console = await rendered(f"{service.url}/docs", tmp_path)
    assert "data-path" not in dom
    assert "Content Security Policy" in console


async def test_no_other_site_may_read_or_send_anything(service: Service) -> None:
    """No origin is allowed, so a browser asks first and is told nothing that would let it go on."""
    async with new_client(service.url, "nobody") as client:
        for path in ("/query", "/docs", "/openapi.json", "/metrics", "/v1/me"):
            asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
            asking["Access-Control-Request-Headers"] = "authorization"
            for method in ("OPTIONS", "GET"):
                answer = await client.request(method, path, headers=asking)
                assert not [name for name in answer.headers if name.startswith("access-control")]
                assert method == "GET" or answer.status_code == 405
                assert answer.headers["cross-origin-resource-policy"] == "same-origin"
