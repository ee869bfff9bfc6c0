"""docs/troubleshooting.md quotes messages that the code gives."""

import ast
import re

import pytest
from doc_blocks import ROOT


PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTES = re.findall(r"^\| `([^`\n]+)`", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """All strings of the package, but for docstrings; of f-strings the parts between values."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    statements = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements
    ]


@pytest.mark.parametrize("quote", QUOTES)
def test_the_message_is_one_of_the_codes(quote, texts):
    assert any(quote in text for text in texts), "reword the page as the message is worded now"


def test_every_table_has_messages():
    assert len(QUOTES) > 30
