"""Devices of a run: processes, precision, and networks sharded over processes."""

from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers.utils import logging
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..models.interface import StageNetwork
from .config import TrainingConfig


logger = logging.get_logger(__name__)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Create the accelerator from the configuration and `accelerate launch`.

    Raises:
        ValueError: For a distributed type that this loop does not support.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and cpu_lacks_bf16():
        logger.warning(
            "`mixed_precision` is 'bf16', which this CPU has no instructions for: training will be about ten times "
            "slower than with 'no'."
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP is version 1, but should be 2: see configs/accelerate/fsdp2.yaml.")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        if plugin.zero_stage > 2:
            raise ValueError(f"DeepSpeed's `zero_stage` is {plugin.zero_stage}, but should be at most 2; or use FSDP.")
        # accelerate would read the batch size from a DataLoader, which is not used here
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.train_batch_size
        plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def is_spread(accelerator: Accelerator) -> bool:
    """Return whether weights or moments are sharded over processes, by FSDP or DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def cpu_lacks_bf16() -> bool:
    """Return whether bf16 is emulated: x86 CPUs support it from AVX-512 on."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def gathered(value: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded over processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a parameter that may be sharded over processes, in the same memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    return cast(DTensor, parameter.detach()).to_local().requires_grad_(parameter.requires_grad)


def join(part: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """
    Return the whole of a tensor of which each process has a part, sharded like a parameter; called by all processes.
    """
    if not isinstance(parameter, DTensor):
        return part
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, parameter.placements, shape=shape, stride=stride).full_tensor()


def describe_sharing(accelerator: Accelerator) -> str:
    """Describe how weights and moments are sharded over processes, which determines the content of a checkpoint."""
    if is_spread(accelerator):
        return f"{accelerator.distributed_type.value} over {accelerator.num_processes} processes"
    return "whole in each process"


def inner_network(accelerator: Accelerator, module: torch.nn.Module) -> Any:
    """Return a module without the wrappers of accelerate and torch.compile."""
    return accelerator.unwrap_model(getattr(module, "_orig_mod", module))


def whole_network(accelerator: Accelerator, unet: torch.nn.Module) -> StageNetwork:
    """Return the network without wrappers; if it is sharded over processes, the main process gets a gathered copy.

    Called by all processes.
    """
    inner = inner_network(accelerator, unet)
    if accelerator.distributed_type != DistributedType.FSDP:
        return inner
    state = accelerator.get_state_dict(unet)  # empty except in the main process
    if not accelerator.is_main_process:
        return inner
    own_class: Any = next(kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule))
    whole = own_class.from_config(inner.config)
    whole.load_state_dict(state)
    return whole.to(accelerator.device)
