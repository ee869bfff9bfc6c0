import math

import pytest
import torch

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.presets import PRESETS, create_unet
from diffusers_imagen.training.growing import grow_unet


def make(**kwargs) -> ImagenUNetModel:
    unet = ImagenUNetModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_resolutions=(8,),
        attention_head_dim=8,
        encoder_hid_dim=None,
        norm_num_groups=4,
        **kwargs,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return unet.eval()


def test_the_preset_of_64_px_is_the_one_of_32_px_grown():
    with torch.device("meta"):
        config = dict(create_unet("emoji_base_64").config)
    grown = dict(grow_unet(create_unet("emoji_base_32")).config)
    assert PRESETS["emoji_base_64"].network_class is ImagenUNetModel
    for key in config.keys() - {"layers_per_block"}:
        assert (
            list(grown[key]) == list(config[key]) if isinstance(config[key], tuple) else grown[key] == config[key]
        ), key
    assert grown["layers_per_block"] == (1,) * 5


@torch.no_grad()
def test_a_grown_network_draws_a_flat_image_as_the_small_one_does():
    """Away from the border averaging and interpolation pass a constant on, so the inner levels see what they saw."""
    small = make()
    # 1x1 as first and last kernel, so that a constant image stays one
    small.conv_in.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    small.conv_out.weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0
    grown = grow_unet(small).eval()
    assert grown.config.sample_size == 32

    seen = {}
    small.down_blocks[0].register_forward_pre_hook(lambda m, args: seen.update(small=args))
    grown.down_blocks[1].register_forward_pre_hook(lambda m, args: seen.update(grown=args))
    drawn = {}
    small.norm_out.register_forward_pre_hook(lambda m, args: drawn.update(small=args[0]))
    grown.norm_out.register_forward_pre_hook(lambda m, args: drawn.update(grown=args[0]))

    image = torch.tensor([0.3, -0.5, 0.9])[None, :, None, None]
    timestep = torch.tensor([0.2])
    small(image.expand(1, 3, 16, 16), timestep - math.log(2) / 4)
    grown(image.expand(1, 3, 32, 32), timestep)
    torch.testing.assert_close(seen["grown"][1], seen["small"][1], atol=1e-5, rtol=1e-5)  # the time embedding
    torch.testing.assert_close(seen["grown"][0][..., 1:, 1:], seen["small"][0][..., 1:, 1:], atol=1e-5, rtol=1e-5)
    interpolated = torch.nn.functional.interpolate(drawn["small"], scale_factor=2, mode="bilinear")
    inner = (..., slice(12, 20), slice(12, 20))
    torch.testing.assert_close(drawn["grown"][inner], interpolated[inner], atol=0.05, rtol=0.05)


def test_levels_joined_by_residual_blocks_are_refused():
    with pytest.raises(ValueError, match="`resample_type` is 'resnet'"):
        grow_unet(make(resample_type="resnet"))
