"""Base class of both U-Nets: conditioning, input checks, and integration with diffusers."""

import functools
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from diffusers.loaders import FromOriginalModelMixin, PeftAdapterMixin
from diffusers.models.activations import get_activation
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..diffusion.augmentation import upsample_low_res
from ..diffusion.discrete_ddpm import BetaSchedule
from ..utils.arguments import bad_argument, check_exactly_one, class_of
from ..utils.files import check_folder
from ..utils.modules import refuse_adapters, remove_earlier_weights
from .attention import AttendedText
from .blocks import ImagenBlock, ResBlock
from .config_checks import RANGES, as_timesteps, check_image, check_integer
from .embeddings import NoiseLevelEmbedding, TextConditioning, TextContext, TextEmbedding, UnencodedText
from .interface import LowResAugmentation, LowResUpsampling, StageNetwork


SAVING = inspect.signature(ModelMixin.save_pretrained)


@dataclass
class ImagenUNetOutput(BaseOutput):
    """Output of a U-Net.

    Args:
        sample (`torch.Tensor` of shape `(batch_size, out_channels, height, width)`):
            The raw network output: EDM's F, or the prediction that the scheduler's `prediction_type` names.
    """

    sample: torch.Tensor


class ConditionalUNet(
    StageNetwork, ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin, FromOriginalModelMixin, CacheMixin
):
    """Base class of this package's U-Nets, which embeds the noise level, the text and the low-resolution image.

    A subclass registers its configuration, calls `_init_conditioning`, builds its blocks and `conv_out`, runs them in
    `_run_levels`, and returns from `text_blocks` those that attend to text, in order of execution.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ImagenBlock"]
    _repeated_blocks = ["ImagenBlock"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "low_res_time_embedding", "text_embedding"]

    def _init_conditioning(self, context_dim: int | None, time_embedding_dim: int) -> None:
        """Build the first convolution and the embeddings from the registered configuration.

        Options that only one of the networks has are read with a default for the other.
        """
        config, act_fn = self.config, self.config.get("act_fn", "silu")
        if config.low_res_noise_conditioning and not config.low_res_conditioning:
            raise ValueError("`low_res_noise_conditioning` is True, but the network has no `low_res_conditioning`.")
        self.gradient_checkpointing = False
        noise_level = time_embedding_dim, config.learned_sinusoidal_dim, config.get("sinusoidal_dim"), act_fn
        self.time_embedding = NoiseLevelEmbedding(*noise_level)
        self.low_res_time_embedding = NoiseLevelEmbedding(*noise_level) if config.low_res_noise_conditioning else None
        pooling = config.text_pooling, config.use_null_token, config.get("text_pooling_num_heads"), act_fn
        self.text_embedding = (
            TextEmbedding(config.encoder_hid_dim, context_dim, time_embedding_dim, *pooling)
            if context_dim is not None
            else None
        )
        self.act = get_activation(act_fn)
        channels = config.in_channels * (2 if config.low_res_conditioning else 1)
        kernel_size = config.conv_kernel_size
        self.conv_in = nn.Conv2d(channels, config.block_out_channels[0], kernel_size, padding=kernel_size // 2)

    def text_blocks(self) -> list[ImagenBlock]:
        """Return the blocks that attend to text, in order of execution."""
        raise NotImplementedError

    def _run_levels(self, h: torch.Tensor, temb: torch.Tensor, texts: Iterator[AttendedText]) -> torch.Tensor:
        """Run the network from the first convolution to the last: `(B, C or 2C, H, W)` and `(B, T)` to `(B, out_channels, H, W)`."""
        raise NotImplementedError

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | TextConditioning | UnencodedText | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        low_res_sample: torch.Tensor | None = None,
        low_res_timestep: torch.Tensor | float | int | None = None,
        return_dict: bool = True,
    ) -> ImagenUNetOutput | tuple[torch.Tensor]:
        r"""
        Predict from noisy images.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`):
                The noisy image, scaled by the scheduler's `scale_model_input`.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or a number):
                The conditioning value that the scheduler publishes: c_noise, log-SNR, or the index of a noise level.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, tokens, encoder_hid_dim)`, *optional*):
                Text embeddings, zero at padded positions unless the network `attends_padding`; or the result of
                `encode_text`.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                True or 1 for valid tokens; ignored by a network that `attends_padding`. A row without valid tokens
                gives zeros.
            low_res_sample (`torch.Tensor` of shape `(batch_size, in_channels, h, w)`, *optional*):
                The low-resolution image, at its own size or upsampled, not scaled by the scheduler. With "discrete"
                `low_res_augmentation` it must be upsampled.
            low_res_timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or a number, *optional*):
                Noise level of `low_res_sample`, as returned by the augmentation.
            return_dict (`bool`, defaults to `True`): Whether to return an `ImagenUNetOutput` or a tuple.
        """
        check_image("sample", sample, self.config.in_channels)
        text = self._condition_on_text(encoder_hidden_states, encoder_attention_mask)
        temb = self._embed_noise_levels(timestep, low_res_timestep, text.pooled, sample)  # (B, T)
        out = self._run_levels(self._append_low_res(sample, low_res_sample), temb, iter(text.texts))
        return ImagenUNetOutput(sample=out) if return_dict else (out,)

    @property
    def resolution(self) -> int:
        return self.config.sample_size

    @property
    def in_channels(self) -> int:
        return self.config.in_channels

    @property
    def out_channels(self) -> int:
        return self.config.out_channels

    @property
    def text_width(self) -> int | None:
        return self.config.encoder_hid_dim

    @property
    def takes_low_res(self) -> bool:
        return self.config.low_res_conditioning

    @property
    def takes_low_res_noise_level(self) -> bool:
        return self.config.low_res_noise_conditioning

    @property
    def attends_padding(self) -> bool:
        return getattr(self.config, "attends_padding", False)

    @property
    def low_res_augmentation(self) -> LowResAugmentation:
        return getattr(self.config, "low_res_augmentation", "edm")

    @property
    def trained_beta_schedule(self) -> BetaSchedule | None:
        return self.config.get("trained_beta_schedule")

    @property
    def low_res_upsampling(self) -> LowResUpsampling:
        return getattr(self.config, "low_res_upsampling", "bicubic")

    @property
    def residual_scale(self) -> float | None:
        return self.config.get("residual_scale")

    # diffusers' pipelines pass `variant`, `max_shard_size` and others on if they are in the signature
    @functools.wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as diffusers' `ModelMixin` does, and delete the weights of the same variant that this replaces.

        Raises:
            ValueError: If the folder cannot be written, or the network has LoRA adapters, whose layers could not be
                loaded again.
        """
        check_folder(save_directory, "save_directory")
        refuse_adapters({"unet": self})
        call = SAVING.bind(self, save_directory, *args, **kwargs)
        call.apply_defaults()
        chosen = call.arguments
        super().save_pretrained(save_directory, *args, **kwargs)
        if chosen["is_main_process"] and not chosen.get("use_flashpack"):
            remove_earlier_weights(self, save_directory, chosen["variant"], chosen["safe_serialization"])

    def zero_initialized(self) -> list[torch.Tensor]:
        return [module.conv2.weight for module in self.modules() if isinstance(module, ResBlock)]

    def at_resolution(self, resolution: int) -> "ConditionalUNet":
        check_integer("resolution", resolution, *RANGES["sample_size"])
        if resolution % self.total_stride:
            raise bad_argument("resolution", resolution, f"a multiple of {self.total_stride}")
        self.register_to_config(sample_size=resolution)
        return self

    def encode_text(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> TextConditioning | UnencodedText:
        """Compute the part of the text conditioning that does not depend on the noise level.

        Pass the result to `forward` as `encoder_hidden_states`; a sampler calls this once per prompt. Under group
        offloading, weights are on the device only within `forward`, which then repeats this computation at every call.

        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, tokens, encoder_hid_dim)`):
                Text embeddings, zero at padded positions unless the network `attends_padding`.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                True or 1 for valid tokens. If all are valid, the mask is dropped, so that flash kernels can be used.
        """
        self._check_text(encoder_hidden_states, encoder_attention_mask)
        if self.attends_padding or (encoder_attention_mask is not None and encoder_attention_mask.bool().all()):
            encoder_attention_mask = None
        if _is_group_offload_enabled(self):
            return UnencodedText(encoder_hidden_states, encoder_attention_mask)
        pooled, context = self._embed_text(encoder_hidden_states, encoder_attention_mask)
        attentions = (block.attention for block in self.text_blocks())
        return TextConditioning(pooled, tuple(attn.project_text(context) for attn in attentions if attn is not None))

    def _embed_text(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, TextContext]:
        assert self.text_embedding is not None
        if encoder_attention_mask is not None:
            encoder_attention_mask = None if self.attends_padding else encoder_attention_mask.bool()
        context, mask, pooled = self.text_embedding(encoder_hidden_states.to(self.dtype), encoder_attention_mask)
        return pooled, TextContext(context, mask)

    def _check_text(self, text: torch.Tensor | None, mask: torch.Tensor | None) -> torch.Tensor:
        width = self.config.encoder_hid_dim
        if width is None:
            raise ValueError("`encoder_hidden_states` was given, but this network was built without text.")
        for name, value in (("encoder_hidden_states", text), ("encoder_attention_mask", mask)):
            if value is not None and not isinstance(value, torch.Tensor):
                raise ValueError(f"`{name}` is {class_of(value)}, but should be a tensor.")
        if text is None:
            raise ValueError(f"`encoder_hidden_states` is None; this network needs (batch, tokens, {width}).")
        if text.ndim != 3 or text.shape[-1] != width:
            raise ValueError(
                f"`encoder_hidden_states` has shape {tuple(text.shape)}, but should be (batch, tokens, {width})."
            )
        if mask is not None and mask.shape != text.shape[:2]:
            raise ValueError(
                f"`encoder_attention_mask` has shape {tuple(mask.shape)}, but should be {tuple(text.shape[:2])}."
            )
        return text

    def _condition_on_text(
        self,
        encoder_hidden_states: torch.Tensor | TextConditioning | UnencodedText | None,
        encoder_attention_mask: torch.Tensor | None,
    ) -> TextConditioning:
        if isinstance(encoder_hidden_states, TextConditioning):
            return encoder_hidden_states
        if isinstance(encoder_hidden_states, UnencodedText):
            encoder_hidden_states, encoder_attention_mask = encoder_hidden_states
        if encoder_hidden_states is None and self.config.encoder_hid_dim is None:
            return TextConditioning(pooled=None, texts=())
        encoder_hidden_states = self._check_text(encoder_hidden_states, encoder_attention_mask)
        pooled, context = self._embed_text(encoder_hidden_states, encoder_attention_mask)
        # each block computes its keys and values in its own forward, for offloading, sharding and checkpointing
        return TextConditioning(pooled, [context] * len(self.text_blocks()))

    def _embed_noise_levels(
        self,
        timestep: torch.Tensor | float | int,
        low_res_timestep: torch.Tensor | float | int | None,
        pooled_text: torch.Tensor | None,
        sample: torch.Tensor,
    ) -> torch.Tensor:
        """Sum the embeddings of the noise level, the low-resolution image's noise level and the text: `(B, T)`, activated."""
        temb = self.time_embedding(as_timesteps("timestep", timestep, sample))
        if self.low_res_time_embedding is not None:
            if low_res_timestep is None:
                raise ValueError("`low_res_timestep` is None, but this network is conditioned on it.")
            temb = temb + self.low_res_time_embedding(as_timesteps("low_res_timestep", low_res_timestep, sample))
        elif low_res_timestep is not None:
            raise ValueError("`low_res_timestep` was given, but `low_res_noise_conditioning` is False.")
        if pooled_text is not None:
            temb = temb + pooled_text
        return self.act(temb)

    def _append_low_res(self, sample: torch.Tensor, low_res_sample: torch.Tensor | None) -> torch.Tensor:
        """Concatenate the low-resolution image, if the network is conditioned on one: `(B, C, H, W)` to `(B, 2C, H, W)`."""
        height, width = sample.shape[-2:]
        if height % self.total_stride or width % self.total_stride:
            raise ValueError(f"`sample` is {height}x{width}, but both should be multiples of {self.total_stride}.")
        if not self.config.low_res_conditioning:
            if low_res_sample is not None:
                raise ValueError("`low_res_sample` was given, but `low_res_conditioning` is False.")
            return sample
        if low_res_sample is None:
            raise ValueError("`low_res_sample` is None, but this network is conditioned on it.")
        check_image("low_res_sample", low_res_sample, self.config.in_channels)
        if len(low_res_sample) != len(sample):
            raise ValueError(f"`low_res_sample` has {len(low_res_sample)} images, but `sample` has {len(sample)}.")
        if low_res_sample.shape[-2:] != sample.shape[-2:]:
            if self.low_res_augmentation == "discrete":
                given = "x".join(map(str, low_res_sample.shape[-2:]))
                raise ValueError(
                    f"`low_res_sample` is {given}, but should be {height}x{width}: this network was trained on images "
                    "to which noise was added after upsampling."
                )
            antialias = self.low_res_upsampling == "bicubic_antialias"
            low_res_sample = upsample_low_res(low_res_sample, (height, width), antialias)
        return torch.cat([sample, low_res_sample.to(sample.dtype)], dim=1)

    def _run(
        self, block: nn.Module, h: torch.Tensor, temb: torch.Tensor, texts: Iterator[AttendedText]
    ) -> torch.Tensor:
        """Run an `ImagenBlock` with the text that it attends to, under gradient checkpointing if enabled."""
        text = next(texts) if block.reads_text else None
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, h, temb, text)
        return block(h, temb, text)


def count_heads(channels: int, num_attention_heads: int | None, attention_head_dim: int | None) -> int:
    """Return the number of heads of an attention layer: a fixed number, or the channels divided by a head's width."""
    check_exactly_one(num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim)
    if num_attention_heads is not None:
        name, value, heads = "num_attention_heads", num_attention_heads, num_attention_heads
    else:
        assert attention_head_dim is not None
        name, value, heads = "attention_head_dim", attention_head_dim, channels // attention_head_dim
    if channels % value:
        raise ValueError(f"`{name}` is {value}, which does not divide the {channels} channels of an attention layer.")
    return heads
