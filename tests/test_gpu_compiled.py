"""Compiled networks in pipelines: one graph a batch size, whatever the step; and CUDA graphs, which need CUDA.

Marked as those of test_gpu.py. Networks have the options of every preset and of DeepFloyd IF's, but small levels.
"""

import os

import pytest
import torch
from networks import randomize
from script_modules import script_module

from diffusers_imagen import EDMAdamsScheduler, ImagenPipeline, ImagenSuperResolutionPipeline, ImagenUNetModel
from diffusers_imagen.models.interface import StageNetwork
from diffusers_imagen.models.presets import PRESETS


CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ON_CPU = os.environ.get("DIFFUSERS_IMAGEN_GPU_TESTS") == "cpu"
TEXT_WIDTH, TOKENS, SIZE = 16, 5, 16

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not CUDA and not ON_CPU, reason="needs CUDA")]
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs CUDA")
KINDS = {name: (preset.network_class, preset.config) for name, preset in PRESETS.items()}
with script_module("measure_memory") as script:
    KINDS |= {network.name: (ImagenUNetModel, network.config) for network in script.NETWORKS}


def make(name: str) -> StageNetwork:
    """A network of this kind with two levels."""
    network_class, config = KINDS[name]
    config = dict(config)
    if network_class is ImagenUNetModel:
        config |= {"attention_resolutions": (SIZE // 2,), "cross_attention_dim": TEXT_WIDTH}
    else:
        config["attention_types"] = (None, config["attention_types"][-1])
    for entry, value in {"encoder_hid_dim": TEXT_WIDTH, "text_pooling_num_heads": 2, "sinusoidal_dim": 8}.items():
        if config.get(entry) is not None:
            config[entry] = value
    sizes = {"sample_size": SIZE, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8}
    return randomize(network_class(**{**config, **sizes, "norm_num_groups": 4, "time_embedding_dim": 16}))


class Drawing:
    """Draws two images with a network: the first and the last steps without guidance, those between with it."""

    def __init__(self, unet: StageNetwork):
        self.given: dict = {"output_type": "pt", "num_inference_steps": 4}
        if unet.takes_low_res:
            self.pipe = ImagenSuperResolutionPipeline(unet, self.scheduler(unet), scale_factor=4)
            self.given["image"] = torch.rand(2, 3, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(1))
        else:
            self.pipe = ImagenPipeline(unet, self.scheduler(unet))
        self.pipe.set_progress_bar_config(disable=True)
        if unet.text_width is not None:
            text = torch.randn(4, TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(2))
            mask = torch.ones(2, TOKENS)
            self.given |= {"prompt_embeds": text[:2], "prompt_attention_mask": mask, "guidance_scale": 3.0}
            self.given |= {"negative_prompt_embeds": text[2:], "negative_prompt_attention_mask": mask}
            self.given["guidance_interval"] = (0.1, 3.0)

    @staticmethod
    def scheduler(unet: StageNetwork) -> EDMAdamsScheduler:
        discrete = unet.config.get("trained_beta_schedule") or unet.out_channels == 2 * unet.in_channels
        return EDMAdamsScheduler(preconditioning="discrete" if discrete else "edm")

    def __call__(self, **kwargs) -> torch.Tensor:
        return self.pipe(**{**self.given, "generator": torch.Generator().manual_seed(0), **kwargs}).images


@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("name", KINDS)
def test_every_published_network_compiles_once_a_batch_size(name, how):
    unet = make(name)
    draw = Drawing(unet)
    expected = draw()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if how == "whole":
        draw.pipe.unet = torch.compile(unet, fullgraph=True, backend="eager")
    else:
        unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(draw(), expected, atol=1e-5, rtol=1e-5)
    if how == "whole":
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (1 if unet.text_width is None else 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        draw(num_inference_steps=6, generator=torch.Generator().manual_seed(1))


@needs_cuda
@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.parametrize("name", ["emoji_base_64", "600m_res_1024"])
def test_cuda_graphs_draw_the_same(name, how):
    unet = make(name)
    draw = Drawing(unet)
    draw.pipe.to(DEVICE)
    draw.pipe.enable_slicing(1)  # two calls a step
    expected = draw()
    torch._dynamo.reset()
    if how == "whole":
        unet.compile(fullgraph=True, mode="reduce-overhead")
    else:
        unet.compile_repeated_blocks(fullgraph=True, mode="reduce-overhead")
    for _ in range(3):  # warm-up, recording, replay
        torch.testing.assert_close(draw(), expected, atol=2e-2, rtol=1e-2)  # TF32
