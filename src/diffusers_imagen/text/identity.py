"""Identities of text encoders: networks require the encoder that they were trained with."""

import hashlib
import json
from typing import Any

import numpy as np
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..utils.modules import is_quantized


PROBES = 64
# entries that earlier versions did not record, with their implied values
LATER = {"keeps_padding": False, "cleans_captions": False}
PROBE_TOLERANCE = 2**-7  # rounding to bfloat16 changes a weight by up to 2^-8; further training changes it by more


def describe_encoder(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> dict[str, Any]:
    """Return kind, sizes, vocabulary, token limit, and a sample of weights (not available for quantized encoders)."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return describe_weights(model) | {
        "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        "max_length": tokenizer.model_max_length,
    }


def describe_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Return kind and sizes of an encoder, and a sample of its weights unless they are quantized or offloaded."""
    return {"class": type(model).__name__, "width": encoder_width(model.config), **sample_weights(model)}


def sample_weights(model: nn.Module) -> dict[str, Any]:
    """Return the number of weights of a model, and a sample of them; empty if they are quantized or offloaded."""
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
    """Return the width of an encoder's embeddings.

    Raises:
        ValueError: If its configuration does not have it.
    """
    width = getattr(config, "d_model", None) or getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(config).__name__} has no width (`hidden_size`): it is not a text encoder.")
    return width


def identity_mismatch(expected: Any, actual: Any) -> str | None:
    """Describe how two encoders differ; None if they do not. Entries that one of them lacks are not compared.

    For concatenated encoders, each is compared.
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
    except TypeError:  # for malformed values
        return "its description is malformed"
    return "other weights" if differ else None
