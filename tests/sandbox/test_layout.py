"""Which paths of a profile become which paths of the host, and in which texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.sandbox import layout


@pytest.fixture
def order(tmp_path: Path) -> dict[str, Any]:
    """Sources `data` (a folder), `code.py`, and `lib` with three entries, one of them a link to elsewhere."""
    (tmp_path / "data").mkdir()
    (tmp_path / "code.py").write_text("")
    for name in ("lib/a", "lib/covered"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lib" / "link").symlink_to("/etc")
    mounts = [
        [str(tmp_path / "data"), "/workspace", True],
        [str(tmp_path / "code.py"), "/srv/code.py", False],
        [str(tmp_path / "lib"), "/lib", False],
        [str(tmp_path / "data"), "/lib/covered", False],
    ]
    return {"mounts": mounts, "files": {"/etc/settings": "data=/workspace\n"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/workspace", "{data}"),
        ("/workspace/sub/x", "{data}/sub/x"),
        ("--root=/workspace", "--root={data}"),
        ("/srv:/workspace", "/links/srv:{data}"),
        ('{"root": "/workspace"}', '{"root": "{data}"}'),
        ("/srv/code.py", "/links/srv/code.py"),
        ("/tmp", "/links/tmp"),  # noqa: S108  # a name inside
        ("/lib/covered", "{data}"),
        ("/lib/a", "/links/lib/a"),
        ("/workspaces", "/workspaces"),
        ("/workspace.old", "/workspace.old"),
        ("/other/workspace", "/other/workspace"),
        ("https://host/workspace", "https://host/workspace"),
        ("c2VjcmV0+/tmp/c2VjcmV0", "c2VjcmV0+/tmp/c2VjcmV0"),  # a secret may look like a path
        ("workspace", "workspace"),
    ],
)
def test_rewrites_a_path_inside_where_a_text_names_one(
    text: str, expected: str, order: dict[str, Any], tmp_path: Path
) -> None:
    rewrite = layout.Rewriter(layout.plan(order), "/links")
    assert rewrite(text) == expected.replace("{data}", str(tmp_path / "data"))


def test_lays_links_and_texts_and_gives_rules_for_what_they_lead_to(order: dict[str, Any], tmp_path: Path) -> None:
    root, links = layout.plan(order), tmp_path / "links"
    rules = set(layout.lay(root, str(links), layout.Rewriter(root, str(links))))
    assert (links / "workspace").readlink() == tmp_path / "data"
    assert (links / "srv/code.py").readlink() == tmp_path / "code.py"
    assert (links / "etc/settings").read_text() == f"data={tmp_path / 'data'}\n"
    assert (links / "tmp").is_dir()
    writable = {rule.path for rule in rules if rule.is_writable}
    assert writable == {str(tmp_path / "data"), str(links / "tmp")}
    assert {rule.path for rule in rules} - writable == {str(tmp_path / "code.py"), str(tmp_path / "lib/a")} | (
        {str(tmp_path / "data")} - writable
    )


def test_takes_a_folder_apart_that_has_a_mount_within(order: dict[str, Any], tmp_path: Path) -> None:
    root, links = layout.plan(order), tmp_path / "links"
    rules = {rule.path for rule in layout.lay(root, str(links), layout.Rewriter(root, str(links)))}
    assert sorted(entry.name for entry in (links / "lib").iterdir()) == ["a", "covered", "link"]
    assert (links / "lib/covered").readlink() == tmp_path / "data"
    # Neither the whole folder, nor what is covered, nor where a link of its own leads.
    assert not {str(tmp_path / "lib"), str(tmp_path / "lib/covered"), str(tmp_path / "lib/link")} & rules


def test_a_later_mount_covers_an_earlier_one(order: dict[str, Any], tmp_path: Path) -> None:
    order["mounts"].append([str(tmp_path / "lib"), "/workspace", False])
    assert layout.Rewriter(layout.plan(order), "/links")("/workspace") == str(tmp_path / "lib")
