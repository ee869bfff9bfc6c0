"""Networks converted from NVIDIA NeMo, against what NeMo v2.3.0 itself computes.

tests/fixtures/nemo holds three of the cases of the project's reference vectors (shared/reference/nemo, described in
shared/reference/README.md): NeMo's configuration, random weights under its names, and its inputs and outputs in fp32
on a CPU. Further cases put there are tested as well.
"""

import copy
import math

import pytest
import torch
from nemo_archives import CASES, PREFIX, read_case
from networks import relative_error

from diffusers_imagen import EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.conversion import load_nemo_unet
from diffusers_imagen.conversion.nemo import (
    EFFICIENT_DEFAULTS,
    FLAGS,
    INTEGERS,
    LISTS,
    UNET_DEFAULTS,
    unet_from_nemo_config,
)
from diffusers_imagen.models.attention import ImagenAttnProcessor, StableImagenAttnProcessor


def network_inputs(vectors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "x": "sample",
        "time": "timestep",
        "text_embed": "encoder_hidden_states",
        "text_mask": "encoder_attention_mask",
        "x_low_res": "low_res_sample",
        "time_low_res": "low_res_timestep",
    }
    return {ours: vectors[nemo] for nemo, ours in names.items() if nemo in vectors}


def test_the_cases_cover_both_networks_and_noise_augmentation():
    assert {"base_default_small", "sr_fused", "srunet_noiseaug"} <= set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_nemo(case):
    config, weights, vectors = read_case(case)
    unet = load_nemo_unet(config, weights)
    assert type(unet) is (EfficientUNetModel if config["unet_type"] == "sr" else ImagenUNetModel)
    assert sum(parameter.numel() for parameter in unet.parameters()) == config["num_parameters"]

    inputs = network_inputs(vectors)
    inputs["sample"].requires_grad_()
    output = unet.eval()(**inputs).sample
    assert relative_error(output.detach(), vectors["output"]) < 1e-5
    (output * vectors["grad_seed"]).sum().backward()
    assert relative_error(inputs["sample"].grad, vectors["grad_x"]) < 1e-5
    grad_norm = torch.stack([parameter.grad.norm() for parameter in unet.parameters()]).norm()
    assert grad_norm.item() == pytest.approx(vectors["param_grad_norm_total"].item(), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_saved_conversion_is_the_same_network(case, tmp_path):
    config, weights, vectors = read_case(case)
    unet = load_nemo_unet(config, weights)
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    inputs = network_inputs(vectors)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, unet.eval()(**inputs).sample)


@pytest.mark.parametrize("prefix", ["", "unet.", "model.unet.", PREFIX, f"{PREFIX}_orig_mod.", "_orig_mod."])
@pytest.mark.parametrize("case", ["base_default_small", "sr_fused"])
def test_prefixes_are_understood(case, prefix):
    config, weights, _ = read_case(case)
    assert all(key.startswith(PREFIX) for key in weights)
    expected = load_nemo_unet(config, weights).state_dict()
    renamed = {prefix + key.removeprefix(PREFIX): value for key, value in weights.items()}
    actual = load_nemo_unet(config, renamed).state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


# NeMo's name, and ours for the parameters that are missing without it
MISSING = {
    "base_default_small": {
        "middle_block.0.in_layers.0.weight": ["mid_blocks.0.resnets.0.norm1.weight"],
        "input_blocks.0.0.bias": ["conv_in.bias"],
        "time_embed.1.weight": ["time_embedding.mlp.linear_1.weight"],
    },
    "sr_fused": {
        "init_conv.weight": ["conv_in.weight"],
        "DBlocks.1.blocks.1.out_layers.2.bias": ["down_blocks.1.resnets.1.conv2.bias"],
        "UBlocks.1.attention_layer.q.weight": ["up_blocks.0.attention.to_q.weight"],
        "UBlocks.1.attention_layer.kv_context.bias": [
            "up_blocks.0.attention.add_k_proj.bias",
            "up_blocks.0.attention.add_v_proj.bias",
        ],
    },
}


@pytest.mark.parametrize("case, key, names", [(c, k, n) for c, keys in MISSING.items() for k, n in keys.items()])
def test_missing_keys_are_named(case, key, names):
    config, weights, _ = read_case(case)
    del weights[PREFIX + key]
    with pytest.raises(ValueError) as error:
        load_nemo_unet(config, weights)
    assert f"Missing parameters: {names}." in str(error.value)
    assert "Unexpected keys: []." in str(error.value)


@pytest.mark.parametrize("case", ["base_default_small", "sr_fused"])
@pytest.mark.parametrize("key", ["nowhere.weight", "time_embed.1.scale", "null_text_embedding", "DBlocks.7.conv.bias"])
def test_leftover_keys_are_named(case, key):
    config, weights, _ = read_case(case)
    weights[PREFIX + key] = torch.zeros(2)
    with pytest.raises(ValueError) as error:
        load_nemo_unet(config, weights)
    place = str(error.value).split("Missing parameters")[0]
    # a key that is understood, but whose network has no such parameter, goes by our name
    assert PREFIX + key in place or "text_embedding.null_token" in place
    assert "Missing parameters: []." in str(error.value)


@pytest.mark.parametrize("layer", ["in_layers.7.weight", "out_layers.0.scale"])
def test_leftover_layers_of_a_block_are_named(layer):
    config, weights, _ = read_case("base_default_small")
    weights[f"{PREFIX}middle_block.0.{layer}"] = torch.zeros(2)
    with pytest.raises(ValueError, match="Unexpected keys"):
        load_nemo_unet(config, weights)


def test_leftover_layers_of_stacked_attention_are_named():
    config, weights, _ = read_case("base_default_small")
    config["unet"]["attention_type"] = "stacked"
    with pytest.raises(ValueError, match="middle_block.1.nowhere.weight"):
        load_nemo_unet(config, {f"{PREFIX}middle_block.1.nowhere.weight": torch.zeros(2)})


def test_two_kinds_of_heads():
    config, _, _ = read_case("base_default_small")
    by_width = unet_from_nemo_config(config)
    assert (by_width.config.attention_head_dim, by_width.config.num_attention_heads) == (16, None)
    config = copy.deepcopy(config)
    config["unet"]["per_head_channels"] = -1
    by_number = unet_from_nemo_config(config)
    assert (by_number.config.attention_head_dim, by_number.config.num_attention_heads) == (None, 4)


def test_a_weight_of_another_size_is_named():
    config, weights, _ = read_case("base_default_small")
    key = next(key for key in weights if key.endswith("out.2.bias"))
    with pytest.raises(ValueError, match=r"'conv_out.bias': \(\(5,\), \(3,\)\)"):
        load_nemo_unet(config, {**weights, key: torch.zeros(5)})


def test_options_that_are_left_out_have_the_defaults_of_nemo():
    base = unet_from_nemo_config(
        {"unet_type": "base", "conditioning": {"embed_dim": 96}, "unet": {"embed_dim": 64, "image_size": 32}}
    )
    assert tuple(base.config.block_out_channels) == (64, 128, 192, 256)
    assert (base.config.layers_per_block, base.config.cross_attention_dim, base.config.encoder_hid_dim) == (3, 512, 96)
    # NeMo asks for attention at 8, 16 and 32 px
    assert tuple(base.config.attention_resolutions) == (32, 16, 8)
    efficient = unet_from_nemo_config(
        {"unet_type": "sr", "unet": {"embed_dim": 32, "image_size": 32, "text_embed_dim": 64, "per_head_channels": 32}}
    )
    assert tuple(efficient.config.layers_per_block) == (1, 2, 4, 8, 8)
    assert tuple(efficient.config.attention_types) == (None, None, None, None, "fused")
    assert efficient.config.skip_connection_scaling is False and efficient.config.learned_sinusoidal_dim == 16


def changed(case: str, **options) -> dict:
    """The configuration of a case with other options of its network."""
    config, _, _ = read_case(case)
    return {**config, "unet": {**config["unet"], **options}}


def test_attention_resolutions_that_no_level_has_are_ignored():
    """The default of 8, 16 and 32 px on a network of two levels, of 32 and 16 px, where 20 px means stride 1."""
    unet = unet_from_nemo_config(changed("base_default_small", attention_resolutions=[4, 8, 16, 20]))
    assert tuple(unet.config.attention_resolutions) == (32, 16)


@pytest.mark.parametrize("case", ["base_default_small", "sr_fused"])
def test_stable_attention_is_a_processor(case):
    for stable, processor_class in ((True, StableImagenAttnProcessor), (False, ImagenAttnProcessor)):
        unet = unet_from_nemo_config(changed(case, stable_attention=stable))
        assert {type(processor) for processor in unet.attn_processors.values()} == {processor_class}


BAD = {
    "unet_type": ({"unet_type": "vit"}, "`unet_type` is 'vit', .* 'base', 'sr' or 'sr-unet'"),
    "unknown": (changed("sr_fused", num_res_blocks=2), r"`unet` has the options \['num_res_blocks'\], .* 'num_resbl"),
    "missing": ({"unet_type": "base", "unet": {"embed_dim": 8}}, r"lacks the options \['image_size'\]"),
    "stride": (changed("sr_fused", stride=4), "`stride` is 4, but should be 2"),
}


@pytest.mark.parametrize("config, message", BAD.values(), ids=BAD)
def test_configurations_that_nemo_does_not_have_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        unet_from_nemo_config(config)


VALUES = (
    ["8", 8.0, [8], -2, 10**12, {}],  # of INTEGERS
    ["8", None, [], ["8"], [1.5], [-1], [[1]], [1] * 13],  # of LISTS
    ["yes", 2, [True], None],  # of FLAGS
)


@pytest.mark.parametrize("case, defaults", [("base_default_small", UNET_DEFAULTS), ("sr_fused", EFFICIENT_DEFAULTS)])
def test_values_of_another_kind_are_refused_by_the_key(case, defaults):
    cases = [
        (key, value) for keys, values in zip((INTEGERS, LISTS, FLAGS), VALUES) for key in keys for value in values
    ]
    for key, value in cases:
        if key not in defaults or (key, value) == ("attention_resolutions", []):
            continue
        with pytest.raises(ValueError, match=f"`{key}`") as error:
            unet_from_nemo_config(changed(case, **{key: value}))
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unet": []}, r"`unet` is \[\], but should be a section"),
        ({"unet": None}, "`unet` is None"),
        ({"unet_type": ["sr"]}, r"`unet_type` is \['sr'\]"),
        ({"noise_cond_aug": "yes"}, "`noise_cond_aug` is 'yes', but should be true or false"),
        (
            {"conditioning": 3, "unet": {"embed_dim": 8, "image_size": 8}},
            "`conditioning` is 3, but should be a section",
        ),
    ],
)
def test_sections_of_another_kind_are_refused(change, message):
    config, _, _ = read_case("base_default_small")
    with pytest.raises(ValueError, match=message):
        unet_from_nemo_config({**config, **change})
    with pytest.raises(ValueError, match="`model_config` is None, but should be the `model:` section"):
        unet_from_nemo_config(None)


def test_weights_that_are_none_are_refused_by_the_key():
    config, weights, _ = read_case("base_default_small")
    key = next(iter(weights))
    for value in (
        None,
        "x",
        [1.0],
        torch.tensor(1.0),
        torch.ones(3).int(),
        weights[key].to("meta"),
        weights[key] * math.nan,
    ):
        with pytest.raises(ValueError, match=f"`state_dict` has .* under '{key}'"):
            load_nemo_unet(config, {**weights, key: value})
    with pytest.raises(ValueError, match="`state_dict` is of class list, but should map"):
        load_nemo_unet(config, [weights])
