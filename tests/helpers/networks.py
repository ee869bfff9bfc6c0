"""Small networks with every option, and inputs for them."""

import math

import torch
from diffusers import AutoModel

from diffusers_imagen import (
    EDMHeunScheduler,
    EfficientUNetModel,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
    ImagenUNetModel,
)


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
    "unet-class-token": (
        ImagenUNetModel,
        {
            **UNET,
            "act_fn": "gelu",
            "resample_type": "resnet_nearest",
            "resnet_out_scale_factor": 1.25,
            "shared_attention_norm": True,
            "sinusoidal_dim": 8,
            "text_pooling": "class_token",
            "text_pooling_num_heads": 3,
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


def save_index(folder, **parts) -> None:
    """Makes a folder of `unet/` and `scheduler/` one of a single-stage pipeline, which has other parts too."""
    unet = AutoModel.from_pretrained(str(folder), subfolder="unet")
    scheduler = EDMHeunScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline_class = ImagenSuperResolutionPipeline if unet.takes_low_res else ImagenPipeline
    pipeline_class(unet, scheduler, **parts).save_config(folder)
