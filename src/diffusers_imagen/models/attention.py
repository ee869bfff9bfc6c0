"""Attention of image tokens to themselves, to the text, or to both in one softmax.

Shapes: B batch, C channels, N = H * W image tokens, L text tokens, D width of the text context.
"""

from typing import Literal, Optional, Union

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from .embeddings import TextKeyValue


AttentionType = Literal["self", "cross", "stacked", "fused"]


def image_to_tokens(image: torch.Tensor) -> torch.Tensor:
    """`(B, C, H, W)` to `(B, N, C)`; free of copies in channels_last."""
    return image.flatten(2).transpose(1, 2)


def tokens_to_image(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`(B, N, C)` to the shape `(B, C, H, W)` of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[-2:])


class ImagenAttnProcessor:
    """Queries of the image; keys and values of the image, of the text, or of both, through diffusers' backends."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "ImagenAttention", hidden_states: torch.Tensor, text: Optional[TextKeyValue] = None
    ) -> torch.Tensor:
        query = attn.to_q(image_to_tokens(attn.norm(hidden_states)))  # (B, N, C)
        key, value, mask = attn.keys_and_values(hidden_states, text)

        # (B, N or M, heads, C / heads), and (B, 1, 1, M), the form of a mask that every backend takes
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        mask = None if mask is None else mask[:, None, None]
        out = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        out = attn.to_out[0](out.flatten(2).to(query.dtype))
        return hidden_states + tokens_to_image(out, like=hidden_states)


class ImagenAttention(nn.Module, AttentionModuleMixin):
    """Residual attention block `(B, C, H, W)` to `(B, C, H, W)`.

    `self` attends to the image, `cross` to the text, `fused` to both at once (keys and values side by side in one
    softmax). Image and text have norms and projections of their own.
    """

    _default_processor_cls = ImagenAttnProcessor
    _available_processors = [ImagenAttnProcessor]
    _supports_qkv_fusion = False  # queries, image keys and text keys each read a differently normalised input

    def __init__(
        self,
        channels: int,
        heads: int,
        attention_type: Literal["self", "cross", "fused"],
        context_dim: Optional[int] = None,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        self.heads = heads
        self.inner_dim = channels
        self.use_bias = True
        self.reads_image = attention_type != "cross"
        self.reads_text = self.is_cross_attention = attention_type != "self"

        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        if self.reads_image:
            # self-attention reads one normalised image; fused attention has a second norm for keys and values
            self.norm_kv = nn.GroupNorm(norm_num_groups, channels) if self.reads_text else None
            self.to_k = nn.Linear(channels, channels)
            self.to_v = nn.Linear(channels, channels)
        if self.reads_text:
            self.norm_context = nn.GroupNorm(norm_num_groups, context_dim)
            self.add_k_proj = nn.Linear(context_dim, channels)
            self.add_v_proj = nn.Linear(context_dim, channels)
        self.to_out = nn.ModuleList([zero_init(nn.Linear(channels, channels))])
        self.set_processor(ImagenAttnProcessor())

    def project_text(self, context: torch.Tensor, mask: Optional[torch.Tensor]) -> TextKeyValue:
        """Keys and values of the text context `(B, L, D)` under its mask `(B, L)`; independent of the noise level."""
        # the statistics run over all tokens of a group of channels, padded ones included, as in NeMo
        context = self.norm_context(context.transpose(1, 2)).transpose(1, 2)
        key, value = self.add_k_proj(context), self.add_v_proj(context)
        if mask is not None and not self.reads_image:
            # A prompt without a valid token must give zeros. Softmax over nothing is NaN, so such a row attends
            # to all its tokens, and their values are zero.
            has_token = mask.any(dim=1, keepdim=True)
            value = value * has_token[..., None]
            mask = mask | ~has_token
        return TextKeyValue(key, value, mask)

    def keys_and_values(
        self, hidden_states: torch.Tensor, text: Optional[TextKeyValue]
    ) -> tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]:
        """Keys and values `(B, M, C)` of all that is attended to, and the mask `(B, M)` or None."""
        if not self.reads_image:
            return text
        norm_kv = self.norm if self.norm_kv is None else self.norm_kv
        tokens = image_to_tokens(norm_kv(hidden_states))  # (B, N, C)
        key, value = self.to_k(tokens), self.to_v(tokens)
        if text is None:
            return key, value, None
        mask = None if text.mask is None else nn.functional.pad(text.mask, (key.shape[1], 0), value=True)
        return torch.cat([key, text.key], dim=1), torch.cat([value, text.value], dim=1), mask

    def forward(self, hidden_states: torch.Tensor, text: Optional[TextKeyValue] = None) -> torch.Tensor:
        return self.processor(self, hidden_states, text)


class StackedAttention(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward in a residual branch of their own: `(B, C, H, W)`."""

    reads_text = True

    def __init__(self, channels: int, heads: int, context_dim: int, norm_num_groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(norm_num_groups, channels)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.attn1 = ImagenAttention(channels, heads, "self", norm_num_groups=norm_num_groups)
        self.attn2 = ImagenAttention(channels, heads, "cross", context_dim, norm_num_groups)
        self.norm_ff = nn.GroupNorm(norm_num_groups, channels)
        self.ff = FeedForward(channels, activation_fn="geglu")
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def project_text(self, context: torch.Tensor, mask: Optional[torch.Tensor]) -> TextKeyValue:
        """Keys and values of the text context, for the cross-attention."""
        return self.attn2.project_text(context, mask)

    def forward(self, hidden_states: torch.Tensor, text: Optional[TextKeyValue] = None) -> torch.Tensor:
        h = self.proj_in(self.norm(hidden_states))  # (B, C, H, W)
        h = self.attn1(h)
        h = self.attn2(h, text)
        h = h + tokens_to_image(self.ff(image_to_tokens(self.norm_ff(h))), like=h)
        return hidden_states + self.proj_out(h)


def make_attention(
    attention_type: AttentionType,
    channels: int,
    heads: int,
    context_dim: Optional[int],
    norm_num_groups: int,
) -> Union[ImagenAttention, StackedAttention]:
    """The attention block of a level. Without text (`context_dim` None) every type is self-attention."""
    if context_dim is None:
        return ImagenAttention(channels, heads, "self", norm_num_groups=norm_num_groups)
    if attention_type == "stacked":
        return StackedAttention(channels, heads, context_dim, norm_num_groups)
    return ImagenAttention(channels, heads, attention_type, context_dim, norm_num_groups)


def zero_init(module: nn.Module) -> nn.Module:
    """Zeros the parameters: a residual branch that ends in such a layer starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
