"""Loading of tokenizers and text encoders from a folder or the Hub, with one-line errors for damaged files."""

import os
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..utils.errors import describe_fault
from ..utils.files import HUB_OPTIONS, for_huggingface_hub
from ..utils.modules import find_not_finite, is_quantized
from ..utils.shipped import find_source
from .completeness import refuse_empty_vocabulary, refuse_random_weights
from .reference import find_reference, load_reference, load_text_model


NO_LIMIT = 1_000_000  # transformers uses 1e30 if a tokenizer's maximum length is not set


def load_tokenizer(name: str, max_length: int | None = None, **hub: Any) -> tuple[PreTrainedTokenizerBase, str]:
    """Load the tokenizer of a pipeline folder or a model; return it with the subfolder of the encoder.

    Args:
        name (`str`): Folder or Hub id.
        max_length (`int`, *optional*): Number of tokens per text; by default the tokenizer's limit.
        hub: Entries of `HUB_OPTIONS`, such as `token`, `revision` or `local_files_only`.

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
        except Exception as error:  # tokenizers raises plain exceptions for malformed files
            reason = describe_fault(error)
            continue
        refuse_empty_vocabulary(f"`text_encoder` is {name!r}, whose tokenizer", tokenizer)
        limit = tokenizer.model_max_length
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
            raise ValueError(
                f"`text_encoder` is {name!r}, whose tokenizer has the limit {limit!r}, which is not a number."
            )
        if tokenizer.pad_token is None:
            raise ValueError(f"`text_encoder` is {name!r}, whose tokenizer has no padding token.")
        if max_length is None and limit > NO_LIMIT:
            raise ValueError(f"The tokenizer of {name!r} has no maximum length: set `tokenizer_max_length`, e.g. 128.")
        if max_length is not None and max_length > limit:
            raise ValueError(
                f"`tokenizer_max_length` is {max_length}, but the tokenizer of {name!r} has the limit {limit}."
            )
        tokenizer.model_max_length = limit if max_length is None else max_length
        return tokenizer, encoder
    raise ValueError(f"`text_encoder` is {name!r}, whose tokenizer cannot be loaded: {reason}")


def load_tokenizer_of_pipeline(source: str, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `tokenizer/` of a folder or Hub id, with its saved maximum length."""
    if not os.path.isdir(source):
        # AutoTokenizer requests files that may not exist, which is an error when offline
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
    """Load the frozen encoder; for encoder-decoders such as T5, the class without the decoder.

    `dtype` is that of the weights, or "auto": as saved. `kwargs` are passed to `from_pretrained`. A quantized encoder
    is loaded directly to its device, because it cannot be moved.

    Raises:
        ValueError: If there is none, weights are missing or not finite, or the tokenizer does not match.
    """
    what = f"`text_encoder` is {name!r}"
    options: dict[str, Any] = {"dtype": dtype}
    if kwargs.get("quantization_config") is not None:
        options["device_map"] = {"": device}
    model = load_where_it_is(what, name, subfolder, {**options, **kwargs})
    broken = find_not_finite(model)
    if broken is not None:
        raise ValueError(f"{what}, whose text encoder has weights that are not finite, such as {broken}.")
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:  # larger tokens would raise an indexing error, and abort the process on a GPU
        raise ValueError(
            f"{what}, whose tokenizer has {len(tokenizer)} tokens, but its encoder {known}: they do not belong "
            "together."
        )
    model = model.eval().requires_grad_(False)
    return model if is_quantized(model) else model.to(device)


def load_where_it_is(what: str, name: str, subfolder: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load the encoder in a folder or repository, or the one that a stage there refers to.

    Raises:
        ValueError: If there is none, or it lacks weights; the message begins with `what`.
    """
    hub = {option: value for option, value in options.items() if option in HUB_OPTIONS}
    reference = find_reference(name, subfolder) if os.path.isdir(name) else None
    if reference is None:
        fixed = {"subfolder": subfolder, "trust_remote_code": False, "output_loading_info": True}
        try:
            model, info = load_text_model(name, **fixed, **options)
        except Exception as error:  # malformed configurations and weights raise errors of any type
            reference = None if os.path.isdir(name) else find_reference(name, subfolder, **hub)
            if reference is None:
                raise ValueError(f"{what}, whose encoder cannot be loaded: {describe_fault(error)}") from error
        else:
            mismatched = (str(entry[0]) for entry in info["mismatched_keys"])
            refuse_random_weights(f"{what}, whose text encoder", [*info["missing_keys"], *mismatched])
            return model
    try:
        return load_reference(
            reference, **{option: value for option, value in options.items() if option != "revision"}
        )
    except ValueError as error:
        raise ValueError(f"{what}, which names a text encoder by reference, but {error}") from error


def load_text(name: str, max_length: int | None = None) -> dict[str, Any]:
    """Load a pipeline's `text_encoder`, in the dtype of its weights, and `tokenizer`; errors as above.

    Args:
        name (`str`): Folder or Hub id, of a pipeline or of a model.
        max_length (`int`, *optional*): Number of tokens per text; by default the tokenizer's limit.
    """
    name = str(find_source(name))
    tokenizer, subfolder = load_tokenizer(name, max_length)
    encoder = load_encoder(name, subfolder, tokenizer, "cpu", "auto")
    return {"text_encoder": encoder, "tokenizer": tokenizer}
