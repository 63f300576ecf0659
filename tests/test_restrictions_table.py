"""Every key of a policy that restricts has its row: what holds it, the test that attacks it, and its control."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from typing import Final, get_args

import pytest

from app.policies.document import DeclaredServer, PolicyDocument
from app.policies.servers.declared import Server
from tests.test_docs import ROOT, codes, page, policy_keys, rows, section

# They choose, guide or note, and keep nobody from anything.
FREE: Final = {
    *("schema", "model.use", "model.name", "model.temperature", "instructions"),
    *("input.flag", "overrides[].input.flag"),
}
SAME: Final = "in the same test"
TABLE: Final = list(rows(section(page("policies.md"), "## What holds each restriction")))


def keys() -> set[str]:
    """All keys; one of a server is called by its template, and by `servers` where all templates have it."""
    schema = PolicyDocument.model_json_schema()
    return {key for key in policy_keys(schema, schema) if not key.startswith("servers.")} | set(_server_keys())


def _server_keys() -> Iterator[str]:
    for model in get_args(DeclaredServer):
        (template,) = get_args(model.model_fields["template"].annotation)
        for key in model.model_fields.keys() - {"template"}:
            yield f"{'servers' if key in Server.model_fields else template}.{key}"


def named_in(cell: str) -> list[str]:
    return [name for name in codes(cell) if name.startswith("tests/")]


@cache
def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_key_that_restricts_has_a_row_and_no_row_is_of_a_key_that_is_not_there() -> None:
    named = {name for row in TABLE for name in codes(row[0])}
    assert keys() - FREE - named == set()
    assert named & FREE == set()
    assert {name for name in named if "." in name} - keys() == set()


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_a_row_names_an_attack_and_a_control_that_are_there(row: list[str]) -> None:
    _, enforced, attack, control = row
    assert enforced
    attacks, controls = named_in(attack), named_in(control)
    assert attacks
    assert bool(controls) is not control.startswith(SAME), "either in the same test, or in one that is named"
    assert not set(attacks) & set(controls)
    for name in (*attacks, *controls):
        path, _, function = name.partition("::")
        assert function in functions(path), f"there is no {name}"
