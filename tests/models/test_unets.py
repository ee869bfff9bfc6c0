import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from networks import (
    NETWORKS,
    SHARED,
    SIZE,
    TEXT_FREE,
    TEXT_WIDTH,
    TOKENS,
    UNET,
    inputs_for,
    make,
    randomize,
    relative_error,
    run,
)

from diffusers_imagen import EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.models.attention import ImagenAttention, StackedAttention
from diffusers_imagen.models.blocks import ImagenBlock


def test_the_output_has_the_shape_of_the_image(unet):
    inputs = inputs_for(unet)
    output = run(unet, inputs)
    assert output.shape == inputs["sample"].shape
    assert output.std() > 0.1
    with torch.no_grad():
        as_tuple = unet(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert torch.equal(as_tuple[0], output)


@pytest.mark.parametrize("name", ["unet-fused", "efficient-cross"])
def test_out_channels_are_those_of_the_output(name):
    network_class, config = NETWORKS[name]
    unet = randomize(network_class(**config, in_channels=4, out_channels=6))
    low_res = {"low_res_sample": torch.ones(2, 4, 4, 4)} if unet.config.low_res_conditioning else {}
    assert run(unet, inputs_for(unet), sample=torch.ones(2, 4, SIZE, SIZE), **low_res).shape == (2, 6, SIZE, SIZE)


@pytest.mark.parametrize("name", ["unet-fused", "efficient-cross"])
def test_the_branches_of_a_new_network_do_nothing(name):
    network_class, config = NETWORKS[name]
    new = network_class(**config).eval()
    inputs = inputs_for(new)
    # text reaches the image only through residual branches, which start at zero
    other_text = inputs_for(new, seed=1)["encoder_hidden_states"]
    assert torch.equal(run(new, inputs), run(new, inputs, encoder_hidden_states=other_text))


def test_every_input_matters(unet):
    inputs, others = inputs_for(unet), inputs_for(unet, seed=1)
    others["timestep"] = inputs["timestep"] + 0.1
    if "low_res_timestep" in inputs:
        others["low_res_timestep"] = inputs["low_res_timestep"] + 0.1
    output = run(unet, inputs)
    for name in inputs.keys() - {"encoder_attention_mask"}:
        assert relative_error(run(unet, inputs, **{name: others[name]}), output) > 1e-3, name
    if unet.text_blocks():
        assert relative_error(run(unet, inputs, encoder_attention_mask=None), output) > 1e-3


@pytest.mark.parametrize("max_shard_size", ["10GB", "10KB"])
def test_saved_and_loaded_networks_are_identical(unet, tmp_path, max_shard_size):
    unet.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    shards = list(tmp_path.glob("*-of-*.safetensors"))
    assert (len(shards) > 2) == (max_shard_size == "10KB")
    loaded = type(unet).from_pretrained(tmp_path)
    assert loaded.config.block_out_channels == list(unet.config.block_out_channels)
    inputs = inputs_for(unet)
    assert torch.equal(run(loaded, inputs), run(unet, inputs))


def test_a_variant_is_loaded_by_name(one_of_each_class, tmp_path):
    unet = one_of_each_class
    unet.save_pretrained(tmp_path)
    randomize(unet, seed=1).half().save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = type(unet).from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert loaded.dtype == torch.float16
    inputs = inputs_for(unet)
    inputs["sample"] = inputs["sample"].half()
    assert torch.equal(run(loaded, inputs), run(unet, inputs))
    unet.float()
    assert not torch.equal(run(type(unet).from_pretrained(tmp_path), inputs_for(unet)), run(unet, inputs_for(unet)))


def test_encoded_text_takes_the_place_of_the_states(unet):
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    with torch.no_grad():
        text = unet.encode_text(inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask"))
    assert len(text.texts) == len(unet.text_blocks())
    for timestep in (inputs["timestep"], inputs["timestep"]):  # it can be used more than once
        assert torch.equal(run(unet, inputs, encoder_hidden_states=text, timestep=timestep), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_a_fully_valid_mask_equals_no_mask(unet, dtype):
    inputs = inputs_for(unet, masked=False)
    mask = torch.ones(2, TOKENS, dtype=dtype)
    expected = run(unet, inputs)
    torch.testing.assert_close(run(unet, inputs, encoder_attention_mask=mask), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        text = unet.encode_text(inputs["encoder_hidden_states"], mask)
    assert all(key_value.mask is None for key_value in text.texts)
    assert torch.equal(run(unet, inputs, encoder_hidden_states=text), expected)


def test_masks_may_be_of_any_type(unet):
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    for dtype in (torch.int64, torch.float32):
        mask = inputs["encoder_attention_mask"].to(dtype)
        assert torch.equal(run(unet, inputs, encoder_attention_mask=mask), expected)


def test_a_prompt_without_a_valid_token_gives_finite_output(unet):
    inputs = inputs_for(unet)
    inputs["encoder_attention_mask"][0] = False
    output = run(unet, inputs)
    assert output.isfinite().all()
    # the other prompt of the batch is not touched
    torch.testing.assert_close(output[1], run(unet, inputs_for(unet))[1], atol=1e-5, rtol=1e-5)


def test_samples_of_a_batch_do_not_mix(unet):
    inputs = inputs_for(unet)
    output = run(unet, inputs)
    for i in range(2):
        alone = run(unet, {name: value[i : i + 1] for name, value in inputs.items()})
        torch.testing.assert_close(output[i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.training
def test_gradient_checkpointing_gives_identical_gradients(unet):
    inputs = inputs_for(unet)
    seed = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))

    # without a layer that reads text, only the pooled embeddings are used
    unused = set() if unet.text_blocks() else {"text_embedding.proj.weight", "text_embedding.proj.bias"}

    def gradients() -> dict[str, torch.Tensor]:
        unet.zero_grad()
        (unet(**inputs).sample * seed).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in unet.named_parameters() if name not in unused}

    expected = gradients()
    calls = []

    def checkpoint(block, *args):
        calls.append(block)
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    unet.enable_gradient_checkpointing(checkpoint)
    actual = gradients()
    assert calls == [block for block in calls if isinstance(block, ImagenBlock)]
    assert len(calls) == sum(isinstance(module, ImagenBlock) for module in unet.modules())
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    # every parameter is used; a bias of all keys or scores cancels in the softmax
    cancelling = ("k.bias", "k_proj.bias", "score.bias")
    assert all(grad.abs().max() > 0 for name, grad in expected.items() if not name.endswith(cancelling))


@pytest.mark.parametrize("name", TEXT_FREE)
def test_networks_without_text(name):
    unet = make(name)
    assert not [key for key in unet.state_dict() if "text" in key or "context" in key or "add_" in key]
    attentions = [module for module in unet.modules() if isinstance(module, ImagenAttention)]
    assert attentions and not any(attention.reads_text for attention in attentions)
    inputs = inputs_for(unet)
    output = run(unet, inputs)
    assert output.shape == (2, 3, SIZE, SIZE) and output.std() > 0.1
    with pytest.raises(ValueError, match="built without text"):
        run(unet, inputs, encoder_hidden_states=torch.zeros(2, TOKENS, TEXT_WIDTH))
    with pytest.raises(ValueError, match="built without text"):
        unet.encode_text(torch.zeros(2, TOKENS, TEXT_WIDTH))


@pytest.mark.parametrize("name", ["unet-cross-pool", "efficient-cross"])
def test_the_low_resolution_image_is_upsampled_bicubically(name):
    unet = make(name)
    inputs = inputs_for(unet)
    upsampled = F.interpolate(
        inputs["low_res_sample"], (SIZE, SIZE), mode="bicubic", align_corners=False, antialias=False
    )
    assert torch.equal(run(unet, inputs), run(unet, inputs, low_res_sample=upsampled))
    nearest = F.interpolate(inputs["low_res_sample"], (SIZE, SIZE), mode="nearest")
    assert relative_error(run(unet, inputs, low_res_sample=nearest), run(unet, inputs)) > 1e-3


def test_timesteps_of_any_form_agree(unet):
    inputs = inputs_for(unet)
    expected = run(unet, inputs, timestep=torch.full((2,), 0.4))
    for timestep in (0.4, torch.tensor(0.4), torch.tensor([0.4]), torch.tensor(0.4, dtype=torch.float64)):
        assert torch.equal(run(unet, inputs, timestep=timestep), expected)
    assert torch.equal(run(unet, inputs, timestep=1), run(unet, inputs, timestep=torch.ones(2)))
    # one noise level a sample
    torch.testing.assert_close(run(unet, inputs)[1], expected[1], atol=1e-5, rtol=1e-5)
    if unet.config.low_res_noise_conditioning:
        expected = run(unet, inputs, low_res_timestep=torch.full((2,), -0.9))
        assert torch.equal(run(unet, inputs, low_res_timestep=-0.9), expected)
        assert torch.equal(run(unet, inputs, low_res_timestep=torch.tensor(-0.9)), expected)


def test_channels_last_gives_the_same(unet):
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    unet.to(memory_format=torch.channels_last)
    sample = inputs["sample"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(run(unet, inputs, sample=sample), expected, atol=1e-5, rtol=1e-5)


def test_a_transposed_network_of_a_transposed_image_gives_the_transposed_output(unet):
    """Height and width are nowhere mixed up: 8 x 24 pixels against 24 x 8 with every kernel transposed."""
    inputs = inputs_for(unet, height=8, width=24)
    expected = run(unet, inputs)
    assert expected.shape == (2, 3, 8, 24)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 4:
                parameter.copy_(parameter.transpose(2, 3).clone())
    images = {name: inputs[name].transpose(2, 3) for name in ("sample", "low_res_sample") if name in inputs}
    torch.testing.assert_close(run(unet, inputs, **images).transpose(2, 3), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_is_near_float32(unet, dtype, tolerance):
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    unet.to(dtype)
    # text and low-resolution image may stay in float32, noise levels must
    output = run(unet, inputs, sample=inputs["sample"].to(dtype))
    assert output.dtype == dtype and output.isfinite().all()
    assert relative_error(output, expected) < tolerance


def test_noise_levels_are_told_apart_in_half_precision(one_of_each_class):
    unet = one_of_each_class.bfloat16()
    # two levels that bfloat16 cannot tell apart at all, at the frequency of 1
    near, far = (unet.time_embedding.sinusoid(torch.tensor([value])) for value in (200.0, 200.4))
    assert torch.tensor(200.0).bfloat16() == torch.tensor(200.4).bfloat16()
    assert near.dtype == torch.float32 and (near - far).abs().max() > 0.1
    inputs = inputs_for(unet)
    inputs["sample"] = inputs["sample"].bfloat16()
    assert not torch.equal(run(unet, inputs, timestep=200.0), run(unet, inputs, timestep=200.4))


@pytest.mark.parametrize("name", ["unet-fused", "unet-cross-pool", "efficient-cross", "efficient-fused"])
def test_at_resolution_keeps_the_function_of_the_weights(name):
    unet = make(name)
    inputs = inputs_for(unet, 32, 32)
    expected = run(unet, inputs)
    assert unet.at_resolution(32) is unet
    rebuilt = type(unet).from_config(unet.config).eval()
    assert rebuilt.config.sample_size == 32
    rebuilt.load_state_dict(unet.state_dict())
    assert torch.equal(run(rebuilt, inputs), expected)


def test_at_resolution_keeps_attention_at_its_levels():
    config = {**UNET, "sample_size": 64, "block_out_channels": (8, 16, 16, 16), "attention_resolutions": (32, 8)}
    unet = ImagenUNetModel(**config).at_resolution(256)
    assert tuple(unet.config.attention_resolutions) == (128, 32)
    rebuilt = ImagenUNetModel.from_config(unet.config)
    with_attention = [block.attention is not None for block in rebuilt.down_blocks]
    assert with_attention == [False, True, False, True]


def test_total_stride_is_that_of_the_deepest_blocks():
    for name, depth in (("unet-fused", 2), ("efficient-cross", 2)):
        network_class, config = NETWORKS[name]
        config = {**config, "block_out_channels": (8, 8, 16), "sample_size": 16}
        if network_class is EfficientUNetModel:
            config["attention_types"] = (None, None, "cross")
        unet = randomize(network_class(**config))
        sizes = []
        deepest = unet.mid_blocks[0] if network_class is ImagenUNetModel else unet.down_blocks[-1]
        deepest.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[-1]))
        run(unet, inputs_for(unet))
        assert unet.total_stride == 2**depth and sizes == [SIZE // unet.total_stride]


# Errors


TEXT = torch.zeros(2, TOKENS, TEXT_WIDTH)
BAD_INPUTS = {
    "height": ("unet-fused", {"sample": torch.zeros(2, 3, 15, 16)}, "`sample` is 15x16", "multiples of 2"),
    "width": ("efficient-cross", {"sample": torch.zeros(2, 3, 16, 17)}, "`sample` is 16x17", "multiples of 2"),
    "no text": ("unet-fused", {"encoder_hidden_states": None}, "is None", "(batch, tokens, 12)"),
    "text width": (
        "unet-self",
        {"encoder_hidden_states": TEXT[..., 1:]},
        "`encoder_hidden_states` has shape (2, 5, 11)",
        "(batch, tokens, 12)",
    ),
    "text without batch": ("efficient-fused", {"encoder_hidden_states": TEXT[0]}, "has shape (5, 12)", "12)"),
    "mask shape": (
        "efficient-fused",
        {"encoder_attention_mask": torch.ones(2, 4)},
        "`encoder_attention_mask` has shape (2, 4)",
        "(2, 5)",
    ),
    "no low_res_sample": ("efficient-cross", {"low_res_sample": None}, "`low_res_sample` is None", "conditioned"),
    "low_res_sample": (
        "unet-fused",
        {"low_res_sample": torch.zeros(2, 3, 4, 4)},
        "`low_res_sample` was given",
        "`low_res_conditioning` is False",
    ),
    "no low_res_timestep": (
        "unet-cross-pool",
        {"low_res_timestep": None},
        "`low_res_timestep` is None",
        "conditioned",
    ),
    "low_res_timestep": (
        "efficient-fused",
        {"low_res_timestep": -1.0},
        "`low_res_timestep` was given",
        "`low_res_noise_conditioning` is False",
    ),
}


@pytest.mark.parametrize("name, change, offence, expectation", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs_are_named(name, change, offence, expectation):
    unet = make(name)
    with pytest.raises(ValueError) as error:
        run(unet, inputs_for(unet), **change)
    assert offence in str(error.value) and expectation in str(error.value)


EFFICIENT = {**SHARED, "attention_types": (None, "cross")}
BAD_CONFIGURATIONS = {
    "noise level of nothing": (
        {**UNET, "low_res_noise_conditioning": True},
        "`low_res_noise_conditioning` is True, but the network has no `low_res_conditioning`",
    ),
    "noise level of nothing, efficient": (
        {**EFFICIENT, "low_res_conditioning": False, "low_res_noise_conditioning": True},
        "`low_res_noise_conditioning` is True",
    ),
    "two counts of heads": ({**UNET, "num_attention_heads": 2}, "Exactly one of `num_attention_heads`, .* 2, 8"),
    "no count of heads": ({**EFFICIENT, "attention_head_dim": None}, "Exactly one of .* None, None"),
    "width of a head": ({**UNET, "attention_head_dim": 7}, "`attention_head_dim` is 7, .* the 16 channels"),
    "number of heads": (
        {**EFFICIENT, "attention_head_dim": None, "num_attention_heads": 3},
        "`num_attention_heads` is 3, .* the 16 channels",
    ),
    "layers": ({**UNET, "layers_per_block": (1, 2, 3)}, "`layers_per_block` has 3 entries, .* has 2"),
    "layers, efficient": ({**EFFICIENT, "layers_per_block": (1,)}, "`layers_per_block` has 1 entries, .* has 2"),
    "attention of levels": ({**EFFICIENT, "attention_types": ("self",)}, "`attention_types` has 1 entries"),
    "attention_type": ({**UNET, "attention_type": "linear"}, "`attention_type` is 'linear', .* 'fused'"),
    "attention_types": ({**EFFICIENT, "attention_types": (None, "linear")}, "`attention_types` is 'linear'.* None"),
    "text_pooling": ({**UNET, "text_pooling": "max"}, "`text_pooling` is 'max', .* 'attention', 'mean'"),
    "text_pooling, efficient": ({**EFFICIENT, "text_pooling": "max"}, "`text_pooling` is 'max'"),
    "time_scale_shift": ({**UNET, "time_scale_shift": "ada"}, "`time_scale_shift` is 'ada', .* 'scale_shift'"),
    "time_scale_shift, efficient": ({**EFFICIENT, "time_scale_shift": "ada"}, "`time_scale_shift` is 'ada'"),
    "resample_type": ({**UNET, "resample_type": "fir"}, "`resample_type` is 'fir', .* 'conv', 'pool', 'resnet'"),
}


@pytest.mark.parametrize("config, message", BAD_CONFIGURATIONS.values(), ids=BAD_CONFIGURATIONS)
def test_bad_configurations_are_named(config, message):
    network_class = EfficientUNetModel if "attention_types" in config else ImagenUNetModel
    with pytest.raises(ValueError) as error:
        network_class(**config)
    assert re.search(message, str(error.value))


def test_the_networks_of_these_tests_have_every_attention():
    types = {type(module) for name in NETWORKS for module in make(name).modules()}
    assert {ImagenAttention, StackedAttention} <= types


def test_a_side_without_a_level_is_refused():
    with pytest.raises(ValueError, match=r"`attention_resolutions` has 12, but the levels have resolutions \[16, 8\]"):
        ImagenUNetModel(sample_size=16, block_out_channels=(32, 32), attention_resolutions=(12,))
    with pytest.raises(ValueError, match="`resolution` is 15, but should be a multiple of 2"):
        ImagenUNetModel(
            sample_size=16, block_out_channels=(32, 32), attention_resolutions=(8,), attention_head_dim=32
        ).at_resolution(15)


@pytest.mark.parametrize(
    "name, made_by, used_up_by",
    [
        ("efficient-cross", "conv_in", "down_blocks.0"),
        ("efficient-cross", "up_blocks.0", "up_blocks.1"),
        ("unet-fused", "mid_blocks.1", "up_blocks.0"),
        ("unet-fused", "up_blocks.0", "up_blocks.1"),
    ],
)
def test_the_input_of_a_resampling_or_a_sum_is_free_while_the_next_block_runs(name, made_by, used_up_by):
    unet, outputs, seen = make(name), [], []
    unet.get_submodule(made_by).register_forward_hook(lambda module, args, out: outputs.append(weakref.ref(out)))
    inside = unet.get_submodule(used_up_by).resnets[0].conv1
    inside.register_forward_pre_hook(lambda module, args: seen.append(outputs[0]() is None))
    run(unet, inputs_for(unet))
    assert seen == [True]
