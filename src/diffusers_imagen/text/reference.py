"""Text encoders by reference: a stage names the one that it was trained with, and loads it from there.

A stage that was trained has its tokenizer in full, and in `text_encoder/` the encoder's config.json and a reference.json:
the Hub id and commit of the encoder, or the path of its folder from there, and what tells it from others. `model_index.json`
names `ReferencedTextEncoder`, whose `from_pretrained` loads the encoder that is meant: diffusers does the rest.
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


INSTEAD = "pass another one as `text_encoder`, or `text_encoder=None` to give embeddings"


class EncoderParts(NamedTuple):
    """What a stage has of its text encoder."""

    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    reference: Reference

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
            return load_reference(read_reference(folder), **kwargs)
        except ValueError as error:
            raise ValueError(f"'{folder}' names a text encoder by reference, but {error}") from error


def load_text_model(name: str, **options: Any) -> Any:
    """What transformers' `from_pretrained` returns: of T5 and its like, whose AutoModel has a decoder, the encoder alone."""
    with quiet_transformers():
        try:
            return AutoModelForTextEncoding.from_pretrained(name, **options)
        except ValueError:  # not a kind that transformers counts among text encoders
            return AutoModel.from_pretrained(name, **options)


def load_reference(reference: Reference, **options: Any) -> PreTrainedModel:
    """The encoder. `options` are those of transformers' `from_pretrained`.

    Of a commit on the Hub, files that were downloaded before are used without asking the Hub.

    Raises:
        ValueError: If it is not there, cannot be loaded, or is another one than is meant.
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
        except Exception as error:  # whatever a configuration or a file of weights makes of itself
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
) -> Reference:
    """As `reference_to`; of an encoder that was loaded by a reference itself, that."""
    found = reference_to(name, subfolder, variant, identity, **hub)
    again = find_reference(name, subfolder, **{**hub, "local_files_only": True})
    return found if again is None else again
