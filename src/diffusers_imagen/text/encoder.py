"""The text encoder: texts to embeddings, the same for pipelines and training."""

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
from .cleanup import clean_captions
from .identity import describe_encoder, encoder_width
from .pretrained import NO_LIMIT, load_encoder, load_tokenizer
from .source import TextSource
from .text_embeddings import TextEmbeddings, zero_padding


logger = logging.get_logger(__name__)


class TextEncoder(TextSource):
    """A tokenizer and the frozen network that reads its tokens.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its `model_max_length` is what texts are cut or padded to.
        model ([`~transformers.PreTrainedModel`], *optional*): The network, of which an encoder-decoder's encoder is used.
        load (`Callable`, *optional*): Makes the network in place of `model` when it is first needed, and after `release`.
        keeps_padding (`bool`): Whether embeddings at padded positions stay the network's, and are not set to zero.
        cleans_captions (`bool`): Whether texts are cleaned as DeepFloyd IF's before they are encoded: see
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
        """Return an encoder that is in memory only while it is used.

        Args:
            name (`str`): Folder or Hub id, with `text_encoder/` and `tokenizer/` or with the model itself.
            max_length (`int`, *optional*): Tokens of a text; the tokenizer's own limit without.
            device (`str` or `torch.device`), dtype (`torch.dtype`): Of the network.
            keeps_padding (`bool`), cleans_captions (`bool`): As the networks that read the embeddings were trained; both
                are true of DeepFloyd IF's, whose `max_length` is 77.
            kwargs: For transformers' `from_pretrained`, such as `variant`, `token`, `revision`, `local_files_only` or
                `quantization_config`.

        Raises:
            ValueError: If there is no such tokenizer or no limit of tokens; once it is used, if the network is damaged.
        """
        hub = {option: value for option, value in kwargs.items() if option in HUB_OPTIONS}
        tokenizer, subfolder = load_tokenizer(name, max_length, **hub)
        load = functools.partial(load_encoder, name, subfolder, tokenizer, device, dtype, **kwargs)
        return cls(tokenizer, load=load, keeps_padding=keeps_padding, cleans_captions=cleans_captions)

    @property
    def model(self) -> PreTrainedModel:
        """The network, loaded when it is first needed."""
        if self._model is None and self._load is not None:
            self._model = self._load()
        return self._model

    @property
    def max_length(self) -> int:  # type: ignore[override]  # of the tokenizer, which may change
        """Tokens that texts are cut or padded to.

        Raises:
            ValueError: If the tokenizer's `model_max_length` is no number of tokens.
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
        """Return what tells this encoder from others: kind, sizes, vocabulary, limit, a sample of weights, and how it is used."""
        self._identity = self._identity or describe_encoder(self.tokenizer, self.model)
        return {**self._identity, "keeps_padding": self.keeps_padding, "cleans_captions": self.cleans_captions}

    def release(self) -> None:
        """Take a network out of memory that can be loaded again."""
        if self._load is not None:
            self._model = None
            free_memory()

    @torch.no_grad()
    def encode(self, texts: list[str], padding: str = "max_length") -> TextEmbeddings:
        """Embeddings of the encoder's last layer, of texts cut or padded to `max_length`; `padding` is the tokenizer's.

        Raises:
            ValueError: If the tokenizer has no limit, the network does not fit it, or the embeddings are not finite:
                half precision is too narrow for some encoders.
        """
        options = {"padding": padding, "max_length": self.max_length, "truncation": True, "return_tensors": "pt"}
        keep_in_fp32(self.model)
        tokens = self.tokenizer(self.cleaned(texts), **options)
        encoder = self.model.get_encoder() if self.model.config.is_encoder_decoder else self.model
        known = encoder.get_input_embeddings().num_embeddings
        if tokens.input_ids.max() >= known:  # on a GPU it would abort the process
            raise ValueError(
                f"`tokenizer` makes the token {tokens.input_ids.max()}, but `text_encoder` knows {known}: they do not "
                "belong together."
            )
        ids, mask = tokens.input_ids, tokens.attention_mask  # (B, L)
        if encoder.device.type != "meta":  # where weights are offloaded, hooks move what they need
            ids, mask = ids.to(encoder.device), mask.to(encoder.device)
        try:
            embeds = encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, L, E)
        except (IndexError, RuntimeError) as error:  # of an encoder with fewer positions
            if is_out_of_memory(error):
                raise
            raise ValueError(
                f"`text_encoder` cannot take the {ids.shape[1]} tokens that `tokenizer` makes: {one_line(error)}"
            ) from error
        mask = mask.to(embeds.device)  # which offloading may have changed
        text = TextEmbeddings(embeds, mask.bool()) if self.keeps_padding else zero_padding(embeds, mask)
        if not text.embeds.isfinite().all():
            weight = find_not_finite(self.model)
            raise ValueError(
                f"`text_encoder` in {self.model.dtype} makes embeddings that are not finite: load it in torch.bfloat16 "
                "or torch.float32" + ("." if weight is None else f", complete; its weight `{weight}` is not finite.")
            )
        return text

    def encode_prompts(self, texts: list[str], slice_size: int | None = None) -> TextEmbeddings:
        """As `encode`, `slice_size` texts at once, with a warning of each that does not fit, as it is encoded."""
        room = self.max_length - self.tokenizer.num_special_tokens_to_add()
        cleaned = self.cleaned(texts)
        for text, ids in zip(cleaned, self.tokenizer(cleaned, add_special_tokens=False).input_ids):
            if len(ids) > room:
                lost = shown(self.tokenizer.decode(ids[room:]))
                logger.warning(f"The prompt {shown(text)} is cut to {self.max_length} tokens: {lost} is lost.")
        return super().encode_prompts(texts, slice_size)

    def unpadded(self, texts: list[str]) -> list[torch.Tensor]:
        """Embeddings of each text's own tokens, `(tokens, E)`, on the CPU.

        The encoder sees texts padded to the longest of them only: for short texts and a limit of 512 tokens that is
        tens of times faster.
        """
        text = self.encode(texts, padding="longest")
        return [row[:length] for row, length in zip(text.embeds.cpu(), text_lengths(text))]

    def padded(self, texts: list[str]) -> tuple[list[torch.Tensor], list[int]]:
        """Embeddings of each text at all positions, `(L, E)`, on the CPU, and how many tokens each text has."""
        text = self.encode(texts)
        return list(text.embeds.cpu()), text_lengths(text)

    def count_tokens(self, texts: list[str]) -> list[int]:
        """Tokens of texts before they are cut."""
        return [len(ids) for ids in self.tokenizer(self.cleaned(texts), truncation=False, verbose=False).input_ids]

    def cleaned(self, texts: list[str]) -> list[str]:
        """Texts as the tokenizer gets them."""
        return clean_captions(texts) if self.cleans_captions else texts


def text_lengths(text: TextEmbeddings) -> list[int]:
    """Tokens of each text.

    Raises:
        ValueError: If they are not the first ones.
    """
    lengths = text.mask.sum(dim=1).tolist()
    if any(not row[:length].all() for row, length in zip(text.mask, lengths)):
        raise ValueError("`tokenizer` pads on the left, but texts should begin at the first token.")
    return lengths


def keep_in_fp32(text_encoder: PreTrainedModel | None) -> None:
    """Keep in float32 the layers of an encoder that float16 is too narrow for: `wo` of T5.

    transformers does so when it loads the encoder in float16, but `.to(torch.float16)` undoes it, and the embeddings
    overflow (diffusers issue 8604).
    """
    names = getattr(text_encoder, "_keep_in_fp32_modules", None)
    if text_encoder is None or not names or text_encoder.dtype != torch.float16:
        return
    for name, module in text_encoder.named_modules():
        if name.rpartition(".")[-1] in names:
            module.to(torch.float32)
