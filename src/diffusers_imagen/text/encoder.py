"""TextEncoder: tokenizer and frozen text encoder, for pipelines and training."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.training_utils import free_memory
from diffusers.utils import logging
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..utils.arguments import shown
from ..utils.errors import is_out_of_memory, one_line
from ..utils.files import HUB_OPTIONS
from ..utils.modules import find_not_finite
from ..utils.references import Reference
from ..utils.shipped import find_source
from .cleanup import clean_captions
from .identity import describe_encoder, describe_weights, encoder_width
from .pretrained import NO_LIMIT, load_encoder, load_tokenizer
from .reference import EncoderParts, reference_of
from .source import TextSource, in_slices
from .text_embeddings import TextEmbeddings, zero_padding


logger = logging.get_logger(__name__)


class TextEncoder(TextSource):
    """Tokenizer and frozen text encoder.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Texts are truncated or padded to its `model_max_length`.
        model ([`~transformers.PreTrainedModel`], *optional*): The network; of an encoder-decoder, the encoder is used.
        load (`Callable`, *optional*): Loads the network instead of `model`, on first use and after `release`.
        keeps_padding (`bool`): Whether embeddings at padded positions are kept, instead of being set to zero.
        cleans_captions (`bool`): Whether texts are cleaned as in DeepFloyd IF before encoding: see
            `cleanup.clean_captions`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel | None = None,
        load: Callable[[], PreTrainedModel] | None = None,
        keeps_padding: bool = False,
        cleans_captions: bool = False,
    ):
        self.tokenizer, self._model, self._load = tokenizer, model, load
        self.keeps_padding, self.cleans_captions = keeps_padding, cleans_captions
        self._identity: dict[str, Any] | None = None
        self._find: Callable[..., Reference] | None = None  # location of an encoder that is loaded when needed

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        max_length: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        keeps_padding: bool = False,
        cleans_captions: bool = False,
        **kwargs: Any,
    ) -> "TextEncoder":
        """Create an encoder that is in memory only while it is used.

        Args:
            name (`str`): Folder or Hub id, with `text_encoder/` and `tokenizer/` or with the model itself; or
                `"imagen-emoji"`, the shipped cascade's.
            max_length (`int`, *optional*): Maximum tokens per text; by default the tokenizer's limit.
            device (`str` or `torch.device`), dtype (`torch.dtype`): Device and dtype of the network.
            keeps_padding (`bool`), cleans_captions (`bool`): Settings of the networks' training; both are true for
                DeepFloyd IF's, whose `max_length` is 77.
            kwargs: For transformers' `from_pretrained`, such as `variant`, `token`, `revision`, `local_files_only` or
                `quantization_config`.

        Raises:
            ValueError: If there is no such tokenizer or no maximum length; on first use, if the network is damaged.
        """
        name = str(find_source(name))
        hub = {option: value for option, value in kwargs.items() if option in HUB_OPTIONS}
        tokenizer, subfolder = load_tokenizer(name, max_length, **hub)
        load = functools.partial(load_encoder, name, subfolder, tokenizer, device, dtype, **kwargs)
        encoder = cls(tokenizer, load=load, keeps_padding=keeps_padding, cleans_captions=cleans_captions)
        encoder._find = functools.partial(reference_of, name, subfolder, kwargs.get("variant"), **hub)
        return encoder

    @property
    def model(self) -> PreTrainedModel:
        """The network, loaded on first use."""
        if self._model is None and self._load is not None:
            self._model = self._load()
        return self._model

    @property
    def max_length(self) -> int:  # type: ignore[override]  # read from the tokenizer, which may change
        """Number of tokens to which texts are truncated or padded.

        Raises:
            ValueError: If the tokenizer's `model_max_length` is not a valid number of tokens.
        """
        limit = self.tokenizer.model_max_length
        is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if is_number and limit > NO_LIMIT:
            raise ValueError(
                "`tokenizer.model_max_length` is not set, but should be the number of tokens that the networks were "
                "trained with."
            )
        if not is_number or isinstance(limit, float) or limit < 1:
            raise ValueError(f"`tokenizer.model_max_length` is {shown(limit)}, but should be a number of tokens.")
        return limit

    @functools.cached_property
    def width(self) -> int:  # type: ignore[override]  # computed when it is first asked for
        return encoder_width(self.model.config)

    def identity(self) -> dict[str, Any]:
        """Return the identity of this encoder: kind, sizes, vocabulary, limit, a sample of weights, and settings."""
        self._identity = self._identity or describe_encoder(self.tokenizer, self.model)
        return {**self._identity, "keeps_padding": self.keeps_padding, "cleans_captions": self.cleans_captions}

    def parts(self) -> EncoderParts | None:
        if self._find is None:
            return None
        return EncoderParts(self.tokenizer, self.model.config, self._find(identity=describe_weights(self.model)))

    def release(self) -> None:
        """Free the memory of a network that can be loaded again."""
        if self._load is not None:
            self._model = None
            free_memory()

    def encode(self, texts: list[str], padding: str = "max_length") -> TextEmbeddings:
        """
        Encode texts, truncated or padded to `max_length`, with the encoder's last layer; `padding` is the tokenizer's.

        Raises:
            ValueError: If the tokenizer has no limit, the network does not match it, or the embeddings are not finite:
                some encoders overflow in float16.
        """
        return self.encode_cleaned(self.cleaned(texts), padding)

    @torch.no_grad()
    def encode_cleaned(self, texts: list[str], padding: str = "max_length") -> TextEmbeddings:
        """Encode texts like `encode`, after `cleaned`."""
        options = {"padding": padding, "max_length": self.max_length, "truncation": True, "return_tensors": "pt"}
        keep_in_fp32(self.model)
        tokens = self.tokenizer(texts, **options)
        encoder = self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model
        known = encoder.get_input_embeddings().num_embeddings
        if tokens.input_ids.max() >= known:  # on a GPU this would abort the process
            raise ValueError(
                f"`tokenizer` returned the token {tokens.input_ids.max()}, but `text_encoder` has {known} tokens: "
                "they do not match."
            )
        ids, mask = tokens.input_ids, tokens.attention_mask  # (B, L)
        if encoder.device.type != "meta":  # if weights are offloaded, hooks move the inputs
            ids, mask = ids.to(encoder.device), mask.to(encoder.device)
        try:
            embeds = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, L, E)
        except (IndexError, RuntimeError) as error:  # from an encoder with fewer positions
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"`text_encoder` does not support the {ids.shape[1]} tokens of `tokenizer`: {one_line(error)}"
            ) from error
        mask = mask.to(embeds.device)  # may be changed by offloading
        # a copy, because a CUDA graph overwrites its output
        text = TextEmbeddings(embeds.clone(), mask.bool()) if self.keeps_padding else zero_padding(embeds, mask)
        if not text.embeds.isfinite().all():
            weight = find_not_finite(self.model)
            raise ValueError(
                f"`text_encoder` in {self.model.dtype} returned embeddings that are not finite: load it in "
                "torch.bfloat16 "
                "or torch.float32" + ("." if weight is None else f", complete; its weight `{weight}` is not finite.")
            )
        return text

    def encode_prompts(self, texts: list[str], slice_size: int | None = None) -> TextEmbeddings:
        """Encode `slice_size` texts at a time, with a warning for each text that is truncated."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        cleaned = self.cleaned(texts)
        for text, ids in zip(cleaned, self.tokenizer(cleaned, add_special_tokens=False, verbose=False).input_ids):
            if len(ids) > room:
                lost = shown(self.tokenizer.decode(ids[room:]))
                logger.warning(f"The prompt {shown(text)} is truncated to {self.max_length} tokens: {lost} is lost.")
        return in_slices(self.encode_cleaned, cleaned, slice_size)

    def unpadded(self, texts: list[str]) -> list[torch.Tensor]:
        """Encode texts without padding: the embeddings of each text's tokens, `(tokens, E)`, on the CPU.

        Batches are padded only to their longest text: for short texts and a limit of 512 tokens that is tens of times
        faster.
        """
        text = self.encode(texts, padding="longest")
        return [row[:length] for row, length in zip(text.embeds.cpu(), text_lengths(text))]

    def padded(self, texts: list[str]) -> tuple[list[torch.Tensor], list[int]]:
        """
        Encode texts with padding: the embeddings of all positions, `(L, E)`, on the CPU, and each text's token count.
        """
        text = self.encode(texts)
        return list(text.embeds.cpu()), text_lengths(text)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Count the tokens of texts without truncation."""
        return [len(ids) for ids in self.tokenizer(self.cleaned(texts), truncation=False, verbose=False).input_ids]

    def cleaned(self, texts: list[str]) -> list[str]:
        """Return texts as passed to the tokenizer, cleaned if `cleans_captions`."""
        return clean_captions(texts) if self.cleans_captions else texts


def text_lengths(text: TextEmbeddings) -> list[int]:
    """Return the number of tokens of each text.

    Raises:
        ValueError: If padding comes before the tokens.
    """
    lengths = text.mask.sum(dim=1).tolist()
    if any(not row[:length].all() for row, length in zip(text.mask, lengths)):
        raise ValueError("`tokenizer` pads on the left, but should pad on the right.")
    return lengths


def keep_in_fp32(text_encoder: PreTrainedModel | None) -> None:
    """Keep layers that overflow in float16 in float32: `wo` of T5.

    transformers does so when it loads the encoder in float16, but `.to(torch.float16)` undoes it, and the embeddings
    overflow (diffusers issue 8604).
    """
    names = getattr(text_encoder, "_keep_in_fp32_modules", None)
    if text_encoder is None or not names or text_encoder.dtype != torch.float16:
        return
    for name, module in text_encoder.named_modules():
        if name.rpartition(".")[-1] in names:
            module.to(torch.float32)
