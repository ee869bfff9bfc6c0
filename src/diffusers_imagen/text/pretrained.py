"""Tokenizers and text encoders from a folder or the Hub, refused in one line if they are damaged or incomplete."""

import os
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..utils.errors import describe_fault
from ..utils.files import for_huggingface_hub
from ..utils.modules import find_not_finite, is_quantized, quiet_transformers
from .completeness import refuse_empty_vocabulary, refuse_random_weights


NO_LIMIT = 1_000_000  # transformers writes 1e30 where a tokenizer's length was never set


def load_tokenizer(name: str, max_length: int | None = None, **hub: Any) -> tuple[PreTrainedTokenizerBase, str]:
    """Return the tokenizer of a pipeline folder or of a model, and the subfolder that the encoder is in.

    Args:
        name (`str`): Folder or Hub id.
        max_length (`int`, *optional*): Tokens that texts are to be cut or padded to; the tokenizer's own limit without.
        hub: Of `HUB_OPTIONS`, such as `token`, `revision` or `local_files_only`.

    Raises:
        ValueError: If there is none, or it cannot pad texts to a limit.
    """
    folders = [("tokenizer", "text_encoder"), ("", "")]
    if os.path.isdir(name):
        folders = folders[:1] if os.path.isdir(os.path.join(name, "tokenizer")) else folders[1:]
    elif os.path.exists(name):
        raise ValueError(f"`text_encoder` is {name!r}, a file, but should be a folder or a Hub id.")
    for subfolder, encoder in folders:
        try:
            if subfolder:
                tokenizer = load_tokenizer_of_pipeline(name, hub)
            else:
                tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
        except Exception as error:  # tokenizers raises plain ones for what is in a file
            reason = describe_fault(error)
            continue
        refuse_empty_vocabulary(f"`text_encoder` is {name!r}, whose tokenizer", tokenizer)
        limit = tokenizer.model_max_length
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
            raise ValueError(
                f"`text_encoder` is {name!r}, whose tokenizer has the limit {limit!r}, which is no number."
            )
        if tokenizer.pad_token is None:
            raise ValueError(f"`text_encoder` is {name!r}, whose tokenizer has no token to pad texts with.")
        if max_length is None and limit > NO_LIMIT:
            raise ValueError(
                f"The tokenizer of {name!r} has no limit of tokens: give `tokenizer_max_length`, e.g. 128."
            )
        if max_length is not None and max_length > limit:
            raise ValueError(f"`tokenizer_max_length` is {max_length}, but the tokenizer of {name!r} ends at {limit}.")
        tokenizer.model_max_length = limit if max_length is None else max_length
        return tokenizer, encoder
    raise ValueError(f"`text_encoder` is {name!r}, which has no tokenizer that can be loaded: {reason}")


def load_tokenizer_of_pipeline(source: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `tokenizer/` of a folder or Hub id, with the limit that it was saved with."""
    if not os.path.isdir(source):
        # AutoTokenizer looks for more than there is, and offline takes that for an error
        source = snapshot_download(source, allow_patterns="tokenizer/*", **for_huggingface_hub(hub))
    return AutoTokenizer.from_pretrained(source, subfolder="tokenizer", trust_remote_code=False)


def load_encoder(
    name: str,
    subfolder: str,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    dtype: torch.dtype | str,
    **kwargs: Any,
) -> PreTrainedModel:
    """Return the frozen encoder alone: of T5 and its like, whose AutoModel has a decoder too, the class without it.

    `dtype` is that of the weights, or "auto": as they were saved. `kwargs` are for `from_pretrained`. A quantized encoder
    is loaded to its device, as it cannot be moved there.

    Raises:
        ValueError: If there is none, it lacks weights or has some that are not finite, or the tokenizer is another's.
    """
    what = f"`text_encoder` is {name!r}"
    options: dict[str, Any] = {
        "subfolder": subfolder,
        "dtype": dtype,
        "trust_remote_code": False,
        "output_loading_info": True,
    }
    if kwargs.get("quantization_config") is not None:
        options["device_map"] = {"": device}
    options |= kwargs
    for auto_class in (AutoModelForTextEncoding, AutoModel):
        try:
            with quiet_transformers():
                model, info = auto_class.from_pretrained(name, **options)
        except ValueError as error:  # not a kind that transformers counts among text encoders
            reason = describe_fault(error)
            continue
        except Exception as error:  # whatever a configuration or a file of weights makes of itself
            reason = describe_fault(error)
            break
        mismatched = (str(entry[0]) for entry in info["mismatched_keys"])
        refuse_random_weights(f"{what}, whose text encoder", [*info["missing_keys"], *mismatched])
        broken = find_not_finite(model)
        if broken is not None:
            raise ValueError(f"{what}, whose text encoder has weights that are not finite, {broken} among them.")
        known = model.get_input_embeddings().num_embeddings
        if len(tokenizer) > known:  # another token would end in an error of indexing, on a GPU in an abort
            raise ValueError(
                f"{what}, whose tokenizer has {len(tokenizer)} tokens, but its encoder knows {known}: they do not belong "
                "together."
            )
        model = model.eval().requires_grad_(False)
        return model if is_quantized(model) else model.to(device)
    raise ValueError(f"{what}, which has no encoder that can be loaded: {reason}")


def load_text(name: str, max_length: int | None = None) -> dict[str, Any]:
    """Return a pipeline's `text_encoder`, in the type that its weights have, and `tokenizer`; ValueError as above.

    Args:
        name (`str`): Folder or Hub id, of a pipeline or of a model.
        max_length (`int`, *optional*): Tokens that texts are to be cut or padded to; the tokenizer's own limit without.
    """
    tokenizer, subfolder = load_tokenizer(name, max_length)
    encoder = load_encoder(name, subfolder, tokenizer, "cpu", "auto")
    return {"text_encoder": encoder, "tokenizer": tokenizer}
