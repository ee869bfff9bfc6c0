import math
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_dispatch

from diffusers_imagen import EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.models.attention import (
    ImagenAttention,
    ImagenAttnProcessor,
    StackedAttention,
    image_to_tokens,
    tokens_to_image,
)
from diffusers_imagen.models.blocks import ImagenBlock
from diffusers_imagen.models.embeddings import TextKeyValue


TEXT_WIDTH, TOKENS, SIZE = 12, 5, 16
SHARED = {
    "sample_size": SIZE,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "encoder_hid_dim": TEXT_WIDTH,
    "norm_num_groups": 4,
}
UNET = {**SHARED, "attention_resolutions": (8,), "cross_attention_dim": 8}
LOW_RES = {"low_res_conditioning": True, "low_res_noise_conditioning": True}
BY_HEADS = {"attention_head_dim": None, "num_attention_heads": 2}
NETWORKS = {
    "unet-fused": (ImagenUNetModel, UNET),
    "unet-self": (ImagenUNetModel, {**UNET, "attention_type": "self", "layers_per_block": (2, 1)}),
    "unet-cross-pool": (
        ImagenUNetModel,
        {
            **UNET,
            **LOW_RES,
            **BY_HEADS,
            "attention_type": "cross",
            "resample_type": "pool",
            "time_scale_shift": "default",
        },
    ),
    "unet-stacked-resnet": (
        ImagenUNetModel,
        {
            **UNET,
            "attention_type": "stacked",
            "resample_type": "resnet",
            "use_null_token": True,
            "text_pooling": "mean",
            "learned_sinusoidal_dim": 6,
            "conv_kernel_size": 7,
        },
    ),
    "efficient-cross": (EfficientUNetModel, {**SHARED, **LOW_RES, "attention_types": (None, "cross")}),
    "efficient-fused": (
        EfficientUNetModel,
        {**SHARED, **BY_HEADS, "attention_types": ("self", "fused"), "skip_connection_scaling": False},
    ),
    "efficient-stacked": (
        EfficientUNetModel,
        {
            **SHARED,
            "attention_types": (None, "stacked"),
            "low_res_conditioning": False,
            "use_null_token": True,
            "text_pooling": "mean",
            "layers_per_block": (1, 2),
        },
    ),
}
TEXT_FREE = {
    "unet": (ImagenUNetModel, {**UNET, "encoder_hid_dim": None}),
    "efficient": (EfficientUNetModel, {**SHARED, "attention_types": (None, "fused"), "encoder_hid_dim": None}),
}


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights that keep the size of what passes: a new network has zeros where its residual branches end."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return module.eval()


def make(name: str) -> torch.nn.Module:
    network_class, config = {**NETWORKS, **TEXT_FREE}[name]
    return randomize(network_class(**config))


@pytest.fixture(params=NETWORKS)
def unet(request):
    return make(request.param)


@pytest.fixture(params=["unet-fused", "efficient-cross"])
def one_of_each_class(request):
    return make(request.param)


def inputs_for(unet, height: int = SIZE, width: int = SIZE, seed: int = 0, masked: bool = True) -> dict:
    """Two images; the second prompt has two padded tokens."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "sample": torch.randn(2, 3, height, width, generator=generator),
        "timestep": torch.tensor([-0.7, 0.4]),
    }
    if unet.config.encoder_hid_dim is not None:
        text = torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator)
        mask = torch.ones(2, TOKENS, dtype=torch.bool)
        if masked:
            mask[1, -2:] = False
            inputs["encoder_attention_mask"] = mask
        inputs["encoder_hidden_states"] = text * mask[..., None]
    if unet.config.low_res_conditioning:
        inputs["low_res_sample"] = torch.randn(2, 3, height // 4, width // 4, generator=generator)
    if unet.config.low_res_noise_conditioning:
        inputs["low_res_timestep"] = torch.tensor([-1.5, -0.9])
    return inputs


@torch.no_grad()
def run(unet, inputs: dict, **changes) -> torch.Tensor:
    return unet(**{**inputs, **changes}).sample


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


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
    assert len(text.key_values) == len(unet.text_blocks())
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
    assert all(key_value.mask is None for key_value in text.key_values)
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

    # without a layer that reads text, only the pooled states are used
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
    with_attention = [[block.attention is not None for block in level.blocks] for level in rebuilt.down_blocks]
    assert with_attention == [[False], [True], [False], [True]]


def test_total_stride_is_that_of_the_deepest_blocks():
    for name, depth in (("unet-fused", 2), ("efficient-cross", 2)):
        network_class, config = NETWORKS[name]
        config = {**config, "block_out_channels": (8, 8, 16), "sample_size": 16}
        if network_class is EfficientUNetModel:
            config["attention_types"] = (None, None, "cross")
        unet = randomize(network_class(**config))
        sides = []
        deepest = unet.mid_blocks[0] if network_class is ImagenUNetModel else unet.down_blocks[-1]
        deepest.register_forward_pre_hook(lambda module, args: sides.append(args[0].shape[-1]))
        run(unet, inputs_for(unet))
        assert unet.total_stride == 2**depth and sides == [SIZE // unet.total_stride]


# Attention


@pytest.fixture(params=["self", "cross", "fused"])
def attention(request):
    context_dim = None if request.param == "self" else TEXT_WIDTH
    return randomize(ImagenAttention(16, 2, request.param, context_dim, norm_num_groups=4))


def image_and_context() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True] * TOKENS, [True, True, False, False, False]])
    return (
        torch.randn(2, 16, 2, 3, generator=generator),
        torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator),
        mask,
    )


def test_tokens_are_the_pixels_row_by_row():
    image = torch.arange(24.0).reshape(1, 2, 3, 4)
    tokens = image_to_tokens(image)
    assert tokens.shape == (1, 12, 2)
    assert torch.equal(tokens[0, 5], image[0, :, 1, 1])
    assert torch.equal(tokens_to_image(tokens, like=image), image)


@torch.no_grad()
def test_attention_is_softmax_over_image_and_text(attention):
    """Against the formula, head by head, with masked tokens left out instead of masked."""
    image, context, mask = image_and_context()
    text = attention.project_text(context, mask) if attention.reads_text else None
    output = attention(image, text)
    query = attention.to_q(attention.norm(image).flatten(2).transpose(1, 2))
    for b in range(2):
        keys, values = [], []
        if attention.reads_image:
            norm = attention.norm if attention.norm_kv is None else attention.norm_kv
            tokens = norm(image)[b].flatten(1).T
            keys, values = [attention.to_k(tokens)], [attention.to_v(tokens)]
        if attention.reads_text:
            normed = attention.norm_context(context.transpose(1, 2)).transpose(1, 2)[b, mask[b]]
            keys.append((attention.add_k_proj or attention.to_k)(normed))
            values.append((attention.add_v_proj or attention.to_v)(normed))
        heads = [
            (q @ k.T / math.sqrt(8)).softmax(dim=-1) @ v
            for q, k, v in zip(*(x.split(8, dim=-1) for x in (query[b], torch.cat(keys), torch.cat(values))))
        ]
        expected = image[b] + attention.to_out[0](torch.cat(heads, dim=-1)).T.reshape(16, 2, 3)
        torch.testing.assert_close(output[b], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention_type", ["cross", "fused"])
@torch.no_grad()
def test_keys_and_values_of_masked_tokens_change_nothing(attention_type):
    attention = randomize(ImagenAttention(16, 2, attention_type, TEXT_WIDTH, norm_num_groups=4))
    image, context, mask = image_and_context()
    text = attention.project_text(context, mask)
    expected = attention(image, text)
    masked, valid = (~mask)[..., None], mask[..., None]
    changed = TextKeyValue(text.key + 7 * masked, text.value - 9 * masked, text.mask)
    assert torch.equal(attention(image, changed), expected)
    changed = TextKeyValue(text.key, text.value - 9 * valid, text.mask)
    assert relative_error(attention(image, changed), expected) > 0.1


@torch.no_grad()
def test_cross_attention_without_a_valid_token_adds_nothing():
    attention = randomize(ImagenAttention(16, 2, "cross", TEXT_WIDTH, norm_num_groups=4))
    image, context, mask = image_and_context()
    mask[1] = False
    output = attention(image, attention.project_text(context, mask))
    # all that is left of the branch is the bias of its last layer
    torch.testing.assert_close(output[1], image[1] + attention.to_out[0].bias[:, None, None])
    expected = attention(image, attention.project_text(context, None))
    torch.testing.assert_close(output[0], expected[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output[1], expected[1], atol=1e-2)


@torch.no_grad()
def test_fused_attention_without_a_valid_token_is_attention_to_the_image():
    attention = randomize(ImagenAttention(16, 2, "fused", TEXT_WIDTH, norm_num_groups=4))
    image, context, mask = image_and_context()
    mask[1] = False
    output = attention(image, attention.project_text(context, mask))
    image_only = attention(image, None)
    torch.testing.assert_close(output[1], image_only[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output[0], image_only[0], atol=1e-2)


@torch.no_grad()
def test_padded_tokens_count_in_the_norm_of_the_context():
    """As in NeMo, whose checkpoints are trained so: the statistics run over every token, valid or not."""
    attention = randomize(ImagenAttention(16, 2, "cross", TEXT_WIDTH, norm_num_groups=4))
    _, context, mask = image_and_context()
    text = attention.project_text(context, mask)
    grouped = context[1].reshape(TOKENS, 4, TEXT_WIDTH // 4)
    variance, mean = torch.var_mean(grouped, dim=(0, 2), correction=0, keepdim=True)
    normed = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(TOKENS, TEXT_WIDTH)
    normed = normed * attention.norm_context.weight + attention.norm_context.bias
    torch.testing.assert_close(text.key[1], attention.to_k(normed), atol=1e-5, rtol=1e-5)


@pytest.mark.attention
def test_processors_can_be_listed_and_replaced(unet):
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    names = [name for name, module in unet.named_modules() if isinstance(module, ImagenAttention)]
    assert set(unet.attn_processors) == {f"{name}.processor" for name in names}
    unet.set_attn_processor({f"{name}.processor": ImagenAttnProcessor() for name in names})
    assert torch.equal(run(unet, inputs), expected)

    class Identity(ImagenAttnProcessor):
        def __call__(self, attn, hidden_states, text=None):
            return hidden_states

    unet.set_attn_processor(Identity())
    assert relative_error(run(unet, inputs), expected) > 1e-3


@pytest.fixture
def active_backend(monkeypatch):
    """`set_attention_backend` sets the backend of all models: puts it back after the test."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


@pytest.mark.attention
def test_attention_backends_agree(unet, active_backend):
    inputs = inputs_for(unet, masked=False)
    expected = run(unet, inputs)
    unet.set_attention_backend("_native_math")
    backends = {processor._attention_backend for processor in unet.attn_processors.values()}
    assert backends == {attention_dispatch.AttentionBackendName._NATIVE_MATH}
    torch.testing.assert_close(run(unet, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.attention
@pytest.mark.parametrize("name", ["unet-fused", "unet-stacked-resnet", "efficient-cross"])
def test_attention_backends_agree_under_a_mask(name, active_backend):
    unet = make(name)
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    unet.set_attention_backend("_native_math")
    torch.testing.assert_close(run(unet, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.attention
@torch.no_grad()
def test_a_mask_of_prompts_is_never_taken_for_one_of_pixels():
    """As many prompts as pixels: a mask `(B, M)` would also fit as one of queries and keys."""
    attention = randomize(ImagenAttention(16, 2, "fused", TEXT_WIDTH, norm_num_groups=4))
    image = torch.randn(4, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    context = torch.randn(4, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(TOKENS) < torch.tensor([[5], [3], [2], [1]])
    text = attention.project_text(context, mask)
    expected = attention(image, text)
    attention.processor._attention_backend = attention_dispatch.AttentionBackendName._NATIVE_MATH
    torch.testing.assert_close(attention(image, text), expected, atol=1e-5, rtol=1e-5)


# LoRA and compilation


@pytest.mark.lora
def test_lora_adapters(unet):
    peft = pytest.importorskip("peft")
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    attentions = {name: module for name, module in unet.named_modules() if isinstance(module, ImagenAttention)}
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets))
    adapted = {name for name, module in unet.named_modules() if hasattr(module, "lora_A")}
    wanted = set()
    for name, module in attentions.items():
        layers = {"to_q", "to_k", "to_v", "to_out.0"}
        layers |= {"add_k_proj", "add_v_proj"} if module.reads_image and module.reads_text else set()
        wanted |= {f"{name}.{layer}" for layer in layers}
    assert adapted == wanted
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == {
        name for name, _ in unet.named_parameters() if "lora_" in name
    }

    torch.testing.assert_close(run(unet, inputs), expected)  # an adapter starts as zero
    generator = torch.Generator().manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    assert relative_error(run(unet, inputs), expected) > 1e-2
    unet.disable_adapters()
    torch.testing.assert_close(run(unet, inputs), expected)


@pytest.mark.lora
def test_a_saved_lora_adapter_gives_the_same_output(one_of_each_class, tmp_path):
    peft = pytest.importorskip("peft")
    unet, inputs = one_of_each_class, inputs_for(one_of_each_class)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_out.0"]))
    randomize(unet, seed=1)  # the adapter, too
    for name, parameter in unet.named_parameters():
        if "lora_" not in name:
            parameter.data = weights[name.replace(".base_layer", "")]
    unet.save_lora_adapter(tmp_path)
    fresh = type(unet).from_config(unet.config).eval()
    fresh.load_state_dict(weights)
    without = run(fresh, inputs)
    fresh.load_lora_adapter(
        tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
    )
    torch.testing.assert_close(run(fresh, inputs), run(unet, inputs))
    assert relative_error(without, run(unet, inputs)) > 1e-2


@pytest.mark.compile
@pytest.mark.parametrize("name", ["unet-fused", "unet-stacked-resnet", "efficient-cross"])
def test_a_compiled_network_is_one_graph_for_all_timesteps(name):
    unet = make(name)
    inputs = inputs_for(unet)
    with torch.no_grad():
        text = unet.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in (torch.tensor(0.3), torch.tensor(-1.1), torch.tensor(1.0)):
            changes = {"timestep": timestep, "encoder_hidden_states": text, "encoder_attention_mask": None}
            expected = run(unet, inputs, timestep=timestep)
            torch.testing.assert_close(run(compiled, inputs, **changes), expected, atol=1e-6, rtol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.compile
def test_a_network_compiles_with_the_text_in_its_graph(one_of_each_class):
    unet, inputs = one_of_each_class, inputs_for(one_of_each_class)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, inputs), run(unet, inputs), atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


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
    "two counts of heads": ({**UNET, "num_attention_heads": 2}, "not 2 and 8"),
    "no count of heads": ({**EFFICIENT, "attention_head_dim": None}, "not None and None"),
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
    with pytest.raises(ValueError, match=r"`attention_resolutions` has 12, but the levels have sides \[16, 8\]"):
        ImagenUNetModel(sample_size=16, block_out_channels=(32, 32), attention_resolutions=(12,))
    with pytest.raises(ValueError, match="`sample_size` is 15, but should be a multiple of 2"):
        ImagenUNetModel(
            sample_size=16, block_out_channels=(32, 32), attention_resolutions=(8,), attention_head_dim=32
        ).at_resolution(15)
