"""Systems that the benchmark compares, as networks with two methods: a prediction with guidance, and a training step.

benchmark_unet.py describes the systems, and creates their networks.
"""

from functools import cached_property
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from diffusers_imagen.models.blocks import ResBlock
from diffusers_imagen.models.unet_base import ConditionalUNet


GUIDANCE = 4.0
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
Inputs = dict[str, torch.Tensor]


# ---- inputs


def make_inputs(unet: ConditionalUNet, batch_size: int, tokens: int) -> Inputs:
    """Return random inputs for a batch of prompts, of which the even ones use half of their tokens."""
    generator = torch.Generator().manual_seed(0)
    config, side = unet.config, unet.config.sample_size
    shape = (batch_size, config.in_channels, side, side)
    inputs = {
        "sample": torch.randn(shape, generator=generator, device="cpu"),
        "timestep": torch.full((batch_size,), -0.5, device="cpu"),
    }
    if config.encoder_hid_dim is not None:
        lengths = torch.full((batch_size, 1), tokens, device="cpu")
        lengths[::2] = tokens // 2
        mask = torch.arange(tokens, device="cpu") < lengths
        text = torch.randn(batch_size, tokens, config.encoder_hid_dim, generator=generator, device="cpu")
        inputs |= {"encoder_hidden_states": text * mask[..., None], "encoder_attention_mask": mask}
    if config.low_res_conditioning:
        inputs["low_res_sample"] = torch.randn(shape, generator=generator, device="cpu")
    if config.low_res_noise_conditioning:
        inputs["low_res_timestep"] = torch.full((batch_size,), -1.0, device="cpu")
    return inputs


def placed(inputs: Inputs, device: torch.device | str, dtype: torch.dtype) -> Inputs:
    """Return inputs on a device; images and text in a dtype, times and masks in their own."""
    return {
        name: value.to(device, dtype) if name.endswith(("sample", "states")) else value.to(device)
        for name, value in inputs.items()
    }


def doubled(inputs: Inputs) -> Inputs:
    return {name: torch.cat([value, value]) for name, value in inputs.items()}


# ---- contenders


class Contender:
    """Network with methods `predict`, with guidance, and `train`, which computes the gradients of one batch."""

    def __init__(self, unet: nn.Module, inputs: Inputs):
        self.unet, self.inputs = unet, inputs

    def predict(self) -> torch.Tensor:
        if "encoder_hidden_states" not in self.inputs:
            return self.call(self.inputs)
        unconditional, conditional = self.call(self.both).chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    @cached_property
    def both(self) -> Inputs:
        """Inputs of the prediction without text, of zeros that all count, followed by those of the one with text."""
        both = doubled(self.inputs)
        text = self.inputs["encoder_hidden_states"]
        both["encoder_hidden_states"] = torch.cat([torch.zeros_like(text), text])
        return both

    def call(self, inputs: Inputs) -> torch.Tensor:
        return self.unet(**inputs, return_dict=False)[0]

    def train(self) -> torch.Tensor:
        self.unet.zero_grad(set_to_none=True)
        output = self.call(self.inputs)
        output.float().square().mean().backward()
        return output


class TextEveryCall(Contender):
    """Our network, called with text embeddings."""

    def __init__(self, unet: ConditionalUNet, inputs: Inputs, memory_format: str = "channels_last"):
        chosen = MEMORY_FORMATS[memory_format]
        unet.to(memory_format=chosen)
        super().__init__(unet, {**inputs, "sample": inputs["sample"].contiguous(memory_format=chosen)})


class Ours(TextEveryCall):
    """Our network, called with the result of `encode_text` in predictions."""

    def __init__(self, unet: ConditionalUNet, inputs: Inputs, memory_format: str = "channels_last"):
        super().__init__(unet, inputs, memory_format)
        self.encoder = unet

    @cached_property
    def both(self) -> Inputs:
        both = super().both
        with torch.no_grad():
            text = self.encoder.encode_text(
                both.pop("encoder_hidden_states"), both.pop("encoder_attention_mask", None)
            )
        return {**both, "encoder_hidden_states": text}


class Plain(Contender):
    """The same layers as our network, run as in the formulas."""

    def __init__(self, unet: ConditionalUNet, inputs: Inputs):
        unet.set_attn_processor(EinsumAttnProcessor())
        for module in unet.modules():
            if isinstance(module, ResBlock):
                module.forward = MethodType(plain_resblock, module)
            elif isinstance(module, nn.GroupNorm):
                module.forward = MethodType(nn.GroupNorm.forward, module)
        super().__init__(unet, inputs)

    def predict(self) -> torch.Tensor:
        conditional = self.call(self.inputs)
        if "encoder_hidden_states" not in self.inputs:
            return conditional
        unprompted = {**self.inputs, "encoder_hidden_states": torch.zeros_like(self.inputs["encoder_hidden_states"])}
        unconditional = self.call(unprompted)
        return unconditional + GUIDANCE * (conditional - unconditional)


class Diffusers(Contender):
    """A UNet2DConditionModel, which gets the low-resolution image in further channels, and no level of its noise."""

    def __init__(self, unet: UNet2DConditionModel, inputs: Inputs):
        names = ("timestep", "encoder_hidden_states", "encoder_attention_mask")
        given = {name: inputs[name] for name in names if name in inputs}
        given["sample"] = image_of(inputs)
        super().__init__(unet, given)

    def call(self, inputs: Inputs) -> torch.Tensor:
        text = inputs.get("encoder_hidden_states")
        return self.unet(**{**inputs, "encoder_hidden_states": text}, return_dict=False)[0]


class DeepFloyd(Diffusers):
    """DeepFloyd IF's network in diffusers, called without a mask, as its pipeline does."""

    def __init__(self, unet: UNet2DConditionModel, inputs: Inputs):
        super().__init__(unet, {name: value for name, value in inputs.items() if name != "encoder_attention_mask"})


class ImagenPytorch(Contender):
    """The `Unet` of imagen-pytorch."""

    def call(self, inputs: Inputs) -> torch.Tensor:
        time = inputs["timestep"].to(inputs["sample"].dtype)
        given = {
            "text_embeds": inputs.get("encoder_hidden_states"),
            "text_mask": inputs.get("encoder_attention_mask"),
            "lowres_cond_img": inputs.get("low_res_sample"),
            "lowres_noise_times": time if "low_res_sample" in inputs else None,
        }
        return self.unet(inputs["sample"], time, **given)


def image_of(inputs: Inputs) -> torch.Tensor:
    images = [inputs[name] for name in ("sample", "low_res_sample") if name in inputs]
    return torch.cat(images, dim=1) if len(images) > 1 else images[0]


# ---- the plain implementation


class EinsumAttnProcessor:
    """Attention as in the formula."""

    def __call__(self, attn, hidden_states, text=None):
        query, key, value, mask = attn.project(hidden_states, text)
        scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return attn.merge(torch.einsum("bhnm,bmhd->bnhd", scores.softmax(dim=-1), value), hidden_states)


def plain_resblock(self, x: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
    """Compute a residual block as in the formula."""
    act = F.gelu if self.act_fn == "gelu" else F.silu
    h = act(self.norm1(x))
    if self.resample_branch is not None:
        h, x = self.resample_branch(h), self.resample_shortcut(x)
    h = self.conv1(h)
    temb = self.time_emb_proj(temb)[:, :, None, None]
    if self.scale_shift:
        scale, shift = temb.chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
    else:
        h = self.norm2(h + temb)
    h = self.conv2(self.dropout(act(h)))
    if self.conv_shortcut is not None:
        x = self.conv_shortcut(x)
    h = h + x * self.shortcut_scale if self.shortcut_scale != 1.0 else h + x
    return h / self.out_scale_factor if self.out_scale_factor != 1.0 else h
