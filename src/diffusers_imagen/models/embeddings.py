"""Embeddings of the conditioning: the noise level, the text, and the noise level of the low-resolution image.

Shapes: B batch, L text tokens, E width of the text encoder, D width of the text context, T width of the time
embedding.
"""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn


TextPooling = Literal["attention", "mean", "class_token"]


class TextKeyValue(NamedTuple):
    """Keys and values of the text for one attention layer."""

    key: torch.Tensor  # (B, L, C)
    value: torch.Tensor  # (B, L, C)
    mask: torch.Tensor | None  # (B, L), True for valid tokens; None if all are valid


class TextContext(NamedTuple):
    """Text context shared by all attention layers, each of which projects it to keys and values."""

    tokens: torch.Tensor  # (B, L, D)
    mask: torch.Tensor | None  # (B, L), True for valid tokens; None if all are valid


class TextConditioning(NamedTuple):
    """Text conditioning that does not depend on the noise level: computed once, used at every step."""

    pooled: torch.Tensor | None  # (B, T), added to the time embedding
    texts: Iterable[TextKeyValue | TextContext]  # one per attention layer that attends to text, in order of execution


class UnencodedText(NamedTuple):
    """Unprocessed text embeddings: the result of `encode_text` if the weights are only available within `forward`."""

    embeds: torch.Tensor  # (B, L, E)
    mask: torch.Tensor | None  # (B, L)


class LearnedTimesteps(nn.Module):
    """The value, followed by sinusoids of learned frequency: `(B,)` to `(B, num_channels + 1)`."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_channels // 2))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        timestep = timestep[:, None].float()
        angles = 2 * math.pi * timestep * self.weight.float()
        return torch.cat([timestep, angles.sin(), angles.cos()], dim=-1)


class NoiseLevelEmbedding(nn.Module):
    """Embedding of the conditioning value of a noise level (c_noise, log-SNR or index): `(B,)` to `(B, T)`.

    The sinusoids are computed in float32 regardless of the model's dtype: half precision distinguishes only about half of
    the values of 1000 training steps. Fixed sinusoids have the width `sinusoidal_dim`, or a quarter of the embedding.
    """

    def __init__(
        self,
        embedding_dim: int,
        learned_sinusoidal_dim: int | None = None,
        sinusoidal_dim: int | None = None,
        act_fn: str = "silu",
    ):
        super().__init__()
        if learned_sinusoidal_dim is None:
            num_features = sinusoidal_dim or embedding_dim // 4
            self.sinusoid = Timesteps(num_features, flip_sin_to_cos=True, downscale_freq_shift=0)
        else:
            self.sinusoid = LearnedTimesteps(learned_sinusoidal_dim)
            num_features = learned_sinusoidal_dim + 1
        self.mlp = TimestepEmbedding(num_features, embedding_dim, act_fn=act_fn)

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        features = self.sinusoid(timestep)
        return self.mlp(features.to(self.mlp.linear_1.weight.dtype))


class AttentionPooling(nn.Module):
    """Self-attention pooling of text tokens (arXiv 2008.01077): `(B, L, E)` to `(B, D)`.

    Padded tokens are included, as in NeMo's checkpoints; pad with zeros.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.score = nn.Linear(in_features, 1)
        self.norm = nn.LayerNorm(in_features)
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weights = self.score(tokens).softmax(dim=1)  # (B, L, 1)
        return self.proj(self.norm((tokens * weights).sum(dim=1)))


class ClassTokenPooling(nn.Module):
    """Attention pooling with a single query, the mean of the tokens plus a learned vector: `(B, L, E)` to `(B, T)`.

    The query attends to itself and to all tokens, including padding: the pooling of CLIP's residual networks (arXiv
    2103.00020, section 2.4) between two normalizations, as in DeepFloyd IF.
    """

    def __init__(self, in_features: int, out_features: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(in_features)
        self.positional_embedding = nn.Parameter(torch.randn(1, in_features) / in_features**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(in_features, in_features) for _ in range(3))
        self.proj = nn.Linear(in_features, out_features)
        self.norm2 = nn.LayerNorm(out_features)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.norm1(tokens)  # (B, L, E)
        class_token = tokens.mean(dim=1, keepdim=True) + self.positional_embedding  # (B, 1, E)
        tokens = torch.cat([class_token, tokens], dim=1)  # (B, 1 + L, E)
        projected = self.q_proj(class_token), self.k_proj(tokens), self.v_proj(tokens)
        query, key, value = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected)
        pooled = nn.functional.scaled_dot_product_attention(query, key, value)  # (B, heads, 1, E / heads)
        return self.norm2(self.proj(pooled.flatten(1)))


class TextEmbedding(nn.Module):
    """Projection of text embeddings to the attention context, and to a pooled vector for the time embedding.

    Takes `(B, L, E)` and an optional mask `(B, L)`; returns the context `(B, L', D)`, its mask, and `(B, T)`, where L'
    is L plus the null token, if there is one. Class-token pooling has `num_heads` heads and returns `(B, T)` itself.
    """

    def __init__(
        self,
        encoder_hid_dim: int,
        context_dim: int,
        time_embedding_dim: int,
        pooling: TextPooling,
        null_token: bool,
        num_heads: int | None = None,
        act_fn: str = "silu",
    ):
        super().__init__()
        self.proj = nn.Linear(encoder_hid_dim, context_dim)
        self.pooling: nn.Module | None = None
        if pooling == "attention":
            self.pooling = AttentionPooling(encoder_hid_dim, context_dim)
        elif pooling == "class_token":
            assert num_heads is not None  # ensured by check_config
            self.pooling = ClassTokenPooling(encoder_hid_dim, time_embedding_dim, num_heads)
        self.null_token = nn.Parameter(torch.randn(1, 1, context_dim)) if null_token else None
        if pooling != "class_token":
            self.pooled_norm = nn.LayerNorm(context_dim)
            self.pooled_mlp = TimestepEmbedding(context_dim, time_embedding_dim, act_fn=act_fn)

    def forward(
        self, text: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        context = self.proj(text)  # (B, L, D)
        pooled = context.mean(dim=1) if self.pooling is None else self.pooling(text)  # (B, D), or (B, T)
        if self.null_token is not None:
            context = torch.cat([context, self.null_token.expand(len(context), -1, -1)], dim=1)
            mask = None if mask is None else nn.functional.pad(mask, (0, 1), value=True)
        if not isinstance(self.pooling, ClassTokenPooling):
            pooled = self.pooled_mlp(self.pooled_norm(pooled))
        return context, mask, pooled  # (B, L', D), (B, L'), (B, T)
