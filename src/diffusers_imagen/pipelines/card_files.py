"""What belongs to a model card beside it: licenses, notices and the pictures that it shows. They go where the weights go."""

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
MOST_BYTES = 2**24  # of a file
MOST_FILES = 200


def find_beside_card(folder: Path) -> list[str]:
    """The licenses and notices of a folder, and the pictures that its card shows, as paths from there."""
    found = set(find_notices(folder))
    card = folder / CARD_FILE
    if card.is_file():
        text = card.read_text(encoding="utf-8", errors="replace")
        links = {link for match in LINK.finditer(text) for link in match.groups() if link}
        found |= {link for link in links if link.lower().endswith(PICTURES)}
    return sorted(name for name in found if is_small_file(folder, name))[:MOST_FILES]


def is_small_file(folder: Path, name: str) -> bool:
    """Whether a path is one of a file in a folder, and not of one outside, which is small enough for a notice or a picture."""
    if "://" in name or os.path.isabs(name) or ".." in Path(name).parts:
        return False
    path = folder / name
    return path.is_file() and path.stat().st_size <= MOST_BYTES


def copy_card(source: Path, target: Path, with_card: bool = True) -> None:
    """Copies a card, if the target has none, and what belongs to it beside; files that are there stay."""
    names = find_beside_card(source) if with_card else [*find_notices(source)]
    for name in [*([CARD_FILE] if with_card and (source / CARD_FILE).is_file() else []), *names]:
        place = target / name
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(place) as partial:
            shutil.copyfile(source / name, partial)


def find_notices(folder: Path) -> list[str]:
    """The licenses and notices of a folder, as paths from there."""
    names = {path.relative_to(folder).as_posix() for pattern in NOTICES for path in folder.glob(pattern)}
    return sorted(name for name in names if is_small_file(folder, name))[:MOST_FILES]


def find_card_folder(
    name: Any, token: str | None = None, revision: str | None = None, with_pictures: bool = True
) -> Path | None:
    """The folder with the card of what was loaded from a folder or repository; of the latter, small files are downloaded.

    None if there is none, or the Hub cannot be asked, of which the log says that the card stays behind.
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
        return None  # a folder that is gone
    patterns = [CARD_FILE, *NOTICES, *(f"*{end}" for end in PICTURES if with_pictures)]
    try:
        return Path(snapshot_download(str(name), allow_patterns=patterns, token=token, revision=revision))
    except Exception as error:  # whatever the network does
        logger.warning(f"The model card of '{name}', with its license and notices, cannot be fetched: {error}")
        return None


def read_card_license(folder: Path | None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the metadata of a folder's card, those that it has."""
    if folder is None or not (folder / CARD_FILE).is_file():
        return {}
    try:
        data = metadata_load(folder / CARD_FILE) or {}
    except Exception:  # of a card that somebody wrote by hand
        return {}
    found = {name: data.get(name) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in found.items() if isinstance(value, str)}
