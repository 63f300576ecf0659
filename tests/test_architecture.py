"""The rules of the house that no linter knows. Each is shown to find its fault in a planted sample."""

from __future__ import annotations

import ast
import io
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grimp
import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
APP: Final = sorted((ROOT / "app").rglob("*.py"))
TESTS: Final = sorted((ROOT / "tests").rglob("*.py"))

TABLES: Final = {"models", "tables"}
BANNED_NAMES: Final = {"utils", "helpers", "common", "core", "manager", "base", "misc"}
WEB: Final = {"fastapi", "starlette"}
IMPURE: Final = WEB | {"sqlalchemy", "httpx", "app.settings", "app.db"}
PURE: Final = [
    "app.policies.document",
    "app.policies.engine",
    "app.policies.screening",
    "app.policies.paths",
    "app.runs.state",
    "app.audit.verify",
    "app.keyring",
    "app.caller",
    "app.scopes",
]
ENVIRONMENT: Final = {"environ", "environb", "getenv", "getenvb"}
SUPPRESSION: Final = re.compile(r"#\s*(?:noqa(?::[A-Z0-9, ]+)?|type: ignore(?:\[[^\]]*\])?)")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="session")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("app", include_external_packages=True, cache_dir=None)


def planted(*imports: tuple[str, str]) -> grimp.ImportGraph:
    """Return a graph of the given (importer, imported) pairs."""
    graph = grimp.ImportGraph()
    for module in {name for pair in imports for name in pair}:
        graph.add_module(module)
    for importer, imported in imports:
        graph.add_import(importer=importer, imported=imported)
    return graph


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def functions(source: str) -> Iterator[Function]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def length(function: Function) -> int:
    """Return lines from `def` to the end."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def comments(source: str) -> dict[int, str]:
    """Return the comment of each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}


# Imports


def strangers_at_tables(graph: grimp.ImportGraph) -> set[str]:
    """Return the imports of a domain's tables from outside that domain."""
    found = set()
    for module in graph.modules:
        domain, _, last = module.rpartition(".")
        if last not in TABLES or domain in {"", "app"}:
            continue
        for importer in graph.find_modules_that_directly_import(module):
            if importer != "app.tables" and not importer.startswith(f"{domain}."):
                found.add(f"{importer} -> {module}")
    return found


def test_a_domains_tables_stay_in_the_domain(graph: grimp.ImportGraph) -> None:
    assert strangers_at_tables(graph) == set()


def test_a_stranger_at_the_tables_is_found() -> None:
    sample = planted(
        ("app.runs.service", "app.auth.models"),
        ("app.auth.repository", "app.auth.models"),
        ("app.tables", "app.auth.models"),
    )
    assert strangers_at_tables(sample) == {"app.runs.service -> app.auth.models"}


def reached(graph: grimp.ImportGraph, module: str, forbidden: set[str]) -> set[str]:
    """Return which of the forbidden modules a module imports, itself or through others."""
    return graph.find_upstream_modules(module) & forbidden


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_reach_no_database_no_web_and_no_settings(graph: grimp.ImportGraph, module: str) -> None:
    if module not in graph.modules:
        pytest.skip(f"{module} does not exist yet")
    assert reached(graph, module, IMPURE) == set()


def test_an_impure_import_is_found_through_another_module() -> None:
    sample = planted(("app.runs.state", "app.runs.clock"), ("app.runs.clock", "sqlalchemy"))
    assert reached(sample, "app.runs.state", IMPURE) == {"sqlalchemy"}


@pytest.mark.parametrize(
    ("module", "importer"),
    [("jose", "app.auth.tokens"), ("pydantic_settings", "app.settings")],
)
def test_a_guarded_package_has_one_importer(graph: grimp.ImportGraph, module: str, importer: str) -> None:
    assert module in graph.modules
    assert graph.find_modules_that_directly_import(module) == {importer}


# The environment


def reads_of_environment(source: str) -> list[int]:
    """Return the lines that read the process environment, under whatever name `os` has."""
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    aliases = [alias for node in imports for alias in node.names if alias.name in {"os", "posix"}]
    names = {alias.asname or alias.name for alias in aliases}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and reads_attribute(node, names))
        or (isinstance(node, ast.ImportFrom) and imports_environment(node))
    ]


def reads_attribute(node: ast.Attribute, names_of_os: set[str]) -> bool:
    return node.attr in ENVIRONMENT and isinstance(node.value, ast.Name) and node.value.id in names_of_os


def imports_environment(node: ast.ImportFrom) -> bool:
    return node.module in {"os", "posix"} and any(alias.name in ENVIRONMENT for alias in node.names)


# The one reader, what quiets libraries for it, and programs of their own: what they are told comes there.
PROGRAMS = {"app.settings", "app.silence", "app.sandbox.launcher", "app.servers.browser.authorities"}


def test_only_settings_reads_the_environment() -> None:
    readers = {
        f"{name_of(path)}:{line}"
        for path in APP
        for line in reads_of_environment(path.read_text())
        if name_of(path) not in PROGRAMS
    }
    assert readers == set()


@pytest.mark.parametrize(
    "source",
    [
        'import os\nos.environ["A"]',
        "import os as system\nsystem.getenv('A')",
        "from os import environ",
        "def f():\n    from os import getenv as g\n    return g('A')",
    ],
)
def test_a_read_of_the_environment_is_found(source: str) -> None:
    assert reads_of_environment(source)


# Names and sizes


def banned_names(modules: list[str]) -> set[str]:
    return {module for module in modules if BANNED_NAMES & set(module.split("."))}


def test_a_module_is_named_for_what_is_inside() -> None:
    assert banned_names([name_of(path) for path in APP]) == set()


def test_a_banned_name_is_found_anywhere_in_a_path() -> None:
    modules = ["app.core.engine", "app.runs.utils", "app.runs.score"]
    assert banned_names(modules) == {"app.core.engine", "app.runs.utils"}


def too_long(lines: dict[str, int], most: int) -> dict[str, int]:
    return {name: count for name, count in lines.items() if count > most}


def lines_of(paths: list[Path]) -> dict[str, int]:
    return {name_of(path): len(path.read_text().splitlines()) for path in paths}


def test_modules_have_at_most_400_lines_and_test_files_500() -> None:
    assert too_long(lines_of(APP), 400) | too_long(lines_of(TESTS), 500) == {}


def test_one_line_too_many_is_found() -> None:
    assert too_long({"app.a": 400, "app.b": 401}, 400) == {"app.b": 401}


def lengths(paths: list[Path]) -> dict[str, int]:
    return {
        f"{name_of(path)}:{function.lineno} {function.name}": length(function)
        for path in paths
        for function in functions(path.read_text())
    }


def test_functions_have_at_most_50_lines() -> None:
    assert too_long(lengths(APP), 50) == {}


def test_the_median_function_is_under_ten_lines() -> None:
    assert statistics.median(lengths(APP).values()) < 10


def test_a_function_is_measured_from_def_to_end() -> None:
    source = "@decorated\nasync def f(\n    a: int,\n) -> int:\n    return a\n\n\nx = 1\n"
    assert [length(function) for function in functions(source)] == [4]


# Excuses


def broad_excepts(source: str) -> list[int]:
    """Return the lines that swallow everything without a comment on the line saying why."""
    said = comments(source)
    handlers = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ExceptHandler))
    return [
        handler.lineno
        for handler in handlers
        if catches_everything(handler.type)
        and not passes_on(handler)
        and not gives_reason(said.get(handler.lineno, ""))
    ]


def passes_on(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def catches_everything(caught: ast.expr | None) -> bool:
    if isinstance(caught, ast.Tuple):
        return any(catches_everything(item) for item in caught.elts)
    return caught is None or (isinstance(caught, ast.Name) and caught.id in {"Exception", "BaseException"})


def gives_reason(comment: str) -> bool:
    """Return whether a word is left once the suppressions are taken out."""
    return bool(re.search(r"[A-Za-z]{3,}", SUPPRESSION.sub("", comment)))


def bare_suppressions(source: str) -> list[int]:
    """Return the lines that silence a check with no reason there or in a comment just above."""
    said = comments(source)
    rows = source.splitlines()
    alone = {line: comment for line, comment in said.items() if rows[line - 1].lstrip().startswith("#")}
    return [
        line
        for line, comment in said.items()
        if SUPPRESSION.search(comment) and not gives_reason(f"{alone.get(line - 1, '')} {comment}")
    ]


def test_a_broad_except_says_why() -> None:
    found = {f"{name_of(path)}:{line}" for path in APP for line in broad_excepts(path.read_text())}
    assert found == set()


def test_a_suppression_says_why() -> None:
    found = {f"{name_of(path)}:{line}" for path in APP + TESTS for line in bare_suppressions(path.read_text())}
    assert found == set()


@pytest.mark.parametrize(
    "clause",
    ["except:", "except Exception:", "except (ValueError, BaseException) as e:", "except Exception:  # noqa: BLE001"],
)
def test_a_broad_except_without_a_reason_is_found(clause: str) -> None:
    assert broad_excepts(f"try:\n    f()\n{clause}\n    pass\n") == [3]


@pytest.mark.parametrize(
    "handler",
    [
        "except OSError:\n    pass",
        "except Exception:  # noqa: BLE001 - a plugin may raise anything\n    pass",
        "except BaseException:\n    close()\n    raise",
    ],
)
def test_a_narrow_a_reasoned_and_a_passing_except_are_accepted(handler: str) -> None:
    assert broad_excepts(f"try:\n    f()\n{handler}\n") == []


@pytest.mark.parametrize(
    ("comment", "is_bare"),
    [
        ("# noqa: S101", True),
        ("# noqa: S101, E501", True),
        ("# type: ignore[arg-type]", True),
        ("# type: ignore[arg-type]  # stubs lag behind", False),
        ("# noqa: S310 - the scheme is checked above", False),
    ],
)
def test_a_bare_suppression_is_found(comment: str, *, is_bare: bool) -> None:
    assert bare_suppressions(f"x = 1  {comment}\n") == ([1] if is_bare else [])


def test_a_reason_may_stand_in_a_comment_just_above_but_no_further() -> None:
    line = "import c  # noqa: PLC0415\n"
    assert bare_suppressions(f"# Only where it is installed.\n{line}") == []
    assert bare_suppressions(f"x = 1  # Only where it is installed.\n{line}") == [2]
    assert bare_suppressions(f"# Only where it is installed.\nx = 1\n{line}") == [3]


# What surrounds the code


def pins(name: str) -> set[str]:
    return set(re.findall(r"^[^\s#]+==\S+", (ROOT / "requirements" / name).read_text(), re.MULTILINE))


def test_lock_files_agree_and_carry_no_address() -> None:
    locks = sorted((ROOT / "requirements").glob("*.txt"))
    assert [path.name for path in locks if "://" in path.read_text()] == []
    assert pins("base.txt") - pins("dev.txt") == set()


def test_every_pin_has_a_hash() -> None:
    text = (ROOT / "requirements" / "dev.txt").read_text()
    entries = re.split(r"\n(?=\S)", text)
    assert [entry.split()[0] for entry in entries if "==" in entry and "--hash=sha256:" not in entry] == []


def test_commit_hooks_are_the_commands_of_make_check() -> None:
    hooks = re.findall(r"entry: ([^,]+),", (ROOT / ".pre-commit-config.yaml").read_text())
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    assert hooks == [command for command in commands if not command.startswith("@")]
