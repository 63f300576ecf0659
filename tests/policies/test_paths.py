"""The path rules of a filesystem template, as a table."""

from __future__ import annotations

import pytest

from app.policies.paths import check_path

EXTENSIONS = frozenset({".txt", ".md"})


@pytest.mark.parametrize(
    "path",
    ["a.txt", "a/b/c.md", "A.TXT", "..a.txt", "a..txt", "%2e%2e/a.txt", "a b.txt", "é/ü.txt", "~/a.txt"],
)
def test_an_ordinary_path_passes(path: str) -> None:
    assert check_path(path, allowed_extensions=EXTENSIONS) is None


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd.txt",
        "//a.txt",
        "../a.txt",
        "a/../b.txt",
        "a/..",
        "..",
        "./a.txt",
        "a//b.txt",
        "a/./b.txt",
        "a.txt/",
        "a\x00.txt",
        "a\n.txt",
        "a\\..\\b.txt",
        "\ud800.txt",
        "a" * 252 + ".txt",
        "a/" * 2050 + "a.txt",
        "",
        None,
        7,
        ["a.txt"],
    ],
)
@pytest.mark.parametrize("allowed", [EXTENSIONS, None])
def test_a_path_out_of_the_workspace_is_denied_by_rule(path: object, allowed: frozenset[str] | None) -> None:
    denial = check_path(path, allowed_extensions=allowed)
    assert denial is not None
    assert denial.rule == "path"


@pytest.mark.parametrize(
    "path",
    ["secret.key", "a.txt/secret.key", "a", ".txt", "a.txt.", "a.txt ", "a.txt.exe", "a.t\u0445t", "a.md%00.key", "."],
)
def test_another_extension_is_denied_by_rule(path: str) -> None:
    denial = check_path(path, allowed_extensions=EXTENSIONS)
    assert denial is not None
    assert denial.rule == "extension"
    assert check_path(path, allowed_extensions=None) is None


def test_a_denial_is_true_so_that_a_forgotten_comparison_cannot_let_it_pass() -> None:
    assert check_path("..", allowed_extensions=None)
