"""Options of ImagenUNetModel that DeepFloyd IF's networks need, each against its formula, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from networks import LOW_RES, SIZE, TEXT_WIDTH, TOKENS, UNET, inputs_for, make, randomize, relative_error, run
from torch import nn

from diffusers_imagen import EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.models.attention import ImagenAttention
from diffusers_imagen.models.blocks import ResBlock, ResBlockOptions
from diffusers_imagen.models.embeddings import ClassTokenPooling, NoiseLevelEmbedding, TextContext, UnencodedText
from diffusers_imagen.models.growing import change_layers, grow_unet
from diffusers_imagen.models.interface import StageNetwork


CLASS_TOKEN = {"text_pooling": "class_token", "text_pooling_num_heads": 3}


def build(**changes) -> ImagenUNetModel:
    return randomize(ImagenUNetModel(**{**UNET, **changes}))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Residual blocks


@pytest.mark.parametrize("act_fn", ["silu", "gelu"])
@pytest.mark.parametrize("factor", [1.0, 1 / 0.7071])
@pytest.mark.parametrize("resample", [None, "down", "up", "up_nearest"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_residual_block_is_its_formula(act_fn, factor, resample, grad):
    options = ResBlockOptions(12, norm_num_groups=4, act_fn=act_fn, out_scale_factor=factor)
    block = randomize(ResBlock(8, 16, options, resample))
    activation = {"silu": lambda x: x * x.sigmoid(), "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2}[
        act_fn
    ]
    resamplers = {
        "down": [lambda x: x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean(dim=(3, 5))] * 2,
        "up": [block.resample_branch, block.resample_shortcut],
        "up_nearest": [lambda x: x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)] * 2,
    }
    on_branch, on_shortcut = resamplers.get(resample, [lambda x: x] * 2)
    image, temb = draw(2, 8, 4, 6), draw(2, 12, seed=1)
    with torch.set_grad_enabled(grad):
        h = block.conv1(on_branch(activation(block.norm1(image))))
        scale, shift = block.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)
        h = block.conv2(activation(block.norm2(h) * (1 + scale) + shift))
        expected = (block.conv_shortcut(on_shortcut(image)) + h) / factor
        output = block(image.clone(), temb)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_nearest_upsampling_has_no_weights():
    names = {resample: set(ResBlock(8, 8, ResBlockOptions(8, norm_num_groups=4), resample).state_dict())
             for resample in ("down", "up_nearest", "up")}  # fmt: skip
    assert names["up_nearest"] == names["down"] < names["up"]
    unet = build(resample_type="resnet_nearest")
    assert isinstance(unet.downsamplers[0].resample_branch, nn.AvgPool2d)
    assert isinstance(unet.upsamplers[0].resample_branch, nn.Upsample)


@pytest.mark.parametrize("act_fn, other", [("gelu", "silu"), ("silu", "gelu")])
def test_the_activation_is_the_same_everywhere(act_fn, other, monkeypatch):
    unet = build(act_fn=act_fn, **LOW_RES)
    inputs = inputs_for(unet)

    def refuse(*args, **kwargs):
        raise AssertionError(f"{other} is called")

    monkeypatch.setattr(F, other, refuse)
    run(unet, inputs)


def test_every_residual_block_is_scaled():
    unet = build(resnet_out_scale_factor=1.5, resample_type="resnet_nearest")
    blocks = [module for module in unet.modules() if isinstance(module, ResBlock)]
    assert len(blocks) == 2 + 1 + 2 + 4 + 1 and {block.out_scale_factor for block in blocks} == {1.5}
    assert {module.act_fn for module in blocks} == {"silu"}


# Attention


@torch.no_grad()
def test_a_shared_norm_is_two_equal_ones():
    shared = randomize(ImagenAttention(16, 2, "fused", TEXT_WIDTH, 4, shared_norm=True))
    apart = ImagenAttention(16, 2, "fused", TEXT_WIDTH, 4)
    assert apart.state_dict().keys() - shared.state_dict().keys() == {"norm_kv.weight", "norm_kv.bias"}
    norm = {"norm_kv.weight": shared.norm.weight, "norm_kv.bias": shared.norm.bias}
    apart.load_state_dict({**shared.state_dict(), **norm})
    image, text = draw(2, 16, 2, 3), TextContext(draw(2, TOKENS, TEXT_WIDTH, seed=1), None)
    assert torch.equal(shared(image, text), apart(image, text))
    apart.norm_kv.weight += 0.5
    assert not torch.allclose(shared(image, text), apart(image, text), atol=1e-3)


def test_all_fused_attention_of_a_network_has_the_shared_norm():
    for shared in (False, True):
        unet = build(shared_attention_norm=shared)
        attentions = [module for module in unet.modules() if isinstance(module, ImagenAttention)]
        assert attentions and all((attention.norm_kv is None) == shared for attention in attentions)


@torch.no_grad()
def test_a_middle_without_attention_is_two_residual_blocks():
    unet, attending = build(mid_block_add_attention=False), build()
    assert not [name for name in unet.state_dict() if name.startswith("mid_blocks") and "attention" in name]
    attending.load_state_dict({**attending.state_dict(), **unet.state_dict()})
    for parameter in attending.mid_blocks[0].attention.to_out.parameters():
        parameter.zero_()  # a residual branch that adds nothing
    inputs = inputs_for(unet)
    assert torch.equal(run(unet, inputs), run(attending, inputs))
    assert len(unet.text_blocks()) == len(attending.text_blocks()) - 1
    without = build(mid_block_add_attention=False, attention_resolutions=(), encoder_hid_dim=None)
    assert not [module for module in without.modules() if isinstance(module, ImagenAttention)]


# Embeddings


@torch.no_grad()
def test_class_token_pooling_is_attention_of_the_mean_to_all_tokens():
    """Against torch's own multi-head attention, which has one matrix for queries, keys and values."""
    pooling = randomize(ClassTokenPooling(TEXT_WIDTH, 10, num_heads=3))
    text = draw(2, TOKENS, TEXT_WIDTH)
    tokens = F.layer_norm(text, (TEXT_WIDTH,), pooling.norm1.weight, pooling.norm1.bias)
    class_token = tokens.sum(dim=1, keepdim=True) / TOKENS + pooling.positional_embedding
    projections = pooling.q_proj, pooling.k_proj, pooling.v_proj
    attention = nn.MultiheadAttention(TEXT_WIDTH, 3, batch_first=True).eval()
    attention.in_proj_weight.copy_(torch.cat([projection.weight for projection in projections]))
    attention.in_proj_bias.copy_(torch.cat([projection.bias for projection in projections]))
    attention.out_proj.weight.copy_(torch.eye(TEXT_WIDTH))
    attention.out_proj.bias.zero_()
    keys = torch.cat([class_token, tokens], dim=1)
    pooled = attention(class_token, keys, keys, need_weights=False)[0][:, 0]
    expected = F.layer_norm(pooling.proj(pooled), (10,), pooling.norm2.weight, pooling.norm2.bias)
    torch.testing.assert_close(pooling(text), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_class_token_is_added_to_the_time_embedding_as_it_is():
    unet = build(**CLASS_TOKEN)
    text = draw(2, TOKENS, TEXT_WIDTH)
    assert torch.equal(unet.encode_text(text).pooled, unet.text_embedding.pooling(text))
    assert not [name for name in unet.state_dict() if "pooled_" in name]


@torch.no_grad()
def test_the_sinusoids_have_their_width():
    embedding = randomize(NoiseLevelEmbedding(32, sinusoidal_dim=6, act_fn="gelu"))
    timestep = torch.tensor([0.0, 250.25, 999.0])
    angles = timestep[:, None] * 10_000.0 ** -(torch.arange(3) / 3)
    h = embedding.mlp.linear_1(torch.cat([angles.cos(), angles.sin()], dim=1))
    torch.testing.assert_close(embedding(timestep), embedding.mlp.linear_2(F.gelu(h)), atol=1e-5, rtol=1e-5)
    unet = build(sinusoidal_dim=6, **LOW_RES)
    assert unet.time_embedding.mlp.linear_1.in_features == 6
    assert unet.low_res_time_embedding.mlp.linear_1.in_features == 6
    quarter, eight = build(), build(sinusoidal_dim=8)  # of a time embedding of 4 x 8
    assert torch.equal(run(eight, inputs_for(eight)), run(quarter, inputs_for(quarter)))


# What the network's inputs are


@torch.no_grad()
def test_padded_text_is_attended_where_the_network_says_so(monkeypatch):
    unet, masking = build(attends_padding=True), build()
    masking.load_state_dict(unet.state_dict())
    assert unet.attends_padding and not masking.attends_padding
    inputs = inputs_for(unet)
    mask, text = inputs["encoder_attention_mask"], draw(2, TOKENS, TEXT_WIDTH, seed=1)
    expected = run(masking, inputs, encoder_hidden_states=text, encoder_attention_mask=None)
    assert relative_error(run(masking, inputs, encoder_hidden_states=text), expected) > 1e-3
    assert torch.equal(run(unet, inputs, encoder_hidden_states=text), expected)
    encoded = unet.encode_text(text, mask)
    assert all(key_value.mask is None for key_value in encoded.texts)
    assert torch.equal(run(unet, inputs, encoder_hidden_states=encoded, encoder_attention_mask=None), expected)
    as_it_came = UnencodedText(text, mask)
    assert torch.equal(run(unet, inputs, encoder_hidden_states=as_it_came), expected)
    monkeypatch.setattr("diffusers_imagen.models.unet_base._is_group_offload_enabled", lambda unet: True)
    assert unet.encode_text(text, mask).mask is None
    with pytest.raises(ValueError, match="`encoder_attention_mask` has shape"):
        unet.encode_text(text, mask[:, 1:])


def test_a_network_of_discrete_augmentation_takes_the_low_resolution_image_upsampled():
    unet, other = build(**LOW_RES, low_res_augmentation="discrete"), build(**LOW_RES)
    assert (unet.low_res_augmentation, other.low_res_augmentation) == ("discrete", "edm")
    inputs = inputs_for(unet)
    with pytest.raises(
        ValueError, match="`low_res_sample` is 4x4, but should be 16x16: .* noise was added after upsampling"
    ):
        run(unet, inputs)
    inputs["low_res_sample"] = draw(2, 3, SIZE, SIZE)
    assert torch.equal(run(unet, inputs), run(other, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_low_resolution_image_is_upsampled_as_the_network_declares(dtype):
    unet = build(**LOW_RES, low_res_upsampling="bicubic_antialias").to(dtype)
    plain = build(**LOW_RES).to(dtype)
    assert (unet.low_res_upsampling, plain.low_res_upsampling) == ("bicubic_antialias", "bicubic")
    inputs = inputs_for(unet)
    low_res = inputs["low_res_sample"] = inputs["low_res_sample"].to(dtype)
    upsampled = F.interpolate(low_res.float(), (SIZE, SIZE), mode="bicubic", antialias=True).to(dtype)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    assert torch.equal(run(unet, inputs), run(plain, inputs, low_res_sample=upsampled))
    assert not torch.equal(run(unet, inputs), run(plain, inputs))


def test_networks_of_other_kinds_mask_padding_and_have_edm_augmentation():
    for network in (StageNetwork(), make("efficient-cross"), make("unet-fused")):
        assert network.attends_padding is False and network.low_res_augmentation == "edm"
        assert network.trained_beta_schedule is None
        assert network.low_res_upsampling == "bicubic"


def test_a_network_declares_the_noise_levels_that_it_was_trained_with():
    unet, other = build(trained_beta_schedule="squaredcos_cap_v2"), build()
    other.load_state_dict(unet.state_dict())
    assert unet.trained_beta_schedule == "squaredcos_cap_v2" and other.trained_beta_schedule is None
    assert torch.equal(run(unet, inputs_for(unet)), run(other, inputs_for(unet)))
    with pytest.raises(ValueError, match="`trained_beta_schedule` is 'cosine', but should be one of None, 'linear'"):
        build(trained_beta_schedule="cosine")


# Configurations


NEW_OPTIONS = {
    "act_fn": "silu",
    "resnet_out_scale_factor": 1.0,
    "shared_attention_norm": False,
    "sinusoidal_dim": None,
    "text_pooling_num_heads": None,
    "mid_block_add_attention": True,
    "attends_padding": False,
    "low_res_augmentation": "edm",
    "trained_beta_schedule": None,
    "low_res_upsampling": "bicubic",
}


def test_a_configuration_from_before_these_options_makes_the_same_network():
    unet = build()
    old = {name: value for name, value in unet.config.items() if name not in NEW_OPTIONS}
    loaded = ImagenUNetModel.from_config(old).eval()
    assert {name: loaded.config[name] for name in NEW_OPTIONS} == NEW_OPTIONS
    loaded.load_state_dict(unet.state_dict())
    assert torch.equal(run(loaded, inputs_for(unet)), run(unet, inputs_for(unet)))


UNUSED = {
    "sinusoids that are learned": (
        {"sinusoidal_dim": 8, "learned_sinusoidal_dim": 8},
        "`sinusoidal_dim` is 8, but should be None with `learned_sinusoidal_dim`",
    ),
    "heads of no class token": (
        {"text_pooling_num_heads": 3},
        "`text_pooling_num_heads` is 3, but should be None where `text_pooling` is not 'class_token'",
    ),
    "a class token without heads": (
        {"text_pooling": "class_token"},
        "`text_pooling_num_heads` is None, but should be a divisor of `encoder_hid_dim`, which is 12",
    ),
    "heads that do not fit": (
        {**CLASS_TOKEN, "text_pooling_num_heads": 5},
        "`text_pooling_num_heads` is 5, but should be a divisor of `encoder_hid_dim`, which is 12",
    ),
    "a norm of cross-attention": (
        {"shared_attention_norm": True, "attention_type": "cross"},
        "`shared_attention_norm` is True, but should be False but with text and an `attention_type` of 'fused'",
    ),
    "a norm without text": (
        {"shared_attention_norm": True, "encoder_hid_dim": None},
        "`shared_attention_norm` is True",
    ),
    "padding of no text": (
        {"attends_padding": True, "encoder_hid_dim": None},
        "`attends_padding` is True, but should be False in a network without text",
    ),
    "augmentation of nothing": (
        {"low_res_augmentation": "discrete", "low_res_conditioning": True},
        "`low_res_augmentation` is 'discrete', but should be 'edm' where `low_res_noise_conditioning` is False",
    ),
    "upsampling of nothing": (
        {"low_res_upsampling": "bicubic_antialias"},
        "`low_res_upsampling` is 'bicubic_antialias', but should be 'bicubic' but with `low_res_conditioning`",
    ),
    "upsampling that is another one": (
        {**LOW_RES, "low_res_augmentation": "discrete", "low_res_upsampling": "bicubic_antialias"},
        "`low_res_upsampling` is 'bicubic_antialias', but should be 'bicubic' but with",
    ),
}


@pytest.mark.parametrize("changes, message", UNUSED.values(), ids=UNUSED)
def test_options_that_would_change_nothing_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        build(**changes)
    assert str(error.value).startswith(message)


def test_the_efficient_network_has_no_class_token():
    with pytest.raises(ValueError, match="`text_pooling` is 'class_token', but should be one of 'attention', 'mean'"):
        EfficientUNetModel(text_pooling="class_token")


def test_a_class_token_counts_in_the_estimate_of_parameters():
    with pytest.raises(ValueError, match="make a network of about 13 billion parameters"):
        build(**{**CLASS_TOKEN, "encoder_hid_dim": 65_535})


def test_scaled_networks_are_given_no_blocks_that_start_as_the_identity():
    unet = build(resnet_out_scale_factor=1.25, layers_per_block=2)
    for surgery in (grow_unet, lambda unet: change_layers(unet, [2, 3])):
        with pytest.raises(ValueError, match="`resnet_out_scale_factor` is 1.25, but should be 1 in"):
            surgery(unet)
    assert change_layers(unet, [2, 1]).config.resnet_out_scale_factor == 1.25
