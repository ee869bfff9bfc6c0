"""Interface of a stage's network, as used by pipelines and training, independent of the architecture."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..diffusion.discrete_ddpm import BetaSchedule
from ..utils.arguments import bad_argument


LowResAugmentation = Literal["edm", "discrete"]
LowResUpsampling = Literal["bicubic", "bicubic_antialias"]


class StageNetwork(nn.Module):
    """
    Base class of the networks of a stage; list it before diffusers' `ModelMixin`.

    A network of another architecture that implements these properties, `encode_text` and `forward` works with all
    pipelines and trainers, and is saved and loaded like this package's networks.

    Pipelines and training also use these members of `ModelMixin` and `ConfigMixin`: `config`, `from_config`,
        `from_pretrained`,
    `save_pretrained`, `dtype`, `device`, `num_parameters`, and if the settings require
    them `enable_gradient_checkpointing` and `set_attention_backend`. LoRA adapters need diffusers' `PeftAdapterMixin`.
    """

    if TYPE_CHECKING:  # `config`, and attributes that diffusers and peft add to a network
        from_config: Callable[..., Any]

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make `encode_text` bring the weights to the device under offloading, as `forward` does."""
        super().__init_subclass__(**kwargs)
        owner = next(base for base in cls.__mro__ if "encode_text" in vars(base))
        if owner is cls or not issubclass(owner, StageNetwork):  # from a mixin; others are wrapped already
            cls.encode_text = apply_forward_hook(cls.encode_text)  # type: ignore[method-assign]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: torch.Tensor | None = None,
        low_res_sample: torch.Tensor | None = None,
        low_res_timestep: torch.Tensor | float | int | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Predict from noisy images, deterministically.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The noisy images.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or a number):
                The conditioning value of their noise level.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, tokens, text_width)`, *optional*):
                Text embeddings, or the result of `encode_text`.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*): True for valid tokens.
            low_res_sample (`torch.Tensor` of shape `(batch_size, in_channels, h, w)`, *optional*):
                The low-resolution images.
            low_res_timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or a number, *optional*):
                The conditioning value of their noise level.
            return_dict (`bool`, defaults to `True`): Whether to return an output with a `sample`, or a tuple.

        Returns:
            The prediction `(batch_size, out_channels, height, width)`, as `.sample` or in a tuple.
        """
        raise NotImplementedError

    @property
    def resolution(self) -> int:
        """Height and width of the images that the network is trained for, in pixels."""
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        raise NotImplementedError

    @property
    def out_channels(self) -> int:
        """Channels of the prediction: those of the images, or twice as many if a variance is predicted too."""
        return self.in_channels

    @property
    def total_stride(self) -> int:
        """Height and width of an input must be multiples of this, in pixels."""
        raise NotImplementedError

    @property
    def text_width(self) -> int | None:
        """Width of the text embeddings; None for a network without text."""
        raise NotImplementedError

    @property
    def takes_low_res(self) -> bool:
        """Whether the network is conditioned on a low-resolution image, as in super-resolution stages."""
        raise NotImplementedError

    @property
    def takes_low_res_noise_level(self) -> bool:
        """Whether the network is conditioned on the noise level of its low-resolution image."""
        raise NotImplementedError

    @property
    def attends_padding(self) -> bool:
        """Whether the network was trained to attend to padded positions, in which case `forward` ignores the mask.

        The text encoder's embeddings must then be passed unchanged at padded positions, not as zeros.
        """
        return False

    @property
    def low_res_augmentation(self) -> LowResAugmentation:
        """How noise is added to the low-resolution image of a network that is conditioned on its noise level.

        "edm": noise is added to the image at its own resolution, and `low_res_timestep` is c_noise: see
        `diffusion.augmentation`. "discrete", as in DeepFloyd IF: the image is upsampled bilinearly to the size of
        `sample`, with corners aligned; it is then diffused as an image of DDPM's 1000 discrete noise levels
        ("squaredcos_cap_v2"), and `low_res_timestep` is the index of that level, 0 to 999, fractional ones included.
        """
        return "edm"

    @property
    def trained_beta_schedule(self) -> BetaSchedule | None:
        """The 1000 discrete noise levels that the network was trained with, as the name of diffusers' beta schedule.

        "linear", "scaled_linear" and "sigmoid" range from 0.0001 to 0.02. Pipelines reject schedulers with other noise
        levels. None if nothing is declared, as for networks with continuous noise levels: any scheduler is accepted.
        """
        return None

    @property
    def low_res_upsampling(self) -> LowResUpsampling:
        """How the low-resolution image is upsampled to the size of `sample`, except for "discrete" `low_res_augmentation`.

        "bicubic" uses the kernel of `torch.nn.functional.interpolate`, "bicubic_antialias" that of `antialias=True`,
        which differs when upsampling too: see `diffusion.augmentation.upsample_low_res`. A pipeline upsamples once per
        call; `forward` must do the same with an image of another size, which training passes.
        """
        return "bicubic"

    @property
    def residual_scale(self) -> float | None:
        """The scale of the residuals that the network is trained to denoise: see `diffusion.residual`.

        None if the network denoises images. A pipeline adds the upsampled low-resolution image to the scheduler's
        final sample, times this scale.
        """
        return None

    def encode_text(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> Any:
        """Compute the part of the text conditioning that does not depend on the noise level, once for all steps.

        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, tokens, text_width)`): Text embeddings.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*): True for valid tokens.
                Not needed by a network that `attends_padding`.

        Returns:
            A value that `forward` accepts in place of `encoder_hidden_states`.
        """
        raise NotImplementedError

    def at_resolution(self, resolution: int) -> "StageNetwork":
        """Set another resolution in the configuration, for further training; return the network.

        By default a network supports only its own resolution.

        Raises:
            ValueError: If the network does not support the resolution.
        """
        if resolution != self.resolution:
            raise bad_argument(
                "resolution", resolution, f"{self.resolution}, the only one of this {type(self).__name__}"
            )
        return self

    def zero_initialized(self) -> list[torch.Tensor]:
        """Return the weights that are zero in a new network and not in a trained one; empty if there are none."""
        return []

    def is_untrained(self) -> bool:
        """Return whether the network is untrained, judging by its zero-initialized weights."""
        weights = self.zero_initialized()
        return bool(weights) and not any(weight.any() for weight in weights)
