"""Checks for missing weights of text encoders and missing vocabularies, which transformers fills in silently."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.modules import first_names, is_offloaded, quiet_transformers


# weights of a text encoder that its embeddings do not depend on, which may be missing
UNREAD = re.compile(r"(^|\.)(pooler|decoder|lm_head|cls|classifier|text_projection)\b")

MOST_SPECIAL = 1000  # a tokenizer with more tokens has some for text; checking all tokens of a large one is slow


def refuse_random_weights(description: str, missing: Iterable[str]) -> None:
    """Raise ValueError for a text encoder whose checkpoint lacks weights that its embeddings depend on."""
    missing = sorted(name for name in missing if not UNREAD.search(name))
    if missing:
        raise ValueError(
            f"{description} lacks weights: {first_names(missing)}. transformers initializes them randomly; save it again "
            "from a complete checkpoint."
        )


def refuse_empty_vocabulary(description: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a tokenizer without its vocabulary file, which maps all texts to the unknown token."""
    if len(tokenizer) > MOST_SPECIAL:
        return
    pieces = [
        piece for piece in set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) if piece.strip(" \u2581")
    ]
    if not pieces:
        raise ValueError(
            f"{description} has no vocabulary except special tokens: its file is missing, tokenizer.json or sentencepiece's."
        )


def random_weights(encoder: PreTrainedModel) -> list[str]:
    """Return the weights that transformers initialized randomly when it loaded an encoder from a folder.

    transformers marks loaded weights; for weights without a mark, the folder is checked again, without reading
    weights.
    """
    folder = encoder.name_or_path
    if all(getattr(parameter, "_is_hf_initialized", False) for parameter in encoder.parameters()):
        return []
    if not folder or not os.path.isdir(folder) or is_offloaded(encoder):
        return []  # built in this process, or from the Hub
    if not os.path.isfile(os.path.join(folder, "config.json")):
        folder = os.path.join(folder, "text_encoder")
    stems = (
        re.fullmatch(r"(?:model|pytorch_model)\.(\w+?)(?:-\d+-of-\d+)?", path.stem) for path in Path(folder).glob("*")
    )
    for variant in [None, *sorted({stem.group(1) for stem in stems if stem})]:
        try:
            with quiet_transformers():
                _, found = type(encoder).from_pretrained(
                    folder, variant=variant, device_map={"": "meta"}, output_loading_info=True, local_files_only=True
                )
        except (OSError, ValueError, RuntimeError):
            continue
        return list(found["missing_keys"])
    return []
