"""The interface of a stage's network: all that pipelines and training ask of one, whatever its architecture."""

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
    Base class of the networks of a stage, to be put before diffusers' `ModelMixin`.

    A network of another architecture that implements these properties, `encode_text` and `forward` is sampled by every
    pipeline, trained by every trainer, and saved and loaded as this package's own networks are.

    Of `ModelMixin` and `ConfigMixin`, pipelines and training also use: `config`, `from_config`, `from_pretrained`,
    `save_pretrained`, `dtype`, `device`, `num_parameters`, and for settings that ask for them
    `enable_gradient_checkpointing` and `set_attention_backend`. LoRA adapters need diffusers' `PeftAdapterMixin`.
    """

    if TYPE_CHECKING:  # `config`, and all that diffusers and peft add to a network
        from_config: Callable[..., Any]

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Makes `encode_text` bring the weights to the device under offloading, as `forward` does."""
        super().__init_subclass__(**kwargs)
        owner = next(base for base in cls.__mro__ if "encode_text" in vars(base))
        if owner is cls or not issubclass(owner, StageNetwork):  # of a mixin; any other has it already
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
        """Predict from noisy images; draw no random numbers.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, in_channels, height, width)`): The noisy images.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or a number):
                The conditioning value of their noise level.
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, tokens, text_width)`, *optional*):
                Text embeddings, or what `encode_text` returned.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*): True where a token counts.
            low_res_sample (`torch.Tensor` of shape `(batch_size, in_channels, h, w)`, *optional*):
                The low-resolution images.
            low_res_timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, or a number, *optional*):
                The conditioning value of the noise in these.
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
        """Channels of the prediction: those of the images, and as many more where a variance is predicted too."""
        return self.in_channels

    @property
    def total_stride(self) -> int:
        """Height and width of an input must be multiples of this, in pixels."""
        raise NotImplementedError

    @property
    def text_width(self) -> int | None:
        """Width of the text embeddings that the network reads; None for a network without text."""
        raise NotImplementedError

    @property
    def takes_low_res(self) -> bool:
        """Whether the network enlarges a low-resolution image; a base stage's network does not."""
        raise NotImplementedError

    @property
    def takes_low_res_noise_level(self) -> bool:
        """Whether the network is told the noise level of its low-resolution image."""
        raise NotImplementedError

    @property
    def attends_padding(self) -> bool:
        """Whether the network was trained to read the text at padded positions, which its `forward` then gets unmasked.

        The text encoder's embeddings are to be given as they are at such positions, and not zero.
        """
        return False

    @property
    def low_res_augmentation(self) -> LowResAugmentation:
        """How noise comes into the low-resolution image of a network that is told its noise level.

        "edm": noise is added to the image at its own resolution, and `low_res_timestep` is c_noise: see
        `diffusion.augmentation`. "discrete", as in DeepFloyd IF: the image is upsampled bilinearly to the size of
        `sample`, with corners aligned; it is then diffused as an image of DDPM's 1000 discrete noise levels
        ("squaredcos_cap_v2"), and `low_res_timestep` is the index of that level, 0 to 999, fractional ones included.
        """
        return "edm"

    @property
    def trained_beta_schedule(self) -> BetaSchedule | None:
        """The 1000 discrete noise levels that the network was trained with, by diffusers' name of their betas.

        "linear", "scaled_linear" and "sigmoid" are those from 0.0001 to 0.02. Pipelines refuse schedulers of other noise
        levels. None where nothing is declared, as by networks of continuous noise levels: any scheduler is taken.
        """
        return None

    @property
    def low_res_upsampling(self) -> LowResUpsampling:
        """How the low-resolution image comes to the size of `sample`, but for "discrete" `low_res_augmentation`.

        "bicubic" has the kernel of `torch.nn.functional.interpolate`, "bicubic_antialias" that with `antialias=True`,
        which is another one in upsampling too: see `diffusion.augmentation.upsample_low_res`. A pipeline upsamples by
        this once a call; `forward` has to do the same with an image of another size, as training gives it.
        """
        return "bicubic"

    @property
    def residual_scale(self) -> float | None:
        """The scale of the residuals that the network is trained to denoise: see `diffusion.residual`.

        None, or the network denoises images. A pipeline adds the enlarged low-resolution image to the sample that the
        scheduler ends with.
        """
        return None

    def encode_text(
        self, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor | None = None
    ) -> Any:
        """Do the work on a prompt that does not depend on the noise level, once for all steps.

        Args:
            encoder_hidden_states (`torch.Tensor` of shape `(batch_size, tokens, text_width)`): Text embeddings.
            encoder_attention_mask (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*): True where a token counts.
                A network that `attends_padding` does without.

        Returns:
            What `forward` takes in the place of `encoder_hidden_states`.
        """
        raise NotImplementedError

    def at_resolution(self, resolution: int) -> "StageNetwork":
        """Record another resolution in the configuration, to train the network further at it; returns the network.

        By default a network has its own resolution and no other.

        Raises:
            ValueError: If the network cannot have it.
        """
        if resolution != self.resolution:
            raise bad_argument(
                "resolution", resolution, f"{self.resolution}, the only one of this {type(self).__name__}"
            )
        return self

    def zero_initialized(self) -> list[torch.Tensor]:
        """The weights that are zero in a new network and not in a trained one; empty if there are none to tell by."""
        return []

    def is_untrained(self) -> bool:
        """Whether the network still is a new one, as far as its zero-initialized weights tell."""
        weights = self.zero_initialized()
        return bool(weights) and not any(weight.any() for weight in weights)
