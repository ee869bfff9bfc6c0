"""Build the package. Its metadata are in setup.cfg, except for the page of an index: README.md without dead links."""

import re
from itertools import groupby
from pathlib import Path

from setuptools import setup


TEXT = r"(?:[^\[\]]|\[[^\]]*\])*"  # of a link, possibly with brackets
PLACE = r"(?!(?:[a-zA-Z][a-zA-Z0-9+.-]*:|//))[^)\s\"'>]*"  # a file of the repository or a part of the page: no scheme
TITLE = r"(?:\s+\"[^\"]*\")?"
PICTURE = re.compile(rf"!\[{TEXT}\]\({PLACE}{TITLE}\)|<img\b[^>]*\bsrc=[\"']{PLACE}[\"'][^>]*>")
LINK = re.compile(rf"(?<!!)\[({TEXT})\]\({PLACE}{TITLE}\)|<a\b[^>]*\bhref=[\"']{PLACE}[\"'][^>]*>(.*?)</a>")
MARKUP = re.compile(r"<[^>]*>|\[\]\([^)]*\)|\W")
FENCE = re.compile(r"^\s*(?:```|~~~)")


def index_page(text: str) -> str:
    """Return a page in Markdown without links to files of its repository or to its own parts, which an index lacks.

    A link becomes its text. Images are removed, with lines, rows or tables that have no other content. Code blocks stay.
    """
    lines, in_code = [], False
    for line in text.splitlines():
        in_code ^= bool(FENCE.match(line))
        lines.append((in_code or bool(FENCE.match(line)), line))

    kept: list[str] = []
    for (is_code, is_table), block in groupby(lines, lambda pair: (pair[0], not pair[0] and pair[1].startswith("|"))):
        before = [line for _, line in block]
        after = before if is_code else [shorter for line in before if (shorter := without_places(line)) is not None]
        if is_table and len(after) < len(before):
            after = without_gaps(after)
        kept += after
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


def without_places(line: str) -> str | None:
    """Return a line without links and images of the repository; None if it had only images."""
    shorter = PICTURE.sub("", line)
    if shorter != line and not MARKUP.sub("", shorter):
        return None
    return LINK.sub(lambda found: found[1] or found[2] or "", shorter)


def without_gaps(rows: list[str]) -> list[str]:
    """Return a table without its rows of images, with the first remaining row as its head; empty without other rows."""
    rule = [row for row in rows if not re.search(r"[^|\s:-]", row)]
    head, *body = [row for row in rows if row not in rule] or [""]
    return [head, *rule, *body] if body else []


if __name__ == "__main__":
    setup(long_description=index_page(Path("README.md").read_text(encoding="utf-8")))
