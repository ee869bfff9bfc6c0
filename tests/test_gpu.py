"""What needs CUDA: offload, half precision, flash attention, compilation, 8-bit AdamW, FSDP2 on one rank.

They are skipped without CUDA; with DIFFUSERS_IMAGEN_GPU_TESTS=cpu those that a CPU can run do (scripts/gpu_check.sh).
"""

import copy
import importlib.util
import os

import pytest
import torch
from networks import randomize
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_imagen import EDMHeunScheduler, EfficientUNetModel, ImagenPipeline, ImagenUNetModel
from diffusers_imagen.text.text_embeddings import PackedText
from diffusers_imagen.training.data import DataConfig
from diffusers_imagen.training.data.batch import Samples


CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ON_CPU = os.environ.get("DIFFUSERS_IMAGEN_GPU_TESTS") == "cpu"
TEXT_WIDTH, TOKENS = 16, 8

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA and not ON_CPU, reason="needs CUDA")]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")


@pytest.fixture
def unet() -> ImagenUNetModel:
    """Network with heads of 64 channels, which flash attention takes, and small outputs."""
    torch.manual_seed(0)
    unet = ImagenUNetModel(
        sample_size=16,
        block_out_channels=(64, 64),
        layers_per_block=1,
        attention_resolutions=(8,),
        encoder_hid_dim=TEXT_WIDTH,
        cross_attention_dim=64,
        norm_num_groups=8,
    )
    return randomize(unet).eval()


def inputs(dtype: torch.dtype = torch.float32, device: str = DEVICE) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 3, 16, 16, generator=generator).to(device, dtype),
        "timestep": torch.full((2,), -0.5, device=device),
        "encoder_hidden_states": torch.randn(2, TOKENS, TEXT_WIDTH, generator=generator).to(device, dtype),
    }


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    given, expected = given.detach().double().cpu(), expected.detach().double().cpu()
    return ((given - expected).norm() / expected.norm()).item()


@torch.no_grad()
def predict(unet: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return unet(**inputs(dtype), return_dict=False)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_finite_and_near_float32(unet, dtype):
    with torch.no_grad():
        expected = unet(**inputs(device="cpu"), return_dict=False)[0]
    given = predict(unet.to(DEVICE, dtype), dtype)
    assert given.isfinite().all()
    assert 0 < relative_error(given, expected) < 32 * torch.finfo(dtype).eps


@needs_cuda
def test_flash_attention_is_native_attention(unet, active_backend):
    unet.to(DEVICE, torch.float16)
    with sdpa_kernel(SDPBackend.MATH):
        expected = predict(unet, torch.float16)
    unet.set_attention_backend("_native_flash")
    assert relative_error(predict(unet, torch.float16), expected) < 4e-3


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_compiled_networks_have_no_graph_break(unet, how):
    unet.to(DEVICE)
    expected = predict(unet)
    torch._dynamo.reset()
    backend = "inductor" if CUDA else "aot_eager"
    if how == "blocks":
        unet.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        unet = torch.compile(unet, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=64):
        given = predict(unet)
    assert relative_error(given, expected) < (2e-3 if CUDA else 1e-5)  # TF32 on a GPU
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


@needs_cuda
@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_offloaded_pipelines_draw_the_same_picture(unet, how):
    call = {
        "prompt_embeds": inputs(device="cpu")["encoder_hidden_states"],
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
        "output_type": "pt",
    }

    def draw(pipe: ImagenPipeline) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    expected = draw(ImagenPipeline(copy.deepcopy(unet), EDMHeunScheduler()).to(DEVICE))
    pipe = ImagenPipeline(unet, EDMHeunScheduler())
    if how == "model":
        pipe.enable_model_cpu_offload()
    elif how == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(torch.device(DEVICE), offload_type="leaf_level", use_stream=True)
    torch.testing.assert_close(draw(pipe), expected, atol=1e-3, rtol=1e-3)
    assert {parameter.device.type for parameter in pipe.unet.parameters()} <= {"cpu", "meta"}


@needs_cuda
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_step_of_the_8_bit_optimizer_is_near_that_of_adamw(unet):
    from diffusers_imagen.training import TrainingConfig
    from diffusers_imagen.training.optimization import make_optimizer

    networks = [unet.to(DEVICE), copy.deepcopy(unet)]
    before = [parameter.detach().clone() for parameter in unet.parameters()]
    for network, eight_bits in zip(networks, (False, True)):
        optimizer = make_optimizer(
            TrainingConfig(output_dir="unused", preset="emoji_base_64", use_8bit_adam=eight_bits), network
        )
        network(**inputs(), return_dict=False)[0].square().mean().backward()
        optimizer.step()
    steps = [
        torch.cat([(new - old).flatten() for new, old in zip(network.parameters(), before)]) for network in networks
    ]
    assert relative_error(steps[1], steps[0]) < 0.1


def test_a_network_sharded_by_fsdp2_on_one_rank_has_the_same_gradients(unet):
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from diffusers_imagen.models.blocks import ImagenBlock

    unet.to(DEVICE)
    whole = copy.deepcopy(unet)
    distributed.init_process_group("nccl" if CUDA else "gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh(DEVICE, (1,))
        for module in unet.modules():
            if isinstance(module, ImagenBlock):
                fully_shard(module, mesh=mesh)
        fully_shard(unet, mesh=mesh)
        for network in (unet, whole):
            network(**inputs(), return_dict=False)[0].square().mean().backward()
        for given, expected in zip(unet.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(given.grad.full_tensor(), expected.grad, atol=1e-4, rtol=1e-3)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_training_step_in_autocast_has_finite_gradients(dtype):
    torch.manual_seed(0)
    unet = EfficientUNetModel(
        sample_size=32,
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_types=(None, "cross"),
        attention_head_dim=8,
        encoder_hid_dim=TEXT_WIDTH,
        norm_num_groups=8,
        low_res_noise_conditioning=True,
    ).to(DEVICE, memory_format=torch.channels_last)
    sample = torch.randn(2, 3, 32, 32).to(DEVICE).contiguous(memory_format=torch.channels_last)
    given = {**inputs(), "sample": sample, "low_res_sample": sample, "low_res_timestep": torch.zeros(2, device=DEVICE)}
    with torch.autocast(DEVICE, dtype):
        output = unet(**given, return_dict=False)[0]
    output.float().square().mean().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in unet.parameters())
    assert unet.conv_in.weight.grad.abs().sum() > 0


def test_batches_are_finished_on_the_device_as_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    text = PackedText.of(torch.randn(3, TEXT_WIDTH, generator=generator).bfloat16(), mask, keeps_padding=False)
    config = DataConfig(resolution=32, low_resolution=8)
    batch, expected = (
        Samples(pixels, None, None, text).finish(None, config, torch.device(device)) for device in (DEVICE, "cpu")
    )
    assert batch.images.device.type == batch.low_res.device.type == batch.text.device.type == DEVICE
    for given, wanted in zip(batch, expected):
        torch.testing.assert_close(given.cpu(), wanted, atol=1e-6, rtol=0)
