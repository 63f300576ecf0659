"""The references that the site makes have everything that the schema and the description have."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final

import pytest
from typer.main import get_command

from app.cli import cli
from docs.hooks import api_reference, json_schema, policy_reference
from tests.documents.blocks import ROOT

SCHEMA: Final[dict[str, Any]] = json.loads((ROOT / "docs" / "policy.schema.json").read_text())
API: Final[dict[str, Any]] = json.loads((ROOT / "tests" / "openapi.json").read_text())
PAGES: Final = api_reference.pages(API)
OPERATIONS: Final = [(method, path) for path, methods in API["paths"].items() for method in methods]


def test_every_key_of_a_policy_is_in_its_reference() -> None:
    """Those of docs/policies.md, which another test compares with the code."""
    keys = re.findall(
        r"^\| `([^`]+)` \|", (ROOT / "docs" / "policies.md").read_text().split("## Versions")[0], re.MULTILINE
    )
    known = {
        key for key in keys if re.match(r"schema$|(model|instructions|limits|input|servers|tools|overrides)\b", key)
    }
    known |= {key for key in keys if re.match(r"(publishing|approvals|conversations)\.", key)}
    made = set(re.findall(r"^\| `([^`]+)` \|", policy_reference.page(SCHEMA), re.MULTILINE))
    assert {key.removesuffix(".<name>") for key in known} == made
    assert len(made) > 50


def test_each_template_has_its_section() -> None:
    templates = SCHEMA["properties"]["servers"]["patternProperties"].values()
    named = {name for part in templates for name in part["discriminator"]["mapping"]}
    assert set(re.findall(r"^## Template (\w+)$", policy_reference.page(SCHEMA), re.MULTILINE)) == named


def commands(command: Any, path: str = "") -> Iterator[str]:
    """All that can be called, as it is written after `bulkhead`."""
    inner: dict[str, Any] = getattr(command, "commands", {})
    if not inner:
        yield path.strip()
    for name, part in inner.items():
        yield from commands(part, f"{path} {name}")


def test_every_command_is_on_its_page() -> None:
    text = (ROOT / "docs" / "reference" / "commands.md").read_text()
    cells = re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)
    assert {name for cell in cells for name in re.findall("`([^`]+)`", cell)} == set(commands(get_command(cli)))


def test_no_cell_of_a_reference_says_that_it_knows_nothing() -> None:
    assert "anything" not in policy_reference.page(SCHEMA)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_route_is_in_the_reference_with_its_parameters_and_answers(method: str, path: str) -> None:
    operation = API["paths"][path][method]
    page = PAGES[operation["tags"][0].replace(" ", "-")]
    heading = f"## {method.upper()} {path}\n"
    assert page.count(heading) == 1
    text = page.partition(heading)[2].split("\n## ")[0]
    assert operation["summary"] in text
    for parameter in operation.get("parameters", []):
        assert f"| `{parameter['name']}` | {parameter['in']} |" in text
    for status in operation["responses"]:
        assert f"`{status}`" in text
    assert f"[`{method.upper()} {path}`]" in PAGES["index"]


def test_every_schema_is_in_the_reference_with_its_members() -> None:
    headings = re.findall(r"^## (.+)$", PAGES["schemas"], re.MULTILINE)
    assert len(headings) == len(set(headings)) == len(API["components"]["schemas"])
    members = sum(len(node.get("properties", {})) for node in API["components"]["schemas"].values())
    assert len(re.findall(r"^\| `", PAGES["schemas"], re.MULTILINE)) == members


@pytest.mark.parametrize(
    ("node", "kind", "bounds", "default"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 1000, "default": 7}, "integer", "1 to 1,000", "`7`"),
        ({"type": "string", "maxLength": 20, "default": ""}, "text", "up to 20 characters", "none"),
        ({"enum": ["a", "b"], "default": "a"}, "`a`, `b`", "", "`a`"),
        ({"const": True}, "only `true`", "", "none"),
        ({"anyOf": [{"type": "integer", "minimum": 2}, {"type": "null"}]}, "integer", "2 or more", "none"),
        ({"type": "array", "items": {"type": "string", "pattern": "^a$"}}, "list of text", "each `^a$`", "none"),
        ({"$ref": "#/components/schemas/State"}, "<State>", "", "none"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "object of text", "", "none"),
        ({"type": "integer", "exclusiveMaximum": 9}, "integer", "below 9", "none"),
    ],
)
def test_a_schema_is_put_into_words(node: dict[str, Any], kind: str, bounds: str, default: str) -> None:
    assert json_schema.kind(node, lambda name: f"<{name}>") == kind
    assert json_schema.bounds(node) == bounds
    assert json_schema.default(node, required=False) == default
    assert json_schema.default(node, required=True) == "required"


def test_a_bar_does_not_end_a_cell() -> None:
    assert json_schema.table(["a"], [["`x|y`\n\nz"]]).splitlines()[-1] == "| `x\\|y` z |"
