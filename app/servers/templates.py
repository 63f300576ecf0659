"""The templates by name: no other module but the templates' own knows one from another.

A template is code: no tenant names a program, only what of it its server may do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from app.policies.decision import Denial
from app.policies.document import DeclaredServer
from app.servers.browser import template as browser
from app.servers.command import template as command
from app.servers.fetch import template as fetch
from app.servers.filesystem import template as filesystem
from app.servers.http import template as http
from app.servers.postgres import template as postgres
from app.servers.template import Template

_TEMPLATES: Final[dict[str, Template[Any]]] = {
    "browser": browser.TEMPLATE,
    "command": command.TEMPLATE,
    "fetch": fetch.TEMPLATE,
    "filesystem": filesystem.TEMPLATE,
    "http": http.TEMPLATE,
    "postgres": postgres.TEMPLATE,
}


def names() -> frozenset[str]:
    """All templates that there are."""
    return frozenset(_TEMPLATES)


def template_of(declared: DeclaredServer) -> Template[Any]:
    """The template that a server's section is for."""
    return _TEMPLATES[declared.template]


def check_call(declared: DeclaredServer, tool: str, arguments: Mapping[str, Any]) -> Denial | None:
    """What the template's own rules have against a call; asked before the server sees it."""
    return template_of(declared).check_call(declared, tool, arguments)
