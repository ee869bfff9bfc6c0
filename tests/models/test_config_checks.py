"""Configurations that make no network, and inputs that no network takes: a ValueError names the argument."""

import inspect
import math

import pytest
import torch
from networks import SHARED, TEXT_WIDTH, TOKENS, UNET, inputs_for, make, run

from diffusers_imagen import EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.models.config_checks import CHOICES, FLAGS, MAX_LAYERS, RANGES, estimate_parameters
from diffusers_imagen.models.presets import PRESETS, create_unet


BASES = {
    ImagenUNetModel: UNET,
    EfficientUNetModel: {**SHARED, "attention_types": (None, "cross")},
}
NO_INTEGER = ["8", 8.0, math.nan, True, [8], {}, 0, -1, 10**12]
NO_FLAG = ["yes", 1, None, [True]]
NO_LIST_OF_SIZES = [None, [], "88", 8, [8, "16"], [8, 16.0], [8, None], [8, True], [[8, 16]], [0, 16], [8] * 13]
NO_LAYERS = [None, "1", 1.0, True, -1, MAX_LAYERS + 1, 1_000_000, [1, "1"], [1, 1_000_000], [[1], [1]], [1, 1, 1]]
NO_SCALE = ["1", 0, -1.0, math.nan, math.inf, None, True, [1.0]]
NO_DROPOUT = ["0", -0.1, 1.0, math.nan, math.inf, None, True]
BAD = [
    *((name, value) for name in RANGES for value in NO_INTEGER),
    *((name, value) for name in FLAGS for value in NO_FLAG),
    *(("block_out_channels", value) for value in [*NO_LIST_OF_SIZES, [8, 10**9]]),
    *(("layers_per_block", value) for value in NO_LAYERS),
    *(("dropout", value) for value in NO_DROPOUT),
    *(("attention_resolutions", value) for value in [None, 8, "8", ["8"], [8.0], [[8]], [0], [8] * 13]),
    *(("attention_types", value) for value in [None, "self", [None, 1], [None, ["cross"]], {}]),
    *((name, value) for name in CHOICES for value in (None, 1, ["a"], "a") if value not in CHOICES[name]),
    *(("resnet_out_scale_factor", value) for value in NO_SCALE),
    ("norm_num_groups", 3),
    ("cross_attention_dim", 6),  # 4 groups of the normalisation
    ("conv_kernel_size", 2),
    ("learned_sinusoidal_dim", 3),
    ("sinusoidal_dim", 3),
    ("sample_size", 17),
]


@pytest.mark.parametrize("network_class", BASES)
def test_values_that_make_no_network_are_refused_by_name(network_class):
    taken = inspect.signature(network_class).parameters
    cases = [(name, value) for name, value in BAD if name in taken]
    assert len(cases) > 150
    for name, value in cases:
        with pytest.raises(ValueError) as error:
            network_class(**{**BASES[network_class], name: value})
        message = str(error.value)
        assert f"`{name}`" in message and len(message.splitlines()) == 1 and len(message) < 300, (name, value, message)


def test_bounds_are_said():
    with pytest.raises(ValueError, match="`layers_per_block` is .*1000000.*, but should be .* from 0 to 128"):
        ImagenUNetModel(**{**UNET, "layers_per_block": 1_000_000})
    with pytest.raises(
        ValueError, match="make a network of about 60 billion parameters, but 10 billion is the maximum"
    ):
        ImagenUNetModel(**{**UNET, "block_out_channels": (16_384, 16_384), "attention_head_dim": 64})


@pytest.mark.parametrize("name", PRESETS)
def test_the_estimate_of_parameters_is_within_a_factor_of_two(name):
    with torch.device("meta"):
        config = create_unet(name).config
    layers = config.layers_per_block
    layers = [layers] * len(config.block_out_channels) if isinstance(layers, int) else layers
    assert 0.5 < estimate_parameters(config, layers) / PRESETS[name].num_parameters < 2


TEXT = torch.zeros(2, TOKENS, TEXT_WIDTH)
BAD_INPUTS = [
    ("sample", [[0.0]], "`sample` is of class list, but should be a tensor"),
    ("sample", torch.zeros(3, 16, 16), r"`sample` has shape \(3, 16, 16\), but should be \(batch, 3, height, width\)"),
    ("sample", torch.zeros(2, 4, 16, 16), r"`sample` has shape \(2, 4, 16, 16\)"),
    ("timestep", "0.3", "`timestep` is '0.3', but should be a number"),
    ("timestep", torch.zeros(3), r"`timestep` has shape \(3,\), but should have one value, or 2"),
    ("encoder_hidden_states", TEXT.numpy(), "`encoder_hidden_states` is of class ndarray, but should be a tensor"),
    (
        "encoder_attention_mask",
        [[1] * TOKENS] * 2,
        "`encoder_attention_mask` is of class list, but should be a tensor",
    ),
    ("low_res_sample", "image", "`low_res_sample` is of class str"),
    ("low_res_sample", torch.zeros(1, 3, 4, 4), "`low_res_sample` has 1 images, but `sample` has 2"),
    ("low_res_timestep", None, "`low_res_timestep` is None"),
    ("low_res_timestep", [0.1], r"`low_res_timestep` is \[0.1\], but should be a number"),
]


@pytest.mark.parametrize("name, value, message", BAD_INPUTS)
def test_inputs_that_no_network_takes_are_refused_by_name(name, value, message):
    unet = make("efficient-cross")
    with pytest.raises(ValueError, match=message):
        run(unet, inputs_for(unet), **{name: value})


@pytest.mark.parametrize("name", ["unet-fused", "efficient-cross"])
def test_another_resolution_is_checked_too(name):
    for size in (15, 0, "32", None, 32.0):
        with pytest.raises(ValueError, match="`resolution` is "):
            make(name).at_resolution(size)
