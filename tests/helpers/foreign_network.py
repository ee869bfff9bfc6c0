"""A network of another family: diffusers' UNet2DConditionModel behind the interface of a stage's network."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config

from diffusers_imagen.models.interface import StageNetwork


class ConditionedUNet2D(StageNetwork, ModelMixin, ConfigMixin):
    """A small UNet2DConditionModel; as a super-resolution stage it reads the enlarged image beside the noisy one."""

    @register_to_config
    def __init__(self, resolution: int = 16, text_width: int = 16, takes_low_res: bool = False):
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=resolution,
            in_channels=6 if takes_low_res else 3,
            out_channels=3,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=text_width,
            attention_head_dim=4,
            norm_num_groups=4,
        )

    in_channels = 3
    total_stride = 2
    takes_low_res_noise_level = False

    @property
    def resolution(self) -> int:
        return self.config.resolution

    @property
    def text_width(self) -> int:
        return self.config.text_width

    @property
    def takes_low_res(self) -> bool:
        return self.config.takes_low_res

    def encode_text(self, encoder_hidden_states, encoder_attention_mask=None):
        return encoder_hidden_states.to(self.dtype), encoder_attention_mask

    def at_resolution(self, resolution: int) -> "ConditionedUNet2D":
        self.register_to_config(resolution=resolution)
        return self

    def forward(
        self,
        sample,
        timestep,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        low_res_sample=None,
        low_res_timestep=None,
        return_dict=True,
    ):
        if not isinstance(encoder_hidden_states, tuple):
            encoder_hidden_states = self.encode_text(encoder_hidden_states, encoder_attention_mask)
        embeds, mask = encoder_hidden_states
        if low_res_sample is not None:
            low_res_sample = F.interpolate(low_res_sample, sample.shape[-2:], mode="bicubic")
            sample = torch.cat([sample, low_res_sample], dim=1)
        return self.unet(sample, timestep, embeds, encoder_attention_mask=mask, return_dict=return_dict)
