"""Attention blocks: self-attention, cross-attention to the text, or both in one softmax.

Shapes: B batch, C channels, N = H * W image tokens, L text tokens, D width of the text context.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from .embeddings import TextContext, TextKeyValue
from .normalization import GroupNorm


AttentionType = Literal["self", "cross", "stacked", "fused"]  # each has its entry in ATTENTION_TYPES
AttendedText = TextKeyValue | TextContext
Layer = TypeVar("Layer", bound=nn.Module)


def image_to_tokens(image: torch.Tensor) -> torch.Tensor:
    """Reshape `(B, C, H, W)` to `(B, N, C)`, without a copy in channels_last."""
    return image.flatten(2).transpose(1, 2)


def tokens_to_image(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Reshape `(B, N, C)` to the shape `(B, C, H, W)` of `like`."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[-2:])


class ImagenAttnProcessor:
    """Attention through diffusers' backends; scaled_dot_product_attention unless `set_attention_backend` was called."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: "ImagenAttention", hidden_states: torch.Tensor, text: AttendedText | None = None
    ) -> torch.Tensor:
        query, key, value, mask = attn.project(hidden_states, text)
        out = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.merge(out, hidden_states)


class StableImagenAttnProcessor:
    """Attention for training in float16, whose gradients do not underflow in the softmax.

    Equivalent to NeMo's `stable_attention`: the same in exact arithmetic, but it stores all attention weights.
    `unet.set_attn_processor(StableImagenAttnProcessor())` enables it.
    """

    def __call__(
        self, attn: "ImagenAttention", hidden_states: torch.Tensor, text: AttendedText | None = None
    ) -> torch.Tensor:
        query, key, value, mask = attn.project(hidden_states, text)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (B, heads, N or M, C / heads)
        out = _StableAttention.apply(query, key, value, mask)
        return attn.merge(out.transpose(1, 2), hidden_states)


class _StableAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v; the backward pass scales each head's gradient to 1 before that of the softmax."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, heads, N, M)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(query, key, value, weights)
        return weights @ value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, weights = ctx.saved_tensors
        grad_value = weights.transpose(-1, -2) @ grad
        grad_weights = grad @ value.transpose(-1, -2)  # (B, heads, N, M)
        largest = grad_weights.abs().amax(dim=(-2, -1), keepdim=True)
        largest = largest.clamp(min=torch.finfo(largest.dtype).tiny)
        grad_weights = grad_weights / largest
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(dim=-1, keepdim=True))
        scale = largest * query.shape[-1] ** -0.5  # undone only after the products
        return grad_scores @ key * scale, grad_scores.transpose(-1, -2) @ query * scale, grad_value, None


class AttentionBlock(nn.Module):
    """Base class of attention blocks: a module from `(B, C, H, W)` to `(B, C, H, W)`.

    `forward(hidden_states, text)` takes the result of `project_text`, or the text context itself; None without text.
    """

    reads_text: bool

    def project_text(self, text: TextContext) -> TextKeyValue:
        """Project the text context `(B, L, D)` to keys and values, which do not depend on the noise level."""
        raise NotImplementedError


class ImagenAttention(AttentionBlock, AttentionModuleMixin):
    """Residual attention block from `(B, C, H, W)` to `(B, C, H, W)`.

    `self` attends to the image, `cross` to the text, `fused` to both at once (keys and values concatenated, in one
    softmax). Image and text have separate norms and projections. With `fused`, the queries have a separate norm too,
    unless `shared_norm` makes them share that of the image's keys and values.
    """

    _default_processor_cls = ImagenAttnProcessor
    _available_processors = [ImagenAttnProcessor, StableImagenAttnProcessor]
    processor: Callable[..., torch.Tensor]
    _supports_qkv_fusion = False  # queries, image keys and text keys have differently normalized inputs

    def __init__(
        self,
        channels: int,
        heads: int,
        attention_type: Literal["self", "cross", "fused"],
        context_dim: int = 0,
        norm_num_groups: int = 32,
        shared_norm: bool = False,
    ):
        super().__init__()
        self.heads = heads
        self.inner_dim = channels
        self.use_bias = True
        self.reads_image = attention_type != "cross"
        self.reads_text = self.is_cross_attention = attention_type != "self"

        self.norm = GroupNorm(norm_num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels if self.reads_image else context_dim, channels)
        self.to_v = nn.Linear(channels if self.reads_image else context_dim, channels)
        self.norm_context = GroupNorm(norm_num_groups, context_dim) if self.reads_text else None
        fused = attention_type == "fused"  # a second norm for the image's keys and values, and the text's projections
        self.norm_kv = GroupNorm(norm_num_groups, channels) if fused and not shared_norm else None
        self.add_k_proj = nn.Linear(context_dim, channels) if fused else None
        self.add_v_proj = nn.Linear(context_dim, channels) if fused else None
        self.to_out = nn.ModuleList([zero_init(nn.Linear(channels, channels))])
        AttentionModuleMixin.set_processor(self, ImagenAttnProcessor())

    def project_text(self, text: TextContext) -> TextKeyValue:
        """Compute keys and values of the text context `(B, L, D)` under its mask `(B, L)`."""
        assert self.norm_context is not None
        # statistics are over all tokens of a group of channels, including padding, as in NeMo
        tokens, mask = self.norm_context(text.tokens.transpose(1, 2)).transpose(1, 2), text.mask
        if self.add_k_proj is not None and self.add_v_proj is not None:
            return TextKeyValue(self.add_k_proj(tokens), self.add_v_proj(tokens), mask)
        key, value = self.to_k(tokens), self.to_v(tokens)
        if mask is not None:
            # A prompt without a valid token must give zeros. Softmax over no token is NaN, so such a row attends
            # to all its tokens, with values set to zero.
            has_token = mask.any(dim=1, keepdim=True)
            value = value * has_token[..., None]
            mask = mask | ~has_token
        return TextKeyValue(key, value, mask)

    def project(
        self, hidden_states: torch.Tensor, text: AttendedText | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Compute query, key and value `(B, N or M, heads, C / heads)` and a mask `(B, 1, 1, M)` for any backend."""
        if isinstance(text, TextContext):
            text = self.project_text(text)
        tokens = image_to_tokens(self.norm(hidden_states))  # (B, N, C)
        query = self.to_q(tokens)
        if not self.reads_image:
            assert text is not None  # networks with cross-attention are not called without
            key, value, mask = text  # (B, L, C), (B, L, C), (B, L)
        else:
            if self.norm_kv is not None:
                tokens = image_to_tokens(self.norm_kv(hidden_states))
            key, value, mask = self.to_k(tokens), self.to_v(tokens), None
            if text is not None:
                key, value = torch.cat([key, text.key], dim=1), torch.cat([value, text.value], dim=1)  # (B, N + L, C)
                mask = None if text.mask is None else nn.functional.pad(text.mask, (tokens.shape[1], 0), value=True)
        query, key, value = (x.unflatten(-1, (self.heads, -1)) for x in (query, key, value))
        return query, key, value, None if mask is None else mask[:, None, None]

    def merge(self, out: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Project the heads' output `(B, N, heads, C / heads)` and add it to the image `(B, C, H, W)`."""
        out = self.to_out[0](out.flatten(2).to(hidden_states.dtype))  # (B, N, C)
        return hidden_states + tokens_to_image(out, like=hidden_states)

    def forward(self, hidden_states: torch.Tensor, text: AttendedText | None = None) -> torch.Tensor:
        return self.processor(self, hidden_states, text)


class StackedAttention(AttentionBlock):
    """Residual branch of self-attention, cross-attention and a gated feed-forward: `(B, C, H, W)` to `(B, C, H, W)`."""

    reads_text = True

    def __init__(self, channels: int, heads: int, context_dim: int, norm_num_groups: int = 32):
        super().__init__()
        self.norm = GroupNorm(norm_num_groups, channels)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.attn1 = ImagenAttention(channels, heads, "self", norm_num_groups=norm_num_groups)
        self.attn2 = ImagenAttention(channels, heads, "cross", context_dim, norm_num_groups)
        self.norm_ff = GroupNorm(norm_num_groups, channels)
        self.ff = FeedForward(channels, activation_fn="geglu")
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def project_text(self, text: TextContext) -> TextKeyValue:
        """Compute keys and values of the text context for the cross-attention."""
        return self.attn2.project_text(text)

    def forward(self, hidden_states: torch.Tensor, text: AttendedText | None = None) -> torch.Tensor:
        h = self.proj_in(self.norm(hidden_states))  # (B, C, H, W)
        h = self.attn1(h)
        h = self.attn2(h, text)
        h = h + tokens_to_image(self.ff(image_to_tokens(self.norm_ff(h))), like=h)
        return hidden_states + self.proj_out(h)


class AttentionKind(NamedTuple):
    """Entry of `ATTENTION_TYPES`.

    Args:
        make: Creates the block from channels, heads, width of the text context, groups of the norms, and
            `shared_norm`.
        reads_text: Whether the block attends to text; `norm_num_groups` then has to divide the width of the context.
    """

    make: Callable[[int, int, int, int, bool], AttentionBlock]
    reads_text: bool


def single_layer(attention_type: Literal["self", "cross", "fused"]) -> AttentionKind:
    """Return the kind of an `ImagenAttention`."""

    def make(channels: int, heads: int, context_dim: int, groups: int, shared_norm: bool) -> AttentionBlock:
        return ImagenAttention(channels, heads, attention_type, context_dim, groups, shared_norm)

    return AttentionKind(make, reads_text=attention_type != "self")


def make_stacked(channels: int, heads: int, context_dim: int, groups: int, shared_norm: bool) -> AttentionBlock:
    return StackedAttention(channels, heads, context_dim, groups)


ATTENTION_TYPES: dict[AttentionType, AttentionKind] = {
    "self": single_layer("self"),
    "cross": single_layer("cross"),
    "stacked": AttentionKind(make_stacked, reads_text=True),
    "fused": single_layer("fused"),
}


def make_attention(
    attention_type: AttentionType,
    channels: int,
    heads: int,
    context_dim: int | None,
    norm_num_groups: int,
    shared_norm: bool = False,
) -> AttentionBlock:
    """Create the attention block of a level; without text (`context_dim` None), every type becomes self-attention."""
    kind = ATTENTION_TYPES[attention_type]
    if context_dim is None and kind.reads_text:
        kind = ATTENTION_TYPES["self"]
    return kind.make(channels, heads, context_dim or 0, norm_num_groups, shared_norm)


def zero_init(module: Layer) -> Layer:
    """Set the parameters to zero, so that a residual branch that ends in this layer is initialized as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
