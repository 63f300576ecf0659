"""The host rules of a template with a network, as tables."""

from __future__ import annotations

import pytest

from app.policies.hosts import check_url, parse_host, spelled

ALLOWED = (("docs.example.com", 443), ("api.example.com", 8443))

# Decoded twice they are something else; controls end a text somewhere, or vanish.
_NEVER = ("25", "252e", "00", "09", "0A", "0D", "1F", "7F")


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("docs.example.com", ("docs.example.com", 443)),
        ("docs.example.com:443", ("docs.example.com", 443)),
        ("api.example.com:8443", ("api.example.com", 8443)),
        ("xn--bcher-kva.example", ("xn--bcher-kva.example", 443)),
        ("intranet:65535", ("intranet", 65535)),
        ("1.2.3.example", ("1.2.3.example", 443)),
        ("a.0xample", ("a.0xample", 443)),
    ],
)
def test_a_host_is_a_name_and_maybe_a_port(text: str, host: tuple[str, int]) -> None:
    assert parse_host(text) == host


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "must name a host"),
        (":443", "must name a host"),
        ("https://docs.example.com", "without a scheme"),
        ("docs.example.com/start", "without a path"),
        ("someone@docs.example.com", "without user information"),
        ("*.example.com", "no wildcards"),
        ("Docs.example.com", "in lower case"),
        ("docs.example.com.", "not end with a dot"),
        ("bücher.example", "xn--"),
        ("docs。example。com", "xn--"),
        ("127.0.0.1", "not an IP address"),
        ("10.1:8443", "not an IP address"),
        ("0x7f000001", "not an IP address"),
        ("127.0.0.0x1", "not an IP address"),
        ("2130706433", "not an IP address"),
        ("::1", "not an IP address"),
        ("[::1]:443", "not an IP address"),
        ("2001:db8::1", "not an IP address"),
        ("docs.example.123", "or a number"),
        ("docs..example", "not a valid host name"),
        (".example", "not a valid host name"),
        ("-a.example", "not a valid host name"),
        ("a_b.example", "not a valid host name"),
        ("a b.example", "not a valid host name"),
        ("a.example\n", "not a valid host name"),
        ("a.example%00", "not a valid host name"),
        (f"{'a' * 64}.example", "not a valid host name"),
        (".".join(["a" * 60] * 5), "not a valid host name"),
        *((f"docs.example.com:{port}", "port from 1 to 65535") for port in ("", "0", "0443", "65536", "+443", " 443")),
        ("docs.example.com:４４３", "port from 1 to 65535"),  # noqa: RUF001  digits to Python, none to us
    ],
)
def test_what_is_no_host_name_is_refused_with_what_is_wrong(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse_host(text)


@pytest.mark.parametrize(
    "url",
    [
        "https://docs.example.com/",
        "https://docs.example.com/a/b.html?q=1&r=%20/..//%C3%BC&s=a%26b%3Dc%2Bd%3Be%5C",
        "https://docs.example.com/a%20b/~c/%C3%BC",
        "https://docs.example.com/@a:b,c(d)!e$f&g=h+i*%3F%22",
        "https://api.example.com:8443/v1/",
    ],
)
def test_a_page_of_a_host_on_the_list_is_allowed(url: str) -> None:
    assert check_url(url, allowed=ALLOWED) is None


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/",
        "https://evil.example/docs.example.com/",
        "https://docs.example.com.evil.example/",
        "https://docs.example.com./",
        "https://DOCS.example.com/",
        "https://docs.example.com:443/",
        "https://docs.example.com:8443/",
        "https://docs.example.com:/",
        "https://api.example.com/",
        "https://api.example.com:08443/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https:///docs.example.com/",
        "https://docs%2Eexample.com/",
    ],
)
def test_a_url_that_is_not_on_the_list_is_denied_by_rule(url: str) -> None:
    denial = check_url(url, allowed=ALLOWED)
    assert denial is not None
    assert denial.rule == "host"
    assert denial.reason == "Only https://api.example.com:8443, https://docs.example.com, spelled so."


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        (None, "text"),
        (7, "text"),
        ("", "text"),
        ("http://docs.example.com/", "https://"),
        ("HTTPS://docs.example.com/", "https://"),
        ("https:/docs.example.com/", "https://"),
        (" https://docs.example.com/", "https://"),
        ("//docs.example.com/", "https://"),
        ("file:///etc/passwd", "https://"),
        ("https://someone@docs.example.com/", "user information"),
        ("https://docs.example.com@evil.example/", "user information"),
        ("https://docs.example.com", "must have a path"),
        ("https://docs.example.com?q", "must have a path"),
        ("https://docs.example.com/?", "empty query"),
        ("https://docs.example.com/#a", "fragment"),
        ("https://docs.example.com/a b", "percent-encoded"),
        ("https://docs.example.com/\r\nHost: evil.example", "percent-encoded"),
        ("https://docs.example.com\\@evil.example/", "percent-encoded"),
        ("https://docs.example.com/ü", "percent-encoded"),
        ("https://docs.example.com/\ud800", "percent-encoded"),
        ("https://docs.example.com/a/../private/", "dotted part"),
        ("https://docs.example.com/./private/", "dotted part"),
        ("https://docs.example.com//private/", "empty"),
        ("https://docs.example.com/a/..", "dotted part"),
        ("https://docs.example.com/%70rivate/", "encodes"),
        ("https://docs.example.com/a%2Fprivate", "encodes"),
        ("https://docs.example.com/a%5Cprivate", "encodes"),
        ("https://docs.example.com/%2E%2E/private", "encodes"),
        ("https://docs.example.com/%c3%bc", "encodes"),
        ("https://docs.example.com/%", "encodes"),
        ("https://docs.example.com/?q=%61", "encodes"),
        *((f"https://docs.example.com/a%{ord(each):02X}b", "encodes") for each in "!$&'()*+,;=:@"),
        *((f"https://docs.example.com/?q=%{ord(each):02X}b", "encodes") for each in "!$'()*,:@/?"),
        *((f"https://docs.example.com/{way}%{code}b", "encodes") for way in ("", "?q=") for code in _NEVER),
        ("https://docs.example.com/%C0%AE%C0%AE/private", "encodes"),
        ("https://docs.example.com/private;x/", "parameters"),
    ],
)
def test_a_page_has_one_spelling(url: object, fault: str) -> None:
    denial = check_url(url, allowed=ALLOWED)
    assert denial is not None
    assert denial.rule == "url"
    assert fault in denial.reason


def test_a_long_list_is_not_told_in_full() -> None:
    denial = check_url("https://evil.example/", allowed=[(f"h{n}.example", 443) for n in range(50)])
    assert denial is not None
    assert denial.reason.count("https://") == 10
    assert "and 40 more" in denial.reason


def test_every_allowed_host_can_be_asked_for_in_its_spelling() -> None:
    for host in ALLOWED:
        assert parse_host(spelled(host)) == host
        assert check_url(f"https://{spelled(host)}/", allowed=ALLOWED) is None
