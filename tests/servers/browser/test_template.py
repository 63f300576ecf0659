"""What the section of a policy says, and which calls are refused before the browser hears of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from app.policies.document import PolicyInvalid, parse
from app.policies.servers.browser import BrowserServer
from app.servers.browser import template
from app.servers.errors import ServerUnavailable
from app.servers.starting import bounds
from app.servers.template import Environment, Place
from app.servers.templates import check_call, template_of

BROWSER = BrowserServer(template="browser", allowed_domains=("docs.example.com", "docs.example.com:8443"))
FETCH = {"template": "fetch", "allowed_hosts": ["docs.example.com"]}
STATIC = BROWSER.model_copy(update={"javascript": False})
LOCK = Path(template.__file__).parent / "environment" / "package-lock.json"


@pytest.mark.parametrize(
    ("tool", "arguments", "rule"),
    [
        ("navigate", {"url": "https://docs.example.com/"}, None),
        ("navigate", {"url": "https://docs.example.com:8443/a?b=c"}, None),
        ("navigate", {"url": "https://other.example/"}, "host"),
        ("navigate", {"url": "http://docs.example.com/"}, "url"),
        ("navigate", {"url": "file:///etc/passwd"}, "url"),
        ("navigate", {"url": "javascript:alert(1)"}, "url"),
        ("navigate", {"url": "view-source:https://docs.example.com/"}, "url"),
        ("navigate", {"url": "https://127.0.0.1/"}, "host"),
        ("navigate", {}, "url"),
        ("tabs", {"action": "new", "url": "https://other.example/"}, "host"),
        ("tabs", {"action": "list"}, None),
        ("snapshot", {"filename": "a.yml"}, "schema"),
        ("run_code_unsafe", {"code": "async page => 1"}, "unknown_tool"),
        ("file_upload", {"paths": ["/etc/passwd"]}, "schema"),
        ("file_upload", {}, None),
        ("drop", {"target": "e1", "paths": ["/etc/passwd"]}, "unknown_tool"),
        ("install", {}, "unknown_tool"),
        ("take_screenshot", {}, "unknown_tool"),
        ("evaluate", {"function": "() => 1"}, None),
    ],
)
def test_a_call_is_checked_before_the_browser_hears_of_it(tool: str, arguments: dict[str, Any], rule: str) -> None:
    denial = check_call(BROWSER, f"browser_{tool}", arguments)
    assert (denial.rule if denial else None) == rule


def test_where_pages_may_run_no_script_the_model_may_not_either() -> None:
    denial = check_call(STATIC, "browser_evaluate", {"function": "() => 1"})
    assert denial
    assert denial.rule == "unknown_tool"


def section(**keys: object) -> str:
    declared = {"template": "browser", "allowed_domains": ["docs.example.com"]} | keys
    return json.dumps({"schema": "bulkhead/1", "servers": {"web": declared}})


def test_the_defaults_are_the_strict_ones() -> None:
    declared = parse(section()).servers["web"]
    assert declared == BROWSER.model_copy(update={"allowed_domains": ("docs.example.com",)})
    assert isinstance(declared, BrowserServer)
    assert (declared.block_private_ips, declared.timeout_s, declared.isolation) == (True, 30, "run")
    assert template_of(declared).reaches_private(declared) is False


@pytest.mark.parametrize(
    "keys",
    [
        {"isolation": "tenant"},
        {"isolation": "user"},
        {"allowed_domains": []},
        {"allowed_domains": ["*.example.com"]},
        {"allowed_domains": ["127.0.0.1"]},
        {"allowed_domains": ["https://docs.example.com"]},
        {"timeout_s": 0},
        {"timeout_s": 3600},
        {"allowed_hosts": ["docs.example.com"]},
    ],
)
def test_what_it_cannot_hold_is_refused(keys: dict[str, object]) -> None:
    parse(section())
    with pytest.raises(PolicyInvalid):
        parse(section(**keys))


def test_a_call_ends_also_where_the_server_keeps_to_no_time(tmp_path: Path) -> None:
    declared = BROWSER.model_copy(update={"timeout_s": 7})
    assert bounds(declared, Environment(tmp_path, "/srv/server", ())).call_s == 9
    fetch = parse(json.dumps({"schema": "bulkhead/1", "servers": {"web": FETCH}})).servers["web"]
    assert bounds(fetch, None).call_s == float("inf")  # whose own bound is the platform's


def test_it_does_not_start_from_what_was_not_installed() -> None:
    with pytest.raises(ServerUnavailable, match="bulkhead servers install browser"):
        template.profile(BROWSER, Place(1000))


def test_a_machine_without_a_browser_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(template, "_CHROMIUM", tmp_path / "chromium-headless-shell")
    monkeypatch.setattr("app.sandbox.runtimes.installed_node", lambda: Path(sys.executable))
    with pytest.raises(ServerUnavailable, match="apt-get install") as caught:
        template.profile(BROWSER, Place(1000, environment=Environment(tmp_path, "/srv/server", ())))
    assert str(tmp_path) not in caught.value.detail


def test_the_lock_names_hashes_and_no_addresses() -> None:
    packages = json.loads(LOCK.read_text())["packages"]
    installed = {name: package for name, package in packages.items() if name}
    assert {"node_modules/@playwright/mcp", "node_modules/playwright"} <= set(installed)
    assert all(package["integrity"].startswith("sha512-") for package in installed.values())
    assert "://" not in LOCK.read_text()
