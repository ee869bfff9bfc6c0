"""The English of the pages, by scripts/check_prose.py, and their links."""

import re
from collections.abc import Iterator
from types import ModuleType

import pytest
from doc_blocks import BLOCK, ROOT, pages
from script_modules import script_module


@pytest.fixture(scope="module")
def checker() -> Iterator[ModuleType]:
    with script_module("check_prose") as module:
        yield module


def test_the_pages_are_in_plain_english(checker):
    assert checker.find_faults() == []


def test_prose_is_told_from_code(checker, tmp_path, monkeypatch):
    monkeypatch.setattr(checker, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        "[tool.prose]\npaths = ['docs']\nexclude = ['docs/made.md']\n[tool.prose.rules]\n'\\bpictures?\\b' = 'image'\n"
    )
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "made.md").write_text("A picture.\n")
    (tmp_path / "docs" / "page.md").write_text(
        "Line `picture`.\n\n```python\npicture = 1\n```\n<!-- a\npicture -->\n[text](picture.png)\nTwo Pictures.\n"
    )
    (tmp_path / "docs" / "code.py").write_text(
        '"""A module."""\n\n\ndef f():\n    """One.\n\n    A picture.\n    """\n    picture = "picture"\n'
    )
    assert checker.find_faults() == ["docs/page.md:9: 'Pictures': image", "docs/code.py:7: 'picture': image"]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", re.sub(r"`[^`\n]*`", "", text))
    made_by_the_site = ("changelog.md",)
    relative = [target for target in targets if not re.match(r"[a-z]+:", target) and target not in made_by_the_site]
    assert [target for target in relative if not (page.parent / target).exists()] == []
