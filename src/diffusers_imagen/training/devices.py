"""Where a run takes place: devices, processes, precision, and networks spread over them."""

from pathlib import Path

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration

from ..models.unet_base import ConditionalUNet
from .config import TrainingConfig


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
    shares = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if shares and config.uncertainty_weighting:
        raise ValueError(
            f"`uncertainty_weighting` is True, but {accelerator.distributed_type.value} trains one module only."
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


def whole_network(accelerator: Accelerator, unet: torch.nn.Module) -> ConditionalUNet:
    """The network as one process has it: where it is spread over processes, which all call this, a gathered copy."""
    inner = accelerator.unwrap_model(unet)
    if accelerator.distributed_type != DistributedType.FSDP:
        return inner
    state = accelerator.get_state_dict(unet)  # empty but in the main process
    whole = getattr(diffusers, inner.config["_class_name"]).from_config(inner.config)
    if accelerator.is_main_process:
        whole.load_state_dict(state)
    return whole
