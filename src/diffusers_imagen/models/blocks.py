"""Residual blocks and resampling, shared by both networks.

Shapes: B batch, C channels, H x W pixels, T width of the time embedding.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .attention import AttendedText, AttentionBlock, zero_init
from .normalization import GroupNorm


TimeScaleShift = Literal["default", "scale_shift"]
ResampleType = Literal["conv", "pool", "resnet", "resnet_nearest"]
ActivationType = Literal["silu", "gelu"]


def overwrite_silu(x: torch.Tensor) -> torch.Tensor:
    """Apply SiLU, in place if gradients are disabled: on a CPU, allocation costs more than the arithmetic."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def overwrite_act(x: torch.Tensor, act_fn: ActivationType) -> torch.Tensor:
    """Apply the activation to a tensor that is not used elsewhere, in place where torch supports it."""
    return F.gelu(x) if act_fn == "gelu" else overwrite_silu(x)


def transposed_upsample(channels: int) -> nn.Module:
    """Create a transposed convolution that doubles height and width."""
    return nn.ConvTranspose2d(channels, channels, kernel_size=4, stride=2, padding=1)


@dataclass(frozen=True)
class ResBlockOptions:
    """Options shared by all residual blocks of a network.

    With a `shortcut_scale`, the shortcut is multiplied by it and always has a 1x1 convolution; without, only where the
    number of channels changes. The sum of branch and shortcut is divided by `out_scale_factor`.
    """

    time_embedding_dim: int
    time_scale_shift: TimeScaleShift = "scale_shift"
    dropout: float = 0.0
    norm_num_groups: int = 32
    act_fn: ActivationType = "silu"
    out_scale_factor: float = 1.0
    shortcut_scale: float | None = None


class ResBlock(nn.Module):
    """Two convolutions around the time embedding, with a residual connection.

    `(B, C_in, H, W)` to `(B, C_out, H, W)`, or half or twice the resolution with `resample`: downsampling averages,
    upsampling is a transposed convolution or repeats pixels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        options: ResBlockOptions,
        resample: Literal["down", "up", "up_nearest"] | None = None,
    ):
        super().__init__()
        self.act_fn, self.out_scale_factor = options.act_fn, options.out_scale_factor
        self.scale_shift = options.time_scale_shift == "scale_shift"
        self.shortcut_scale = 1.0 if options.shortcut_scale is None else options.shortcut_scale
        self.norm1 = GroupNorm(options.norm_num_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(options.time_embedding_dim, out_channels * (2 if self.scale_shift else 1))
        self.norm2 = GroupNorm(options.norm_num_groups, out_channels)
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))

        self.resample_branch: nn.Module | None = None
        self.resample_shortcut: nn.Module | None = None
        if resample == "down":
            self.resample_branch, self.resample_shortcut = nn.AvgPool2d(2), nn.AvgPool2d(2)
        elif resample == "up":
            self.resample_branch, self.resample_shortcut = (transposed_upsample(in_channels) for _ in range(2))
        elif resample == "up_nearest":
            self.resample_branch, self.resample_shortcut = nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2)
        project_shortcut = options.shortcut_scale is not None or in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if project_shortcut else None

    def forward(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Apply the block; `temb` `(B, T)` has been through its activation, which all blocks share."""
        h = overwrite_act(self.norm1(x), self.act_fn)  # (B, C_in, H, W)
        if self.resample_branch is not None and self.resample_shortcut is not None:
            h, x = self.resample_branch(h), self.resample_shortcut(x)
        h = self.conv1(h)  # (B, C_out, H', W')

        temb = self.time_emb_proj(temb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = temb.chunk(2, dim=1)
            h = self.norm2(h)
            h = torch.addcmul(shift, h, 1 + scale)
        else:
            h = self.norm2(h + temb)
        h = self.conv2(self.dropout(overwrite_act(h, self.act_fn)))  # (B, C_out, H', W')

        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = h.add_(x, alpha=self.shortcut_scale)
        return h if self.out_scale_factor == 1.0 else h.div_(self.out_scale_factor)


class ImagenBlock(nn.Module):
    """Residual blocks, then optional attention: the unit of gradient checkpointing and regional compilation."""

    def __init__(self, resnets: list[ResBlock], attention: AttentionBlock | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attention = attention

    @property
    def reads_text(self) -> bool:
        """Whether the block attends to the text."""
        return self.attention is not None and self.attention.reads_text

    def compile(self, *args, **kwargs) -> None:
        """Compile like torch's `Module.compile`; blocks whose parameters have the same shapes share compiled code.

        torch limits the number of compilations per function (`torch._dynamo.config.recompile_limit`, 8), and raises an
        error under `fullgraph` beyond it. The blocks of a network have about ten different shapes, each of which
        therefore gets a separate function.
        """
        shapes = tuple((name, *parameter.shape) for name, parameter in self.named_parameters())
        self._compiled_call_impl = torch.compile(MethodType(call_for(shapes), self), *args, **kwargs)

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, text: AttendedText | None = None
    ) -> torch.Tensor:
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states, temb)
        if self.attention is not None:
            hidden_states = self.attention(hidden_states, text)
        return hidden_states


def _call(block: ImagenBlock, *args, **kwargs) -> torch.Tensor:
    return block._call_impl(*args, **kwargs)  # includes the block's hooks


@functools.cache
def call_for(shapes: tuple[tuple, ...]) -> Callable[..., Any]:
    """Return a copy of `_call` for blocks with these parameter shapes: torch counts compilations per code object."""
    return FunctionType(_call.__code__.replace(co_name=f"_call_{abs(hash(shapes)):x}"), _call.__globals__)
