"""The optimizer, and what keeps it from a step that is not finite."""

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
    """The parameters that are trained: all, or those of an adapter."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def make_optimizer(
    config: TrainingConfig, unet: torch.nn.Module, others: Sequence[torch.nn.Module] = (), num_processes: int = 1
) -> torch.optim.Optimizer:
    """AdamW, in its fused form or with a state of 8 bits; the weights of modules beside the network do not decay.

    Raises:
        ValueError: If bitsandbytes is asked for and not installed.
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
    """The schedule of learning rates from a step on: a function of the step, without a state to be saved.

    To be made after the optimizer's state is loaded: rates, betas and decay are those that the run is told, not
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
    """Clips gradients to a norm, 0 for none; returns their norm before, the same in all processes."""
    norm = accelerator.clip_grad_norm_(parameters, max_norm or math.inf)
    return torch.as_tensor(1.0 if norm is None else gathered(norm), dtype=torch.float32, device=accelerator.device)


def step_if_finite(optimizer: AcceleratedOptimizer, grad_norm: torch.Tensor) -> None:
    """An optimizer step that leaves weights and state as they are where the gradient is not finite.

    The fused AdamW decides that on the device, by the flag that GradScaler gives it in fp16: nothing waits for the
    gradient. Other optimizers have to be told by the host.
    """
    inner = optimizer.optimizer
    if not getattr(inner, "_step_supports_amp_scaling", False):
        if torch.isfinite(grad_norm).item():
            optimizer.step()
        return
    inner.found_inf = (~torch.isfinite(grad_norm)).to(torch.float32)
    optimizer.step()
    if hasattr(inner, "found_inf"):  # a GradScaler takes its own away
        del inner.found_inf
