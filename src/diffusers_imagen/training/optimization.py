"""Optimizer and learning rates, and steps that skip gradients that are not finite."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler

from .config import TrainingConfig
from .devices import gathered


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the trained parameters: all, or those of an adapter."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_optimizer(
    config: TrainingConfig, unet: torch.nn.Module, others: Sequence[torch.nn.Module] = (), num_processes: int = 1
) -> torch.optim.Optimizer:
    """Create AdamW, fused or with 8-bit states; weights of modules other than the network do not decay.

    Raises:
        ValueError: If bitsandbytes is required and not installed.
    """
    rate = config.learning_rate
    if config.scale_lr:
        rate *= config.train_batch_size * config.gradient_accumulation_steps * num_processes
    groups = [{"params": trainable(unet), "weight_decay": config.adam_weight_decay}]
    groups += [{"params": list(module.parameters()), "weight_decay": 0.0} for module in others]
    kwargs: dict[str, Any] = {"lr": rate, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if not config.use_8bit_adam:
        return torch.optim.AdamW(groups, fused=True, **kwargs)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("`use_8bit_adam` needs bitsandbytes: pip install bitsandbytes.") from error
    return bitsandbytes.optim.AdamW8bit(groups, **kwargs)


def learning_rates(
    config: TrainingConfig, optimizer: torch.optim.Optimizer, step: int = 0
) -> torch.optim.lr_scheduler.LRScheduler:
    """Create the learning rate schedule starting at a step: a function of the step, without a state to save.

    Call it after the optimizer's state is loaded: rates, betas and decay are those of the run's configuration, not
    those of the checkpoint.
    """
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
    )
    schedule.last_epoch = step
    for group, rate in zip(optimizer.param_groups, schedule.get_lr()):
        group["lr"] = rate
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]
    return schedule


def clip_gradients(
    accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter], max_norm: float
) -> torch.Tensor:
    """Clip gradients to a norm, 0 for none; return their norm before clipping, the same in all processes."""
    norm = accelerator.clip_grad_norm_(parameters, max_norm or math.inf)
    return torch.as_tensor(1.0 if norm is None else gathered(norm), dtype=torch.float32, device=accelerator.device)


def step_if_finite(optimizer: AcceleratedOptimizer, grad_norm: torch.Tensor) -> None:
    """Perform an optimizer step that does not change weights and state if the gradient is not finite.

    The fused AdamW decides this on the device, by the flag that GradScaler sets in fp16, without synchronization. For
    other optimizers the host decides.
    """
    inner = optimizer.optimizer
    if not getattr(inner, "_step_supports_amp_scaling", False):
        if torch.isfinite(grad_norm).item():
            optimizer.step()
        return
    inner.found_inf = (~torch.isfinite(grad_norm)).to(torch.float32)
    optimizer.step()
    if hasattr(inner, "found_inf"):  # a GradScaler removes its own
        del inner.found_inf
