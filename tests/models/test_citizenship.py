"""What diffusers promises of a model: adapters, compilation, offloading, casting."""

import pytest
import torch
from networks import TEXT_WIDTH, inputs_for, make, randomize, relative_error, run

from diffusers_imagen import ImagenUNetModel
from diffusers_imagen.models.attention import ImagenAttention
from diffusers_imagen.models.blocks import ImagenBlock
from diffusers_imagen.models.presets import PRESETS, create_unet


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
@pytest.mark.parametrize("name", ["unet-fused", "unet-stacked-resnet", "unet-class-token", "efficient-cross"])
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


@pytest.mark.compile
@torch.no_grad()
def test_repeated_blocks_compile_alone(one_of_each_class):
    unet, inputs = one_of_each_class, inputs_for(one_of_each_class)
    expected = run(unet, inputs)
    torch._dynamo.reset()
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(unet, inputs), expected, atol=1e-6, rtol=1e-6)
    torch._dynamo.reset()


@pytest.mark.compile
@torch.no_grad()
def test_repeated_blocks_of_ten_shapes_compile_alone():
    """torch compiles one function eight times: `fullgraph` makes the ninth an error."""
    unet = ImagenUNetModel(
        sample_size=32,
        block_out_channels=(4, 8, 12, 16),
        layers_per_block=(2, 1, 0, 1),
        attention_resolutions=(),
        attention_head_dim=16,
        encoder_hid_dim=None,
        norm_num_groups=2,
    )
    blocks = [module for module in randomize(unet).modules() if isinstance(module, ImagenBlock)]
    shapes = {tuple(parameter.shape for parameter in block.parameters()) for block in blocks}
    assert 10 <= len(shapes) < len(blocks)
    inputs = inputs_for(unet, 32, 32)
    expected = run(unet, inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(unet, inputs), expected, atol=1e-6, rtol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(shapes)
    torch._dynamo.reset()


# Memory


@pytest.mark.group_offload
@pytest.mark.parametrize(
    "settings",
    [
        {"offload_type": "block_level", "num_blocks_per_group": 1},
        {"offload_type": "block_level", "num_blocks_per_group": 2},
        {"offload_type": "leaf_level"},
    ],
)
@torch.no_grad()
def test_group_offloading_reaches_every_layer(unet, settings, tmp_path):
    """From the disk to the CPU: a layer that runs without its hooks would run with empty weights."""
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    unet.enable_group_offload(onload_device=torch.device("cpu"), offload_to_disk_path=str(tmp_path), **settings)
    for parameter in unet.parameters():
        parameter.data.fill_(torch.nan)
    text = unet.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"])
    assert torch.equal(run(unet, inputs), expected)
    del inputs["encoder_attention_mask"]
    assert torch.equal(run(unet, inputs, encoder_hidden_states=text), expected)


@pytest.mark.memory
def test_layerwise_casting_stores_the_convolutions_in_eight_bits(unet):
    inputs = inputs_for(unet)
    expected = run(unet, inputs)
    unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    dtypes = {name: parameter.dtype for name, parameter in unet.named_parameters()}
    assert all(dtype == torch.float8_e4m3fn for name, dtype in dtypes.items() if name.endswith("conv1.weight"))
    # what a small error would move far stays as it is
    kept = ("norm", "time_embedding", "text_embedding")
    assert all(dtype == torch.float32 for name, dtype in dtypes.items() if any(part in name for part in kept))
    # three bits of mantissa: an error of 1/16 at most in a weight, and of about half of that on average
    assert relative_error(run(unet, inputs), expected) < 0.2


def shrunk(name: str) -> torch.nn.Module:
    """A preset at its full depth, with few channels, and residual branches that are not zero."""
    config = PRESETS[name].config
    narrowing = 8 if min(config["block_out_channels"]) >= 128 else 4
    overrides = {
        "sample_size": 32,
        "block_out_channels": tuple(channels // narrowing for channels in config["block_out_channels"]),
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "encoder_hid_dim": TEXT_WIDTH,
    }
    if "attention_resolutions" in config:
        strides = [config["sample_size"] // side for side in config["attention_resolutions"]]
        overrides["attention_resolutions"] = tuple(32 // stride for stride in strides)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = create_unet(name, **overrides).eval()
        for parameter in unet.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return unet


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_in_half_precision(name, dtype):
    unet = shrunk(name)
    inputs = inputs_for(unet, 32, 32)
    expected = run(unet, inputs)
    output = run(unet.to(dtype), inputs, sample=inputs["sample"].to(dtype))
    assert output.dtype == dtype and output.isfinite().all()
    assert relative_error(output, expected) < 2e-2
