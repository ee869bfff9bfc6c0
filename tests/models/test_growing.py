import math

import pytest
import torch

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.models.growing import change_layers, grow_unet
from diffusers_imagen.models.presets import PRESETS, create_unet


def make(**kwargs) -> ImagenUNetModel:
    unet = ImagenUNetModel(
        sample_size=16,
        attention_resolutions=(8,),
        attention_head_dim=8,
        encoder_hid_dim=None,
        norm_num_groups=4,
        **{"block_out_channels": (8, 16), "layers_per_block": 1, **kwargs},
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


def draw(unet: ImagenUNetModel) -> torch.Tensor:
    sample = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return unet.eval()(sample, torch.tensor([0.2, -0.5]), return_dict=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("layers", [(1, 2), (2, 1), (3, 3), (1, 1)])
def test_a_network_that_gains_blocks_draws_what_it_drew(layers):
    unet = make(attention_type="self")
    changed = change_layers(unet, list(layers))
    assert changed.num_layers == layers and len(changed.down_blocks) == sum(layers)
    torch.testing.assert_close(draw(changed), draw(unet), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_that_were_gained_can_be_lost_again():
    unet = make(layers_per_block=(1, 2), attention_type="self")
    there_and_back = change_layers(change_layers(unet, [2, 3]), [1, 2])
    for key, value in unet.state_dict().items():
        assert torch.equal(there_and_back.state_dict()[key], value), key


@torch.no_grad()
def test_the_first_level_may_lose_all_its_blocks():
    unet = make(block_out_channels=(8, 8))
    changed = change_layers(unet, [0, 1])
    assert len(changed.down_blocks) == 1 and len(changed.up_blocks) == 3
    for key, value in changed.down_blocks[0].state_dict().items():
        assert torch.equal(value, unet.down_blocks[1].state_dict()[key])
    for key, value in changed.up_blocks[2].state_dict().items():
        assert torch.equal(value, unet.up_blocks[2].state_dict()[key])
    assert draw(changed).shape == (2, 3, 16, 16)
    assert change_layers(changed, [1, 1]).num_layers == (1, 1)


@pytest.mark.parametrize(
    "layers, message",
    [
        ([1], "`layers_per_block` has 1 entries, but `block_out_channels` has 2"),
        ([1, 0], r"`layers_per_block` is \(1, 0\), but only the first level may have none"),
        ([-1, 1], r"`layers_per_block` is \(-1, 1\)"),
        ([0, 1], r"only where the second is as wide: `block_out_channels` is \(8, 16\)"),
    ],
)
def test_layers_that_make_no_network_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        change_layers(make(), layers)
