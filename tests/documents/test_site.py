"""The site of the documents builds with strict links, fetches nothing, and shows what the pages show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import pytest
from markdown_it import MarkdownIt

from docs.hooks import bars, folders, outside_links
from tests.documents.blocks import ROOT

SOURCES: Final = sorted((ROOT / "docs").rglob("*.md"))
COUNTED: Final = {"h1", "h2", "h3", "h4", "li", "ol", "ul", "pre", "tr", "img"}


def build(folder: Path, config: Path = ROOT / ".mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """What `make docs` does, to a folder of the test's own, without a way to any network.

    Not quietly: warnings that are not printed do not count as such.
    """
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config)]
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:1")
    return subprocess.run(
        [*command, "--site-dir", str(folder)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "HOME": str(folder.parent), "NO_MKDOCS_2_WARNING": "1"} | nowhere,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents") / "site"
    built = build(folder)
    assert built.returncode == 0, built.stdout
    return folder


def shown(site: Path, source: Path) -> str:
    """The page of the site."""
    name = source.relative_to(ROOT / "docs")
    path = site / (name.with_name("index.html") if name.name == "README.md" else name.with_suffix(".html"))
    return path.read_text()


class Page(HTMLParser):
    """What a page consists of, and what a browser loads for it."""

    def __init__(self, text: str, *, is_article: bool = True) -> None:
        super().__init__()
        self.parts: Counter[str] = Counter()
        self.loads: list[str] = []
        self._is_article = is_article
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self._is_article = self._is_article or tag == "article"
        if self._is_article and tag in COUNTED:
            self.parts[tag] += 1
        if tag == "link" and values.get("rel") in {"stylesheet", "icon", "preconnect", "preload", "prefetch"}:
            self.loads.append(values["href"] or "")
        if tag in {"script", "img", "iframe", "source"} and "src" in values:
            self.loads.append(values["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        self._is_article = self._is_article and tag != "article"


def test_every_page_is_in_the_site_with_all_that_github_shows(site: Path) -> None:
    """Python-Markdown wants a blank line before a list, and four spaces inside of one."""
    differing = {}
    for source in SOURCES:
        github = Page(MarkdownIt("commonmark").enable("table").render(source.read_text())).parts
        ours = Page(shown(site, source), is_article=False).parts
        if github != ours:
            differing[source.name] = {"lacks": dict(github - ours), "has besides": dict(ours - github)}
    assert differing == {}


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > len(SOURCES)
    loaded = {(page.name, url) for page in pages for url in Page(page.read_text()).loads}
    assert {url for _, url in loaded if re.match(r"[a-z]+:|//", url)} == set()
    assert any(url.endswith(".js") for _, url in loaded)
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"url\(\s*[\"']?(?:https?:)?//[^)]*", styles) == []
    # The theme would fetch a script of mermaid's for these, and nothing else of ours makes it.
    assert [page.name for page in pages if 'class="mermaid"' in page.read_text()] == []


def test_what_is_made_of_the_schema_and_the_description_is_in_the_navigation(site: Path) -> None:
    first = (site / "index.html").read_text()
    for page in ("reference/policy.html", "reference/api/index.html", "reference/api/runs.html"):
        assert f'href="{page}"' in first
        assert (site / page).exists()
    assert not (site / "hooks").exists()


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    links = ("nowhere.md", "index.md#nowhere", "/index.md")
    (tmp_path / "docs" / "index.md").write_text("".join(f"[words]({link})\n\n" for link in links))
    settings = (ROOT / ".mkdocs.yml").read_text()
    validation = settings[settings.index("\nvalidation:") : settings.index("\nexclude_docs:")]
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"site_name: test\nplugins: []\ntheme: mkdocs\n{validation}")
    built = build(tmp_path / "site", config)
    assert built.returncode != 0
    assert [link for link in links if f"'{link}'" not in built.stdout] == [], built.stdout


def reached(start: Path) -> set[Path]:
    """The pages that links lead to, from one to the next."""
    found, ahead = {start}, [start]
    while ahead:
        page = ahead.pop()
        for target in re.findall(r"\]\(([^)#\s:]+)[^)\s]*\)", page.read_text()):
            path = (page.parent / target).resolve()
            if path.suffix == ".md" and path not in found and path.exists():
                found.add(path)
                ahead.append(path)
    return found


def test_every_page_is_reached_from_the_readme_by_links() -> None:
    assert set(SOURCES) - reached(ROOT / "README.md") == set()


# Hooks


@pytest.mark.parametrize(
    ("link", "alone", "linked"),
    [
        ("[words](../app/main.py)", "words (`app/main.py`)", "[words](https://code.example/blob/app/main.py)"),
        ("[words](../../docs/x.md)", "[words](../../docs/x.md)", "[words](../../docs/x.md)"),
        ("[two\nwords](../a/b)", "two\nwords (`a/b`)", "[two\nwords](https://code.example/blob/a/b)"),
        ("[main.py](../app/main.py#a)", "main.py", "[main.py](https://code.example/blob/app/main.py#a)"),
        ("[words](x.md#y)", "[words](x.md#y)", "[words](x.md#y)"),
        ("[words](#y)", "[words](#y)", "[words](#y)"),
        ("[words](https://x.example/y)", "[words](https://x.example/y)", "[words](https://x.example/y)"),
        (
            "`a\nb` [words](../a/b.c) `d`",
            "`a\nb` words (`a/b.c`) `d`",
            "`a\nb` [words](https://code.example/blob/a/b.c) `d`",
        ),
        ("`[words](../app/main.py)`", "`[words](../app/main.py)`", "`[words](../app/main.py)`"),
        ("```sh\n[words](../a)\n```", "```sh\n[words](../a)\n```", "```sh\n[words](../a)\n```"),
        ("[`/x`](../a/b.json) `y`", "`/x` (`a/b.json`) `y`", "[`/x`](https://code.example/blob/a/b.json) `y`"),
    ],
)
def test_a_link_out_of_the_documents_is_named_or_leads_to_the_repository(link: str, alone: str, linked: str) -> None:
    source = "deploy/page.md" if "../../" in link else "page.md"
    assert outside_links.rewritten(link, source, repository="") == alone
    assert outside_links.rewritten(link, source, repository="https://code.example/blob/") == linked


def test_a_folder_of_the_navigation_stands_for_its_pages() -> None:
    pages = ["a/b.md", "a/README.md", "a/c/d.md", "e.md"]
    assert folders.expanded([{"A": "a/"}, "e.md"], pages) == [{"A": ["a/README.md", "a/b.md"]}, "e.md"]


def test_a_bar_in_a_cell_is_a_bar() -> None:
    html = "<td><code>a\\|b</code></td><p>a\\|b</p>"
    assert bars.on_page_content(html) == "<td><code>a|b</code></td><p>a\\|b</p>"
