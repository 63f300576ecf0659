"""The document's JSON Schema: what an editor is told is what the service takes.

`python -m tests.policies.test_json_schema` writes the copy in docs/ anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import jsonschema
import pytest
import yaml

from app.policies.document import PolicyInvalid, parse
from app.policies.json_schema import document_schema
from tests.policies.test_document import FULL
from tests.service import Service, Tenant

COPY: Final = Path(__file__).resolve().parents[2] / "docs" / "policy.schema.json"
VALIDATOR: Final = jsonschema.Draft202012Validator(document_schema())


def keys(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every key of every section, with what the schema says of it."""
    if isinstance(node, dict):
        yield from ((f"{path}/{name}", part) for name, part in node.get("properties", {}).items())
        for name, part in node.items():
            yield from keys(part, f"{path}/{name}")
    elif isinstance(node, list):
        for place, part in enumerate(node):
            yield from keys(part, f"{path}/{place}")


def test_the_copy_in_the_docs_is_the_schema() -> None:
    assert json.loads(COPY.read_text()) == document_schema(), (
        "if this change is meant: python -m tests.policies.test_json_schema"
    )


def test_it_is_a_schema_and_says_what_every_key_means() -> None:
    VALIDATOR.check_schema(document_schema())
    found = list(keys(document_schema()))
    assert len(found) > 30
    assert [path for path, part in found if not part.get("description")] == []


def is_described(text: str) -> bool:
    return bool(VALIDATOR.is_valid(yaml.safe_load(text)))


DOCUMENTS: Final = [
    "schema: bulkhead/1",
    FULL.replace("preset: off", 'preset: "off"'),
    "{schema: bulkhead/1, overrides: [{roles: [user], tools: {allow: []}, limits: {requests: 1/day}}]}",
]


@pytest.mark.parametrize("text", DOCUMENTS)
def test_what_the_service_takes_the_schema_takes(text: str) -> None:
    assert parse(text).schema_ == "bulkhead/1"
    assert is_described(text)


@pytest.mark.parametrize(
    "section",
    [
        "surprise: 1",
        "limits: {max_steps: 0}",
        "limits: {requests: often}",
        "input: {preset: lax}",
        "tools: {allow: ['docs__?']}",
        "tools: {approve: ['docs__?']}",
        "tools: {permit: [a__b]}",
        "approvals: {expires_s: 59}",
        "conversations: {window_tokens: 200001}",
        "servers: {web: {template: browser, allowed_domains: [a.example], stateful: false}}",
        "servers: {docs: {template: nope}}",
        "servers: {Docs: {template: filesystem, root: docs}}",
        "servers: {docs: {template: filesystem}}",
        "servers: {docs: {template: filesystem, root: ../etc}}",
        "servers: {docs: {template: filesystem, root: docs, max_file_size: 10}}",
        "servers: {docs: {template: filesystem, root: docs, max_file_size: 10GB}}",
        "servers: {docs: {template: filesystem, root: docs, dsn: x}}",
        "servers: {site: {template: fetch, allowed_hosts: ['https://a.example']}}",
        "servers: {site: {template: fetch, allowed_hosts: ['*.a.example']}}",
        f"servers: {{site: {{template: fetch, allowed_hosts: {[f'h{n}.example' for n in range(51)]}}}}}",
        "overrides: [{users: [alice], tools: {deny: [a]}}]",
        "overrides: [{roles: [user], servers: {}}]",
    ],
)
def test_what_an_editor_can_tell_it_tells(section: str) -> None:
    text = f"schema: bulkhead/1\n{section}\n"
    with pytest.raises(PolicyInvalid):
        parse(text)
    assert not is_described(text)


def test_a_default_is_spelled_as_an_author_would() -> None:
    for path, part in keys(document_schema()):
        if "pattern" in part and "default" in part:
            assert jsonschema.Draft202012Validator(part).is_valid(part["default"]), path


async def test_who_may_read_policies_may_read_the_schema(service: Service) -> None:
    tenant: Tenant = await service.new_tenant(policy=None)
    answer = await tenant.admin.get("/v1/policies/schema")
    assert (answer.status_code, answer.json()) == (200, document_schema())
    assert answer.headers["content-type"] == "application/schema+json"
    assert (await tenant.user.get("/v1/policies/schema")).status_code == 403


if __name__ == "__main__":
    COPY.write_text(json.dumps(document_schema(), indent=2) + "\n")
