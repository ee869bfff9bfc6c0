"""Prompts of a call: checks, and their text embeddings for the networks."""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..models.interface import StageNetwork
from ..text.source import TextSource
from ..text.text_embeddings import TextEmbeddings, without_text, zero_padding
from ..utils.arguments import check_exactly_one, shown
from ..utils.tensors import FLOATS, INTEGERS, check_tensor
from .stages import Stage


PROMPT_EMBEDS = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
Branch = Literal["conditional", "unconditional", "both"]
MAX_PROMPTS = 10_000
# tokenizers take minutes for longer texts, most of which would be cut anyway
MAX_PROMPT_CHARACTERS = 100_000


@dataclass
class PromptEmbeds:
    """
    Text embeddings for all images of a call, `(images, tokens, width)` and `(images, tokens)`; None without text.
    """

    prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None
    negative_given: bool = False  # whether there are negative prompts
    keeps_padding: bool = False  # whether embeddings at padded positions are the encoder's, instead of zero
    version: int = 0  # number of changes by callbacks

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """Return the tensors by the names of the pipelines' arguments."""
        return {name: getattr(self, name) for name in PROMPT_EMBEDS}

    def copies(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Return copies of the tensors with these names, among others, to recognize changes in place."""
        return {
            name: tensor.clone() for name, tensor in self.tensors().items() if name in names and tensor is not None
        }

    def update(self, tensors: dict[str, torch.Tensor | None], before: dict[str, torch.Tensor] | None = None) -> None:
        """Replace tensors by those that a callback returned; `before` are copies of those that it may have changed."""
        self.version += sum(not torch.equal(copy, getattr(self, name)) for name, copy in (before or {}).items())
        for name, tensor in tensors.items():
            if name in PROMPT_EMBEDS and tensor is not getattr(self, name):
                setattr(self, name, tensor)
                self.version += 1

    def encode_for(self, unet: StageNetwork, branch: Branch, images: slice) -> Any:
        """Run a network's `encode_text` for some images; for both branches, negative prompts come first."""
        if unet.text_width is None:
            return None
        parts = [tensor[images] for tensor in self.tensors().values() if tensor is not None]
        prompt, negative = TextEmbeddings(*parts[:2]), TextEmbeddings(*parts[2:])
        if self.keeps_padding and not unet.attends_padding:  # for another network that does
            prompt = zero_padding(*prompt)
            negative = zero_padding(*negative) if self.negative_given else without_text(prompt)
        if branch == "both":
            return unet.encode_text(*(torch.cat(pair) for pair in zip(negative, prompt)))
        return unet.encode_text(*(prompt if branch == "conditional" else negative))


@dataclass
class Prompts:
    """The caller's texts or their embeddings, by the names of the pipelines' arguments."""

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: torch.Tensor | None = None
    prompt_attention_mask: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    negative_prompt_attention_mask: torch.Tensor | None = None

    @property
    def number(self) -> int:
        """Number of prompts; 1 without text."""
        return count_prompts(self.prompt, self.prompt_embeds)

    @property
    def negative_given(self) -> bool:
        """Whether there are negative prompts or their embeddings."""
        return self.negative_prompt is not None or self.negative_prompt_embeds is not None

    def check(self, source: TextSource | None, stages: list[Stage] | None = None) -> None:
        """Check that there is either a text or an embedding for each prompt, and that it fits the networks.

        Args:
            source: Encoder of texts; None without a text encoder.
            stages: Stages that use the text; None if text is only encoded.

        Raises:
            ValueError: If an argument is invalid.
        """
        texts = [
            (name, getattr(self, name), getattr(self, f"{name}_embeds"), getattr(self, f"{name}_attention_mask"))
            for name in ("prompt", "negative_prompt")
        ]
        if stages is not None and not any(stage.reads_text for stage in stages):
            given = [name for name, *values in texts if any(value is not None for value in values)]
            if given and source is None:
                raise ValueError(f"`{given[0]}` is given, but no stage of this pipeline is conditioned on text.")
            # a cascade accepts a prompt for an image to upscale, even if that stage is not conditioned on text
            if not given:
                return
        check_exactly_one(prompt=self.prompt, prompt_embeds=self.prompt_embeds)
        if self.negative_prompt is not None and self.negative_prompt_embeds is not None:
            raise ValueError("Only one of `negative_prompt` and `negative_prompt_embeds` can be given.")
        for name, text, embeds, mask in texts:
            if text is not None:
                check_prompt(name, text)
                if source is None:
                    raise ValueError(f"`{name}` needs a text encoder and a tokenizer; pass `{name}_embeds` instead.")
            if embeds is not None:
                check_embeds(name, embeds, mask, stages or [])
            elif mask is not None:
                raise ValueError(f"`{name}_attention_mask` is given without `{name}_embeds`.")
        if stages and any(stage.unet.attends_padding for stage in stages) and not self.negative_given:
            if source is None:
                raise ValueError(
                    "`negative_prompt_embeds` is None, but should be the embeddings of the empty text, which are the "
                    "unconditional embeddings of networks that attend to padding: there is no text encoder to "
                    "compute them."
                )
            if self.prompt_embeds is not None and self.prompt_embeds.shape[1] != source.max_length:
                raise ValueError(
                    f"Prompts have {self.prompt_embeds.shape[1]} tokens, but the empty text has {source.max_length}."
                )
        self._check_negatives(source)

    def _check_negatives(self, source: TextSource | None) -> None:
        """
        Check that there is one negative prompt per prompt, or a single text, and that the token counts are equal.
        """
        if not self.negative_given:
            return
        if not isinstance(self.negative_prompt, str):
            negatives = count_prompts(self.negative_prompt, self.negative_prompt_embeds)
            if negatives != self.number:
                name = "negative_prompt" if self.negative_prompt_embeds is None else "negative_prompt_embeds"
                raise ValueError(f"`{name}` has {negatives} entries, but should have {self.number}, as the prompts.")
        given = (self.prompt_embeds, self.negative_prompt_embeds)
        lengths = [embeds.shape[1] if embeds is not None else source and source.max_length for embeds in given]
        if lengths[0] != lengths[1]:
            raise ValueError(
                f"Prompts have {lengths[0]} tokens and negative prompts {lengths[1]}: pad both to the same length."
            )

    def encode(
        self, source: TextSource | None, slice_size: int | None, num_images_per_prompt: int, device: torch.device
    ) -> tuple[torch.Tensor | None, ...]:
        """
        Return the tensors of `PROMPT_EMBEDS` for all images, on a device; `slice_size` texts are encoded at a time.
        """
        embeds, mask = self.prompt_embeds, self.prompt_attention_mask
        if embeds is None:
            if self.prompt is None:
                return (None,) * len(PROMPT_EMBEDS)
            assert source is not None  # ensured by `check`
            embeds, mask = source.encode_prompts(as_list(self.prompt), slice_size)
        assert mask is not None
        text, negative_mask = TextEmbeddings(embeds, mask.bool()), self.negative_prompt_attention_mask
        if self.negative_prompt_embeds is not None and negative_mask is not None:
            negative = TextEmbeddings(self.negative_prompt_embeds, negative_mask.bool())
        elif self.negative_prompt is not None:
            assert source is not None
            negative = source.encode_prompts(as_list(self.negative_prompt), slice_size)
            if isinstance(self.negative_prompt, str):
                negative = TextEmbeddings(*(tensor.expand(len(embeds), *tensor.shape[1:]) for tensor in negative))
        else:
            negative = without_text(text) if source is None else source.no_text(text)
        tensors = (*text, *negative)
        return tuple(tensor.repeat_interleave(num_images_per_prompt, dim=0).to(device) for tensor in tensors)


def as_list(prompt: str | list[str]) -> list[str]:
    """Return a single prompt as a list of one."""
    return [prompt] if isinstance(prompt, str) else prompt


def check_prompt(name: str, prompt: Any) -> None:
    """Check that a prompt is a string, or a list of at least one string, within the limits."""
    texts = as_list(prompt)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"`{name}` is {shown(prompt)}, but should be a string or a list of strings.")
    if len(texts) > MAX_PROMPTS:
        raise ValueError(f"`{name}` has {len(texts)} entries, but should have at most {MAX_PROMPTS}.")
    for text in texts:
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"`{name}` has a text of {len(text)} characters, but should have at most {MAX_PROMPT_CHARACTERS}."
            )
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"`{name}` is {shown(text)}, which is not valid Unicode: it has an unpaired surrogate.")


def check_embeds(name: str, embeds: Any, mask: Any, stages: list[Stage]) -> None:
    """Check that embeddings are finite, `(prompts, tokens, width)`, of every network's width, with a matching mask."""
    check_tensor(f"{name}_embeds", embeds, "of shape (prompts, tokens, width)")
    if embeds.ndim != 3 or 0 in embeds.shape:
        raise ValueError(f"`{name}_embeds` has shape {tuple(embeds.shape)}, but should be (prompts, tokens, width).")
    if len(embeds) > MAX_PROMPTS:
        raise ValueError(f"`{name}_embeds` has {len(embeds)} prompts, but should have at most {MAX_PROMPTS}.")
    for stage in stages:
        width = stage.unet.text_width
        if width is not None and embeds.shape[-1] != width:
            raise ValueError(
                f"`{name}_embeds` has width {embeds.shape[-1]}, but should have {width} for the stage `{stage.name}`."
            )
    if mask is None:
        raise ValueError(
            f"`{name}_embeds` is given without `{name}_attention_mask`, of shape {tuple(embeds.shape[:2])}, which "
            "marks padding; without padding, pass ones."
        )
    check_tensor(f"{name}_attention_mask", mask, f"of shape {tuple(embeds.shape[:2])}", INTEGERS + FLOATS)
    if mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"`{name}_attention_mask` has shape {tuple(mask.shape)}, but should be {tuple(embeds.shape[:2])}."
        )
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"`{name}_attention_mask` has other values than 0 and 1, or True and False.")


def count_prompts(prompt: str | list[str] | None, embeds: torch.Tensor | None) -> int:
    """Return the number of prompts, given as texts or as embeddings; 1 without text."""
    if embeds is not None:
        return len(embeds)
    return len(prompt) if isinstance(prompt, list) else 1
