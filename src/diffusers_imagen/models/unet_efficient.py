"""EfficientUNetModel: the Efficient U-Net for super-resolution stages."""

from collections.abc import Iterator
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..utils.arguments import check_choice
from .attention import ATTENTION_TYPES, AttendedText, AttentionType, make_attention
from .blocks import ImagenBlock, ResBlock, ResBlockOptions, TimeScaleShift, transposed_upsample
from .config_checks import check_config, check_groups, per_level
from .unet_base import ConditionalUNet, count_heads


class EfficientUNetModel(ConditionalUNet):
    r"""The Efficient U-Net of Imagen (arXiv 2205.11487, appendix B and figures A.27 to A.30), as in NVIDIA NeMo.

    Downsampling comes before the convolutions of a level and upsampling after them, most parameters are at
    the low resolutions, and skip connections are added.

    Args:
        sample_size (`int`, defaults to 256): Resolution of the images that it is trained for, in pixels.
        in_channels (`int`, defaults to 3): Channels of the noisy image.
        out_channels (`int`, defaults to 3): Channels of the output.
        block_out_channels (`tuple[int]`): Channels of each level; all but the last begin with downsampling by 2.
        layers_per_block (`int` or `tuple[int]`): Residual blocks of each level.
        attention_types (`tuple` of `AttentionType` or `None`):
            What image tokens attend to at each level, of `attention.ATTENTION_TYPES`; None for a level without
            attention.
        attention_head_dim (`int`, *optional*, defaults to 64): Channels of a head.
        num_attention_heads (`int`, *optional*): Number of heads, in place of `attention_head_dim`.
        encoder_hid_dim (`int`, *optional*, defaults to 1024):
            Width of the text encoder's embeddings; None builds a network without text.
        text_pooling (`"attention"` or `"mean"`): How the text becomes the vector added to the time embedding.
        use_null_token (`bool`): Whether a learned token is appended to the text embeddings.
        time_embedding_dim (`int`, *optional*): Width of the time embedding; 4 times the first level's channels.
        learned_sinusoidal_dim (`int`, *optional*): Learned sinusoids of the noise level, in place of fixed ones.
        time_scale_shift (`"scale_shift"` or `"default"`): Whether the time embedding scales and shifts, or is added.
        skip_connection_scaling (`bool`): Whether the shortcut of every residual block is scaled by 1 / sqrt(2).
        conv_kernel_size (`int`, defaults to 3): Kernel of the first convolution.
        dropout (`float`): Dropout rate of the residual blocks.
        norm_num_groups (`int`, defaults to 32): Groups of every normalization.
        low_res_conditioning (`bool`, defaults to True): Whether a low-resolution image is concatenated to the input.
        low_res_noise_conditioning (`bool`): Whether the noise level of that image is an input too.
        residual_scale (`float`, *optional*):
            Denoise the difference between the image and its upsampled low-resolution image, divided by this value,
            instead of the image: see `diffusion.residual`. Above 0; about twice that difference's standard deviation.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 256,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 1024, 1024),
        layers_per_block: int | tuple[int, ...] = (2, 4, 8, 8, 8),
        attention_types: tuple[AttentionType | None, ...] = (None, None, None, "fused", "fused"),
        attention_head_dim: int | None = 64,
        num_attention_heads: int | None = None,
        encoder_hid_dim: int | None = 1024,
        text_pooling: Literal["attention", "mean"] = "attention",
        use_null_token: bool = False,
        time_embedding_dim: int | None = None,
        learned_sinusoidal_dim: int | None = None,
        time_scale_shift: TimeScaleShift = "scale_shift",
        skip_connection_scaling: bool = True,
        conv_kernel_size: int = 3,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        low_res_conditioning: bool = True,
        low_res_noise_conditioning: bool = False,
        residual_scale: float | None = None,
    ):
        super().__init__()
        check_config(self.config, min_layers=1)
        num_levels = len(block_out_channels)
        attention_types = per_level("attention_types", attention_types, num_levels)
        for attention_type in attention_types:
            check_choice("attention_types", attention_type, (*ATTENTION_TYPES, None))
        if encoder_hid_dim is not None and any(ATTENTION_TYPES[kind].reads_text for kind in attention_types if kind):
            check_groups("encoder_hid_dim", [encoder_hid_dim], norm_num_groups)
        num_layers = per_level("layers_per_block", layers_per_block, num_levels)
        time_embedding_dim = time_embedding_dim or 4 * block_out_channels[0]

        options = ResBlockOptions(
            time_embedding_dim,
            time_scale_shift,
            dropout,
            norm_num_groups,
            shortcut_scale=0.5**0.5 if skip_connection_scaling else 1.0,
        )

        def block(level: int, in_channels: int, out_channels: int) -> ImagenBlock:
            widths = [in_channels] + [out_channels] * num_layers[level]
            resnets = [ResBlock(width_in, width_out, options) for width_in, width_out in zip(widths, widths[1:])]
            if (attention_type := attention_types[level]) is None:
                return ImagenBlock(resnets)
            heads = count_heads(out_channels, num_attention_heads, attention_head_dim)
            return ImagenBlock(
                resnets, make_attention(attention_type, out_channels, heads, encoder_hid_dim, norm_num_groups)
            )

        self._init_conditioning(encoder_hid_dim, time_embedding_dim)

        # channels at the boundaries of the levels: level i maps widths[i] to widths[i + 1], and back
        widths = [block_out_channels[0], *block_out_channels]
        levels = range(num_levels)
        self.downsamplers = nn.ModuleList(
            nn.Conv2d(widths[level], widths[level], 4, stride=2, padding=1) for level in levels[:-1]
        )
        self.down_blocks = nn.ModuleList(block(level, widths[level], widths[level + 1]) for level in levels)
        self.up_blocks = nn.ModuleList(block(level, widths[level + 1], widths[level]) for level in reversed(levels))
        self.upsamplers = nn.ModuleList(transposed_upsample(widths[level]) for level in reversed(levels[:-1]))
        self.conv_out = nn.Conv2d(widths[0], out_channels, 1)

    @property
    def total_stride(self) -> int:
        return 2 ** len(self.downsamplers)

    def text_blocks(self) -> list[ImagenBlock]:
        return [block for block in [*self.down_blocks, *self.up_blocks] if block.reads_text]

    def _run_levels(self, h: torch.Tensor, temb: torch.Tensor, texts: Iterator[AttendedText]) -> torch.Tensor:
        h = self.conv_in(h)  # (B, C_0, H, W)
        skips = []
        for downsample, block in zip(self.downsamplers, self.down_blocks):
            h = downsample(h)  # assigned first: what it was, the largest image, is free while the block runs
            h = self._run(block, h, temb, texts)  # (B, C_i, H / 2^(i+1), W / 2^(i+1))
            skips.append(h)

        # the deepest level does not resample
        h = self._run(self.down_blocks[-1], h, temb, texts)
        h = self._run(self.up_blocks[0], h, temb, texts)

        for block, upsample in zip(self.up_blocks[1:], self.upsamplers):
            h = h + skips.pop()
            h = self._run(block, h, temb, texts)
            h = upsample(h)

        return self.conv_out(h)  # (B, out_channels, H, W)
