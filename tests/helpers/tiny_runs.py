"""Tiny runs that several test modules share, also in processes of their own."""

import json
import math
import multiprocessing
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from groups import environments, exit_codes, make_process
from text_sources import FunctionSource

from diffusers_imagen import EfficientUNetModel, ImagenUNetModel
from diffusers_imagen.training import LoraTrainer, LoraTrainingConfig, Trainer, TrainingConfig
from diffusers_imagen.training.network import make_unet as make_pretrained


TINY = {"block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 8, "norm_num_groups": 4}
TEXT_WIDTH = 4


def encode_numbers(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The caption's number as a position on a circle; a second token is padding."""
    angles = torch.tensor([int(caption.removeprefix("text ")) / 8 * 2 * math.pi for caption in captions])
    token = torch.stack([angles.sin(), angles.cos(), 0 * angles, 1 + 0 * angles], dim=-1)
    mask = torch.tensor([[True, False]]).expand(len(captions), 2)
    return torch.stack([token, 0 * token], dim=1), mask


encode = FunctionSource(encode_numbers, TEXT_WIDTH)


def make_unet(seed: int = 0, text_width: int = TEXT_WIDTH) -> ImagenUNetModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ImagenUNetModel(
            sample_size=16, attention_resolutions=(8,), encoder_hid_dim=text_width, cross_attention_dim=8, **TINY
        )


def make_sr_unet(seed: int = 0, text_width: int = TEXT_WIDTH) -> EfficientUNetModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return EfficientUNetModel(
            sample_size=32,
            attention_types=(None, "cross"),
            encoder_hid_dim=text_width,
            low_res_noise_conditioning=True,
            **TINY,
        )


def settings(folder: str, output_dir: Path | str, **kwargs) -> dict:
    """Of a run of four steps."""
    return {
        "train_data_dir": folder,
        "output_dir": str(output_dir),
        "cache_dir": str(Path(folder).parent / "cache"),
        "preset": "emoji_base_64",
        "resolution": 16,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 3e-3,
        "lr_warmup_steps": 3,
        "checkpointing_steps": 2,
        "logging_steps": 1,
        **kwargs,
    }


def reset_accelerate() -> None:
    """accelerate keeps its state for the whole process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(settings: dict, seed: int = 0, environment: dict[str, str] | None = None) -> torch.nn.Module:
    """A whole run, with a `rank` of an adapter, for a process of its own; leaves its weights in `weights.pt`; returns the network.

    The network is a tiny one, or that of a pretrained stage, which has its text encoder.
    """
    reset_accelerate()
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in os.environ:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate spreads on GPUs only
    trainer_class, config_class = (
        (LoraTrainer, LoraTrainingConfig) if "rank" in settings else (Trainer, TrainingConfig)
    )
    config = config_class(**settings)
    pretrained = config.pretrained_model_name_or_path is not None and config.text_encoder is not None
    unet, text = (make_pretrained(config), None) if pretrained else (make_unet(seed), encode)
    trainer = trainer_class(config, unet, text)
    trainer.train()
    if trainer.accelerator.is_main_process and "ACCELERATE_USE_FSDP" not in os.environ:
        torch.save(unet.state_dict(), Path(config.output_dir) / "weights.pt")
    return unet


def start(settings: dict, seed: int = 0, environment: dict[str, str] | None = None) -> multiprocessing.Process:
    """Starts `run` in a process of its own."""
    process = make_process(run, settings, seed, environment)
    process.start()
    return process


def run_in_processes(settings: dict, count: int, **environment: str) -> None:
    """A run shared by processes, through gloo."""
    processes = [make_process(run, settings, 0, own) for own in environments(count, **environment)]
    assert exit_codes(processes) == [0] * count


def interrupt_at(monkeypatch, step: int):
    """Training stops before this step, as when its process is ended."""
    train_step = Trainer.train_step

    def interrupted(self, this_step):
        if this_step == step:
            raise OSError("gone")
        return train_step(self, this_step)

    monkeypatch.setattr(Trainer, "train_step", interrupted)


def metrics(output_dir: Path | str) -> list[dict]:
    """What the run said of every step."""
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir: Path | str) -> list[float]:
    """Of every step, to the last digit."""
    return [record["loss"] for record in metrics(output_dir)]


def weights_of(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in unet.state_dict().items()}


def are_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def exported(output_dir: Path | str, network_class=ImagenUNetModel) -> dict[str, torch.Tensor]:
    return network_class.from_pretrained(output_dir, subfolder="unet").state_dict()
