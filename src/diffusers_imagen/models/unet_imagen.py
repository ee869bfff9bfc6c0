"""ImagenUNetModel: the U-Net for base stages, and for super-resolution stages of this architecture."""

from collections.abc import Iterator

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..diffusion.discrete_ddpm import BetaSchedule
from .attention import ATTENTION_TYPES, AttendedText, AttentionBlock, AttentionType, make_attention
from .blocks import (
    ActivationType,
    ImagenBlock,
    ResampleType,
    ResBlock,
    ResBlockOptions,
    TimeScaleShift,
    overwrite_act,
    transposed_upsample,
)
from .config_checks import check_config, check_groups, check_integers, check_options, per_level
from .embeddings import TextPooling
from .interface import LowResAugmentation, LowResUpsampling
from .normalization import GroupNorm
from .unet_base import ConditionalUNet, count_heads


class ImagenUNetModel(ConditionalUNet):
    r"""The U-Net of Imagen (arXiv 2205.11487, appendix F.1, after Nichol and Dhariwal 2021), as in NVIDIA NeMo.

    Args:
        sample_size (`int`, defaults to 64):
            Resolution of the images that it is trained on, in pixels. Other sizes are possible: see `total_stride`.
        in_channels (`int`, defaults to 3): Channels of the noisy image.
        out_channels (`int`, defaults to 3): Channels of the output.
        block_out_channels (`tuple[int]`): Channels of each level, from full resolution down; each level halves the
            resolution.
        layers_per_block (`int` or `tuple[int]`, defaults to 3): Residual blocks of each level.
        attention_resolutions (`tuple[int]`, defaults to `(32, 16, 8)`):
            Resolutions, in pixels at `sample_size`, of the levels that have attention.
        attention_type (`AttentionType`): What image tokens attend to, of `attention.ATTENTION_TYPES`.
        attention_head_dim (`int`, *optional*, defaults to 64): Channels of a head.
        num_attention_heads (`int`, *optional*): Number of heads, in place of `attention_head_dim`.
        encoder_hid_dim (`int`, *optional*, defaults to 1024):
            Width of the text encoder's embeddings; None builds a network without text.
        cross_attention_dim (`int`, defaults to 512): Width to which text embeddings are projected.
        text_pooling (`"attention"`, `"mean"` or `"class_token"`):
            How the text embeddings are pooled to a vector that is added to the time embedding: a mean weighted by one
            learned score, the mean, or multi-head attention of a class token (see `ClassTokenPooling`).
        use_null_token (`bool`): Whether a learned token is appended to the text embeddings.
        time_embedding_dim (`int`, *optional*): Width of the time embedding; 4 times the first level's channels.
        learned_sinusoidal_dim (`int`, *optional*): Learned sinusoids of the noise level, in place of fixed ones.
        time_scale_shift (`"scale_shift"` or `"default"`): Whether the time embedding scales and shifts, or is added.
        resample_type (`"conv"`, `"pool"`, `"resnet"` or `"resnet_nearest"`):
            Downsampling is a strided convolution, average pooling, or a residual block; upsampling is a transposed
            convolution for the first three, and nearest-neighbor for the last.
        conv_kernel_size (`int`, defaults to 3): Kernel of the first and the last convolution.
        dropout (`float`): Dropout rate of the residual blocks.
        norm_num_groups (`int`, defaults to 32): Groups of every normalization.
        low_res_conditioning (`bool`): Whether a low-resolution image is concatenated to the input.
        low_res_noise_conditioning (`bool`): Whether the noise level of that image is an input too.
        act_fn (`"silu"` or `"gelu"`):
            The activation function, except in the gated feed-forward of stacked attention.
        resnet_out_scale_factor (`float`, defaults to 1.0): Divisor of every residual block's output.
        shared_attention_norm (`bool`):
            Whether the image's queries, keys and values in fused attention share one normalization, instead of having
            one for the queries and one for keys and values.
        sinusoidal_dim (`int`, *optional*):
            Width of the fixed sinusoids of the noise level; a quarter of the time embedding.
        text_pooling_num_heads (`int`, *optional*): Number of heads, only for `text_pooling="class_token"`.
        mid_block_add_attention (`bool`, defaults to True): Whether the middle block has attention.
        attends_padding (`bool`):
            Whether padded positions of the text are attended to, ignoring the mask: see `StageNetwork`.
        low_res_augmentation (`"edm"` or `"discrete"`):
            How noise is added to the low-resolution image, and how the network is conditioned on it: see
            `StageNetwork`.
        trained_beta_schedule (`str`, *optional*):
            The discrete noise levels that the network was trained with: see `StageNetwork`. Pipelines reject
                schedulers
            with others.
        low_res_upsampling (`"bicubic"` or `"bicubic_antialias"`):
            How the low-resolution image is upsampled to the size of the sample: see `StageNetwork`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: tuple[int, ...] = (256, 512, 768, 1024),
        layers_per_block: int | tuple[int, ...] = 3,
        attention_resolutions: tuple[int, ...] = (32, 16, 8),
        attention_type: AttentionType = "fused",
        attention_head_dim: int | None = 64,
        num_attention_heads: int | None = None,
        encoder_hid_dim: int | None = 1024,
        cross_attention_dim: int = 512,
        text_pooling: TextPooling = "attention",
        use_null_token: bool = False,
        time_embedding_dim: int | None = None,
        learned_sinusoidal_dim: int | None = None,
        time_scale_shift: TimeScaleShift = "scale_shift",
        resample_type: ResampleType = "conv",
        conv_kernel_size: int = 3,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        low_res_conditioning: bool = False,
        low_res_noise_conditioning: bool = False,
        act_fn: ActivationType = "silu",
        resnet_out_scale_factor: float = 1.0,
        shared_attention_norm: bool = False,
        sinusoidal_dim: int | None = None,
        text_pooling_num_heads: int | None = None,
        mid_block_add_attention: bool = True,
        attends_padding: bool = False,
        low_res_augmentation: LowResAugmentation = "edm",
        trained_beta_schedule: BetaSchedule | None = None,
        low_res_upsampling: LowResUpsampling = "bicubic",
    ):
        super().__init__()
        check_config(self.config, min_layers=0)
        check_options(self.config)
        if encoder_hid_dim is not None and ATTENTION_TYPES[attention_type].reads_text:
            check_groups("cross_attention_dim", [cross_attention_dim], norm_num_groups)
        self.num_layers = per_level("layers_per_block", layers_per_block, len(block_out_channels))
        time_embedding_dim = time_embedding_dim or 4 * block_out_channels[0]
        context_dim = None if encoder_hid_dim is None else cross_attention_dim
        attention_strides = strides_of(attention_resolutions, sample_size, len(block_out_channels))

        options = ResBlockOptions(
            time_embedding_dim, time_scale_shift, dropout, norm_num_groups, act_fn, resnet_out_scale_factor
        )

        def attention(channels: int) -> AttentionBlock:
            heads = count_heads(channels, num_attention_heads, attention_head_dim)
            return make_attention(attention_type, channels, heads, context_dim, norm_num_groups, shared_attention_norm)

        def block(in_channels: int, out_channels: int, attends: bool) -> ImagenBlock:
            resnet = ResBlock(in_channels, out_channels, options)
            return ImagenBlock([resnet], attention(out_channels) if attends else None)

        self._init_conditioning(context_dim, time_embedding_dim)

        channels = block_out_channels[0]
        skip_channels = [channels]
        self.down_blocks, self.downsamplers = nn.ModuleList(), nn.ModuleList()
        for level, level_channels in enumerate(block_out_channels):
            if level > 0:
                self.downsamplers.append(make_downsampler(resample_type, channels, options))
                skip_channels.append(channels)
            for _ in range(self.num_layers[level]):
                self.down_blocks.append(block(channels, level_channels, 2**level in attention_strides))
                channels = level_channels
                skip_channels.append(channels)

        self.mid_blocks = nn.ModuleList(block(channels, channels, has) for has in (mid_block_add_attention, False))

        self.up_blocks, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, level_channels in reversed(list(enumerate(block_out_channels))):
            for _ in range(self.num_layers[level] + 1):
                attends = 2**level in attention_strides
                self.up_blocks.append(block(channels + skip_channels.pop(), level_channels, attends))
                channels = level_channels
            if level > 0:
                self.upsamplers.append(make_upsampler(resample_type, channels, options))

        self.norm_out = GroupNorm(norm_num_groups, channels)
        self.conv_out = nn.Conv2d(channels, out_channels, conv_kernel_size, padding=conv_kernel_size // 2)

    @property
    def total_stride(self) -> int:
        return 2 ** (len(self.config.block_out_channels) - 1)

    def at_resolution(self, resolution: int) -> "ImagenUNetModel":
        """Set another `sample_size`; attention stays at its levels, so `attention_resolutions` are scaled too."""
        strides = [self.resolution // attended for attended in self.config.attention_resolutions]
        super().at_resolution(resolution)
        self.register_to_config(attention_resolutions=tuple(resolution // stride for stride in strides))
        return self

    def text_blocks(self) -> list[ImagenBlock]:
        return [block for block in [*self.down_blocks, *self.mid_blocks, *self.up_blocks] if block.reads_text]

    def _run_levels(self, h: torch.Tensor, temb: torch.Tensor, texts: Iterator[AttendedText]) -> torch.Tensor:
        h = self.conv_in(h)  # (B, C_0, H, W)
        skips = [h]
        blocks, downsamplers = iter(self.down_blocks), iter(self.downsamplers)
        for level, num_layers in enumerate(self.num_layers):
            if level > 0:
                h = resample(next(downsamplers), h, temb)
                skips.append(h)
            for _ in range(num_layers):
                h = self._run(next(blocks), h, temb, texts)  # (B, C_i, H / 2^i, W / 2^i)
                skips.append(h)

        for block in self.mid_blocks:
            h = self._run(block, h, temb, texts)

        blocks, upsamplers = iter(self.up_blocks), iter(self.upsamplers)
        for level, num_layers in reversed(list(enumerate(self.num_layers))):
            for _ in range(num_layers + 1):
                h = torch.cat([h, skips.pop()], dim=1)  # assigned first: both are free while the block runs
                h = self._run(next(blocks), h, temb, texts)
            if level > 0:
                h = resample(next(upsamplers), h, temb)

        h = overwrite_act(self.norm_out(h), self.config.act_fn)
        return self.conv_out(h)  # (B, out_channels, H, W)


def resample(resampler: nn.Module, h: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """Resample to the resolution of the next level."""
    return resampler(h, temb) if isinstance(resampler, ResBlock) else resampler(h)


def strides_of(attention_resolutions: tuple[int, ...], sample_size: int, num_levels: int) -> set[int]:
    """Return the strides of the levels with these resolutions, in pixels at `sample_size`."""
    check_integers("attention_resolutions", attention_resolutions, 1, sample_size, (0, num_levels))
    strides = {sample_size // 2**level: 2**level for level in range(num_levels)}
    for resolution in attention_resolutions:
        if resolution not in strides:
            raise ValueError(
                f"`attention_resolutions` has {resolution}, but the levels have resolutions {list(strides)}."
            )
    return {strides[resolution] for resolution in attention_resolutions}


def make_downsampler(resample_type: ResampleType, channels: int, options: ResBlockOptions) -> nn.Module:
    """Create a module that halves height and width."""
    if resample_type in ("resnet", "resnet_nearest"):
        return ResBlock(channels, channels, options, "down")
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1) if resample_type == "conv" else nn.AvgPool2d(2)


def make_upsampler(resample_type: ResampleType, channels: int, options: ResBlockOptions) -> nn.Module:
    """Create a module that doubles height and width."""
    if resample_type in ("resnet", "resnet_nearest"):
        return ResBlock(channels, channels, options, "up" if resample_type == "resnet" else "up_nearest")
    return transposed_upsample(channels)
