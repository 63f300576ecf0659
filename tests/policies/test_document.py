"""The policy document: what is read, and that every fault is told at its place."""

from __future__ import annotations

import time

import pytest

from app.policies.document import PolicyDocument, PolicyInvalid, digest, parse
from app.policies.servers.fetch import FetchServer
from app.policies.servers.filesystem import FilesystemServer

FULL = """
schema: bulkhead/1
model: {use: default, name: gpt-4.1-mini, temperature: 0}
instructions: You answer from the tenant's documents.
limits: {max_steps: 30, timeout_s: 60, max_tool_calls: 40, requests: 5/second}
approvals: {expires_s: 3600, self_approval: false}
conversations: {window_tokens: 4000, retention_days: 30}
input: {preset: off, max_length: 4000, block: ["(?i)internal-only"], flag: [secret]}
servers:
  docs: {template: filesystem, root: docs, readonly: false, max_file_size: 512KB, allowed_extensions: [.txt, .md]}
  site: {template: fetch, allowed_hosts: [docs.example.com, "api.example.com:8443"], max_response_size: 2MB}
tools:
  allow: [docs__*]
  deny: ["*__delete*"]
  approve: [docs__write_file]
  idempotent: [docs__write_file]
  rules: |
    forbid (principal, action == Action::"docs__write_file", resource);
"""


ONE_OF = "must be one of 'browser', 'command', 'filesystem', 'fetch', 'http', 'postgres'"


def faults(text: str) -> dict[str, str]:
    with pytest.raises(PolicyInvalid) as raised:
        parse(text)
    assert raised.value.code == "policy_invalid"
    return {fault.path: fault.message for fault in raised.value.faults}


def with_section(section: str) -> str:
    return f"schema: bulkhead/1\n{section}\n"


def files_of(policy: PolicyDocument) -> FilesystemServer:
    server = policy.servers["docs"]
    assert isinstance(server, FilesystemServer)
    return server


def site_of(text: str) -> FetchServer:
    server = parse(text).servers["site"]
    assert isinstance(server, FetchServer)
    return server


def site(keys: str) -> str:
    return f"servers: {{site: {{template: fetch, {keys}}}}}"


def test_every_key_is_read() -> None:
    policy = parse(FULL)
    server = files_of(policy)
    assert (policy.model.name, policy.limits.requests, policy.input.preset) == ("gpt-4.1-mini", "5/second", "off")
    assert (server.root, server.readonly, server.max_file_size) == ("docs", False, 512 * 1024)
    assert server.allowed_extensions == (".txt", ".md")
    assert policy.tools.deny == ("*__delete*",)
    assert policy.tools.approve == policy.tools.idempotent == ("docs__write_file",)
    assert policy.tools.rules.startswith("forbid")
    assert site_of(FULL).allowed_hosts == ("docs.example.com", "api.example.com:8443")
    assert site_of(FULL).max_response_size == 2 * 1024 * 1024


def test_defaults_are_the_guides() -> None:
    policy = parse(with_section("servers: {docs: {template: filesystem, root: docs}}"))
    server = files_of(policy)
    assert (policy.limits.max_steps, policy.limits.timeout_s, policy.limits.max_tool_calls) == (20, 300, 10)
    assert (policy.limits.requests, policy.input.preset) == ("10/minute", "balanced")
    assert (server.readonly, server.max_file_size) == (True, 10 * 1024 * 1024)
    assert server.allowed_extensions == (".txt", ".md", ".json", ".py")
    assert policy.tools.allow == ()


def test_calls_wait_a_day_and_conversations_are_kept_a_quarter_unless_it_says_otherwise() -> None:
    policy = parse("schema: bulkhead/1")
    assert (policy.approvals.expires_s, policy.approvals.self_approval) == (86_400, True)
    assert (policy.conversations.window_tokens, policy.conversations.retention_days) == (8_000, 90)
    policy = parse(
        with_section(
            "approvals: {expires_s: 60, self_approval: false}\nconversations: {window_tokens: 0, retention_days: 3650}"
        )
    )
    assert (policy.approvals.expires_s, policy.approvals.self_approval) == (60, False)
    assert (policy.conversations.window_tokens, policy.conversations.retention_days) == (0, 3_650)


@pytest.mark.parametrize("level", ["tenant", "user", "run"])
def test_isolation_is_the_tenants_unless_it_says_otherwise(level: str) -> None:
    docs = f"docs: {{template: filesystem, root: docs, isolation: {level}}}"
    site = "site: {template: fetch, allowed_hosts: [a.example]}"
    policy = parse(with_section(f"servers: {{{docs}, {site}}}"))
    assert [server.isolation for server in policy.servers.values()] == [level, "tenant"]


def test_ten_faults_give_ten_errors() -> None:
    found = faults("""
schema: bulkhead/2
surprise: 1
model: {temperature: 3}
limits: {max_steps: 0, timeout_s: 9999, requests: often, tokens_per_day: 0}
input: {block: ["("]}
servers: {docs: {template: filesystem, root: ../etc}}
tools: {allow: ["docs__?"]}
""")
    assert set(found) == {
        "/schema",
        "/surprise",
        "/model/temperature",
        "/limits/max_steps",
        "/limits/timeout_s",
        "/limits/requests",
        "/limits/tokens_per_day",
        "/input/block/0",
        "/servers/docs/root",
        "/tools/allow/0",
    }


@pytest.mark.parametrize(
    ("section", "path", "message"),
    [
        (site("allowed_hosts: [a.example], dsn: x"), "/servers/site/dsn", "dsn is a key of another template"),
        ("approve: [a__b]", "/approve", "approve is not a known key"),
        ("tools: {alow: []}", "/tools/alow", "alow is not a known key"),
        ("limits: {max_steps: 1, max_steps: 2}", "/limits/max_steps", "is given twice"),
        ("a/b~c: 1", "/a~1b~0c", "a/b~c is not a known key"),
    ],
)
def test_a_key_that_is_none_is_refused_by_name(section: str, path: str, message: str) -> None:
    assert faults(with_section(section)) == {path: message}


@pytest.mark.parametrize(
    ("section", "path", "message"),
    [
        ("servers: {web: {template: nope}}", "/servers/web/template", ONE_OF),
        ("servers: {web: {template: [fetch]}}", "/servers/web/template", ONE_OF),
        ("servers: {web: {allowed_hosts: [a.example]}}", "/servers/web/template", "Field required"),
        ("servers: {site: {template: fetch}}", "/servers/site/allowed_hosts", "Field required"),
        ("servers: {site: fetch}", "/servers/site", "Input should be an object"),
        (site("allowed_hosts: [a.example], root: docs"), "/servers/site/root", "root is a key of another template"),
        (
            "servers: {docs: {template: filesystem, root: docs, allowed_hosts: [a.example]}}",
            "/servers/docs/allowed_hosts",
            "allowed_hosts is a key of another template",
        ),
        (site("allowed_hosts: []"), "/servers/site/allowed_hosts", "must name at least one host"),
        (
            site("allowed_hosts: [a.example, 'a.example:443']"),
            "/servers/site/allowed_hosts",
            "names a host and port twice",
        ),
        (
            site("allowed_hosts: [a.example, https://a.example]"),
            "/servers/site/allowed_hosts/1",
            "must be a host name, without a scheme",
        ),
    ],
)
def test_a_server_is_read_by_its_template(section: str, path: str, message: str) -> None:
    assert faults(with_section(section)) == {path: message}


def test_a_rate_that_is_none_is_told_its_form() -> None:
    assert faults(with_section("limits: {requests: 60 a minute}")) == {
        "/limits/requests": 'must be a rate such as "100/minute"'
    }


def test_a_misspelt_template_is_named() -> None:
    assert faults(with_section("servers: {site: {templat: fetch, allowed_hosts: [a.example]}}")) == {
        "/servers/site/template": "Field required",
        "/servers/site/templat": "templat is not a known key",
    }


@pytest.mark.parametrize(
    ("section", "path"),
    [
        (site(f"allowed_hosts: {[f'h{n}.example' for n in range(51)]}"), "/servers/site/allowed_hosts"),
        (site("allowed_hosts: a.example"), "/servers/site/allowed_hosts"),
        (site("allowed_hosts: [7]"), "/servers/site/allowed_hosts/0"),
        (site("allowed_hosts: [a.example], max_response_size: 11MB"), "/servers/site/max_response_size"),
        (site("allowed_hosts: [a.example], isolation: all"), "/servers/site/isolation"),
        ("servers: {Docs: {template: filesystem, root: docs}}", "/servers/Docs"),
        ("servers: {my__docs: {template: filesystem, root: docs}}", "/servers/my__docs"),
        ("servers: {docs: {template: 7, root: docs}}", "/servers/docs/template"),
        ("servers: {docs: {template: filesystem}}", "/servers/docs/root"),
        ("servers: {docs: {template: filesystem, root: docs, readonly: no}}", "/servers/docs/readonly"),
        ("servers: {docs: {template: filesystem, root: docs, max_file_size: 10}}", "/servers/docs/max_file_size"),
        ("servers: {docs: {template: filesystem, root: docs, max_file_size: 101MB}}", "/servers/docs/max_file_size"),
        (
            "servers: {docs: {template: filesystem, root: docs, allowed_extensions: [txt]}}",
            "/servers/docs/allowed_extensions/0",
        ),
        (
            "servers: {docs: {template: filesystem, root: docs, allowed_extensions: []}}",
            "/servers/docs/allowed_extensions",
        ),
        ("limits: {max_steps: true}", "/limits/max_steps"),
        ("limits: {max_steps: '20'}", "/limits/max_steps"),
        ("limits: {max_steps: 1:30}", "/limits/max_steps"),
        ("limits: {requests: 0/minute}", "/limits/requests"),
        ("limits: {requests: '10/minute\n\n'}", "/limits/requests"),
        ("limits:", "/limits"),
        ("model: {temperature: .nan}", "/model/temperature"),
        ("input: {preset: loose}", "/input/preset"),
        ("input: {flag: ['(?=lookahead)']}", "/input/flag/0"),
        (f"input: {{flag: ['{'a' * 501}']}}", "/input/flag/0"),
        (f"input: {{flag: {['a'] * 51}}}", "/input/flag"),
        ("tools: {deny: ['docs__read file']}", "/tools/deny/0"),
        ("tools: {approve: ['docs__re\u0430d']}", "/tools/approve/0"),
        ("tools: {approve: ['docs__[rw]*']}", "/tools/approve/0"),
        ("tools: {approve: docs__read}", "/tools/approve"),
        ("tools:\n  approve:", "/tools/approve"),
        ("tools: {idempotent: ['docs__?']}", "/tools/idempotent/0"),
        ("servers: {docs: {template: filesystem, root: docs, stateful: 1}}", "/servers/docs/stateful"),
        ("servers: {web: {template: browser, allowed_domains: [a.example], stateful: false}}", "/servers/web/stateful"),
        ("approvals: {expires_s: 59}", "/approvals/expires_s"),
        ("approvals: {expires_s: 604801}", "/approvals/expires_s"),
        ("approvals: {self_approval: no}", "/approvals/self_approval"),
        ("approvals: {self_approval: 'false'}", "/approvals/self_approval"),
        ("approvals: {scope: all}", "/approvals/scope"),
        ("conversations: {window_tokens: -1}", "/conversations/window_tokens"),
        ("conversations: {window_tokens: 200001}", "/conversations/window_tokens"),
        ("conversations: {retention_days: 0}", "/conversations/retention_days"),
        ("conversations: {retention_days: 3651}", "/conversations/retention_days"),
        ("<<: {model: {use: x}}", "/<<"),
        ("? [a]\n: 1", ""),
    ],
)
def test_a_wrong_value_is_refused_at_its_place(section: str, path: str) -> None:
    assert list(faults(with_section(section))) == [path]


@pytest.mark.parametrize("name", ["off", "no", "2020-99-99", "1:30", "0x1F", "1_000"])
def test_what_yaml_would_turn_into_something_else_stays_text(name: str) -> None:
    assert parse(with_section(f"model: {{name: {name}}}")).model.name == name


BOMB = "a: &a [x, x]\n" + "".join(f"b{n}: &b{n} [{', '.join(['*a'] * 9)}]\n" for n in range(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "", id="empty"),
        pytest.param("- a", "", id="a list"),
        pytest.param(BOMB, "Anchors and aliases", id="alias bomb"),
        pytest.param("a: &x 1", "Anchors and aliases", id="anchor"),
        pytest.param("a: !!python/object/apply:os.system [id]", "Tags", id="python tag"),
        pytest.param("a: !!str 1", "Tags", id="any tag"),
        pytest.param("[" * 100_000, "nested deeper", id="open brackets"),
        pytest.param("a: " + "[" * 13 + "]" * 13, "nested deeper", id="one level too deep"),
        pytest.param("a: [" + "1, " * 20_000 + "]", "too many entries", id="too many"),
        pytest.param("a: " + "x" * (256 * 1024), "larger than 256 KiB", id="too large"),
        pytest.param("a: 1\n---\nb: 2", "not valid YAML", id="two documents"),
        pytest.param("a: [1", "not valid YAML: line", id="unfinished"),
        pytest.param("a: \ud800", "not valid Unicode", id="lone surrogate"),
        pytest.param("a: \x00", "not valid YAML", id="nul"),
    ],
)
def test_what_is_not_a_plain_document_is_refused_at_once(text: str, message: str) -> None:
    started = time.monotonic()
    found = faults(text)
    assert time.monotonic() - started < 1
    assert list(found) == [""]
    assert message in found[""]


def test_the_digest_is_of_the_text_as_written() -> None:
    assert digest("a: 1") != digest("a:  1")
    assert len(digest("\ud800")) == 64
