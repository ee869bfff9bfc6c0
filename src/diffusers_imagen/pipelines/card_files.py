"""Files that belong to a model card: licenses, notices and images, which are copied with the weights."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import metadata_load, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..utils.files import whole_file


logger = logging.get_logger(__name__)

CARD_FILE = "README.md"
LICENSES = "LICENSES"
NOTICES = (f"{LICENSES}/*", "LICENSE*", "LICENCE*", "NOTICE*")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
LINK = re.compile(r"\]\(([^)\s]+)\)|\burl:\s*['\"]?([^\s'\"]+)|<img[^>]*\bsrc=[\"']([^\"']+)")
MOST_BYTES = 2**24  # per file
MOST_FILES = 200


def find_beside_card(folder: Path) -> list[str]:
    """Find the licenses and notices in a folder, and the images that its card shows, as relative paths."""
    found = set(find_notices(folder))
    card = folder / CARD_FILE
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        links = {link for match in LINK.finditer(text) for link in match.groups() if link}
        found |= {link for link in links if link.lower().endswith(PICTURES)}
    return sorted(name for name in found if is_small_file(folder, name))[:MOST_FILES]


def is_small_file(folder: Path, name: str) -> bool:
    """Return whether a path is a file inside a folder, not outside it, and small enough for a notice or an image."""
    if "://" in name or os.path.isabs(name) or ".." in Path(name).parts:
        return False
    path = folder / name
    return path.is_file() and path.stat().st_size <= MOST_BYTES


def copy_card(source: Path, target: Path, with_card: bool = True) -> None:
    """Copy a card, if the target has none, and the files that belong to it; existing files are kept."""
    names = find_beside_card(source) if with_card else [*find_notices(source)]
    for name in [*([CARD_FILE] if with_card and (source / CARD_FILE).is_file() else []), *names]:
        place = target / name
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as partial:
            shutil.copyfile(source / name, partial)


def find_notices(folder: Path) -> list[str]:
    """Find the licenses and notices in a folder, as relative paths."""
    names = {path.relative_to(folder).as_posix() for pattern in NOTICES for path in folder.glob(pattern)}
    return sorted(name for name in names if is_small_file(folder, name))[:MOST_FILES]


def find_card_folder(
    name: Any, token: str | None = None, revision: str | None = None, with_pictures: bool = True
) -> Path | None:
    """Return the folder with the card of a loaded folder or repository; of a repository, small files are downloaded.

    None if there is none, or if the Hub cannot be reached, in which case a warning is logged that the card is missing.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.fspath(name):
        return None
    if os.path.isdir(name):
        return Path(name)
    try:
        validate_repo_id(str(name))
    except HFValidationError:
        return None
    if str(name).count("/") != 1:
        return None  # a folder that no longer exists
    patterns = [CARD_FILE, *NOTICES, *(f"*{end}" for end in PICTURES if with_pictures)]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, token=token, revision=revision))
    except Exception as error:  # any failure of the network
        logger.warning(f"The model card of '{name}', with its license and notices, cannot be downloaded: {error}")
        return None


def read_card_license(folder: Path | None) -> dict[str, str]:
    """Read `license`, `license_name` and `license_link` from the metadata of a folder's card, where present."""
    if folder is None or not (folder / CARD_FILE).is_file():
        return {}
    try:
        data = metadata_load(folder / CARD_FILE) or {}
    except Exception:  # cards can be written by hand
        return {}
    found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if isinstance(value, str)}
