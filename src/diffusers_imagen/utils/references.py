"""References: small files that refer to a model on the Hub or in another folder, with its identity."""

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
    """Location and identity of a model.

    Attributes:
        source (`str`): Hub id, or absolute path of a folder.
        subfolder (`str`): Folder of the model in it; empty if it is the model itself.
        revision (`str`, *optional*): Commit on the Hub.
        variant (`str`, *optional*): Variant of its files.
        identity (`dict`, *optional*): Identity of the model.
    """

    source: str
    subfolder: str = ""
    revision: str | None = None
    variant: str | None = None
    identity: dict[str, Any] | None = None

    @property
    def is_local(self) -> bool:
        """Whether the model is in a local folder."""
        return os.path.isabs(self.source)


def write_reference(folder: Path, reference: Reference, place: Path) -> None:
    """Write reference.json to a folder that will be at `place`, to which paths are relative, so that both can be moved."""
    content = {name: getattr(reference, name) for name in ("revision", "subfolder", "variant", "identity")}
    where = {"hub": reference.source}
    if reference.is_local:
        where = {"folder": Path(os.path.relpath(reference.source, os.path.abspath(place))).as_posix()}
    write_json(folder / REFERENCE, where | {name: value for name, value in content.items() if value})


def read_reference(folder: Path) -> Reference:
    """Read the reference.json of a folder, which is untrusted.

    Raises:
        ValueError: If there is none, or it is malformed, for example has an absolute path.
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
            raise ValueError(f"its {REFERENCE} has {shown(content['hub'])}, which is not a Hub id.") from error
        return Reference(content["hub"], subfolder, **options)
    path = content["folder"]
    if os.path.isabs(path) or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"its {REFERENCE} has {shown(path)}, which is not a relative path.")
    return Reference(os.path.normpath(os.path.join(os.path.abspath(folder), path)), subfolder, **options)


def reference_to(
    name: str, subfolder: str, variant: str | None = None, identity: dict[str, Any] | None = None, **hub: Any
) -> Reference:
    """Return the reference to a loaded model; on the Hub, to the commit in the cache.

    Args:
        name (`str`): Folder or Hub id that it was loaded from.
        subfolder (`str`): Folder of the model in it.
        variant (`str`, *optional*): Variant of its files.
        identity (`dict`, *optional*): Identity of the model.
        hub: Options among `HUB_OPTIONS`.
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
    """Return options for attempts to load a model; for a commit, first from the cache, without requests to the Hub."""
    return [{"local_files_only": True}, {}] if reference.revision is not None and not force_download else [{}]
