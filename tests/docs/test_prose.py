"""The English of pages and Python files, by scripts/check_prose.py, and the links of the pages."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from doc_blocks import BLOCK, ROOT, pages
from script_modules import script_module


@pytest.fixture(scope="module")
def checker() -> Iterator[ModuleType]:
    with script_module("check_prose") as module:
        yield module


@pytest.fixture
def project(checker, tmp_path, monkeypatch) -> Path:
    """Folder of a project whose pages and modules should have no "picture", and imperative summaries."""
    monkeypatch.setattr(checker, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        "[tool.prose]\npaths = ['docs']\nexclude = ['docs/made.md']\n[tool.prose.rules]\n'\\bpictures?\\b' = 'image'\n"
        "[tool.prose.summaries]\n'^Returns' = 'imperative'\n"
    )
    (tmp_path / "docs").mkdir()
    return tmp_path


def test_pages_and_code_are_in_plain_english(checker):
    assert checker.find_faults() == []


def test_prose_is_told_from_code_in_pages(checker, project):
    (project / "docs" / "made.md").write_text("A picture.\n")
    (project / "docs" / "page.md").write_text(
        "Line `picture`.\n\n```python\npicture = 1\n```\n<!-- a\npicture -->\n[text](picture.png)\nTwo Pictures.\n"
    )
    (project / "docs" / "build" / "lib").mkdir(parents=True)  # as `make dist` leaves
    (project / "docs" / "build" / "lib" / "copy.md").write_text("A picture.\n")
    assert checker.find_faults() == ["docs/page.md:9: 'Pictures': image"]


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("picture = 1  # a picture", 1),
        ("x = 1  # as in `picture`", None),
        ("x = {'picture': 'picture'}['picture']", None),
        ("x = 'many a picture'", 1),
        ("x = 'many a {picture}'.format(picture=1)", None),
        ("x = f'many a {picture} of {picture:.2f}'", None),
        ("x = f'many a picture of {size}'", 1),
        ("x = f'{size}' ' is the size ' 'of a picture'", 1),
        ("x = '''\nmany a\npicture\n'''", 3),
        ("x = 'many a\\npicture'", 1),
        ("'''A module.\n\nA picture.\n'''", 3),
        ("def f():\n    '''Make it.\n\n    `a\n    b` picture.\n    '''", 5),
        ("def f():\n    '''Make it.\n\n    picture (`str`): Path.\n    '''", None),
        ("def f():\n    '''Make it.\n\n    size, picture (`str`,\n        *optional*): Path.\n    '''", None),
    ],
)
def test_prose_is_told_from_code_in_modules(checker, project, code, line):
    (project / "docs" / "code.py").write_text(code)
    assert checker.find_faults() == ([f"docs/code.py:{line}: 'picture': image"] if line else [])


@pytest.mark.parametrize(
    ("code", "line"),
    [
        ("def f():\n    '''Returns one.'''", 2),
        ("async def f():\n    '''\n    Returns one.\n    '''", 3),
        ("def f():\n    '''Return one.\n\n    Returns: one.\n    '''", None),
        ("'''Returns of funds.'''", None),
        ("class A:\n    '''Returns of funds.'''", None),
        ("class A:\n    @cached_property\n    def f(self):\n        '''Returns of funds.'''", None),
    ],
)
def test_summaries_of_functions_are_imperative(checker, project, code, line):
    (project / "docs" / "code.py").write_text(code)
    assert checker.find_faults() == ([f"docs/code.py:{line}: 'Returns': imperative"] if line else [])


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^()\s#]+)[^()\s]*\)", re.sub(r"`[^`\n]*`", "", text))
    made_by_the_site = ("changelog.md",)
    relative = [target for target in targets if not re.match(r"[a-z]+:", target) and target not in made_by_the_site]
    assert [target for target in relative if not (page.parent / target).exists()] == []
