"""Karlo's super-resolution networks against diffusers' own."""

from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from networks import randomize

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.conversion.karlo import config_from_karlo, unet_from_karlo


# The arguments that diffusers' script for Karlo's checkpoints gives, at small widths.
PUBLISHED = {
    "sample_size": 16,
    "layers_per_block": 3,
    "down_block_types": ("ResnetDownsampleBlock2D",) * 4,
    "up_block_types": ("ResnetUpsampleBlock2D",) * 4,
    "block_out_channels": (32, 64, 96, 128),
    "in_channels": 6,
    "out_channels": 3,
    "add_attention": False,
}


@pytest.mark.parametrize("shift", ["default", "scale_shift"])
@torch.no_grad()
def test_outputs_are_those_of_diffusers(shift, tmp_path):
    theirs = randomize(UNet2DModel(**PUBLISHED, resnet_time_scale_shift=shift))
    ours = unet_from_karlo(theirs)
    sample = torch.randn(2, 6, 16, 16, generator=torch.Generator().manual_seed(0))
    ours.save_pretrained(tmp_path)
    for network in (ours, ImagenUNetModel.from_pretrained(tmp_path)):
        for timestep in (torch.tensor([0.0, 999.0]), torch.tensor([499.5, 20.0])):
            expected = theirs(sample, timestep).sample
            output = network(sample[:, :3], timestep, low_res_sample=sample[:, 3:]).sample
            assert expected.std() > 0.1
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert Counter(p.data_ptr() for p in ours.parameters()) == Counter(p.data_ptr() for p in theirs.parameters())


@pytest.mark.parametrize(
    "name, value",
    [
        ("in_channels", 3),
        ("add_attention", True),
        ("act_fn", "gelu"),
        ("mid_block_scale_factor", 2),
        ("class_embed_type", "timestep"),
        ("down_block_types", ("DownBlock2D",) * 4),
        ("up_block_types", ("UpBlock2D",) * 4),
        ("resnet_time_scale_shift", "ada_group"),
        ("sample_size", None),
        ("encoder_hid_dim", 8),
        ("_class_name", "UNet2DConditionModel"),
    ],
)
def test_configurations_of_another_kind_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` is "):
        config_from_karlo({**PUBLISHED, name: value})


def test_levels_with_attention_are_refused():
    down, up = ("SimpleCrossAttnDownBlock2D",) * 4, ("SimpleCrossAttnUpBlock2D",) * 4
    with pytest.raises(ValueError, match="^`down_block_types` is 'SimpleCrossAttnDownBlock2D', but should be one of"):
        config_from_karlo({**PUBLISHED, "down_block_types": down, "up_block_types": up})
    with pytest.raises(ValueError, match="`unet` is of class UNet2DConditionModel, but should be a UNet2DModel"):
        unet_from_karlo(UNet2DConditionModel(block_out_channels=(32, 32, 32, 32), attention_head_dim=8))
