"""Where a run takes place: devices, processes, precision, and networks spread over them."""

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
    """Devices, processes and precision, as `accelerate launch` and the configuration say.

    Raises:
        ValueError: For a way of sharing that this loop does not know.
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
            raise ValueError(f"DeepSpeed's `zero_stage` is {plugin.zero_stage}, but should be up to 2; or take FSDP.")
        # there is no DataLoader from which accelerate could tell
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = config.train_batch_size
        plugin.deepspeed_config["gradient_clipping"] = config.max_grad_norm
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return accelerator


def is_spread(accelerator: Accelerator) -> bool:
    """Whether weights or moments are spread over processes, by FSDP or DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def cpu_lacks_bf16() -> bool:
    """Whether bf16 has to be imitated: x86 has it from AVX-512 on."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def gathered(value: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over processes."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this process has of a parameter that may be spread over processes: the same memory."""
    if not isinstance(parameter, DTensor):
        return parameter
    return cast(DTensor, parameter.detach()).to_local().requires_grad_(parameter.requires_grad)


def join(part: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """All of what each process has a part of, spread as a parameter is; all processes call this."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, shape, stride = parameter.device_mesh, parameter.shape, parameter.stride()
    return DTensor.from_local(part, mesh, parameter.placements, shape=shape, stride=stride).full_tensor()


def describe_sharing(accelerator: Accelerator) -> str:
    """How weights and moments are spread over processes, which decides how a checkpoint has them."""
    if is_spread(accelerator):
        return f"{accelerator.distributed_type.value} over {accelerator.num_processes} processes"
    return "whole in each process"


def inner_network(accelerator: Accelerator, module: torch.nn.Module) -> Any:
    """A module without the wrappers of accelerate, those of its compiler too."""
    return accelerator.unwrap_model(getattr(module, "_orig_mod", module))


def whole_network(accelerator: Accelerator, unet: torch.nn.Module) -> StageNetwork:
    """The network without wrappers; where it is spread over processes, the main process gets a gathered copy.

    All processes call this.
    """
    inner = inner_network(accelerator, unet)
    if accelerator.distributed_type != DistributedType.FSDP:
        return inner
    state = accelerator.get_state_dict(unet)  # empty but in the main process
    if not accelerator.is_main_process:
        return inner
    own_class: Any = next(kind for kind in type(inner).__mro__ if not issubclass(kind, FSDPModule))
    whole = own_class.from_config(inner.config)
    whole.load_state_dict(state)
    return whole.to(accelerator.device)
