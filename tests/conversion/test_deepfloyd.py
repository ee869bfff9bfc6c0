"""DeepFloyd IF's networks against diffusers' own, which is the oracle: the same outputs, and the same weights back."""

from collections import Counter

import pytest
import torch
from deepfloyd_networks import STAGE_1, STAGE_2, TEXT_WIDTH, TOKENS
from diffusers import UNet2DConditionModel, UNet2DModel
from networks import make, randomize, relative_error

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.conversion.deepfloyd import (
    config_from_deepfloyd,
    unet_from_deepfloyd,
    unet_to_deepfloyd,
    weight_names,
)


KINDS = {
    "I": STAGE_1,
    "II": STAGE_2,
    "II with self-attention": {**STAGE_2, "only_cross_attention": False},
}
# IF-I-M: 371,605,830 parameters
MEDIUM = {
    **STAGE_1,
    "sample_size": 64,
    "block_out_channels": (192, 384, 576, 768),
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "encoder_hid_dim": 4096,
    "cross_attention_dim": 768,
    "addition_embed_type_num_heads": 64,
}


@pytest.fixture(params=KINDS)
def theirs(request) -> UNet2DConditionModel:
    return randomize(UNet2DConditionModel(**KINDS[request.param]))


def draw_inputs(theirs: UNet2DConditionModel) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = theirs.config.sample_size
    sample = torch.randn(2, theirs.config.in_channels, size, size, generator=generator)
    return sample, torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator)


def public(config) -> dict:
    return {name: value for name, value in config.items() if not name.startswith("_")}


@torch.no_grad()
def run_both(theirs, ours, timestep, class_labels=None) -> tuple[torch.Tensor, torch.Tensor]:
    sample, text = draw_inputs(theirs)
    expected = theirs(sample, timestep, text, class_labels=class_labels).sample
    sample, low_res = sample[:, :3], sample[:, 3:] if sample.shape[1] == 6 else None
    return ours(sample, timestep, text, None, low_res, class_labels).sample, expected


@pytest.mark.parametrize("timestep", [0, 20, 250, 499.5, 999])
def test_outputs_are_those_of_diffusers(theirs, timestep):
    ours = unet_from_deepfloyd(theirs)
    for class_labels in (0, 250, 611.25) if ours.takes_low_res else (None,):
        labels = None if class_labels is None else torch.tensor([class_labels, 3.0])
        actual, expected = run_both(theirs, ours, torch.tensor([float(timestep), 37.75]), labels)
        assert actual.shape == expected.shape == (2, 6, *expected.shape[2:]) and expected.std() > 0.1
        assert relative_error(actual, expected) < 1e-5


def test_every_weight_matters_as_it_does_in_diffusers(theirs):
    """Gradients of the same loss: no weight has taken the place of another of the same shape."""
    ours = unet_from_deepfloyd(theirs)
    sample, text = draw_inputs(theirs)
    labels = torch.tensor([250.0, 3.0]) if ours.takes_low_res else None
    theirs(sample, 250, text, class_labels=labels).sample.square().mean().backward()
    image, low_res = sample[:, :3], sample[:, 3:] if ours.takes_low_res else None
    ours(image, 250, text, None, low_res, labels).sample.square().mean().backward()
    parameters = dict(ours.named_parameters())
    largest = max(parameter.grad.abs().max() for parameter in parameters.values())
    for name, new_name in weight_names(dict(theirs.config)).items():
        expected = theirs.get_parameter(name).grad
        torch.testing.assert_close(parameters[new_name].grad, expected, atol=1e-5 * largest, rtol=1e-3, msg=name)


def test_the_way_there_and_back_changes_no_bit(theirs, tmp_path):
    ours = unet_from_deepfloyd(theirs)
    ours.save_pretrained(tmp_path)
    for converted in (ours, ImagenUNetModel.from_pretrained(tmp_path)):
        back = unet_to_deepfloyd(converted)
        assert public(back.config) == public(theirs.config)
        weights = theirs.state_dict()
        assert back.state_dict().keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in back.state_dict().items())
        again = unet_from_deepfloyd(back)
        assert public(again.config) == public(ours.config)
        labels = torch.tensor([250.0, 3.0]) if ours.takes_low_res else None
        outputs = [run_both(theirs, network, 250, labels)[0] for network in (ours, again)]
        assert torch.equal(*outputs)


def test_renaming_is_a_bijection(theirs):
    ours = unet_from_deepfloyd(theirs)
    names = weight_names(dict(theirs.config))
    assert list(names) == list(theirs.state_dict())
    assert Counter(names.values()) == Counter(list(ours.state_dict()))


def test_weights_are_shared_both_ways(theirs):
    ours = unet_from_deepfloyd(theirs)
    back = unet_to_deepfloyd(ours)
    places = [{parameter.data_ptr() for parameter in network.parameters()} for network in (theirs, ours, back)]
    assert places[0] == places[1] == places[2]
    assert all(tensor.device.type == "cpu" for tensor in [*ours.parameters(), *ours.buffers()])
    assert all(parameter.requires_grad for parameter in ours.parameters())


def test_weights_with_their_configuration_make_the_same_network(theirs):
    weights = {name: value.half() for name, value in theirs.state_dict().items()}
    ours = unet_from_deepfloyd(weights, theirs.config)
    assert ours.dtype == torch.float16 and not ours.training
    names = weight_names(dict(theirs.config))
    assert all(ours.state_dict()[names[name]].data_ptr() == value.data_ptr() for name, value in weights.items())
    assert unet_from_deepfloyd(theirs.train()).training and unet_to_deepfloyd(unet_from_deepfloyd(theirs)).training


def test_configurations_of_older_files_lack_entries_and_have_private_ones():
    config = {**STAGE_1, "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.16.0.dev0"}
    config["block_out_channels"] = list(config["block_out_channels"])
    expected = config_from_deepfloyd(UNet2DConditionModel(**STAGE_1).config)
    assert config_from_deepfloyd(config) == expected
    assert expected["attends_padding"] and expected["attention_resolutions"] == (8, 4, 2)
    assert config_from_deepfloyd(STAGE_2)["low_res_augmentation"] == "discrete"
    assert config_from_deepfloyd(STAGE_2)["attention_resolutions"] == (4, 2)


def test_a_network_of_the_size_of_the_medium_one_has_its_parameters():
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**MEDIUM)
        ours = ImagenUNetModel(**config_from_deepfloyd(theirs.config))
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (theirs, ours)]
    assert counts == [371_605_830] * 2
    assert Counter(weight_names(dict(theirs.config)).values()) == Counter(list(ours.state_dict()))
    names, weights = weight_names(dict(theirs.config)), ours.state_dict()
    assert all(weights[names[name]].shape == weight.shape for name, weight in theirs.state_dict().items())


def test_another_resolution_goes_back_too():
    ours = unet_from_deepfloyd(randomize(UNet2DConditionModel(**STAGE_1))).at_resolution(32)
    back = unet_to_deepfloyd(ours)
    assert back.config.sample_size == 32 and back.config.down_block_types == STAGE_1["down_block_types"]


# Errors

OTHER_KINDS = {
    **{
        name: {name: value}
        for name, value in {
            "in_channels": 4,
            "out_channels": 3,
            "act_fn": "silu",
            "norm_num_groups": 16,
            "norm_eps": 1e-6,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "center_input_sample": True,
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "mid_block_scale_factor": 1.414,
            "resnet_out_scale_factor": 2.0,
            "resnet_skip_time_act": True,
            "resnet_time_scale_shift": "default",
            "time_embedding_act_fn": "gelu",
            "time_embedding_type": "fourier",
            "timestep_post_act": "silu",
            "class_embed_type": "projection",
            "class_embeddings_concat": True,
            "conv_in_kernel": 1,
            "conv_out_kernel": 1,
            "cross_attention_norm": "layer_norm",
            "addition_embed_type": "text_time",
            "encoder_hid_dim_type": "image_proj",
            "encoder_hid_dim": None,
            "dual_cross_attention": True,
            "attention_type": "gated",
            "only_cross_attention": (True, False, False, False),
            "mid_block_only_cross_attention": True,
            "attention_head_dim": (8, 16, 16, 16),
            "cross_attention_dim": (64, 64, 64, 64),
            "addition_embed_type_num_heads": 5,
            "sample_size": None,
            "block_out_channels": "32",
            "layers_per_block": (1, 2),
            "down_block_types": ("DownBlock2D",) + STAGE_1["down_block_types"][1:],
            "up_block_types": STAGE_1["up_block_types"][::-1],
            "quantization_config": {"bits": 8},
            "_class_name": "UNet2DModel",
        }.items()
    },
    "up_block_types of another length": {"up_block_types": STAGE_1["up_block_types"][1:]},
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_configurations_of_another_kind_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^`{name.split()[0]}` (is|has) ") as error:
        config_from_deepfloyd({**STAGE_1, **OTHER_KINDS[name]})
    assert len(str(error.value).splitlines()) == 1


def test_the_super_resolution_network_of_tests_of_diffusers_is_refused():
    """tests/pipelines/deepfloyd_if of diffusers: its middle is scaled by 1.414 and its blocks are not."""
    config = {
        **STAGE_2,
        "block_out_channels": [32, 64],
        "layers_per_block": [1, 2],
        "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
        "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "mid_block_scale_factor": 1.414,
        "time_embedding_act_fn": "gelu",
        "time_embedding_dim": 32,
    }
    for name in ("resnet_out_scale_factor", "resnet_skip_time_act", "only_cross_attention"):
        del config[name]
    with pytest.raises(ValueError, match="`mid_block_scale_factor` is 1.414, but should be 1.414227"):
        unet_from_deepfloyd(UNet2DConditionModel(**config))


def test_networks_of_another_kind_do_not_go_back():
    for config, name in (
        ({}, "out_channels"),
        ({"out_channels": 6}, "text_pooling"),
        ({"out_channels": 6, "attention_type": "stacked"}, "attention_type"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is .*, but should be .* in a network of DeepFloyd IF"):
            with torch.device("meta"):
                unet = ImagenUNetModel(**config)
            unet_to_deepfloyd(unet)
    ours = config_from_deepfloyd(STAGE_1)
    for name, value in (
        *(("use_null_token", True), ("act_fn", "silu"), ("attends_padding", False)),
        ("trained_beta_schedule", "linear"),
    ):
        with torch.device("meta"):
            unet = ImagenUNetModel(**{**ours, name: value})
        with pytest.raises(ValueError, match=f"`{name}` is {value!r}, but should be"):
            unet_to_deepfloyd(unet)
    with torch.device("meta"):
        undeclared = ImagenUNetModel(
            **{**ours, "trained_beta_schedule": None}
        )  # converted before there was the option
    assert unet_to_deepfloyd(undeclared).config.sample_size == 16
    with pytest.raises(ValueError, match="`unet` is of class EfficientUNetModel, but should be an ImagenUNetModel"):
        unet_to_deepfloyd(make("efficient-cross"))
    with pytest.raises(ValueError, match="`unet` is of class UNet2DModel, but should be a UNet2DCond"):
        unet_from_deepfloyd(UNet2DModel(block_out_channels=(32, 32, 32, 32)))


def test_weights_that_do_not_fit_are_refused_by_name():
    weights = UNet2DConditionModel(**STAGE_1).state_dict()
    with pytest.raises(ValueError, match="`config` is None"):
        unet_from_deepfloyd(weights)
    missing = {name: value for name, value in weights.items() if name != "conv_out.bias"}
    with pytest.raises(ValueError, match="have no `conv_out.bias`"):
        unet_from_deepfloyd(missing, STAGE_1)
    with pytest.raises(ValueError, match="have `conv_out.scale`"):
        unet_from_deepfloyd({**weights, "conv_out.scale": torch.ones(1)}, STAGE_1)
    with pytest.raises(ValueError, match=r"`conv_out.bias` has shape \(3,\), but should have \(6,\)"):
        unet_from_deepfloyd({**weights, "conv_out.bias": torch.ones(3)}, STAGE_1)
    with pytest.raises(ValueError, match="`config` is .*, but should be None with a network"):
        unet_from_deepfloyd(UNet2DConditionModel(**STAGE_1), STAGE_1)
