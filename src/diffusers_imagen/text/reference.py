"""Text encoders by reference: a stage refers to its text encoder, and loads it from its source.

A trained stage has its complete tokenizer, and in `text_encoder/` the encoder's config.json and a reference.json: the
Hub id and commit of the encoder, or the relative path of its folder, and its identity. `model_index.json` names
`ReferencedTextEncoder`, whose `from_pretrained`, called by diffusers, loads the encoder.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..utils.errors import one_line
from ..utils.files import for_huggingface_hub
from ..utils.modules import quiet_transformers
from ..utils.references import REFERENCE, Reference, attempts, read_reference, reference_to, write_reference
from .completeness import refuse_random_weights
from .identity import describe_weights, identity_mismatch


INSTEAD = "pass another one as `text_encoder`, or `text_encoder=None` to use embeddings"


class EncoderParts(NamedTuple):
    """Tokenizer and reference of a stage's text encoder."""

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    reference: Reference

    def save(self, folder: Path, place: Path) -> dict[str, list[str]]:
        """Write `tokenizer/` and `text_encoder/`; return their entries of a `model_index.json`.

        Args:
            folder (`Path`): Folder to write to.
            place (`Path`): Final location of the folder, to which paths are relative.
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
    Placeholder in `model_index.json` for a text encoder that is saved elsewhere. It is never instantiated:
    `from_pretrained` returns the encoder itself, so that `save_pretrained` of a pipeline saves the complete encoder.
    """

    config_class = PretrainedConfig

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load the text encoder that a folder's reference.json refers to.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): The folder: `text_encoder/` of a stage.
            kwargs: Options of transformers' `from_pretrained` for the encoder.

        Raises:
            ValueError: If the file is malformed, or the encoder cannot be loaded; describes alternatives.
        """
        folder = Path(pretrained_model_name_or_path, kwargs.pop("subfolder", None) or "")
        try:
            return load_reference(read_reference(folder), **kwargs)
        except ValueError as error:
            raise ValueError(f"'{folder}' names a text encoder by reference, but {error}") from error


def load_text_model(name: str, **options: Any) -> Any:
    """Return the result of transformers' `from_pretrained`; for T5 and similar models, load only the encoder."""
    with quiet_transformers():
        try:
            return AutoModelForTextEncoding.from_pretrained(name, **options)
        except ValueError:  # not listed by transformers as a text encoder
            return AutoModel.from_pretrained(name, **options)


def load_reference(reference: Reference, **options: Any) -> PreTrainedModel:
    """Load the encoder. `options` are those of transformers' `from_pretrained`.

    For a commit on the Hub, downloaded files are used without requests to the Hub.

    Raises:
        ValueError: If it does not exist, cannot be loaded, or is another encoder than that of the reference.
    """
    if reference.is_local and not os.path.isdir(reference.source):
        raise ValueError(f"the text encoder that it was trained with is not in '{reference.source}': {INSTEAD}.")
    options |= {"subfolder": reference.subfolder, "trust_remote_code": False, "output_loading_info": True}
    options |= {
        name: getattr(reference, name) for name in ("revision", "variant") if getattr(reference, name) is not None
    }
    for attempt in attempts(reference, bool(options.get("force_download"))):
        try:
            model, found = load_text_model(reference.source, **{**options, **attempt})
            break
        except Exception as error:  # malformed configurations and weights raise errors of any type
            reason = error
    else:
        raise ValueError(
            f"the text encoder that it was trained with, '{reference.source}', cannot be loaded ({one_line(reason)}): "
            f"{INSTEAD}."
        ) from reason
    refuse_random_weights(f"The text encoder of '{reference.source}'", found["missing_keys"])
    difference = identity_mismatch(reference.identity, describe_weights(model))
    if difference is not None:
        raise ValueError(
            f"'{reference.source}' has another text encoder than the one that it was trained with ({difference}): "
            f"{INSTEAD}."
        )
    return model.eval()


def find_reference(name: str, subfolder: str, **hub: Any) -> Reference | None:
    """Read the reference.json next to an encoder's configuration; None if there is none.

    Args:
        name (`str`): Folder or Hub id.
        subfolder (`str`): Folder of the encoder in it.
        hub: Options among `HUB_OPTIONS`.
    """
    if os.path.isdir(name):
        folder = Path(name, subfolder)
        return read_reference(folder) if (folder / REFERENCE).is_file() else None
    file = f"{subfolder}/{REFERENCE}" if subfolder else REFERENCE
    try:
        path = hf_hub_download(name, file, **for_huggingface_hub(hub))
    except Exception:  # it does not exist, or the Hub cannot be reached
        return None
    return read_reference(Path(path).parent)


def reference_of(
    name: str, subfolder: str, variant: str | None, identity: dict[str, Any] | None, **hub: Any
) -> Reference:
    """Return a reference like `reference_to`; for an encoder that was loaded by reference, that reference."""
    found = reference_to(name, subfolder, variant, identity, **hub)
    again = find_reference(name, subfolder, **{**hub, "local_files_only": True})
    return found if again is None else again
