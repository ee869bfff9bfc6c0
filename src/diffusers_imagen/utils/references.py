"""References: small files by which a folder names a model that is elsewhere, on the Hub or in a folder, and tells it from others."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .arguments import shown
from .files import read_json_object, write_json


REFERENCE = "reference.json"
FIELDS = {"hub": str, "revision": str, "folder": str, "subfolder": str, "variant": str, "identity": dict}


class Reference(NamedTuple):
    """Where a model is.

    Attributes:
        source (`str`): Hub id, or absolute path of a folder.
        subfolder (`str`): Folder of the model in it; empty for a model of its own.
        revision (`str`, *optional*): Commit on the Hub.
        variant (`str`, *optional*): Of its files.
        identity (`dict`, *optional*): What tells it from others.
    """

    source: str
    subfolder: str = ""
    revision: str | None = None
    variant: str | None = None
    identity: dict[str, Any] | None = None

    @property
    def is_local(self) -> bool:
        """Whether it is in a folder of this machine."""
        return os.path.isabs(self.source)


def write_reference(folder: Path, reference: Reference, place: Path) -> None:
    """Writes reference.json into a folder that will be at `place`; a path begins there, so that both can be moved."""
    content = {name: getattr(reference, name) for name in ("revision", "subfolder", "variant", "identity")}
    where = {"hub": reference.source}
    if reference.is_local:
        where = {"folder": Path(os.path.relpath(reference.source, os.path.abspath(place))).as_posix()}
    write_json(folder / REFERENCE, where | {name: value for name, value in content.items() if value})


def read_reference(folder: Path) -> Reference:
    """What the reference.json of a folder says.

    Raises:
        ValueError: If there is none, or it is malformed. It may come from anybody: a path is one from that folder.
    """
    content = read_json_object(folder / REFERENCE)
    for name, value in content.items():
        if name not in FIELDS or not isinstance(value, FIELDS[name]):
            raise ValueError(f"its {REFERENCE} has {shown(value)} for {shown(name)}.")
    if ("hub" in content) == ("folder" in content):
        raise ValueError(f"its {REFERENCE} should have one of `hub` and `folder`.")
    subfolder = content.get("subfolder", "")
    if subfolder and not subfolder.isidentifier():
        raise ValueError(f"its {REFERENCE} has {shown(subfolder)} for `subfolder`, but should name a folder there.")
    options = {name: content.get(name) for name in ("revision", "variant", "identity")}
    if "hub" in content:
        try:
            validate_repo_id(content["hub"])
        except HFValidationError as error:
            raise ValueError(f"its {REFERENCE} has {shown(content['hub'])}, which is no Hub id.") from error
        return Reference(content["hub"], subfolder, **options)
    path = content["folder"]
    if os.path.isabs(path) or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"its {REFERENCE} has {shown(path)}, which is no path from there.")
    return Reference(os.path.normpath(os.path.join(os.path.abspath(folder), path)), subfolder, **options)


def reference_to(
    name: str, subfolder: str, variant: str | None = None, identity: dict[str, Any] | None = None, **hub: Any
) -> Reference:
    """The reference to a model that was loaded; on the Hub, to the commit that is in the cache.

    Args:
        name (`str`): Folder or Hub id that it was loaded from.
        subfolder (`str`): Folder of the model in it.
        variant (`str`, *optional*): Of its files.
        identity (`dict`, *optional*): What tells it from others.
        hub: Of `HUB_OPTIONS`.
    """
    if os.path.isdir(name):
        return Reference(os.path.abspath(name), subfolder, None, variant, identity)
    file = f"{subfolder}/config.json" if subfolder else "config.json"
    path = try_to_load_from_cache(name, file, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
    if not isinstance(path, str):
        return Reference(name, subfolder, hub.get("revision"), variant, identity)
    folder = Path(path).parent  # .../snapshots/COMMIT, or a folder in it
    return Reference(name, subfolder, (folder.parent if subfolder else folder).name, variant, identity)


def attempts(reference: Reference, force_download: bool = False) -> list[dict[str, Any]]:
    """Options to load a model with, one after another: of a commit, what was downloaded is used without asking the Hub."""
    return [{"local_files_only": True}, {}] if reference.revision is not None and not force_download else [{}]
