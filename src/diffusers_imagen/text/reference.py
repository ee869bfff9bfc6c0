"""Text encoders by reference: a stage names the one that it was trained with, and loads it from there.

A stage that was trained has its tokenizer in full, and in `text_encoder/` the encoder's config.json and a reference.json:
the Hub id and commit of the encoder, or the path of its folder from there, and what tells it from others. `model_index.json`
names `ReferencedTextEncoder`, whose `from_pretrained` loads the encoder that is meant: diffusers does the rest.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..utils.arguments import shown
from ..utils.errors import one_line
from ..utils.files import for_huggingface_hub, read_json_object, write_json
from ..utils.modules import quiet_transformers
from .completeness import refuse_random_weights
from .identity import describe_weights, identity_mismatch


REFERENCE = "reference.json"
FIELDS = {"hub": str, "revision": str, "folder": str, "subfolder": str, "variant": str, "identity": dict}
INSTEAD = "pass another one as `text_encoder`, or `text_encoder=None` to give embeddings"


class EncoderReference(NamedTuple):
    """Where a text encoder is.

    Attributes:
        source (`str`): Hub id, or absolute path of a folder.
        subfolder (`str`): Folder of the encoder in it; empty for a model of its own.
        revision (`str`, *optional*): Commit on the Hub.
        variant (`str`, *optional*): Of its files.
        identity (`dict`, *optional*): What `identity.describe_weights` says of it.
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

    def load(self, **options: Any) -> PreTrainedModel:
        """The encoder. `options` are those of transformers' `from_pretrained`.

        Of a commit on the Hub, files that were downloaded before are used without asking the Hub.

        Raises:
            ValueError: If it is not there, cannot be loaded, or is another one than is meant.
        """
        if self.is_local and not os.path.isdir(self.source):
            raise ValueError(f"the text encoder that it was trained with is not in '{self.source}': {INSTEAD}.")
        options |= {"subfolder": self.subfolder, "trust_remote_code": False, "output_loading_info": True}
        options |= {name: getattr(self, name) for name in ("revision", "variant") if getattr(self, name) is not None}
        attempts: list[dict[str, Any]] = [{}]
        if self.revision is not None and not options.get("force_download"):
            attempts = [{"local_files_only": True}, {}]
        for attempt in attempts:
            try:
                model, found = load_text_model(self.source, **{**options, **attempt})
                break
            except Exception as error:  # whatever a configuration or a file of weights makes of itself
                reason = error
        else:
            raise ValueError(
                f"the text encoder that it was trained with, '{self.source}', cannot be loaded ({one_line(reason)}): "
                f"{INSTEAD}."
            ) from reason
        refuse_random_weights(f"The text encoder of '{self.source}'", found["missing_keys"])
        difference = identity_mismatch(self.identity, describe_weights(model))
        if difference is not None:
            raise ValueError(
                f"'{self.source}' has another text encoder than the one that it was trained with ({difference}): "
                f"{INSTEAD}."
            )
        return model.eval()


class EncoderParts(NamedTuple):
    """What a stage has of its text encoder."""

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    reference: EncoderReference

    def save(self, folder: Path, place: Path) -> dict[str, list[str]]:
        """Writes `tokenizer/` and `text_encoder/`; returns their entries of a `model_index.json`.

        Args:
            folder (`Path`): Where to write to.
            place (`Path`): Where the folder will be, which paths begin at.
        """
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.config.save_pretrained(folder / "text_encoder")
        write_reference(folder / "text_encoder", self.reference, place / "text_encoder")
        return {
            "tokenizer": ["transformers", type(self.tokenizer).__name__],
            "text_encoder": ["diffusers_imagen", ReferencedTextEncoder.__name__],
        }


class ReferencedTextEncoder(PreTrainedModel):
    """
    Stands in a `model_index.json` for a text encoder that is elsewhere. It is never made: `from_pretrained` returns the
    encoder itself, so that `save_pretrained` of a pipeline saves it in full.
    """

    config_class = PretrainedConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """The text encoder that a folder's reference.json means.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): The folder, `text_encoder/` of a stage.
            kwargs: For transformers' `from_pretrained` of the encoder.

        Raises:
            ValueError: If the file is malformed, or the encoder cannot be loaded; says what to pass in its place.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "")
        try:
            return read_reference(folder).load(**kwargs)
        except ValueError as error:
            raise ValueError(f"'{folder}' names a text encoder by reference, but {error}") from error


def load_text_model(name: str, **options: Any) -> Any:
    """What transformers' `from_pretrained` returns: of T5 and its like, whose AutoModel has a decoder, the encoder alone."""
    with quiet_transformers():
        try:
            return AutoModelForTextEncoding.from_pretrained(name, **options)
        except ValueError:  # not a kind that transformers counts among text encoders
            return AutoModel.from_pretrained(name, **options)


# ---- files


def write_reference(folder: Path, reference: EncoderReference, place: Path) -> None:
    """Writes reference.json into a folder that will be at `place`; a path begins there, so that both can be moved."""
    content = {name: getattr(reference, name) for name in ("revision", "subfolder", "variant", "identity")}
    where = {"hub": reference.source}
    if reference.is_local:
        where = {"folder": Path(os.path.relpath(reference.source, os.path.abspath(place))).as_posix()}
    write_json(folder / REFERENCE, where | {name: value for name, value in content.items() if value})


def read_reference(folder: Path) -> EncoderReference:
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
    if subfolder not in ("", "text_encoder"):
        raise ValueError(f"its {REFERENCE} has {shown(subfolder)} for `subfolder`, but should have 'text_encoder'.")
    options = {name: content.get(name) for name in ("revision", "variant", "identity")}
    if "hub" in content:
        try:
            validate_repo_id(content["hub"])
        except HFValidationError as error:
            raise ValueError(f"its {REFERENCE} has {shown(content['hub'])}, which is no Hub id.") from error
        return EncoderReference(content["hub"], subfolder, **options)
    path = content["folder"]
    if os.path.isabs(path) or "\\" in path or ":" in path or "\0" in path:
        raise ValueError(f"its {REFERENCE} has {shown(path)}, which is no path from there.")
    return EncoderReference(os.path.normpath(os.path.join(os.path.abspath(folder), path)), subfolder, **options)


def find_reference(name: str, subfolder: str, **hub: Any) -> EncoderReference | None:
    """What the reference.json beside an encoder's configuration says; None if there is none.

    Args:
        name (`str`): Folder or Hub id.
        subfolder (`str`): Folder of the encoder in it.
        hub: Of `HUB_OPTIONS`.
    """
    if os.path.isdir(name):
        folder = Path(name, subfolder)
        return read_reference(folder) if (folder / REFERENCE).is_file() else None
    file = f"{subfolder}/{REFERENCE}" if subfolder else REFERENCE
    try:
        path = hf_hub_download(name, file, **for_huggingface_hub(hub))
    except Exception:  # there is none, or no Hub
        return None
    return read_reference(Path(path).parent)


def reference_of(
    name: str, subfolder: str, variant: str | None, identity: dict[str, Any] | None, **hub: Any
) -> EncoderReference:
    """The reference of an encoder that was loaded; of one that is loaded by a reference itself, that.

    Args:
        name (`str`): Folder or Hub id that it was loaded from.
        subfolder (`str`): Folder of the encoder in it.
        variant (`str`, *optional*): Of its files.
        identity (`dict`, *optional*): What tells it from others.
        hub: Of `HUB_OPTIONS`; `revision` is not needed to find the commit out.
    """
    if os.path.isdir(name):
        found = find_reference(name, subfolder)
        if found is not None:
            return found
        return EncoderReference(os.path.abspath(name), subfolder, None, variant, identity)
    file = f"{subfolder}/config.json" if subfolder else "config.json"
    options = {key: hub[key] for key in ("cache_dir", "revision") if hub.get(key) is not None}
    path = try_to_load_from_cache(name, file, **options)
    if not isinstance(path, str):
        return EncoderReference(name, subfolder, hub.get("revision"), variant, identity)
    folder = Path(path).parent
    if (folder / REFERENCE).is_file():
        return read_reference(folder)
    commit = folder.parent.name if subfolder else folder.name  # of .../snapshots/COMMIT/file
    return EncoderReference(name, subfolder, commit, variant, identity)
