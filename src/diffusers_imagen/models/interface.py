"""The interface of a stage's network: all that pipelines and training ask of one, whatever its architecture."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn


LowResAugmentation = Literal["edm", "discrete"]


class StageNetwork(nn.Module):
    """
    Base class of the networks of a stage, to be put before diffusers' `ModelMixin`.

    A network of another architecture that implements these properties and `forward` is sampled by every pipeline,
    trained by every script, and saved and loaded as this package's own networks are.

    `forward(sample, timestep, encoder_hidden_states=None, encoder_attention_mask=None, low_res_sample=None,
    low_res_timestep=None, return_dict=True)` takes the noisy images `(B, in_channels, H, W)`, the conditioning value of
    their noise level `(B,)` or `()`, the text embeddings `(B, L, text_width)` and their mask `(B, L)`, or in the place
    of the embeddings what `encode_text` returned, the low-resolution images `(B, in_channels, h, w)`, and the
    conditioning value of the noise in these `(B,)`. It returns the prediction `(B, out_channels, H, W)`, in a tuple
    with `return_dict=False`. It draws no random numbers.
    """

    if TYPE_CHECKING:  # `config`, and all that diffusers and peft add to a network
        from_config: Callable[..., Any]

        def __getattr__(self, name: str) -> Any: ...

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

        Raises:
            ValueError: If the network cannot have it.
        """
        raise NotImplementedError

    def zero_initialized(self) -> list[torch.Tensor]:
        """The weights that are zero in a new network and not in a trained one; empty if there are none to tell by."""
        return []

    def is_untrained(self) -> bool:
        """Whether the network still is a new one, as far as its zero-initialized weights tell."""
        weights = self.zero_initialized()
        return bool(weights) and not any(weight.any() for weight in weights)
