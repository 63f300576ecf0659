"""The section of a policy, the DSN, and what the sandbox and the relay are asked for."""

from __future__ import annotations

import os
from typing import Any

import pytest

from app.outbound.grants import Forward
from app.policies.document import PolicyInvalid, parse
from app.servers.errors import ServerFailed
from app.servers.postgres import dsn, template
from app.servers.template import Place
from tests.servers.postgres.ground import declared

UID = 61_304 if os.geteuid() == 0 else os.geteuid()


def fault(keys: str) -> dict[str, str]:
    with pytest.raises(PolicyInvalid) as refused:
        parse(f"schema: bulkhead/1\nservers: {{reports: {{template: postgres, {keys}}}}}\n")
    return {fault.path.removeprefix("/servers/reports/"): fault.message for fault in refused.value.faults}


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ("readonly: false", "readonly"),
        ("allowed_schemas: []", "allowed_schemas"),
        ("allowed_schemas: [pg_catalog]", "allowed_schemas"),
        ("allowed_schemas: [information_schema]", "allowed_schemas"),
        ('allowed_schemas: ["a b"]', "allowed_schemas/0"),
        ("blocked_tables: [a.b.c]", "blocked_tables/0"),
        ('dsn: "postgresql://a:b@c/d"', "dsn"),
        ("max_connections: 0", "max_connections"),
        ("statement_timeout_s: 26", "statement_timeout_s"),
        ("connect_timeout_s: 31", "connect_timeout_s"),
        ("max_rows: 1001", "max_rows"),
    ],
)
def test_a_key_has_its_bounds(keys: str, key: str) -> None:
    whole = {"dsn": 'dsn: "secret:reports"', "allowed_schemas": "allowed_schemas: [public]"}
    rest = [text for name, text in whole.items() if not key.startswith(name)]
    assert set(fault(", ".join([*rest, keys]))) == {key}


def test_the_guides_policy_is_read() -> None:
    text = (
        "schema: bulkhead/1\nservers:\n  reports: {template: postgres, dsn: 'secret:reports-dsn', readonly: true,"
        " allowed_schemas: [public, reporting], blocked_tables: [users, passwords, secrets],"
        " connect_timeout_s: 30, max_connections: 5}\n"
    )
    assert parse(text).servers["reports"] == declared(dsn="secret:reports-dsn", connect_timeout_s=30)


def test_a_dsn_is_read_in_its_parts() -> None:
    read = dsn.parse("postgresql://re%40der:p%3Ass%2Fword@DB.example.com:6432/sh%20op?sslmode=verify-full\n")
    assert (read.user, read.password, read.host, read.port, read.database) == (
        "re@der",
        "p:ss/word",
        "db.example.com",
        6432,
        "sh op",
    )
    assert read.has_tls
    assert "ss/word" not in repr(read)
    assert dsn.parse("postgres://a:b@db/c") == dsn.Dsn("db", 5432, "c", "a", "b", has_tls=True)
    assert not dsn.parse("postgres://a:b@db/c?sslmode=disable").has_tls


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mysql://a:hush@db/c",
        "postgresql://a@db/c",
        "postgresql://a:hush@db",
        "postgresql://a:hush@127.0.0.1/c",
        "postgresql://a:hush@[::1]/c",
        "postgresql://a:hush@0x7f000001/c",
        "postgresql://a:hush@db,other/c",
        "postgresql://a:hush@%2Ftmp/c",
        "postgresql://a:hush@db:0/c",
        "postgresql://a:hush@db:65536/c",
        "postgresql://a:hush@db/c?sslmode=require",
        "postgresql://a:hush@db/c?sslmode=prefer",
        "postgresql://a:hush@db/c?host=127.0.0.1",
        "postgresql://a:hush@db/c?sslmode=verify-full&sslrootcert=/etc/passwd",
        "postgresql://a:hush@db/c?passfile=/etc/passwd",
        "postgresql://a:hush@evil.test@db/c",
        "postgresql://a:hu%00sh@db/c",
        "host=db user=a password=hush",
    ],
)
def test_any_other_dsn_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ServerFailed) as refused:
        template.doors(declared(), {"reports": text})
    assert "hush" not in str(refused.value)
    assert "'reports'" in str(refused.value)


def test_its_one_door_is_to_the_database() -> None:
    texts = {"reports": "postgresql://a:b@db.example.com:6432/c"}
    assert template.TEMPLATE.secrets(declared()) == {"reports"}
    assert template.doors(declared(), texts) == {("127.0.0.1", 5432): Forward("db.example.com", 6432)}


def test_its_credential_is_in_its_environment_alone() -> None:
    texts = {"reports": "postgresql://ann:hush@db.example.com:6432/c"}
    profile = template.profile(declared(), Place(UID, secrets=texts))
    assert profile.environment["PGPASSWORD"] == "hush"
    rest: tuple[Any, ...] = (profile.argv, profile.files, profile.mounts, repr(profile))
    assert "hush" not in str(rest)
    assert profile.files["/etc/hosts"] == "127.0.0.1 db.example.com\n"
