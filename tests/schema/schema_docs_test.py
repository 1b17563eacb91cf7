# SPDX-License-Identifier: GPL-2.0-or-later
"""The reference: both forms have every verb, links lead somewhere, nothing is loaded from afar."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vdsm_storage.schema import docs
from vdsm_storage.schema.loader import FILES, Schema

BUILT = ["Host.ping", "Volume.create", "Volume.getInfo"]
VOID = {"meta", "link", "hr", "br"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    built = out / "built.json"
    built.write_text(json.dumps(BUILT))
    assert docs.main([str(out / "pages"), "--built", str(built)]) == 0
    return out / "pages"


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def pages(folder: Path) -> dict[str, _Page]:
    return {path.name: _Page(path.read_text()) for path in folder.glob("*.html")}


def test_a_page_a_namespace_in_both_forms(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    for stem in (*FILES, "index", "types", "events", "errors"):
        assert {f"{stem}.html", f"{stem}.md"} <= names
    assert "style.css" in names


def test_html_is_balanced_and_ids_are_unique(pages: dict[str, _Page]) -> None:
    for name, page in pages.items():
        assert page.open == [], name
        assert len(page.ids) == len(set(page.ids)), name


def test_every_link_leads_somewhere(folder: Path, pages: dict[str, _Page]) -> None:
    for name, page in pages.items():
        for link in page.links:
            file, _, anchor = link.partition("#")
            assert (folder / (file or name)).is_file(), link
            if anchor:
                assert anchor in pages[file or name].ids, link


def test_every_markdown_link_leads_somewhere(folder: Path) -> None:
    for path in folder.glob("*.md"):
        for file, anchor in re.findall(r"\]\((\w+\.md)(?:#(\w+))?\)", path.read_text()):
            target = (folder / file).read_text()
            if anchor:
                assert re.search(rf"^#+ {anchor}$", target, re.M | re.I), (path.name, file, anchor)


@pytest.mark.parametrize("form", ["html", "md"])
def test_every_verb_parameter_and_error_is_there(folder: Path, form: str) -> None:
    for verb in Schema().verbs():
        text = (folder / f"{verb.namespace}.{form}").read_text()
        assert verb.name in text
        for param in verb.params:
            assert param.name in text
        for error in verb.errors:
            assert error in text


def test_counts(folder: Path) -> None:
    text = (folder / "index.md").read_text()
    assert "| **all** | 252 | 3 | 249 |" in text
    assert "| [Volume](Volume.md) | 14 | 2 | 12 |" in text


def test_errors_tell_who_answers_them(folder: Path) -> None:
    text = (folder / "errors.md").read_text()
    assert re.search(r"\| 44 \| MethodNotImplemented \| .* \| any \|", text)
    assert re.search(r"\| 201 \| VolumeDoesNotExist \| .* \| \d+ \|", text)


def test_tags_of_built_verbs(folder: Path) -> None:
    text = (folder / "Volume.html").read_text()
    assert text.count('class="tag built"') == 2 * 2  # in the list and at the verb
    assert "**Not built yet.**" in (folder / "Volume.md").read_text()


def test_nobody_told_what_is_built(tmp_path: Path) -> None:
    assert docs.main([str(tmp_path)]) == 0
    assert "| **all** | 252 |  |  |" in (tmp_path / "index.md").read_text()
    assert "tag" not in (tmp_path / "Volume.html").read_text()


def test_nothing_is_loaded_from_elsewhere(folder: Path) -> None:
    for path in folder.iterdir():
        assert not re.search(r"(src|href)=\"https?:|url\(|@import", path.read_text()), path.name


def test_a_bad_list_of_built_verbs(tmp_path: Path) -> None:
    bad = tmp_path / "built.json"
    bad.write_text('{"Host.ping": true}')
    with pytest.raises(SystemExit):
        docs.main([str(tmp_path / "x"), "--built", str(bad)])
