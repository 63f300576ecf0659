"""The host rules of templates that have a network: read from the policy and the argument alone, nothing is resolved.

They are the first of two walls: the egress relay, outside the sandbox, connects to the policy's hosts and to no other.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import unquote_to_bytes

from app.policies.decision import BuiltIn, Denial

HTTPS: Final = 443
_LABEL: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# What the C library, too, reads as a number: 127.1, 0x7f000001.
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT: Final = re.compile(r"[1-9][0-9]{0,4}")
_NAMED: Final = 10

_URL: Final = re.compile(r"https://(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<query>\?[^#]*)?")
_UNPRINTABLE: Final = re.compile(r"[^\x21-\x7e]")
_UNUSUAL: Final = re.compile(r'[\\"<>^`{|}]')
_ESCAPE: Final = re.compile(r"%(?P<code>[0-9A-F]{2})?")
# What stands for itself, which an escape would only spell anew; and controls and %, which nobody asks for in earnest.
_PLAIN: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$'()*,:@/%\x7f") | {
    chr(code) for code in range(0x20)
}
# In a query an escaped delimiter is a part of a value, and a bare one is not. Some servers decode a backslash.
_PLAIN_IN_PATH: Final = _PLAIN | frozenset("&=+;\\")
_PLAIN_IN_QUERY: Final = _PLAIN | frozenset("?")

HostPort = tuple[str, int]


def parse_host(text: str) -> HostPort:
    """`docs.example.com` or `docs.example.com:8443` as host and port. Raises ValueError with what is wrong."""
    for mark, fault in (
        ("://", "must be a host name, without a scheme"),
        ("@", "must be a host name, without user information"),
        ("/", "must be a host name, without a path"),
        ("*", "must be a whole host name: there are no wildcards"),
        ("[", "must be a host name, not an IP address"),
    ):
        if mark in text:
            raise ValueError(fault)
    host, colon, port = text.partition(":")
    if ":" in port:
        raise ValueError("must be a host name, not an IP address")
    _check_name(host)
    return host, _port(port) if colon else HTTPS


def spelled(host: HostPort) -> str:
    """The one spelling of a host and its port."""
    return host[0] if host[1] == HTTPS else f"{host[0]}:{host[1]}"


def check_url(argument: object, *, allowed: Collection[HostPort]) -> Denial | None:
    """What speaks against this URL argument."""
    fault = _url_fault(argument)
    if fault is not None:
        return Denial(BuiltIn.URL, f"The URL {fault}.")
    found = _URL.fullmatch(str(argument))
    if found is None or found["authority"] not in {spelled(host) for host in allowed}:
        return Denial(BuiltIn.HOST, f"Only {_listed(allowed)}, spelled so.")
    return None


def _check_name(name: str) -> None:
    labels = name.split(".")
    faults = (
        (not name, "must name a host"),
        (not name.isascii(), "must be ASCII: write an international name with its xn-- labels"),
        (name != name.lower(), "must be in lower case"),
        (name.endswith("."), "must not end with a dot"),
        (_NUMBER.fullmatch(labels[-1]), "must be a host name, not an IP address or a number"),
        (len(name) > 253 or not all(map(_LABEL.fullmatch, labels)), "is not a valid host name"),
    )
    for holds, fault in faults:
        if holds:
            raise ValueError(fault)


def _port(text: str) -> int:
    if not _PORT.fullmatch(text) or int(text) > 65535:
        raise ValueError("must have a port from 1 to 65535")
    return int(text)


def _url_fault(argument: object) -> str | None:
    if not isinstance(argument, str) or not argument:
        return "must be text and not empty"
    found = _URL.match(argument)
    if found is None:
        return "must begin with https://"
    path, query = found["path"], found["query"] or ""
    faults = (
        (_UNPRINTABLE.search(argument), "holds a character that must be percent-encoded"),
        (_UNUSUAL.search(argument), "holds a character that must be percent-encoded"),
        ("#" in argument, "must have no fragment"),
        ("@" in found["authority"], "must hold no user information"),
        (not path or query == "?", "must have a path, / at least, and no empty query"),
        # One page has one spelling, so that a policy's rule on URLs holds.
        (not {"", ".", ".."}.isdisjoint(path.split("/")[1:-1]), "has an empty or dotted part"),
        (path.rpartition("/")[2] in {".", ".."}, "has an empty or dotted part"),
        (";" in path, "has a part with parameters"),
        (_is_oddly_escaped(path, _PLAIN_IN_PATH), "encodes what it need not, or wrongly"),
        (_is_oddly_escaped(query, _PLAIN_IN_QUERY), "encodes what it need not, or wrongly"),
    )
    return next((fault for holds, fault in faults if holds), None)


def _is_oddly_escaped(text: str, unescaped: frozenset[str]) -> bool:
    codes = [found["code"] for found in _ESCAPE.finditer(text)]
    if any(code is None or chr(int(code, 16)) in unescaped for code in codes):
        return True
    try:
        unquote_to_bytes(text).decode()
    except UnicodeError:  # among others a longer form of what may not be escaped
        return True
    return False


def _listed(allowed: Collection[HostPort]) -> str:
    named = sorted(map(spelled, allowed))
    more = [f"{len(named) - _NAMED} more of the policy"] if len(named) > _NAMED else []
    return "https://" + ", https://".join([*named[:_NAMED]]) + "".join(f" and {each}" for each in more)
