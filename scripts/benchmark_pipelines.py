"""Stages and cascades that the benchmark samples: whole calls of pipelines, from text embeddings to an image."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmark_contenders import GUIDANCE
from benchmark_measures import Case, Group
from benchmark_unet import DEEPFLOYD, Networks, compile_network, create_deepfloyd, twin
from diffusers import DDPMScheduler, IFPipeline

from diffusers_imagen import (
    EDMHeunScheduler,
    ImagenCascadePipeline,
    ImagenPipeline,
    ImagenSuperResolutionPipeline,
)


# Cascades whose networks are presets
CASCADES = {
    "500M, 600M": ("500m_res_64", "600m_res_256"),
    "500M, 600M, 600M": ("500m_res_64", "600m_res_256", "600m_res_1024"),
    "emoji": ("emoji_base_64", "emoji_sr_256"),
}


class Sampler:
    """Pipelines of one preset or cascade, of random weights, called with random text embeddings."""

    def __init__(self, presets: tuple[str, ...], settings: Any, batch_size: int):
        self.settings, self.batch_size = settings, batch_size
        self.stages = [Networks(preset, settings, batch_size) for preset in presets]

    def cases(self) -> list[Case]:
        """Return our pipeline, the compiled one, and diffusers' IFPipeline for a network of DeepFloyd IF."""
        chosen, cases = self.settings.systems, []
        networks, steps = self.stages[0], self.settings.steps[0]
        note = f"{' + '.join(str(self.steps(i)) for i in range(len(self.stages)))} steps"
        if "ours" in chosen:
            cases.append(Case("ours", partial(self.ours, None), self.flops(), note))
        if "compiled" in chosen:
            cases += [
                Case(f"ours, {how} compiled", partial(self.ours, how), self.flops(), note)
                for how in self.settings.compile
            ]
        if "deepfloyd" in chosen and networks.preset in DEEPFLOYD:
            cases.append(Case("deepfloyd", self.deepfloyd, self.flops(), f"IFPipeline, {2 * steps - 1} steps of DDPM"))
        return cases

    def steps(self, index: int) -> int:
        """Return the steps of a stage: the first of `--steps` is for bases, the second for super-resolution."""
        return self.settings.steps[self.stages[index].meta().config.low_res_conditioning]

    def flops(self) -> int:
        """Return the FLOPs of all predictions; Heun's method makes two in each step but the last."""
        return sum((2 * self.steps(i) - 1) * stage.count("predict") for i, stage in enumerate(self.stages))

    def text(self) -> dict[str, torch.Tensor]:
        for stage in self.stages:
            if "encoder_hidden_states" in stage.inputs:
                text, mask = stage.inputs["encoder_hidden_states"], stage.inputs["encoder_attention_mask"]
                given = {"prompt_embeds": text, "prompt_attention_mask": mask}
                if stage.meta().attends_padding:  # has no unconditional embeddings of its own
                    given |= {"negative_prompt_embeds": torch.zeros_like(text), "negative_prompt_attention_mask": mask}
                return given
        return {}

    def network(self, stage: Networks, compiled: str | None) -> torch.nn.Module:
        unet = twin(stage.unet).to(memory_format=torch.channels_last).eval()
        return unet if compiled is None else compile_network(unet, compiled)

    def ours(self, compiled: str | None) -> Callable[[], Any]:
        """Build our pipeline; its schedulers are those of the second order that cascades have by default."""
        unets = [self.network(stage, compiled) for stage in self.stages]
        first = self.stages[0].meta().config
        options: dict[str, Any] = {**self.text(), "output_type": "pt"}
        if len(unets) > 1:
            pipe = ImagenCascadePipeline.from_stages(*((unet, scheduler_of(unet)) for unet in unets))
        elif first.low_res_conditioning:
            pipe = ImagenSuperResolutionPipeline(unets[0], scheduler_of(unets[0]))
            options["image"] = self.low_res(pipe.low_resolution)
        else:
            pipe = ImagenPipeline(unets[0], scheduler_of(unets[0]))
        steps = {stage.name: self.steps(i) for i, stage in enumerate(pipe.stages)}
        scales = {stage.name: GUIDANCE if stage.reads_text else 1.0 for stage in pipe.stages}
        for name, values in (("num_inference_steps", steps), ("guidance_scale", scales)):
            options[name] = values if len(unets) > 1 else next(iter(values.values()))
        return self.quiet(pipe, options)

    def low_res(self, side: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.rand(self.batch_size, 3, side, side, generator=generator).to(self.settings.device)

    def deepfloyd(self) -> Callable[[], Any]:
        """Build IFPipeline without its text encoder, with as many predictions as ours makes."""
        stage = self.stages[0]
        pipe = IFPipeline(
            None,
            None,
            stage.place(create_deepfloyd(stage.preset, self.settings.overrides)).eval(),
            DDPMScheduler(variance_type="learned_range"),
            None,
            None,
            None,
            requires_safety_checker=False,
        )
        text = stage.inputs["encoder_hidden_states"]
        options = {
            "prompt_embeds": text,
            "negative_prompt_embeds": torch.zeros_like(text),
            "num_inference_steps": 2 * self.steps(0) - 1,
            "guidance_scale": GUIDANCE,
            "output_type": "pt",
        }
        return self.quiet(pipe, options)

    def quiet(self, pipe: Any, options: dict[str, Any]) -> Callable[[], Any]:
        pipe.set_progress_bar_config(disable=True)

        def call() -> Any:
            return pipe(**options, generator=torch.Generator().manual_seed(0))

        return call


def scheduler_of(unet: Any) -> EDMHeunScheduler:
    """Return the scheduler of a network; those of DeepFloyd IF predict noise at discrete levels, and a variance."""
    return EDMHeunScheduler(preconditioning="discrete" if unet.out_channels == 2 * unet.in_channels else "edm")


def sampling_group(what: str, name: str, presets: tuple[str, ...], settings: Any, batch_size: int) -> Group:
    """Return the group of a stage or a cascade."""
    sampler = Sampler(presets, settings, batch_size)
    weights = sum(size_of(stage) for stage in sampler.stages)

    def cases() -> list[Case]:  # the networks live as long as the cases
        return Sampler(presets, settings, batch_size).cases()

    return Group(what, name, batch_size, cases, sampler.flops(), weights)


def size_of(networks: Networks) -> int:
    """Return the bytes of our network's weights."""
    return networks.settings.dtype.itemsize * sum(parameter.numel() for parameter in networks.meta().parameters())
