"""Hooks of the documentation site (mkdocs.yml): the changelog as a page, and links to files of the repository."""

import configparser
import logging
import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = "changelog.md"
# [text](target), not an image; the target may have an anchor
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^ *(```|~~~)")
log = logging.getLogger("mkdocs.hooks.repository")  # in strict mode a warning fails the build


def on_config(config: Any) -> Any:
    """Take the repository's address from the project URLs of setup.cfg, unless mkdocs.yml has one."""
    if not config.repo_url:
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        lines = setup.get("metadata", "project_urls", fallback="").split("\n")
        urls = dict(map(str.strip, line.split("=", 1)) for line in lines if "=" in line)
        config.repo_url = next((urls[name] for name in ("Source", "Repository", "Homepage") if name in urls), None)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add CHANGELOG.md as a page."""
    from mkdocs.structure.files import File

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    files.append(File.generated(config, CHANGELOG, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links to files outside of docs/ into links to the repository, or into their text if it has no address."""
    source = ROOT if page.file.src_uri == CHANGELOG else (ROOT / "docs" / page.file.src_uri).parent
    repository = (config.repo_url or "").rstrip("/")

    def replace(match: re.Match) -> str:
        text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path = (source / target.split("#")[0]).resolve()
        if not path.exists() and path.name != CHANGELOG and page.file.src_uri != CHANGELOG:
            log.warning(f"{page.file.src_uri} links to {target}, which does not exist")
        if path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT):
            return match[0]
        return f"[{text}]({repository}/blob/main/{path.relative_to(ROOT).as_posix()})" if repository else text

    return "\n".join(outside_fences(markdown.split("\n"), lambda line: LINK.sub(replace, line)))


def outside_fences(lines: list[str], change: Any) -> list[str]:
    """Return the lines, with changes only outside of code."""
    result, inside = [], False
    for line in lines:
        if FENCE.match(line):
            inside = not inside
            result.append(line)
        else:
            result.append(line if inside else change(line))
    return result
