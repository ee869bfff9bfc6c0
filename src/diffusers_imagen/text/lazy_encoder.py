"""Text encoders for training: captions to states, in the form that the pipelines give the networks."""

import hashlib
import json
import os
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import free_memory
from diffusers.utils import logging
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer, PreTrainedModel

from ..utils.errors import describe_fault
from ..utils.quiet import quiet_transformers
from ..utils.tensors import find_not_finite
from .completeness import refuse_random_weights
from .encoder import NO_LIMIT, encode_tokens


logger = logging.get_logger(__name__)

PROBES = 64
PROBE_TOLERANCE = 2**-7  # a weight in bfloat16 is off by 2^-8; weights that were trained on move by more


class TextEncoder:
    """A text encoder that is in memory only while it is used.

    Args:
        name (`str`): Folder or Hub id, with `text_encoder/` and `tokenizer/` or with the model itself.
        max_length (`int`, *optional*): Tokens of a caption; the tokenizer's own limit without.
        device (`str` or `torch.device`): Where it runs.
        dtype (`torch.dtype`): Of its weights.

    Raises:
        ValueError: If there is no such encoder, it lacks weights, or there is no limit of tokens.
    """

    def __init__(
        self,
        name: str,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.name, self.device, self.dtype = name, device, dtype
        self._model: PreTrainedModel | None = None
        self._identity: dict[str, Any] | None = None
        self.tokenizer, self.subfolder = load_tokenizer(name)
        limit = self.tokenizer.model_max_length
        if max_length is not None:
            if max_length > limit:
                raise ValueError(
                    f"`tokenizer_max_length` is {max_length}, but the tokenizer of {name!r} ends at {limit}."
                )
            self.tokenizer.model_max_length = max_length
        elif limit > NO_LIMIT:
            raise ValueError(
                f"The tokenizer of {name!r} has no limit of tokens: give `tokenizer_max_length`, e.g. 128."
            )

    @property
    def max_length(self) -> int:
        """Tokens that captions are cut or padded to."""
        return self.tokenizer.model_max_length

    @property
    def model(self) -> PreTrainedModel:
        """The network, loaded when it is first needed."""
        if self._model is None:
            model = load_encoder(self.name, self.subfolder, self.dtype)
            check_vocabulary(self.name, self.tokenizer, model)
            self._model = model.eval().requires_grad_(False).to(self.device)
        return self._model

    def release(self) -> None:
        """Takes the network out of memory; the next use loads it again."""
        self._model = None
        free_memory()

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States `(B, L, E)`, zero at padded positions, and mask `(B, L)`."""
        return self._encode(captions, "max_length")

    def _encode(self, captions: list[str], padding: str) -> tuple[torch.Tensor, torch.Tensor]:
        states, mask = encode_tokens(self.tokenizer, self.model, captions, padding=padding)
        if not states.isfinite().all():
            raise ValueError(
                f"`text_encoder` is {self.name!r}, whose states in {self.dtype} are not finite: its weights are damaged, "
                "or the precision is too narrow for it."
            )
        return states, mask

    @torch.no_grad()
    def unpadded(self, captions: list[str]) -> list[torch.Tensor]:
        """States of each caption's own tokens, `(tokens, E)`.

        The encoder sees captions padded to the longest of them only: for short captions and a limit of 512 tokens
        that is tens of times faster.
        """
        states, mask = self._encode(captions, "longest")
        lengths = mask.sum(dim=1).tolist()
        if any(not row[:length].all() for row, length in zip(mask, lengths)):
            raise ValueError(
                f"The tokenizer of {self.name!r} pads on the left; captions must begin at the first token."
            )
        return [row[:length].cpu() for row, length in zip(states, lengths)]

    def count_tokens(self, captions: list[str]) -> list[int]:
        """Tokens of captions before they are cut."""
        return [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False).input_ids]

    def identity(self) -> dict[str, Any]:
        """What tells this encoder from others: kind, sizes, vocabulary, limit, and a sample of weights."""
        if self._identity is None:
            weights = sorted(self.model.named_parameters())
            places = np.linspace(0, len(weights) - 1, PROBES).round().astype(int)
            probe = [weights[place][1].flatten()[7 * i % weights[place][1].numel()] for i, place in enumerate(places)]
            vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
            self._identity = {
                "class": type(self.model).__name__,
                "parameters": sum(weight.numel() for _, weight in weights),
                "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
                "max_length": self.max_length,
                "width": encoder_width(self.model.config),
                "weights": [float(value) for value in probe],
            }
        return self._identity


def load_text_encoder(name: str, max_length: int | None = None, **kwargs) -> TextEncoder:
    """The text encoder of a folder or of the Hub; keyword arguments as for `TextEncoder`."""
    return TextEncoder(name, max_length, **kwargs)


def load_tokenizer(name: str):
    """The tokenizer of a pipeline folder or of a model, and the subfolder that the encoder is in.

    Raises:
        ValueError: If there is none, or it cannot pad captions to a limit.
    """
    folders = [("tokenizer", "text_encoder"), ("", "")]
    if os.path.isdir(name):
        folders = folders[:1] if os.path.isdir(os.path.join(name, "tokenizer")) else folders[1:]
    elif os.path.exists(name):
        raise ValueError(f"`text_encoder` is {name!r}, a file, but should be a folder or a Hub id.")
    for subfolder, encoder in folders:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, subfolder=subfolder, trust_remote_code=False)
        except Exception as error:  # tokenizers raises plain ones for what is in a file
            reason = describe_fault(error)
            continue
        limit = tokenizer.model_max_length
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not limit >= 1:
            raise ValueError(
                f"`text_encoder` is {name!r}, whose tokenizer has the limit {limit!r}, which is no number."
            )
        if tokenizer.pad_token is None:
            raise ValueError(f"`text_encoder` is {name!r}, whose tokenizer has no token to pad captions with.")
        return tokenizer, encoder
    raise ValueError(f"`text_encoder` is {name!r}, which has no tokenizer that can be loaded: {reason}")


def load_encoder(name: str, subfolder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder alone: of T5 and its like, whose AutoModel has a decoder too, the class without it.

    Raises:
        ValueError: If there is none, or it lacks weights or has some that are not finite.
    """
    what = f"`text_encoder` is {name!r}"
    options = {"subfolder": subfolder, "dtype": dtype, "trust_remote_code": False, "output_loading_info": True}
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
        return model
    raise ValueError(f"{what}, which has no encoder that can be loaded: {reason}")


def check_vocabulary(name: str, tokenizer, model: PreTrainedModel) -> None:
    """Checks that the encoder knows every token: another would end in an error of indexing, on a GPU in an abort.

    Raises:
        ValueError: If not.
    """
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(
            f"`text_encoder` is {name!r}, whose tokenizer has {len(tokenizer)} tokens, but its encoder knows {known}: they "
            "do not belong together."
        )


def encoder_width(config) -> int:
    """Width of an encoder's states.

    Raises:
        ValueError: If its configuration names none.
    """
    width = getattr(config, "d_model", None) or getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(f"{type(config).__name__} has no width (`hidden_size`): it is no text encoder's.")
    return width


def identity_mismatch(expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    """How two encoders differ, in words; None if they do not. Keys that one of them lacks are not compared."""
    for key in expected.keys() & actual.keys() - {"weights"}:
        if expected[key] != actual[key]:
            return f"{key} {expected[key]!r}, not {actual[key]!r}"
    pairs = zip(expected.get("weights", []), actual.get("weights", []))
    if any(abs(a - b) > PROBE_TOLERANCE * max(abs(a), abs(b)) + 1e-6 for a, b in pairs):
        return "other weights"
    return None
