"""What tells one text encoder from another: networks only read the embeddings of the one they were trained with."""

import hashlib
import json
from typing import Any

import numpy as np
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..utils.modules import is_quantized


PROBES = 64
# what descriptions did not say at first, with what that stood for
LATER = {"keeps_padding": False, "cleans_captions": False}
PROBE_TOLERANCE = 2**-7  # a weight in bfloat16 is off by 2^-8; weights that were trained on move by more


def describe_encoder(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Any]:
    """Kind, sizes, vocabulary, limit of tokens, and a sample of weights, which a quantized encoder does not have as such."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return describe_weights(model) | {
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "max_length": tokenizer.model_max_length,
    }


def describe_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Kind and sizes of an encoder, and a sample of its weights; without that where they are quantized or elsewhere."""
    return {"class": type(model).__name__, "width": encoder_width(model.config), **sample_weights(model)}


def sample_weights(model: nn.Module) -> dict[str, Any]:
    """How many weights a model has, and a sample of them; nothing where they are quantized or elsewhere."""
    weights = sorted(model.named_parameters())
    if is_quantized(model) or any(weight.is_meta for _, weight in weights):
        return {}
    places = np.linspace(0, len(weights) - 1, PROBES).round().astype(int)
    probe = [weights[place][1].detach().flatten()[7 * i % weights[place][1].numel()] for i, place in enumerate(places)]
    return {
        "parameters": sum(weight.numel() for _, weight in weights),
        "weights": [float(value) for value in probe],
    }


def encoder_width(config: PretrainedConfig) -> int:
    """Width of an encoder's embeddings.

    Raises:
        ValueError: If its configuration names none.
    """
    width = getattr(config, "d_model", None) or getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(config).__name__} has no width (`hidden_size`): it is no text encoder's.")
    return width


def identity_mismatch(expected: Any, actual: Any) -> str | None:
    """How two encoders differ, in words; None if they do not. What one of them does not say is not compared.

    Of several encoders side by side, each is compared.
    """
    if not (isinstance(expected, dict) and isinstance(actual, dict)):
        return None
    expected, actual = LATER | expected, LATER | actual
    for key in expected.keys() & actual.keys() - {"weights"}:
        if isinstance(expected[key], dict) and isinstance(actual[key], dict):
            difference = identity_mismatch(expected[key], actual[key])
            if difference is not None:
                return difference
        elif expected[key] != actual[key]:
            return f"{key} {expected[key]!r}, not {actual[key]!r}"
    try:
        pairs = list(zip(expected.get("weights", []), actual.get("weights", [])))
        differ = any(abs(a - b) > PROBE_TOLERANCE * max(abs(a), abs(b)) + 1e-6 for a, b in pairs)
    except TypeError:  # of values that no encoder has
        return "its description is malformed"
    return "other weights" if differ else None
